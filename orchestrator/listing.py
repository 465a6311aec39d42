"""What there is: plug-ins by kind, and the results of a finished run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesaic.kernels.discovery import plugins
from moesaic.methods.base import Spec, chain_text
from moesaic.orchestrator.errors import UserError


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").strip().split("\n")[0]


def _described(package: str, marker: str) -> dict[str, str]:
    return {name: _first_line(module) for name, module in plugins(package, marker).items()}


def _methods() -> dict[str, str]:
    found = {}
    for name, module in plugins("moesaic.methods", "compress").items():
        options = ", ".join(
            f"{key}={field.default}" for key, field in module.Options.model_fields.items()
        )
        found[name] = f"{_first_line(module)} ({options})"
    return found


def _families() -> dict[str, str]:
    from moesaic.orchestrator.family import families, load_family

    return {
        name: "Mixture-of-Experts" if load_family(name).experts is not None else "dense"
        for name in families()
    }


_KINDS: Mapping[str, Callable[[], dict[str, str]]] = {
    "methods": _methods,
    "formats": lambda: _described("moesaic.kernels", "pack"),
    "searches": lambda: _described("moesaic.search", "search"),
    "families": _families,
}


def listing(kind: str) -> dict[str, str]:
    """Name → one line about it.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in _KINDS:
        raise UserError(f"list: no {kind!r}; there are {', '.join(_KINDS)}")
    return _KINDS[kind]()


def read_run(folder: Path) -> dict[str, Any]:
    """``scores``, ``plan`` and how often each choice was taken (``choices``).

    Raises:
        UserError: the folder holds no finished run.
    """
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder}: no finished run: {Path(error.filename).name} is missing"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder}: plan.json or scores.json is damaged: {error}") from None
    choices: dict[str, int] = {}
    for specs in plan["units"].values():
        chain = tuple(Spec.of(spec["method"], spec["options"]) for spec in specs)
        choices[chain_text(chain)] = choices.get(chain_text(chain), 0) + 1
    ordered = dict(sorted(choices.items(), key=lambda item: -item[1]))
    return {"scores": scores, "plan": plan, "choices": ordered}
