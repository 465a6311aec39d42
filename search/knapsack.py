"""Exact multiple-choice knapsack: the plan of least total loss that fits the budget.

Every group of tied units takes one of its choices; the total of bytes may not exceed the budget and
the total of losses is to be least. The search goes in three steps.

1. *Relaxation.* If choices may be mixed, a price λ per byte decides alone: every group takes its
   choice of least loss + λ·bytes. The steps along the groups' lower convex hulls, taken in order
   of loss saved per byte, reach the budget at the right λ. All groups on their side of the budget
   are the *base*. A choice costs over its group's base

       reduced cost = (loss − base loss) + λ · (bytes − base bytes) ≥ 0,

   and no plan is better than base + its reduced costs + λ · (bytes it leaves unused).
2. *Dynamic programming* over the groups, those with the smallest reduced costs first (Pisinger
   1995, "A minimal algorithm for the multiple-choice knapsack problem", section 3). A state is what
   the groups seen so far have changed against the base, the others standing at their base:

       excess   bytes over the budget, negative where bytes are free
       change   of the loss

   States that another one beats in both are dropped. So is a state whose *bound* is above the best
   plan known: its reduced costs so far, and for what it is off the budget the cheapest rate at
   which a group still to come could mend that.
3. It ends when no state is left that could still become better.

Losses are counted in a power of two, at most 2⁻⁶⁰ of the largest possible total, so that sums are
exact and equal is equal; only the bounds are floats, and two plans whose losses differ by less than
2⁻⁴⁹ of that total count as equal. Of equally good plans the one with fewer bytes is taken; what is
still undecided goes by the order of units and candidates, always the same way.

Measured losses leave few states (thousands for 6,000 groups of 20 choices). Losses that are a
linear function of the bytes, which no measurement gives, leave so many that the search stops with
an error instead of filling the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.methods.base import Chain, chain_text
from moesaic.search.base import Infeasible, Plan, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# The largest possible total loss is below two to this power in the units that losses are counted
# in.
_LOSS_BITS = 61
# A bound's rounding error in those units: a few products of 61 bits in floats of 53.
_ROUNDING = float(2**12)
# A rate that no group offers.
_NEVER = 1e200
# States remembered in all, 6 bytes each.
_MOST_STATES = 200_000_000


@dataclass(frozen=True)
class Group:
    """The choices of one group that no other choice of it beats, bytes rising, losses falling.

    Attributes:
        index: position of each choice among the group's offers.
        bytes, loss: of each choice.
        hull: positions of the choices on the lower convex hull.
    """

    index: Ints
    bytes: Ints
    loss: Ints
    hull: list[int]


def search(problem: Problem) -> Plan:
    """The plan of least predicted loss within the budget.

    Raises:
        Infeasible: even the smallest choices are too large.
        RuntimeError: too many nearly equal plans to tell the best (see the module's docstring).
        ValueError: a loss that is not finite, or ties that cannot be kept.

    Example::

        plan = search(Problem(choices, ties=[("q", "k", "v")], budget=Budget(total, fixed)))
    """
    offers = problem.groups()
    groups = worthwhile_groups(offers)
    check_smallest(problem, groups)
    picked = solve(groups, problem.budget.unit_bytes)
    chosen: dict[str, Chain] = {}
    for (units, choices), group, pick in zip(offers, groups, picked, strict=True):
        chosen |= dict.fromkeys(units, choices[int(group.index[pick])][0])
    return problem.plan(chosen)


def check_smallest(problem: Problem, groups: Sequence[Group]) -> None:
    """Raises Infeasible, naming the smallest plan, where even that exceeds the budget."""
    smallest, budget = sum(int(group.bytes[0]) for group in groups), problem.budget
    if smallest > budget.unit_bytes:
        raise Infeasible(
            f"the smallest plan has {smallest + budget.fixed_bytes:,} bytes,"
            f" the budget is {budget.total_bytes:,} bytes"
        )


def worthwhile_groups(
    offers: list[tuple[tuple[str, ...], list[tuple[Chain, int, float]]]],
) -> list[Group]:
    """Every group's worthwhile choices with losses as whole numbers.

    Raises:
        ValueError: a loss that is not finite.
    """
    largest = 0.0
    for units, choices in offers:
        for chain, _, loss in choices:
            if not math.isfinite(loss):
                raise ValueError(f"unit {units[0]}: the loss of {chain_text(chain)} is {loss}")
        largest += max(abs(loss) for _, _, loss in choices)
    scale = loss_scale(largest)
    return [
        worthwhile([size for _, size, _ in choices], [round(x * scale) for _, _, x in choices])
        for _, choices in offers
    ]


def loss_scale(largest: float) -> float:
    """What losses are multiplied with to count them in whole numbers.

    Args:
        largest: no total of losses is larger.
    """
    # A power of two keeps floats as they are: what sums to the same before does so after.
    return math.ldexp(1.0, min(_LOSS_BITS - math.frexp(largest)[1], 1023)) if largest else 1.0


def worthwhile(sizes: Sequence[int] | Ints, losses: Sequence[int] | Ints) -> Group:
    """The choices of a group that no other one beats; losses are whole numbers."""
    sizes = np.asarray(sizes, dtype=np.int64)
    losses = np.asarray(losses, dtype=np.int64)
    order = np.lexsort((losses, sizes))  # stable: of equal choices the first stays first
    order = order[improves(losses[order])]
    return Group(order, sizes[order], losses[order], hull(sizes[order], losses[order]))


def improves(losses: Ints) -> NDArray[np.bool_]:
    """Which entries are smaller than all before them."""
    keep = np.ones(len(losses), dtype=bool)
    keep[1:] = losses[1:] < np.minimum.accumulate(losses)[:-1]
    return keep


def hull(sizes: Ints, losses: Ints) -> list[int]:
    """Positions on the lower convex hull of falling points."""
    points = [(int(size), int(loss)) for size, loss in zip(sizes, losses, strict=True)]
    corners: list[int] = []
    for position, (size, loss) in enumerate(points):
        while len(corners) > 1:
            (s0, l0), (s1, l1) = points[corners[-2]], points[corners[-1]]
            if (l0 - l1) * (size - s1) > (l1 - loss) * (s1 - s0):
                break
            corners.pop()
        corners.append(position)
    return corners


def solve(
    groups: Sequence[Group],
    budget: int,
    widest: int | None = None,
    most_moves: int | None = None,
) -> list[int]:
    """Position of each group's choice; the smallest choices fit.

    Args:
        widest: keep no more partial plans than so many, the most promising ones, after each group:
            bounds the time, but what comes out need not be the best.
        most_moves: stop with an error after looking at so many moves.

    Raises:
        RuntimeError: too many nearly equal plans to tell the best.
    """
    base, price = relaxed(groups, budget)
    free = budget - sum(int(g.bytes[pick]) for g, pick in zip(groups, base, strict=True))
    if price == 0.0:
        return base  # every group has its best choice
    return _Programme(groups, base, price, free, widest, most_moves).run()


def relaxed(groups: Sequence[Group], budget: int) -> tuple[list[int], float]:
    """The base, which fits, and λ: steps along the hulls until the next one does not fit.

    λ is 0 where all steps fit.
    """
    steps = []
    for number, group in enumerate(groups):
        for low, high in zip(group.hull, group.hull[1:], strict=False):
            size = int(group.bytes[high] - group.bytes[low])
            rate = int(group.loss[low] - group.loss[high]) / size
            steps.append((-rate, number, high, size))
    steps.sort()
    base = [0] * len(groups)
    free = budget - sum(int(group.bytes[0]) for group in groups)
    for negative, number, high, size in steps:
        if size > free:
            return base, -negative
        base[number], free = high, free - size
    return base, 0.0


@dataclass(frozen=True)
class _Moves:
    """What a group can do instead of its base choice.

    Attributes:
        group: number of the group.
        picks: the choices, the base first.
        bytes, loss: change against the base.
        reduced: reduced costs; 0 for the base.
    """

    group: int
    picks: Ints
    bytes: Ints
    loss: Ints
    reduced: Floats


class _Programme:
    """The dynamic programme; see the module's docstring."""

    def __init__(
        self,
        groups: Sequence[Group],
        base: list[int],
        price: float,
        free: int,
        widest: int | None,
        most_moves: int | None,
    ) -> None:
        self.widest = widest
        self.moves_left = most_moves
        self.base = base
        self.price = price
        self.free = free
        moves = [
            _moves(number, group, pick, price)
            for number, (group, pick) in enumerate(zip(groups, base, strict=True))
            if len(group.bytes) > 1
        ]
        self.moves = sorted(moves, key=lambda m: (m.reduced[1:].min(), m.group))
        self.saving, self.leaving = self._rates()
        # The best plan known: its state, and the stage and place where that stands.
        self.best_change, self.best_excess = 0, -free
        self.found = (0, 0)
        # Per stage and state: the state that it came from and the move that led to it.
        self.history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []

    def _rates(self) -> tuple[Floats, Floats]:
        """Per stage: least cost of a byte saved, or left or spent, by the groups still to come."""
        saving = np.full(len(self.moves) + 1, _NEVER)
        leaving = np.full(len(self.moves) + 1, self.price)  # bytes may stay unused
        for stage, move in enumerate(self.moves):
            rate = move.reduced[1:] / np.abs(move.bytes[1:])
            less = move.bytes[1:] < 0
            saving[stage] = rate[less].min(initial=_NEVER)
            leaving[stage] = rate[~less].min(initial=self.price)
        return _suffix_minima(saving), _suffix_minima(leaving)

    def run(self) -> list[int]:
        """Position of each group's choice in the best plan."""
        excess = np.array([-self.free], dtype=np.int64)
        change = np.zeros(1, dtype=np.int64)
        states = 0
        for stage, move in enumerate(self.moves):
            excess, change = self._advance(stage, move, excess, change)
            states += len(excess)
            if states > _MOST_STATES:
                raise RuntimeError(
                    f"knapsack: more than {_MOST_STATES:,} partial plans after {stage + 1} of"
                    f" {len(self.moves)} groups: losses nearly proportional to bytes decide nothing"
                )
            if not len(excess):
                break
        return self._trace()

    def _reduced(self, excess: Ints, change: Ints) -> Floats:
        reduced: Floats = np.maximum(change + self.price * (excess + self.free), 0.0)
        return reduced

    def _hopeful(self, reduced: Floats, bound: Floats) -> NDArray[np.bool_]:
        """Which states can still end with less loss, or as little in fewer bytes.

        At the same loss a plan has fewer bytes exactly if its reduced costs are lower.
        """
        level = self.best_change + self.price * self.free
        best_reduced = level + self.price * self.best_excess
        fewer = reduced < best_reduced - _ROUNDING
        hopeful: NDArray[np.bool_] = bound < np.where(fewer, level + _ROUNDING, level - _ROUNDING)
        return hopeful

    def _advance(self, stage: int, move: _Moves, excess: Ints, change: Ints) -> tuple[Ints, Ints]:
        """All states with all moves of one group, without those that cannot become the best."""
        reduced = self._reduced(excess, change)
        least = reduced.min() + move.reduced
        useful = np.flatnonzero(self._hopeful(least, least))
        if self.moves_left is not None:
            self.moves_left -= len(reduced) * len(useful)
            if self.moves_left < 0:
                raise RuntimeError(f"knapsack: too many moves at stage {stage + 1}")
        total = reduced[:, None] + move.reduced[useful]
        states, picks = np.nonzero(self._hopeful(total, total))
        picks = useful[picks]
        excess, change = excess[states] + move.bytes[picks], change[states] + move.loss[picks]
        over = np.where(excess > 0, self.saving[stage + 1], self.leaving[stage + 1])
        reduced = self._reduced(excess, change)
        bound = reduced + over * np.abs(excess)
        order = np.flatnonzero(self._hopeful(reduced, bound))
        order = order[np.lexsort((change[order], excess[order]))]
        order = order[improves(change[order])]
        if self.widest is not None and len(order) > self.widest:
            order = order[np.sort(np.argsort(bound[order], kind="stable")[: self.widest])]
        excess, change = excess[order], change[order]
        self.history.append((states[order].astype(np.int32), picks[order].astype(np.int16)))
        self._remember(excess, change)
        return excess, change

    def _remember(self, excess: Ints, change: Ints) -> None:
        """Takes the best plan of a stage if it is better than the best known."""
        last = int(np.searchsorted(excess, 0, side="right")) - 1
        if last < 0:
            return
        # Losses fall as bytes rise: the last state that fits is the best of its stage.
        found = int(change[last]), int(excess[last])
        if found < (self.best_change, self.best_excess):
            self.best_change, self.best_excess = found
            self.found = (len(self.history), last)

    def _trace(self) -> list[int]:
        """The choices that led to the best plan."""
        picked = list(self.base)
        stage, state = self.found
        while stage > 0:
            stage -= 1
            states, picks = self.history[stage]
            move = self.moves[stage]
            picked[move.group] = int(move.picks[picks[state]])
            state = int(states[state])
        return picked


def _suffix_minima(values: Floats) -> Floats:
    """Of every position, the smallest value from there to the end."""
    return np.minimum.accumulate(values[::-1])[::-1]


def _moves(number: int, group: Group, base: int, price: float) -> _Moves:
    picks = np.array([base] + [p for p in range(len(group.bytes)) if p != base], dtype=np.int64)
    sizes = group.bytes[picks] - group.bytes[base]
    losses = group.loss[picks] - group.loss[base]
    reduced = np.maximum(losses + price * sizes, 0.0)
    return _Moves(number, picks, sizes, losses, reduced)
