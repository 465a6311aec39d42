"""Greedy: buys what saves most loss per byte until the budget is full, then what still fits.

The plain baseline of :mod:`moesaic.search.knapsack`. All groups start at their smallest choice. The
steps along their lower convex hulls are taken in order of loss saved per byte until one does not
fit (Sinha and Zoltners 1979, "The multiple-choice knapsack problem", section 2). What is left of
the budget is then spent step by step on whatever choice saves most per byte among those that fit.

Off the best plan by no more than what the first step that does not fit would have saved: little
where there are many small groups, much where there are few large ones.
"""

from collections.abc import Sequence

from moesaic.methods.base import Chain
from moesaic.search.base import Plan, Problem
from moesaic.search.knapsack import Group, check_smallest, relaxed, worthwhile_groups


def search(problem: Problem) -> Plan:
    """A good plan within the budget, not always the best.

    Raises:
        Infeasible: even the smallest choices are too large.
        ValueError: a loss that is not finite, or ties that cannot be kept.

    Example::

        plan = search(Problem(choices, ties=[("q", "k", "v")], budget=Budget(total, fixed)))
    """
    offers = problem.groups()
    groups = worthwhile_groups(offers)
    check_smallest(problem, groups)
    picked = fill(groups, relaxed(groups, problem.budget.unit_bytes)[0], problem.budget.unit_bytes)
    chosen: dict[str, Chain] = {}
    for (units, choices), group, pick in zip(offers, groups, picked, strict=True):
        chosen |= dict.fromkeys(units, choices[int(group.index[pick])][0])
    return problem.plan(chosen)


def fill(groups: Sequence[Group], picked: Sequence[int], budget: int) -> list[int]:
    """Positions of the groups after all that still fits has been bought, the best rate first."""
    picks = list(picked)
    free = budget - sum(int(g.bytes[pick]) for g, pick in zip(groups, picks, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for number, (group, pick) in enumerate(zip(groups, picks, strict=True)):
            for higher in range(pick + 1, len(group.bytes)):
                size = int(group.bytes[higher] - group.bytes[pick])
                if size > free:
                    break
                # Equal rates: the first group, so that the same input gives the same plan.
                step = (-int(group.loss[pick] - group.loss[higher]) / size, number, higher)
                best = step if best is None or step < best else best
        if best is None:
            return picks
        _, number, higher = best
        free -= int(groups[number].bytes[higher] - groups[number].bytes[picks[number]])
        picks[number] = higher
