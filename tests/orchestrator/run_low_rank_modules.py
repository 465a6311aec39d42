"""Runs models whose linears are of low rank and prints what their modules gave, as JSON.

A program of its own because Triton reads TRITON_INTERPRET once, when it is imported:

    TRITON_INTERPRET=1 python tests/orchestrator/run_low_rank_modules.py FOLDER …
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.orchestrator import low_rank_attention, low_rank_mlp
from moesaic.orchestrator.low_rank_mlp import LowRankAfter
from moesaic.orchestrator.low_rank_modules import KINDS

IDS = torch.arange(3, 25).view(2, 11)
LAUNCHED: list[str] = []  # names of kernels


def load(folder: str, dtype: torch.dtype | str) -> Any:
    if is_encoder(folder):
        return AutoModel.from_pretrained(folder, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def is_encoder(folder: str) -> bool:
    return bool(AutoConfig.from_pretrained(folder).model_type == "bert")


@torch.no_grad()
def cases(folder: str) -> Iterator[dict[str, object]]:
    """Every module that a kernel may compute, on what it is given, and its own class in float64."""
    model, exact = load(folder, "auto"), load(folder, torch.float64)
    found: list[dict[str, Any]] = []

    def watch(name: str, module: torch.nn.Module) -> None:
        def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            found.append(
                {"name": name, "args": args, "kwargs": kwargs, "y": y, "launches": list(LAUNCHED)}
            )

        module.register_forward_pre_hook(lambda *_: LAUNCHED.clear())
        module.register_forward_hook(after, with_kwargs=True)

    fronts = tuple(kind.front for kind in KINDS)
    for name, module in model.named_modules():
        if isinstance(module, LowRankAfter):  # its module: a linear with hooks is left alone
            watch(name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0]))
        elif isinstance(module, fronts) and not getattr(module, "low_rank_after", ()):
            watch(name, module)
    for use_cache in (False,) if is_encoder(folder) else (False, True):
        options = {} if is_encoder(folder) else {"use_cache": use_cache}
        assert model(IDS, **options)[0].isfinite().all()
        for call in found:
            y = first(call["y"])
            module = exact.get_submodule(call["name"])
            expected = first(module(*map(widened, call["args"]), **widened(call["kwargs"])))
            yield {
                "module": call["name"],
                "cache": use_cache,
                "launches": call["launches"],
                "dtype": str(y.dtype).removeprefix("torch."),
                "error": float((y.double() - expected).abs().max() / expected.abs().max()),
            }
        found.clear()


def first(value: Any) -> torch.Tensor:
    """What a module computes, of all that it returns."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def widened(value: Any) -> Any:
    """The same in float64, without a cache."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if isinstance(value, dict):
        return {name: widened(each) for name, each in value.items() if name != "cache"}
    return value


def counted(kernel: Any, name: str) -> None:
    """Writes down every launch of a kernel."""
    launch = kernel.launch

    def noted(*arguments: Any) -> None:
        LAUNCHED.append(name)
        launch(*arguments)

    kernel.launch = noted


if __name__ == "__main__":
    counted(attention, "attention")
    counted(mlp, "mlp")
    # The interpreter's device is the CPU.
    for kind in (low_rank_mlp, low_rank_attention):
        kind.kernels_take = lambda x: x.dtype in (torch.float16, torch.bfloat16)
    print(json.dumps([case for folder in sys.argv[1:] for case in cases(folder)]))
