"""Calibration: the dense model walks its blocks once, and statistics of every site are summed.

The sequences are cut into *shards*, fixed by the recipe. A range of shards belongs to a worker,
which takes it from block to block: hidden states in, statistics and hidden states out, both as
files, so that any other worker can go on from there. Statistics of shards are summed along a fixed
binary tree over the shards. A worker sums the whole subtrees that its range covers and the rest is
summed when all ranges have passed the block: the order of additions, and so every bit of the
result, is the same for any number of workers.

For the reverse pass (:mod:`moesaic.orchestrator.gradients`) the hidden states of a few sequences of
every shard are kept at every boundary between blocks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.methods.base import Stats
from moesaic.orchestrator.block_sizes import BlockSizes
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.expert_statistics import (
    ExpertStatistics,
    Tokens,
    expert_site,
    sampled_tokens,
)
from moesaic.orchestrator.experts import observing
from moesaic.orchestrator.parted import PartedBlock, parted_nodes
from moesaic.orchestrator.passes import Passes, bank_of, experts_at_a_time, planned_passes
from moesaic.orchestrator.pieces import dense_members
from moesaic.orchestrator.readahead import own_share, read_ahead, read_files_ahead
from moesaic.orchestrator.shared import exists, fetched, remove
from moesaic.orchestrator.source_statistics import SourceObserver, batches, in_order
from moesaic.orchestrator.statistics import (
    BLOCK,
    InfluenceObserver,
    Node,
    SiteStats,
    StatisticsObserver,
    covered,
    held_by_walker,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.sums import leave_sums, sum_nodes, sums_left
from moesaic.orchestrator.walk import (
    Walk,
    block_units,
    boundary_path,
    hidden_path,
    load_tensor,
    opened,
    save_tensor,
    token_ids,
)
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# A range of shards may be this many blocks ahead of the slowest: bounds unfinished sums on disk,
# and hidden states in memory.
LEAD = 2


def _batches(walk: Walk, shard: int, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Source, places and hidden states of sequences that run together; the source is 0 where
    sources do not matter."""
    if walk.by_source:
        low, high = walk.shard_rows(shard)
        yield from batches(walk.by_source[low:high], walk.batch, hidden)
        return
    order = torch.arange(len(hidden)).split(walk.batch)
    for places, part in zip(order, hidden.split(walk.batch), strict=True):
        yield 0, places, part


@torch.no_grad()
def _hidden(state: WorkerState, walk: Walk, block: int, shard: int) -> Tensor:
    """Hidden states of a shard before ``block``, from memory, a file, or an earlier file onwards.

    Returns:
        ``[sequences of the shard, length, hidden]`` on the CPU.
    """
    kept: Tensor | None = state.take(("hidden", walk.key, walk.prefixes, block, shard))
    if kept is not None:
        return kept
    model = opened(state, walk)
    start = block
    hidden = load_tensor(hidden_path(walk, start, shard))
    while hidden is None and start > 0:
        if walk.prefixes:
            raise RunError(
                f"the hidden states before block {block} of shard {shard} are missing;"
                " run the same command again"
            )
        start -= 1
        hidden = load_tensor(hidden_path(walk, start, shard))
    if hidden is None:
        ids = token_ids(walk, shard)
        hidden = torch.cat(
            [model.embed(part.to(model.device)).cpu() for part in ids.split(walk.batch)]
        )
    for index in range(start, block):
        experts = loaded_experts(state, walk, model, index, (shard, shard + 1))
        module = model.load_block(index, experts=experts)
        hidden = _passed(walk, model, index, shard, module, hidden)
    return hidden


@dataclass(frozen=True)
class _Told:
    """Who is told of every batch: of its source before, of what a block made of it afterwards."""

    influence: InfluenceObserver
    begin: Callable[[int], None] = lambda source: None


