"""Runs models whose feed-forward layers are of low rank and prints what came out, as JSON.

A program of its own because Triton reads TRITON_INTERPRET once, when it is imported:

    TRITON_INTERPRET=1 python tests/orchestrator/run_low_rank_modules.py FOLDER …
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.orchestrator import low_rank_modules
from moesaic.orchestrator.low_rank_modules import LowRankFeedForward

IDS = torch.arange(3, 25).view(2, 11)


def load(folder: str, dtype: torch.dtype | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


@torch.no_grad()
def cases(folder: str) -> Iterator[dict[str, object]]:
    """Every fused layer on the inputs that it gets, against its own class in float64."""
    model, exact = load(folder, "auto"), load(folder, torch.float64)
    launches: list[str] = []
    launch = mlp.launch

    def counted(x: torch.Tensor, layer: mlp.Layer, out: torch.Tensor) -> None:
        launches.append(layer.activation)
        launch(x, layer, out)

    mlp.launch = counted
    found: list[tuple[str, torch.Tensor, torch.Tensor, list[str]]] = []

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: launches.clear())
        module.register_forward_hook(
            lambda _, given, y: found.append((name, given[0], y, list(launches)))
        )

    for name, module in model.named_modules():
        if isinstance(module, LowRankFeedForward):
            watch(name, module)
    logits = model(IDS).logits
    for name, x, y, kernels in found:
        expected = exact.get_submodule(name)(x.double())
        yield {
            "module": name,
            "dtype": str(x.dtype).removeprefix("torch."),
            "launches": kernels,
            "error": float((y.double() - expected).abs().max() / expected.abs().max()),
            "finite": bool(logits.isfinite().all()),
        }
    mlp.launch = launch


if __name__ == "__main__":
    # The interpreter's device is the CPU.
    low_rank_modules.kernels_take = lambda x: x.dtype in (torch.float16, torch.bfloat16)
    print(json.dumps([case for folder in sys.argv[1:] for case in cases(folder)]))
