"""The calibration text on its way through a model that is to be sliced, to find the stream's axes.

The blocks are the original's, and the stream stays as wide as it is. Cutting it is projecting it:
a hook behind every attention and MLP does that, so that each place sees what the places before it
have left. Sums over the stream are taken as :mod:`moesaic.orchestrator.calibrate` takes its own:
per shard, added along a fixed tree, so that any number of workers gives the same bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesaic.methods import slicegpt
from moesaic.methods.base import Stats
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.shared import exists, remove, write_shared
from moesaic.orchestrator.slicing import Cut
from moesaic.orchestrator.statistics import (
    Node,
    SiteStats,
    add_gram,
    covered,
    load_stats,
    mirror,
    save_stats,
    tree_sum,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import load_tensor, opened, save_tensor, token_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

_STREAM = "stream"
# What a block makes of the stream may differ from what is expected of it by this share.
_ROUNDING = 0.02


class _Enough(Exception):
    """A block has been run as far as it is wanted."""


class Passage:
    """A block whose residual stream is watched, and projected, while this is open; a context
    manager.

    Args:
        family: what the block's parts are called.
        block: the module.
        bases: sublayer → axes that the stream is projected on behind it.
        seen: called with a sublayer and what its norm is given.
        last: the sublayer in front of which the block may stop; None runs all of it.
    """

    def __init__(
        self,
        family: Family,
        block: nn.Module,
        bases: Mapping[int, Tensor],
        seen: Callable[[int, Tensor], None],
        last: int | None,
    ) -> None:
        self.family, self.bases, self.seen, self.last = family, bases, seen, last
        self.stream: Tensor | None = None
        self.block = block
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Passage":
        for number, (norm, module) in enumerate(self.family.shortcut_pairs()):
            own, sublayer = self.block.get_submodule(norm), self.block.get_submodule(module)
            self._hooks += [
                own.register_forward_pre_hook(self._enters(number)),
                own.register_forward_hook(self._normed),
                sublayer.register_forward_hook(self._added(number)),
            ]
        return self

    def __exit__(self, *failure: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def run(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """What the block makes of ``x``; None where it was stopped."""
        self.stream = None
        try:
            y = call(x)
        except _Enough:
            return None
        self._check(y, "the block")
        return y

    def _enters(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
            if number:
                self._check(arguments[0], f"sublayer {number}")
            self.stream = arguments[0]
            self.seen(number, arguments[0])
            if number == self.last:
                raise _Enough

        return hook

    def _normed(self, norm: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        x = arguments[0].float()
        wanted = x * x.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt() * norm.weight
        self._compare(output, wanted, f"{type(norm).__name__} is no RMSNorm")

    def _added(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            assert self.stream is not None, "a sublayer without its norm"
            first = output[0] if isinstance(output, tuple) else output
            if number in self.bases:
                first = slicegpt.projected(self.stream, first, self.bases[number])
            self.stream = self.stream + first
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def _check(self, stream: Tensor, what: str) -> None:
        assert self.stream is not None, "a block that does not call its norms"
        text = "is given something else than the sum of what the sublayers before it gave"
        self._compare(stream, self.stream, f"{what} {text}")

    def _compare(self, found: Tensor, wanted: Tensor, text: str) -> None:
        difference = (found.float() - wanted.float()).norm()
        if not difference <= _ROUNDING * wanted.float().norm() and found.isfinite().all():
            kind = self.family.model_type
            raise RecipeError(
                f"slice: {kind} cannot be sliced: {text}; families/{kind}.yaml should say"
                " sublayers: []"
            )


class _StreamSums:
    """Sums n nᵀ over the stream, n of length √D; in float64, to tell small axes from none."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        add_gram(self.gram, rows * rows.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt())
        self.tokens += len(rows)

    def finish(self) -> SiteStats:
        mirror(self.gram)
        return {_STREAM: Stats({"tokens": self.tokens, "gram": self.gram})}


@torch.no_grad()
def gather(state: WorkerState, cut: dict[str, Any], step: int, span: Node) -> dict[str, Any]:
    """Sums over the stream for the shards of ``span``, and what enters the next block."""
    plan = Cut.of(cut)
    walk, nodes = plan.walk, covered((0, plan.walk.shards), span)
    model = opened(state, walk)
    block, last = _reached(plan, step)
    module = None if block < 0 else model.load_block(block)

    def shard_stats(shard: int) -> SiteStats:
        sums = _StreamSums(model.hidden_size, model.device)
        hidden = _entering(plan, model, block, shard)
        if module is None:
            after = [hidden]
            for part in hidden.split(walk.batch):
                sums.add(part.to(model.device))
        else:
            after = _through(plan, model, block, module, hidden, last, sums)
        if after:
            whole = torch.cat(after)
            if not torch.isfinite(whole).all():
                raise RunError(
                    f"block {block}: its output has NaN or Inf values in {model.dtype};"
                    " try compute.dtype: float32"
                )
            save_tensor(plan.hidden_path(block + 1, shard), whole)
        return sums.finish()

    for node in nodes:
        total = tree_sum(node, lambda n: shard_stats(n[0]) if n[1] - n[0] == 1 else None)
        write_shared(plan.node_path(step, node), lambda p, total=total: save_stats(p, total))  # type: ignore[misc]
    if block > 0:
        for shard in range(*span):
            remove(plan.hidden_path(block - 1, shard))
    return {"peak_bytes": peak_memory_bytes()}


