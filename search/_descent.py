"""What allocations share that make every group smaller step by step until the budget holds.

A group of tied units stands on its *ladder*: the choices that no other one beats, the largest
first. All groups start at the top. A strategy says when each step is due; steps are taken in that
order until the plan fits. That finds what a bisection of the strategy's parameter would: of all
plans on its way down the largest one within the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.methods.base import Chain, chain_text
from moesaic.search.base import Infeasible, Plan, Problem


@dataclass(frozen=True)
class Ladder:
    """The choices of a group that no other choice of it beats: bytes fall, losses rise.

    Attributes:
        units: the tied units.
        chains, bytes, loss: of each choice, summed over the units.
        dense_bytes: of the units as the original has them; of the largest choice measured, where
            that is not known.
    """

    units: tuple[str, ...]
    chains: list[Chain]
    bytes: list[int]
    loss: list[float]
    dense_bytes: int

    def removed(self, step: int) -> float:
        """Share of the dense bytes that the choice at a position does without."""
        return 1 - self.bytes[step] / max(self.dense_bytes, 1)


def ladders(problem: Problem) -> list[Ladder]:
    """The ladder of every group, in model order.

    Raises:
        ValueError: a loss that is not finite, or ties that cannot be kept.
    """
    found = []
    for units, offers in problem.groups():
        for chain, _, loss in offers:
            if not math.isfinite(loss):
                raise ValueError(f"unit {units[0]}: the loss of {chain_text(chain)} is {loss}")
        kept: list[tuple[Chain, int, float]] = []
        # Stable: of equal choices the first stays first.
        for offer in sorted(offers, key=lambda offer: offer[1:]):
            if not kept or offer[2] < kept[-1][2]:
                kept.append(offer)
        kept.reverse()
        largest = max(size for _, size, _ in offers)
        known = all(unit in problem.layers for unit in units)
        dense = sum(problem.layers[unit].bytes for unit in units) if known else largest
        chains, sizes, losses = (list(column) for column in zip(*kept, strict=True))
        found.append(Ladder(units, chains, sizes, losses, dense))
    return found


def smallest_bytes(problem: Problem, groups: Sequence[Ladder], last: Sequence[int]) -> int:
    """Bytes of the plan in which every group has come down to its position ``last``."""
    sizes = (group.bytes[step] for group, step in zip(groups, last, strict=True))
    return problem.budget.fixed_bytes + sum(sizes)


def descend(
    problem: Problem,
    groups: Sequence[Ladder],
    due: Sequence[Sequence[float]],
    together: bool = False,
) -> list[int]:
    """Position of every group on its ladder after the fewest steps that fit the budget.

    Args:
        due: per group, when it leaves each position for the next, never falling; a group stays
            where its numbers end.
        together: take all steps that are due at once; else one by one, in model order.

    Raises:
        Infeasible: the plan after all steps is too large; names its bytes.
    """
    limit = problem.budget.total_bytes
    smallest = smallest_bytes(problem, groups, [len(when) for when in due])
    if smallest > limit:
        raise Infeasible(f"the smallest plan has {smallest:,} bytes, the budget is {limit:,} bytes")
    at = [0] * len(groups)
    size = smallest_bytes(problem, groups, at)
    last: float | None = None
    steps = sorted((time, number) for number, when in enumerate(due) for time in when)
    for time, number in steps:
        if size <= limit and not (together and time == last):
            break
        group, here = groups[number], at[number]
        size += group.bytes[here + 1] - group.bytes[here]
        at[number], last = here + 1, time
    return at


def plan(problem: Problem, groups: Sequence[Ladder], at: Sequence[int]) -> Plan:
    """The plan with every group at its position."""
    return problem.plan(
        {u: group.chains[step] for group, step in zip(groups, at, strict=True) for u in group.units}
    )
