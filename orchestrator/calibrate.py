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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.methods.base import Stats, Unit
from moesaic.orchestrator.adding import OpenSums, found_nodes, open_sums
from moesaic.orchestrator.block_sizes import BlockSizes
from moesaic.orchestrator.damage import DamagedFile, damage_removed
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.expert_statistics import (
    ExpertStatistics,
    Tokens,
    expert_site,
    sampled_tokens,
)
from moesaic.orchestrator.experts import Experts, observing
from moesaic.orchestrator.parted import PartedBlock, parted_nodes
from moesaic.orchestrator.passes import Passes, bank_of, experts_at_a_time, planned_passes
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.readahead import own_share, read_ahead, read_files_ahead
from moesaic.orchestrator.shared import exists, fetched, open_store, remove, write_shared
from moesaic.orchestrator.source_statistics import SourceObserver, batches, in_order
from moesaic.orchestrator.statistics import (
    BLOCK,
    SEPARATOR,
    InfluenceObserver,
    Node,
    SiteStats,
    StatisticsObserver,
    covered,
    held_by_walker,
    save_stats,
    tree_sum,
)
from moesaic.orchestrator.store import (
    code_digest,
    digest,
    scratch_folder,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# A range of shards may be this many blocks ahead of the slowest: bounds unfinished sums on disk,
# and hidden states in memory.
LEAD = 2


@dataclass(frozen=True)
class Walk:
    """Everything that fixes the statistics of one walk over the blocks; plain data for workers.

    Attributes:
        model, dtype, trust_remote_code: what to open.
        fingerprint: digest of the checkpoint's contents.
        ids: file with the token ids ``[sequences, length]``.
        ids_digest: digest of the tokens.
        sequences, shards, batch: how the tokens are cut.
        needs: statistics that are wanted at every site.
        experts: ``routed`` or ``all``.
        gradients: sequences per shard for the reverse pass; 0 for none.
        seed: of the labels drawn in the reverse pass.
        fisher: whether the reverse pass also takes the next tokens as labels, for ``fisher``.
        pooling: of an encoder's hidden states, where the reverse pass begins with embeddings; empty
            for a language model.
        sampled: tokens that every expert is run on, where ``needs`` name expert statistics.
        sources: text source of every sequence; empty where no expert statistics are wanted.
        by_source: the same, where second moments are kept apart by source; else empty.
        store: root of the store.
        prefixes: with ``propagate``, for every block the digest of what the plan made of the blocks
            before it, "" where that is nothing; empty where inputs come from the dense model.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    fingerprint: str
    ids: str
    ids_digest: str
    sequences: int
    shards: int
    batch: int
    needs: tuple[str, ...]
    experts: Experts
    gradients: int
    seed: int
    store: str
    sampled: int = 0
    sources: tuple[int, ...] = ()
    by_source: tuple[int, ...] = ()
    prefixes: tuple[str, ...] = ()
    fisher: bool = False
    pooling: str = ""

    @cached_property
    def key(self) -> str:
        """Digest of everything that fixes the hidden states and the statistics."""
        inputs = {
            "model": self.fingerprint,
            "dtype": self.dtype,
            "ids": self.ids_digest,
            "cut": [self.sequences, self.shards, self.batch],
            "needs": sorted(self.needs),
            "experts": self.experts,
            "layers": [self.sampled, self.sources],
            **({"by source": self.by_source} if self.by_source else {}),
            "code": code_digest(
                "orchestrator/calibrate.py",
                "orchestrator/parted.py",
                "orchestrator/bank_slices.py",
                "orchestrator/adding.py",
                "orchestrator/gradients.py",
                "orchestrator/embeddings.py",
                "orchestrator/statistics.py",
                "orchestrator/source_statistics.py",
                "orchestrator/expert_statistics.py",
                "orchestrator/streaming.py",
                "orchestrator/experts.py",
                "orchestrator/family.py",
                "orchestrator/skeleton.py",
                "orchestrator/layout.py",
                "orchestrator/bank.py",
            ),
        }
        return digest(inputs)

    def stats_key(self, block: int) -> str:
        return digest([self.key, "stats", block, *filter(None, self.prefixes[block : block + 1])])

    def gradients_key(self, block: int) -> str:
        return digest([self.key, "gradients", *self._reverse, block])

    @property
    def _reverse(self) -> list[Any]:
        """What fixes the reverse pass besides the hidden states."""
        more = [*(["fisher"] if self.fisher else []), *filter(None, [self.pooling])]
        return [self.gradients, self.seed, *more]

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """First and one-past-last sequence of a shard."""
        return (
            shard * self.sequences // self.shards,
            (shard + 1) * self.sequences // self.shards,
        )

    @cached_property
    def scratch(self) -> Path:
        """Folder of unfinished work: hidden states, partial sums."""
        own = [self.key, self.prefixes, *self._reverse]
        return scratch_folder(Path(self.store), digest(own))


def load_tensor(path: Path) -> Tensor | None:
    """A tensor saved alone, copied so that the file is not kept mapped; None if not there.

    One that was damaged is removed, and not there either.
    """
    try:
        with damage_removed(path), safe_open(fetched(path), framework="pt") as file:
            value: Tensor = file.get_tensor("value").clone()
            return value
    except (FileNotFoundError, DamagedFile):
        return None


def save_tensor(path: Path, value: Tensor) -> None:
    def write(temporary: Path) -> None:
        save_file({"value": value.cpu().contiguous()}, temporary)

    write_shared(path, write)


def token_ids(walk: Walk, shard: int) -> Tensor:
    """``[sequences of the shard, length]``"""
    return read_ids(walk.ids, *walk.shard_rows(shard))


def read_ids(file: str, low: int, high: int) -> Tensor:
    """Tokens of the sequences ``low … high - 1``, int64 ``[sequences, length]``."""
    with safe_open(fetched(file), framework="pt") as opened:
        rows: Tensor = opened.get_slice("ids")[low:high].long()
        return rows


def hidden_path(walk: Walk, block: int, shard: int) -> Path:
    return walk.scratch / f"hidden-{block:04d}-{shard:04d}.safetensors"


def boundary_path(walk: Walk, block: int, shard: int) -> Path:
    return walk.scratch / f"boundary-{block:04d}-{shard:04d}.safetensors"


def node_path(walk: Walk, what: str, block: int, node: Node) -> Path:
    return walk.scratch / f"{what}-{block:04d}-{node[0]:04d}-{node[1]:04d}.safetensors"


def opened(state: WorkerState, walk: Walk) -> StreamedModel:
    model: StreamedModel = state.model(walk.model, walk.dtype, walk.trust_remote_code)
    return model


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


def _overflow(walk: Walk, what: str, block: int, site: str, statistic: str) -> str:
    """What to say of sums that are not finite."""
    where = "its hidden states" if site == BLOCK else f"{statistic} of {site}"
    # Gradients come from where the model ends.
    side = "before" if what == "stats" else "behind"
    advice = f"look at the weights {side} it for values that are far too large"
    if walk.dtype != "float32":
        advice = "try compute.dtype: float32"
    return f"{walk.model}: block {block}: {where} overflow: {advice}"


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


def dense_members(pieces: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The weights that pieces stand for: unit → member → ``[*batch, out, in]``."""
    return {
        unit: {member: tensor.effective() for member, tensor in read_piece(Path(path)).items()}
        for unit, path in pieces.items()
    }


def block_units(model: StreamedModel, block: int) -> list[Unit]:
    return [unit for unit in model.units() if unit.block == block]


def sum_nodes(
    walk: Walk,
    what: str,
    block: int,
    nodes: list[Node],
    shard_stats: Callable[[int], SiteStats],
) -> None:
    """Sums every node from its shards, in order, and writes it."""

    def leaf(node: Node) -> SiteStats | None:
        return None if node[1] - node[0] > 1 else shard_stats(node[0])

    for node in nodes:
        sums = tree_sum(node, leaf)
        leave_sums(walk, what, block, node, lambda p, sums=sums: save_stats(p, sums))  # type: ignore[misc]


def entry_key(walk: Walk, what: str, block: int) -> str:
    """Of a block's sums in the store."""
    return walk.stats_key(block) if what == "stats" else walk.gradients_key(block)


def sums_left(walk: Walk, what: str, block: int, nodes: list[Node]) -> bool:
    """Whether :func:`leave_sums` was here for all these nodes."""
    if nodes == [(0, walk.shards)]:
        return open_store(walk.store).get(what, entry_key(walk, what, block)) is not None
    return all(exists(node_path(walk, what, block, node)) for node in nodes)


def leave_sums(walk: Walk, what: str, block: int, node: Node, fill: Callable[[Path], None]) -> None:
    """Writes the sums of a node: a file that is to be added to others, or, where the node is all
    shards and there is nothing to add, the block's entry.

    Args:
        fill: writes them to a path.
    """
    if node != (0, walk.shards):
        write_shared(node_path(walk, what, block, node), fill)
        return
    told: dict[str, Any] = {}

    def write(path: Path) -> None:
        fill(path)
        with safe_open(path, framework="pt") as file:
            sums = OpenSums(node, {node: file})
            sums.look(partial(_finite, walk, what, block))
            told.update(_counts(sums, block))

    open_store(walk.store).put(what, entry_key(walk, what, block), write, told)


def _finite(walk: Walk, what: str, block: int, name: str, value: Tensor) -> None:
    """Raises RunError where a sum is not."""
    if not torch.isfinite(value).all():
        site, _, statistic = name.rpartition(SEPARATOR)
        raise RunError(_overflow(walk, what, block, site, statistic))


def _counts(sums: OpenSums, block: int) -> dict[str, Any]:
    """What is told with the sums of a block: the tokens that each site saw."""
    counts = {
        name: {
            site: sums.total(full).tolist()
            for full in sums.layout
            for site, _, statistic in [full.rpartition(SEPARATOR)]
            if statistic == name
        }
        for name in ("tokens", "routed")
    }
    return {"block": block, **counts}


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


def reduce(state: WorkerState, walk: dict[str, Any], what: str, block: int) -> dict[str, Any]:
    """Sums the nodes of a block into its entry of the store, and removes them.

    Args:
        what: ``stats`` or ``gradients``.
    """
    plan = Walk(**walk)
    store = open_store(plan.store)
    key = entry_key(plan, what, block)
    root: Node = (0, plan.shards)

    def known() -> bool:
        """Whether another worker was here, and has removed some nodes or all."""
        return store.get(what, key) is not None

    if known():
        return {"peak_bytes": peak_memory_bytes()}
    paths, missing = found_nodes(root, lambda node: node_path(plan, what, block, node), exists)
    try:
        if missing:
            raise RunError(
                f"block {block}: the {what} of shard {missing[0]} are missing; run the same command"
                " again"
            )
        with open_sums(root, paths) as sums:
            finite = partial(_finite, plan, what, block)
            store.put(what, key, lambda path: sums.write(path, finite), _counts(sums, block))
    except (RunError, FileNotFoundError):
        if known():
            return {"peak_bytes": peak_memory_bytes()}
        raise
    for path in paths.values():
        remove(path)
    return {"peak_bytes": peak_memory_bytes()}