@contextmanager
def _collecting(
    walk: Walk, model: StreamedModel, block: int, shard: int, module: torch.nn.Module
) -> Iterator[tuple[SiteStats, "_Told"]]:
    """While this is open the block is run on a shard; what is given is filled when it ends.

    What is run, and what the block makes of it, is told to the second thing given.
    """
    units = block_units(model, block)
    bank = next((unit for unit in units if unit.kind == "bank"), None)
    layer = None
    if bank is not None and walk.sources:
        layer = ExpertStatistics(bank, walk.needs, _tokens(walk, shard), model.device)
    observer: StatisticsObserver | SourceObserver
    influence = InfluenceObserver(model.device)
    if walk.by_source:
        kinds = 1 + max(walk.by_source)
        observer = apart = SourceObserver(units, walk.needs, model.device, kinds)
        told = _Told(influence, apart.begin)
    else:
        observer = StatisticsObserver(units, walk.needs, model.device)
        told = _Told(influence)
    stats: SiteStats = {}
    with observing(model, block, module, observer, experts=walk.experts, layer=layer):
        yield stats, told
    stats.update(observer.finish())
    stats[BLOCK] = Stats(influence.sums)
    if bank is not None and layer is not None:
        stats[expert_site(bank.name)] = layer.finish()


def _tokens(walk: Walk, shard: int) -> Tokens:
    low, high = walk.shard_rows(shard)
    with safe_open(fetched(walk.ids), framework="pt") as file:
        length = file.get_slice("ids").get_shape()[1]
    tokens = walk.sequences * length
    places, rows = sampled_tokens(low * length, high * length, tokens, walk.sampled)
    return Tokens(
        sources=torch.tensor(walk.sources[low:high]).repeat_interleave(length),
        kinds=1 + max(walk.sources),
        sampled=places,
        rows=rows,
        total=min(walk.sampled, tokens),
    )


@torch.no_grad()
def forward(
    state: WorkerState, walk: dict[str, Any], block: int, span: Node, sums: bool = True
) -> dict[str, Any]:
    """Takes the shards of ``span`` through a dense block: statistics and hidden states out.

    Args:
        sums: whether statistics are wanted; not where the block's are there.

    Returns:
        ``seconds`` and ``peak_bytes`` of the worker.
    """
    plan = Walk(**walk)
    started = time.monotonic()
    nodes = covered((0, plan.shards), span)
    model = opened(state, plan)
    told = ""
    if not sums:
        pass_shards(state, plan, model, block, span)
    elif not (all_passed(plan, model, block, span) and sums_left(plan, "stats", block, nodes)):
        passes = _passes(state, plan, model, block, span)
        if passes is None:
            module = model.load_block(block)

            def shard_stats(shard: int) -> SiteStats:
                with _collecting(plan, model, block, shard, module) as (stats, watchers):
                    advance_shard(state, plan, block, shard, module, watchers)
                return stats

            sum_nodes(plan, "stats", block, nodes, shard_stats)
        else:
            told = _walk_in_parts(state, plan, block, nodes, passes, go_on=True)
    return {**_finished(plan, block, span, started), "parted": told}


def all_passed(walk: Walk, model: StreamedModel, block: int, span: Node) -> bool:
    """Whether all is there that some shards leave of hidden states on their way through a block."""
    left = [hidden_path(walk, block + 1, shard) for shard in range(*span)]
    if walk.gradients:
        ends = [block, *([block + 1] if block + 1 == model.blocks else [])]
        left += [boundary_path(walk, end, shard) for end in ends for shard in range(*span)]
    return all(map(exists, left))


def pass_shards(
    state: WorkerState, walk: Walk, model: StreamedModel, block: int, span: Node
) -> None:
    """Takes shards through a dense block, without statistics."""
    if all_passed(walk, model, block, span):
        return
    experts = loaded_experts(state, walk, model, block, span)
    module = model.load_block(block, experts=experts)
    read_ahead(model, block + 1, own_share(span))
    for shard in range(*span):
        advance_shard(state, walk, block, shard, module)