def _reached(cut: Cut, step: int) -> tuple[int, int | None]:
    """The block that a step runs, -1 for the embedding, and the sublayer in front of which it may
    stop."""
    if not cut.shortcuts:
        return step, None
    block, sublayer = divmod(step - 1, cut.sublayers)
    return block, sublayer + 1 if sublayer + 1 < cut.sublayers else None


def _entering(cut: Cut, model: StreamedModel, block: int, shard: int) -> Tensor:
    """The stream in front of a block, of the shard's sequences ``[sequences, length, hidden]``."""
    if block > 0 or (block == 0 and cut.shortcuts):
        hidden = load_tensor(cut.hidden_path(block, shard))
        if hidden is None:
            raise RunError(
                f"the hidden states before block {block} of shard {shard} are missing;"
                " run the same command again"
            )
        return hidden
    ids = token_ids(cut.walk, shard)
    return torch.cat([model.embed(p.to(model.device)).cpu() for p in ids.split(cut.walk.batch)])


def _through(
    cut: Cut,
    model: StreamedModel,
    block: int,
    module: nn.Module,
    hidden: Tensor,
    last: int | None,
    sums: _StreamSums,
) -> list[Tensor]:
    """What a block makes of the stream, batch by batch; nothing where it stops before the end."""
    first = block * cut.sublayers
    known = range(1, cut.sublayers if last is None else last) if cut.shortcuts else range(0)
    bases = {k - 1: cut.basis(first + k).to(model.device) for k in known}
    entry = cut.basis(first).to(model.device) if cut.shortcuts else None
    ends = last is None and (cut.shortcuts or block + 1 == cut.blocks)

    def seen(sublayer: int, stream: Tensor) -> None:
        if not cut.shortcuts or sublayer == last:
            sums.add(stream)

    after = []
    with Passage(model.family, module, bases, seen, last) as passage:
        for part in hidden.split(cut.walk.batch):
            x = part.to(model.device)
            if entry is not None:
                x = slicegpt.projected(torch.zeros_like(x), x, entry)
            y = passage.run(lambda stream: model.run_block(block, module, stream), x)
            if y is not None:
                if ends:
                    sums.add(y)
                after.append(y.cpu())
    return after


def add_up(state: WorkerState, cut: dict[str, Any]) -> dict[str, Any]:
    """Sums over the stream of all steps, which share their axes."""
    plan = Cut.of(cut)
    total = _total(plan, 0)
    for step in range(1, plan.steps):
        total = total + _total(plan, step)
    sums = {_STREAM: total}
    told = {"tokens": {_STREAM: int(total["tokens"])}, "routed": {}}
    plan.store.put("stats", plan.sums_key, lambda p: save_stats(p, sums), told)
    return {"peak_bytes": peak_memory_bytes()}


def settle(state: WorkerState, cut: dict[str, Any], place: int) -> dict[str, Any]:
    """Axes of a place from the sums there; of all places where they share them."""
    plan = Cut.of(cut)
    if plan.shortcuts:
        sums = _total(plan, place)
    else:
        sums = load_stats(plan.store.path("stats", plan.sums_key))[_STREAM]
    places = 1 if plan.shortcuts else plan.blocks * plan.sublayers + 1  # that were summed over
    gram, tokens = sums["gram"].to(state.device), int(sums["tokens"]) // places
    basis, dropped, events = slicegpt.principal_axes(gram, plan.width, tokens)
    if plan.shortcuts and place:
        basis = slicegpt.aligned(basis, plan.basis(place - 1).to(basis.device))
    found = {"dropped": dropped, "events": [asdict(event) for event in events]}
    tensors = {"basis": basis.cpu().contiguous()}
    plan.store.put("bases", plan.basis_key(place), lambda p: save_file(tensors, p), found)
    return {"peak_bytes": peak_memory_bytes()}


def _total(cut: Cut, step: int) -> Stats:
    def leaf(node: Node) -> SiteStats | None:
        path = cut.node_path(step, node)
        if exists(path):
            return load_stats(path)
        if node[1] - node[0] == 1:
            raise RunError(
                f"slice: the sums of step {step}, shard {node[0]} are missing; run the same command"
                " again"
            )
        return None

    return tree_sum((0, cut.walk.shards), leaf)[_STREAM]


def gathered(cut: Cut, step: int, node: Node | None = None) -> bool:
    """Whether the sums of all shards are there, in whatever pieces."""
    low, high = node or (0, cut.walk.shards)
    if exists(cut.node_path(step, (low, high))):
        return True
    middle = (low + high) // 2
    return high - low > 1 and all(
        gathered(cut, step, half) for half in ((low, middle), (middle, high))
    )
