"""What there is: plug-ins by kind, and the results of a finished run."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesaic.kernels.discovery import UnknownName, plugins
from moesaic.methods.base import Spec, chain_text
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import read_json, shown
from moesaic.orchestrator.yardsticks import yardstick_of
from moesaic.search.knobs import SIZES

# What every score of a finished run has, whatever it was judged by.
_SIZES = ("bytes", "bits_per_weight")


def _first_sentence(module: Any) -> str:
    paragraph = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    # Not behind an abbreviation, nor within brackets.
    for place in re.finditer(r"\.(?= |$)", paragraph):
        before = paragraph[: place.start()]
        if before.count("(") == before.count(")") and not before.endswith(("al", "e.g", "i.e")):
            return before
    return paragraph


def _described(package: str, marker: str) -> dict[str, str]:
    return {name: _first_sentence(module) for name, module in plugins(package, (marker,)).items()}


def _methods() -> dict[str, str]:
    found = {}
    kinds = ("compress", "reduce", "repair", "principal_axes")
    for name, module in plugins("moesaic.methods", kinds).items():
        fields = module.Options.model_fields.items()
        options = ", ".join(f"{key}={_values(key, field)}" for key, field in fields)
        found[name] = f"{_first_sentence(module)} ({options})"
    return found


def _values(name: str, field: Any) -> str:
    """The default of an option, then what else is suggested to a study (:mod:`.widening`)."""
    others = [] if name in SIZES else field.json_schema_extra["candidates"]
    return "|".join(map(str, dict.fromkeys([field.default, *others])))


def _searches() -> dict[str, str]:
    """Allocators, for the key ``search``, then refiners, for ``refine.method``."""
    refiners = _described("moesaic.search", "refine")
    return {
        **_described("moesaic.search", "search"),
        **{name: f"refines a plan (refine.method): {text}" for name, text in refiners.items()},
    }


def _families() -> dict[str, str]:
    from moesaic.orchestrator.family import families, load_family

    found = {name: load_family(name) for name in families()}
    return {
        name: "Mixture-of-Experts"
        if family.experts
        else "encoder"
        if family.is_encoder
        else "dense"
        for name, family in found.items()
    }


_KINDS: Mapping[str, Callable[[], dict[str, str]]] = {
    "methods": _methods,
    "formats": lambda: _described("moesaic.kernels", "pack"),
    "searches": _searches,
    "scores": lambda: _described("moesaic.search.scores", "score"),
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

    Of a run with several budgets ``plans`` and ``choices`` are by budget.

    Raises:
        UserError: the folder holds no finished run.
    """
    single = os.path.exists(folder / "plan.json")  # False of a path that is too long, too
    scores = None if single or not os.path.isdir(folder) else _read(folder / "scores.json")
    if isinstance(scores, dict):
        plans = {
            name: _read(folder / name / "plan.json")
            for name in scores
            if os.path.exists(folder / name / "plan.json")
        }
        if plans:
            _check_scores(scores, folder / "scores.json")
            choices = {
                name: _choices(plan, folder / name / "plan.json") for name, plan in plans.items()
            }
            return {"scores": scores, "plans": plans, "choices": choices}
    plan, scores = (_read(folder / name) for name in ("plan.json", "scores.json"))
    _check_scores(scores, folder / "scores.json")
    return {"scores": scores, "plan": plan, "choices": _choices(plan, folder / "plan.json")}


def _choices(plan: Any, file: Path) -> dict[str, int]:
    """Chain → how many units take it, the most frequent first."""
    found: dict[str, int] = {}
    try:
        for specs in plan["units"].values():
            chain = tuple(Spec.of(spec["method"], spec["options"]) for spec in specs)
            found[chain_text(chain)] = found.get(chain_text(chain), 0) + 1
    except (UnknownName, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _check_scores(scores: Any, file: Path) -> None:
    try:
        for score in scores.values():
            figures = yardstick_of(score).everything
            nullable = {figure.key for figure in figures if figure.nullable}
            for name in (*_SIZES, *(figure.key for figure in figures)):
                figure = score[name]
                if figure is None and name in nullable:
                    continue
                if not isinstance(figure, int | float):
                    raise TypeError(f"{name} is {figure!r:.60}")
    except (LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None


def _read(file: Path) -> Any:
    try:
        return read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file.parent}: no finished run: {file.name} is missing") from None
    except OSError as error:
        raise UserError(f"{str(file)[:300]}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    reason = shown(" ".join(f"{type(error).__name__}: {error}".split()))
    return UserError(f"{file}: is damaged ({reason}): run the recipe again to have it written anew")