@torch.no_grad()
def collect(state: WorkerState, walk: dict[str, Any], block: int, span: Node) -> dict[str, Any]:
    """Statistics of a dense block for the shards of ``span``; hidden states stay before it."""
    plan = Walk(**walk)
    started = time.monotonic()
    nodes = covered((0, plan.shards), span)
    told = ""
    if not sums_left(plan, "stats", block, nodes):
        model = opened(state, plan)
        passes = _passes(state, plan, model, block, span)
        if passes is None:
            module = model.load_block(block)
            read_files_ahead(model, [hidden_path(plan, block, shard) for shard in range(*span)])

            def shard_stats(shard: int) -> SiteStats:
                hidden = _kept_hidden(state, plan, block, shard)
                with _collecting(plan, model, block, shard, module) as (stats, watchers):
                    _passed(plan, model, block, shard, module, hidden, watchers)
                return stats

            sum_nodes(plan, "stats", block, nodes, shard_stats)
        else:
            told = _walk_in_parts(state, plan, block, nodes, passes, go_on=False)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes(), "parted": told}


def _kept_hidden(state: WorkerState, walk: Walk, block: int, shard: int) -> Tensor:
    """Hidden states before a block, which are left as a file for others."""
    hidden = _hidden(state, walk, block, shard)
    if not exists(path := hidden_path(walk, block, shard)):
        save_tensor(path, hidden)
    return hidden


@torch.no_grad()
def advance(
    state: WorkerState, walk: dict[str, Any], block: int, span: Node, pieces: Mapping[str, str]
) -> dict[str, Any]:
    """Takes the shards of ``span`` through a block made of ``pieces`` (unit → file)."""
    plan = Walk(**walk)
    started = time.monotonic()
    if not all(exists(hidden_path(plan, block + 1, s)) for s in range(*span)):
        model = opened(state, plan)
        module = model.load_block(block, replaced=dense_members(pieces))
        for shard in range(*span):
            advance_shard(state, plan, block, shard, module)
    return _finished(plan, block, span, started)


def _sizes(walk: Walk, model: StreamedModel) -> BlockSizes:
    with safe_open(fetched(walk.ids), framework="pt") as file:
        return BlockSizes(model, walk, file.get_slice("ids").get_shape()[1])


def loaded_experts(
    state: WorkerState, walk: Walk, model: StreamedModel, block: int, span: Node
) -> int:
    """How many experts are on the device at a time where a block is only run; 0 for all."""
    sizes = _sizes(walk, model)
    running = sizes.activations(block, sizes.batch_tokens())
    beside = sizes.beside(state.device, span)[0] + running
    return experts_at_a_time(sizes, block, state.room, beside)


def reversed_experts(
    state: WorkerState, walk: Walk, model: StreamedModel, block: int, span: Node
) -> int:
    """How many experts are on the device at a time on the way back; 0 for all."""
    sizes, held = _sizes(walk, model), held_by_walker(walk.shards, span)
    running = sizes.activations(block, sizes.length, keep_all=True) + sizes.squares(block)
    beside = sizes.beside(state.device, span)[0] + running + held * sizes.gradients(block)
    return experts_at_a_time(sizes, block, state.room, beside)


def _passes(
    state: WorkerState, walk: Walk, model: StreamedModel, block: int, span: Node
) -> Passes | None:
    """How a block is walked where it does not fit the worker's device."""
    sizes, held = _sizes(walk, model), held_by_walker(walk.shards, span)
    return planned_passes(sizes, block, held, state.room, *sizes.beside(state.device, span))


