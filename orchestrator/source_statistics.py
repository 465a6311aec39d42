"""Second moments of inputs apart by text source, and what a piece loses under each of them.

Methods solve with the sums over all text. With ``calibration.per_source`` those of every source
are kept beside them, as ``hessian/0``, ``hessian/1`` … in the order of the recipe's texts; they add
over shards and experts as all sums do. A finished piece is then measured under each: the same
piece, a few more numbers. Gradients are not told apart.

Sequences of one source run through a block together, so that whoever watches needs to know one
source at a time. Nothing else of a block's result depends on who is beside a sequence, but the last
bits of products do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moesaic.methods.base import Stats, Unit, of_source
from moesaic.orchestrator.statistics import SEPARATOR, SiteStats, StatisticsObserver


class SourceObserver:
    """As :class:`StatisticsObserver`, with the second moments of every source besides.

    Attributes:
        source: that all of what is told comes from.
    """

    def __init__(
        self, units: list[Unit], needs: tuple[str, ...], device: torch.device, kinds: int
    ) -> None:
        self.source = 0
        self._apart = [StatisticsObserver(units, needs, device) for _ in range(kinds)]

    def begin(self, source: int) -> None:
        """Says where what is told next comes from."""
        self.source = source

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        self._apart[self.source].inputs(site, x, expert)

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        self._apart[self.source].outputs(unit, member, y, expert)

    def finish(self) -> SiteStats:
        """The sums over all sources, in their order, and the second moments of each."""
        apart = [observer.finish() for observer in self._apart]
        found = {}
        for site in apart[0]:
            own = [stats[site].sums for stats in apart]
            sums = {name: value.clone() for name, value in own[0].items()}
            for name, total in sums.items():
                for other in own[1:]:
                    total += other[name]
            if "hessian" in sums:
                sums |= {of_source(k): other["hessian"] for k, other in enumerate(own)}
            found[site] = Stats(sums)
        return found


def batches(
    sources: Sequence[int], size: int, hidden: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sequences of one source at a time.

    Args:
        sources: of every sequence.
        size: sequences of a batch, at most.
        hidden: ``[sequences, length, hidden]``.

    Yields:
        source, places of the sequences, their part of ``hidden``.
    """
    of = torch.tensor(sources)
    for source in sorted(set(sources)):
        for places in (of == source).nonzero().flatten().split(size):
            yield source, places, hidden[places]


def in_order(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """What came out of :func:`batches`, sequences where they were before."""
    joined = torch.cat(list(parts))
    found = torch.empty_like(joined)
    found[torch.cat(list(places))] = joined
    return found


def source_errors(stats: Stats, errors: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The errors under the second moments of every source; none where they are not kept.

    Args:
        errors: of second moments ``[*batch, in, in]``.
    """
    found: list[Tensor] = []
    while of_source(len(found)) in stats:
        found.append(errors(stats[of_source(len(found))]))
    return found


def error_name(member: str, source: int) -> str:
    """Name in an ``errors`` entry of a member's row errors under one source."""
    return f"error{SEPARATOR}{member}{SEPARATOR}{source}"


def loss_shares(
    errors: Mapping[str, Tensor], gradients: Mapping[str, Stats] | None, unit: Unit
) -> dict[str, Tensor]:
    """What part of a piece's predicted loss, or error where there are no gradients, is each
    source's.

    Args:
        errors: tensors of an ``errors`` entry.
        gradients: ``unit|member`` → sums, or None where none were collected.

    Returns:
        member → ``[*batch, sources]``, float64, sums of 1; of what loses nothing, zeros. Empty
        where sources are not told apart.
    """
    found = {}
    for member in unit.shapes:
        losses: list[Tensor] = []
        while (error := errors.get(error_name(member, len(losses)))) is not None:
            error = error.double()  # [*batch, out]
            if gradients is not None:
                squares = gradients[f"{unit.name}{SEPARATOR}{member}"]["grad_sq"]
                error = error * squares.double()
            losses.append(error.sum(-1))
        if losses:
            apart = torch.stack(losses, dim=-1)
            total = apart.sum(-1, keepdim=True)
            found[member] = apart / total.where(total > 0, torch.ones_like(total))
    return found
