"""The whole front, bytes against predicted loss, from one table of measurements.

A knapsack answers one budget. A Lagrangian answers all of them at once: at a price λ per byte every
group of tied choices takes its choice of least loss + λ·bytes, whatever the others take, and what
comes out is the best plan of its size (Everett 1963, "Generalized Lagrange multiplier method",
theorem 1). As λ falls from infinity to zero, these plans run along the lower convex hull of all
plans, from the smallest to the one of least loss; between two neighbours of them lie only plans
above the line that joins them. No λ has to be tried: the hull of a sum is made of the steps of its
terms' hulls, those that save most loss per byte first, and that of an either-or is the hull of all
points (Sinha and Zoltners 1979, "The multiple-choice knapsack problem", section 2).

A problem with banks is such sums and either-ors: a plan is the sum of what stands outside of banks
and of the banks; a bank is either of its alternatives; an alternative is the sum of its choices.
Ties that reach over several banks are a sum under each of the chains that they may take, and either
of these; likewise the forms, where all banks must have one. Nothing is left out or rounded, so the
front is exact for every kind of problem. That banks are not searched by themselves but together
where they hang together limits how many ties may do so, as in :mod:`moesaic.search.alternatives`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesaic.methods.base import Chain
from moesaic.search import knapsack
from moesaic.search.alternatives import FirstStep, Part
from moesaic.search.base import Plan, Problem

Ints = NDArray[np.int64]
Chosen = dict[str, Chain]


@dataclass(frozen=True)
class Front:
    """The corners of the lower convex hull of all plans, bytes rising and losses falling.

    Attributes:
        problem: whose plans they are; its budget plays no part but for the fixed bytes.
        bytes: of whole plans, fixed parts included, ``[points]``.
        loss: predicted, ``[points]``.
    """

    problem: Problem
    bytes: Ints
    loss: NDArray[np.float64]
    _choices: Callable[[int], Chosen] = field(repr=False)

    def __len__(self) -> int:
        return len(self.bytes)

    def plan(self, point: int) -> Plan:
        """The plan of a corner: no plan of as many bytes or fewer has less loss."""
        return self.problem.plan(self._choices(point))

    def last_within(self, total_bytes: int) -> int | None:
        """The largest corner that fits; None if even the smallest plan does not."""
        found = int(np.searchsorted(self.bytes, total_bytes, side="right")) - 1
        return found if found >= 0 else None

    def bound(self, total_bytes: int) -> float:
        """No plan of so many bytes has less loss; infinite where there is no plan at all."""
        if total_bytes < self.bytes[0]:
            return float("inf")
        return float(np.interp(total_bytes, self.bytes, self.loss))

    def spread(self, most: int) -> list[int]:
        """At most so many corners, evenly spread over the bytes, first and last included."""
        if len(self) <= most:
            return list(range(len(self)))
        wanted = np.linspace(self.bytes[0], self.bytes[-1], most)
        return [int(point) for point in np.unique(np.searchsorted(self.bytes, wanted))]


def predicted_front(problem: Problem) -> Front:
    """The front of a problem, banks with alternatives and ties included.

    Raises:
        ValueError: there is no plan at all, a loss is not finite, or the problem contradicts
            itself.
        RuntimeError: too many ties that reach over banks hang together.

    Example::

        front = predicted_front(problem)
        plans = [front.plan(point) for point in range(len(front))]
    """
    step = FirstStep(problem)
    forms = step.forms() if problem.banks else [None]
    curves = [curve for form in forms for curve in _of_form(step, form)]
    if not curves:
        raise ValueError("no plan takes one alternative of each bank and keeps all ties")
    whole = _either(curves)
    return Front(
        problem,
        whole.bytes + problem.budget.fixed_bytes,
        whole.loss / step.scale,
        whole.chosen,
    )


@dataclass(frozen=True)
class _Curve:
    """Corners of a hull, and what is chosen at each of them."""

    bytes: Ints
    loss: Ints
    chosen: Callable[[int], Chosen]


def _of_form(step: FirstStep, form: str | None) -> list[_Curve]:
    """The plans whose banks have a form, as one curve; empty if there are none."""
    parts = step.allowed(form, None)
    curves = _groups(step.outside)
    for ties, banks in step.clusters:
        cases = []
        for chains in step.combinations(ties, parts):
            beside = _fixed(step.beside(chains), _tied(step.outside, chains))
            found = [_bank([part for _, part in parts[bank]], chains) for bank in banks]
            known = [curve for curve in found if curve is not None]
            if len(known) == len(found):
                cases.append(_sum([beside, *known]))
        if not cases:
            return []
        curves.append(_either(cases))
    return [_sum(curves)]


def _bank(parts: Sequence[Part], chains: dict[int, Chain]) -> _Curve | None:
    """A bank's alternatives under given chains of ties; None if none can be had."""
    curves = []
    for part in parts:
        shift = part.shift(chains)
        if shift is not None:
            own = part.own[0] + shift[0], part.own[1] + shift[1]
            curve = _sum([_fixed(own, _tied(part, chains)), *_groups(part)])
            curves.append(_prefixed(curve, part.prefix))
    return _either(curves) if curves else None