def _walk_in_parts(
    state: WorkerState, walk: Walk, block: int, nodes: list[Node], passes: Passes, go_on: bool
) -> str:
    """Sums of some nodes, part by part; with ``go_on`` also hidden states behind the block.

    Returns:
        how it is walked, in words.
    """
    model = opened(state, walk)
    bank = bank_of(block_units(model, block))

    def layer(shard: int, names: Sequence[str]) -> ExpertStatistics | None:
        if bank is None or not walk.sources:
            return None
        found = ExpertStatistics(bank, walk.needs, _tokens(walk, shard), model.device)
        found.sums = {name: value for name, value in found.sums.items() if name in names}
        return found

    def batches(shard: int) -> Sequence[Tensor]:
        if go_on:
            hidden = _hidden(state, walk, block, shard)
            _keep_boundary(walk, block, shard, hidden)
        else:
            hidden = _kept_hidden(state, walk, block, shard)
        return [part for _, _, part in _batches(walk, shard, hidden)]

    def leave(shard: int, after: list[Tensor]) -> None:
        if go_on:
            _leave(state, walk, block, shard, torch.cat(after))

    part = PartedBlock(
        model=model,
        block=block,
        module=model.load_block(block, experts=passes.experts),
        passes=passes,
        needs=walk.needs,
        experts=walk.experts,
        layout=_sizes(walk, model).layout(block),
        layer=layer,
    )
    parted_nodes(
        part,
        nodes,
        batches,
        leave,
        lambda node, fill: leave_sums(walk, "stats", block, node, fill),
    )
    return passes.text(bank)


def _passed(
    walk: Walk,
    model: StreamedModel,
    block: int,
    shard: int,
    module: torch.nn.Module,
    hidden: Tensor,
    told: _Told | None = None,
) -> Tensor:
    """Hidden states after a block, like ``hidden`` ``[sequences, length, hidden]`` on the CPU."""
    after, order = [], []
    for source, places, part in _batches(walk, shard, hidden):
        x = part.to(model.device)
        if told is not None:
            told.begin(source)
        y = model.run_block(block, module, x)
        if told is not None:
            told.influence.add(x, y)
        after.append(y.cpu())
        order.append(places)
    return in_order(after, order) if walk.by_source else torch.cat(after)


def advance_shard(
    state: WorkerState,
    walk: Walk,
    block: int,
    shard: int,
    module: torch.nn.Module,
    told: _Told | None = None,
) -> None:
    """Runs a block on a shard's hidden states and keeps what comes out, in memory and as a file."""
    model = opened(state, walk)
    hidden = _hidden(state, walk, block, shard)
    _keep_boundary(walk, block, shard, hidden)
    _leave(state, walk, block, shard, _passed(walk, model, block, shard, module, hidden, told))


def _leave(state: WorkerState, walk: Walk, block: int, shard: int, after: Tensor) -> None:
    """Keeps a shard's hidden states behind a block, in memory and as a file."""
    model, own = opened(state, walk), ("hidden", walk.key, walk.prefixes)
    if not torch.isfinite(after).all():
        raise RunError(
            f"block {block}: its output has NaN or Inf values in {model.dtype};"
            " try compute.dtype: float32"
        )
    save_tensor(hidden_path(walk, block + 1, shard), after)
    if block + 1 < model.blocks:
        # What a worker got of other ranges, while theirs was away, may have gone on elsewhere.
        state.discard(lambda key: key[:3] == own and key[3] < block - LEAD)
        state.put((*own, block + 1, shard), after)
    else:
        _keep_boundary(walk, block + 1, shard, after)


def _finished(walk: Walk, block: int, span: Node, started: float) -> dict[str, Any]:
    """Drops hidden states that no resume needs: the block before the one just passed."""
    if block > 0:
        for shard in range(*span):
            remove(hidden_path(walk, block - 1, shard))
    return {"seconds": time.monotonic() - started, "peak_bytes": peak_memory_bytes()}


def _keep_boundary(walk: Walk, block: int, shard: int, hidden: Tensor) -> None:
    if walk.gradients:
        path = boundary_path(walk, block, shard)
        if not exists(path):
            save_tensor(path, hidden[: walk.gradients])
