"""The sums of a block that does not fit its device: taken in passes, for one node of the tree.

1. Every batch enters the block and is stopped in front of the experts; what they are called with
   is kept in the processor's memory.
2. Slice after slice of the experts is read. All batches pass it, and what the experts before it
   gave is added to. Only the slice's statistics are held, and they are written when all shards of
   the node are added up.
3. Every batch goes through the whole block, the experts' result being there already, and the rest
   is summed: what linears read, in groups of sites, and what is known of the layer as a whole.

Every sum adds the same numbers in the same order as in a walk that holds all of them at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.methods.base import Stats, Unit
from moesaic.orchestrator.bank_slices import bank_slices
from moesaic.orchestrator.expert_statistics import ROUTED, ExpertStatistics, expert_site
from moesaic.orchestrator.experts import (
    Experts,
    Observer,
    Routed,
    detour,
    observing,
    one_expert,
    visit,
)
from moesaic.orchestrator.passes import Passes, bank_of
from moesaic.orchestrator.statistics import (
    BLOCK,
    SEPARATOR,
    InfluenceObserver,
    Node,
    SiteStats,
    StatisticsObserver,
    SumsFile,
    SumShapes,
    tree_sum,
)
from moesaic.orchestrator.streaming import StreamedModel


class _Stopped(Exception):
    """A batch has reached the experts."""


@dataclass(frozen=True)
class _Shifted:
    """Tells an observer of a slice what is told of the bank."""

    observer: Observer
    first: int

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        assert expert is not None, "only experts are visited"
        self.observer.inputs(site, x, expert - self.first)

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        assert expert is not None, "only experts are visited"
        self.observer.outputs(unit, member, y, expert - self.first)


@dataclass
class PartedBlock:
    """A block that is walked in parts.

    Attributes:
        model, block, module: what is walked; the module's experts are slices of the bank.
        passes: the parts.
        needs: statistics that are wanted at every site.
        experts: which tokens teach an expert.
        layout: of the file that is to be written.
        layer: sums about the expert layer over a shard, of the given names; None where none are
            wanted.
    """

    model: StreamedModel
    block: int
    module: nn.Module
    passes: Passes
    needs: tuple[str, ...]
    experts: Experts
    layout: SumShapes
    layer: Callable[[int, Sequence[str]], ExpertStatistics | None]
    _calls: dict[int, list[Routed]] = field(default_factory=dict)
    _results: dict[int, list[Tensor]] = field(default_factory=dict)

    def write(
        self,
        path: Path,
        node: Node,
        batches: Callable[[int], Sequence[Tensor]],
        leave: Callable[[int, list[Tensor]], None],
    ) -> None:
        """Writes all sums over the shards of ``node``.

        Args:
            batches: a shard's hidden states before the block.
            leave: is given those behind it, batch by batch on the CPU.
        """
        units = self.model.layouts[self.block].units
        bank = bank_of(units)
        with SumsFile(path, self.layout) as file:
            if bank is not None:
                self._stop(node, batches)
                self._visit(bank, node, file)
            linears = [unit for unit in units if unit.kind == "linear"]
            for number, group in enumerate(self.passes.groups):
                own = [unit for unit in linears if unit.sites["weight"] in group]
                last = number + 1 == len(self.passes.groups)
                sums = self._through(own, bank, node, batches, leave if last else None)
                file.put_all(sums)
                del sums
        self._calls.clear()
        self._results.clear()

    def _stop(self, node: Node, batches: Callable[[int], Sequence[Tensor]]) -> None:
        """What the experts are called with."""
        for shard in range(*node):
            self._calls[shard], self._results[shard] = [], []
            for part in batches(shard):
                call = self._call_of(part)
                self._calls[shard].append(call)
                self._results[shard].append(torch.zeros_like(call.hidden))

    def _call_of(self, part: Tensor) -> Routed:
        found: list[Routed] = []

        def stop(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            found.append(Routed(hidden, index, weights).to("cpu"))
            raise _Stopped

        with detour(self._experts_module(), stop):
            try:
                self.model.run_block(self.block, self.module, part.to(self.model.device))
            except _Stopped:
                return found[0]
        raise AssertionError("a block with experts that does not call them")

    def _experts_module(self) -> nn.Module:
        bank = bank_of(self.model.layouts[self.block].units)
        assert bank is not None, "the caller has looked"
        return self.module.get_submodule(self.model.unit_module(bank))

    def _visit(self, bank: Unit, node: Node, file: SumsFile) -> None:
        """The experts, slice by slice."""
        module, device = self._experts_module(), self.model.device
        slices = bank_slices(module)
        assert slices is not None, "the block was loaded so"
        for span in slices.spans():
            shapes = {name: (len(span), *shape[1:]) for name, shape in bank.shapes.items()}
            own = replace(bank, shapes=shapes)

            def shard_sums(shard: int, span: range = span, own: Unit = own) -> SiteStats:
                observer = StatisticsObserver([own], self.needs, device)
                layer = self.layer(shard, sorted(ROUTED))
                told = _Shifted(observer, span[0])
                for place, call in enumerate(self._calls[shard]):
                    result = self._results[shard][place].to(device)
                    here = call.to(device)
                    visit(module, own, told, self.experts, layer, here, span, result)
                    self._results[shard][place] = result.cpu()
                sums = observer.finish()
                if layer is not None:
                    rows = slice(span[0], span[-1] + 1)
                    kept = {n: v[rows] for n, v in layer.sums.items() if n in ROUTED}
                    sums[expert_site(bank.name)] = Stats(kept)
                return sums

            file.put_all(_added(node, shard_sums), span[0])

    def _through(
        self,
        linears: list[Unit],
        bank: Unit | None,
        node: Node,
        batches: Callable[[int], Sequence[Tensor]],
        leave: Callable[[int, list[Tensor]], None] | None,
    ) -> SiteStats:
        """The whole block; with ``leave`` also what is known of the layer, and of the block."""

        def shard_sums(shard: int) -> SiteStats:
            observer = StatisticsObserver(linears, self.needs, self.model.device)
            names = sorted(name for name in _statistics(self.layout, bank) if name not in ROUTED)
            layer = self.layer(shard, names) if leave is not None and bank is not None else None
            influence, after = InfluenceObserver(self.model.device), []
            with ExitStack() as stack:
                watching = observing(
                    self.model,
                    self.block,
                    self.module,
                    observer,
                    experts=self.experts,
                    layer=layer,
                    only=linears,
                )
                stack.enter_context(watching)
                stack.enter_context(self._replayed(bank, shard, layer))
                for part in batches(shard):
                    x = part.to(self.model.device)
                    y = self.model.run_block(self.block, self.module, x)
                    if leave is not None:
                        influence.add(x, y)
                        after.append(y.cpu())
            sums = observer.finish()
            if leave is not None:
                leave(shard, after)
                sums[BLOCK] = Stats(influence.sums)
                if layer is not None and bank is not None:
                    found = layer.finish().sums
                    kept = {name: value for name, value in found.items() if name in names}
                    sums[expert_site(bank.name)] = Stats(kept)
            return sums

        return _added(node, shard_sums)

    def _replayed(
        self, bank: Unit | None, shard: int, layer: ExpertStatistics | None
    ) -> AbstractContextManager[None]:
        """In the experts' place, what they gave."""
        if bank is None:
            return nullcontext()
        module, results = self._experts_module(), iter(self._results[shard])

        def replay(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if layer is not None:
                layer.inputs(hidden, lambda expert, x: one_expert(module, expert, x))
            return next(results).to(hidden.device)

        return detour(module, replay)


def _statistics(layout: SumShapes, bank: Unit | None) -> Iterator[str]:
    """Names of the sums about an expert layer."""
    if bank is None:
        return
    for full in layout:
        site, _, name = full.rpartition(SEPARATOR)
        if site == expert_site(bank.name):
            yield name


def _added(node: Node, shard_sums: Callable[[int], SiteStats]) -> SiteStats:
    def leaf(own: Node) -> SiteStats | None:
        return shard_sums(own[0]) if own[1] - own[0] == 1 else None

    return tree_sum(node, leaf)


def parted_nodes(
    part: PartedBlock,
    nodes: Sequence[Node],
    batches: Callable[[int], Sequence[Tensor]],
    leave: Callable[[int, list[Tensor]], None],
    write: Callable[[Node, Callable[[Path], None]], None],
) -> None:
    """All nodes of a range of shards, one after another; ``write`` makes a node's file."""
    for node in nodes:
        states: Mapping[int, Any] = {shard: batches(shard) for shard in range(*node)}
        write(
            node,
            lambda path, node=node, states=states: part.write(  # type: ignore[misc]
                path, node, states.__getitem__, leave
            ),
        )