def _tied(part: Part, chains: dict[int, Chain]) -> Chosen:
    """What ties that reach over parts make its choices take."""
    bound = {tie: names for tie, names in part.bound.items() if tie in chains}
    return {name: chains[tie] for tie, names in bound.items() for name in names}


def _groups(part: Part) -> list[_Curve]:
    """A curve per group of tied choices."""
    curves = []
    for (units, offers), group in zip(part.offers, part.groups, strict=True):
        hull = np.array(group.hull, dtype=np.int64)
        chains = [offers[int(position)][0] for position in group.index[hull]]
        curves.append(_Curve(group.bytes[hull], group.loss[hull], _takes(units, chains)))
    return curves


def _takes(units: Sequence[str], chains: Sequence[Chain]) -> Callable[[int], Chosen]:
    return lambda point: dict.fromkeys(units, chains[point])


def _fixed(size_and_loss: tuple[int, int], chosen: Chosen) -> _Curve:
    size, loss = size_and_loss
    return _Curve(np.array([size]), np.array([loss]), lambda point: chosen)


def _prefixed(curve: _Curve, prefix: Chain) -> _Curve:
    def chosen(point: int) -> Chosen:
        return {name: prefix + chain for name, chain in curve.chosen(point).items()}

    return _Curve(curve.bytes, curve.loss, chosen)


def _sum(curves: Sequence[_Curve]) -> _Curve:
    """All of them together: their steps in order of the loss saved per byte."""
    none = np.zeros(0, dtype=np.int64)
    more = np.concatenate([none, *(np.diff(curve.bytes) for curve in curves)])
    less = np.concatenate([none, *(np.diff(curve.loss) for curve in curves)])
    owner = np.repeat(np.arange(len(curves)), [len(curve.bytes) - 1 for curve in curves])
    order = np.argsort(less / more, kind="stable")
    zero = np.zeros(1, dtype=np.int64)
    size = sum(curve.bytes[0] for curve in curves) + np.cumsum(np.concatenate([zero, more[order]]))
    loss = sum(curve.loss[0] for curve in curves) + np.cumsum(np.concatenate([zero, less[order]]))
    # Equal steps of several curves are one.
    kept = np.array(knapsack.hull(size, loss), dtype=np.int64)

    def chosen(point: int) -> Chosen:
        taken = np.bincount(owner[order[: kept[point]]], minlength=len(curves))
        found: Chosen = {}
        for curve, place in zip(curves, taken, strict=True):
            found |= curve.chosen(int(place))
        return found

    return _Curve(size[kept], loss[kept], chosen)


def _either(curves: Sequence[_Curve]) -> _Curve:
    """One of them: the hull of all their corners; of equal ones the first curve's."""
    sizes = np.concatenate([curve.bytes for curve in curves])
    losses = np.concatenate([curve.loss for curve in curves])
    which = np.repeat(np.arange(len(curves)), [len(curve.bytes) for curve in curves])
    place = np.concatenate([np.arange(len(curve.bytes)) for curve in curves])
    group = knapsack.worthwhile(sizes, losses)
    kept = np.array(group.hull, dtype=np.int64)
    origin = group.index[kept]

    def chosen(point: int) -> Chosen:
        at = int(origin[point])
        return curves[int(which[at])].chosen(int(place[at]))

    return _Curve(group.bytes[kept], group.loss[kept], chosen)
