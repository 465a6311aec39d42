"""How long a plan takes: its packed weights, as a checkpoint for ``serve: moesaic`` would run them.

Blocks are built one after another as our plug-in builds them, compressed modules in the place of
dense ones, so a model need not fit into memory for this. Each is run on single tokens, as in the
generation of text, but without earlier ones to attend to; the head comes last. What is told is

    Σ over blocks and head of the median over repeats of the mean over tokens,

in milliseconds per token, after a run that does not count. On a GPU, in 16 bits, kernels multiply
with packed weights. On a CPU, and in float32, weights are unpacked anew for every call: there it is
mostly the time of unpacking, which says little of any other engine.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import CONSTANTS, EXPERT_MAP, ROUTER
from moesaic.orchestrator.compressed_modules import CompressedExperts, CompressedLinear, Packed
from moesaic.orchestrator.evaluate import Judge
from moesaic.orchestrator.low_rank_modules import fuse
from moesaic.orchestrator.mixtures import Mixtures, members_of
from moesaic.orchestrator.pieces import describe
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import block_units, read_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Different tokens, which go to different experts, and how often each step is timed.
_TOKENS, _REPEATS = 8, 7


@torch.no_grad()
def measure_plan(
    state: WorkerState,
    judge: dict[str, Any],
    pieces: Mapping[str, str],
    mixtures: Mixtures | None = None,
) -> dict[str, Any]:
    """Times the model made of ``pieces`` (unit → file) on tokens of the judge's text.

    Args:
        mixtures: what ``pieces`` name that is no file.

    Returns:
        ``milliseconds``: per token; ``peak_bytes``.
    """
    plan = Judge(**judge)
    model: StreamedModel = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    ids = read_ids(plan.ids, 0, _TOKENS)
    middle = ids.shape[1] // 2  # what texts begin with is often the same
    hidden = [model.embed(row[None, middle : middle + 1]) for row in ids]  # [1, 1, H] each
    seconds = 0.0
    for index in range(model.blocks):
        block = compressed_block(model, index, pieces, mixtures or {})

        def run(x: Tensor, index: int = index, block: nn.Module = block) -> Tensor:
            return model.run_block(index, block, x)

        after = [run(x) for x in hidden]
        seconds += _median_seconds(run, hidden, model.device)
        hidden = after
    for x in hidden:
        model.outputs(x)
    seconds += _median_seconds(model.outputs, hidden, model.device)
    return {"milliseconds": 1000 * seconds, "peak_bytes": peak_memory_bytes()}


def _median_seconds(
    run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], device: torch.device | str
) -> float:
    """Seconds for one input: mean over all of them, median over repeats."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for x in inputs:
            run(x)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / len(inputs))
    return statistics.median(times)


def compressed_block(
    model: StreamedModel, index: int, pieces: Mapping[str, str], mixtures: Mixtures
) -> nn.Module:
    """A block whose units compute with the packed weights of their pieces; the others are dense."""
    own = [unit for unit in block_units(model, index) if unit.name in pieces]
    compressed = {unit.name: members_of(pieces[unit.name], mixtures) for unit in own}
    replaced = {
        unit: {name: member.effective() for name, member in members.items()}
        for unit, members in compressed.items()
    }
    block = model.build_block(index, replaced)
    for unit in own:
        path, members = model.unit_module(unit), compressed[unit.name]
        block.set_submodule(path, _compressed(block.get_submodule(path), unit, members))
    block.to(model.device)
    if not model.family.is_encoder:
        fuse(nn.ModuleDict({str(index): block}), model.family)
    return block.requires_grad_(False)


def _compressed(dense: nn.Module, unit: Unit, members: Mapping[str, CompressedTensor]) -> nn.Module:
    described = {
        name: describe(member.format, member.shape, member.dtype, member.params)
        for name, member in members.items()
        if name in unit.shapes
    }
    with torch.device("meta"):
        module: nn.Module
        if unit.kind == "linear":
            assert isinstance(dense, nn.Linear)
            module = CompressedLinear(described["weight"], dense)
            packed: dict[str, Packed] = {"weight": module}
        else:
            reduced = None
            if f"{ROUTER}weight" in members:
                rows = members[f"{ROUTER}weight"].shape[0]
                constants = members[CONSTANTS].shape[0] if CONSTANTS in members else 0
                mapped = EXPERT_MAP in members
                reduced = {"rows": rows, "mapped": mapped, "constants": constants}
            module = CompressedExperts(described, dense, reduced)
            packed = {name: getattr(module, name) for name in unit.shapes}
    for name in {EXPERT_MAP, CONSTANTS} & members.keys():
        module._buffers[name] = members[name].dense()
    for name, place in packed.items():
        for part in place.part_names:
            # What the file maps is read now, not while the block runs.
            place._buffers[part] = members[name].parts[part].clone()
    return module
