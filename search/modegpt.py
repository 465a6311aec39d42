"""MoDeGPT's allocation: blocks that turn the hidden states little lose more.

Lin et al., MoDeGPT, 2024, 2408.09632, section 3.3 (global sparsity allocation). The influence of a
block is s = E[1 − cos(x, y)] over the calibration tokens, x and y its hidden states before and
after (ShortGPT, 2403.03853). For a mean share R the one that block i of n loses is

    removed_i = R · n · softmax(−s / ε)_i,    at most 0.8

the same for all layers of the block. Here

- ε is 0.1: the smaller, the more uneven the shares are.
- R is the least one that fits the budget; so the plan is the largest within it. Where even 0.8
  everywhere is too large, blocks go beyond that in the same way.
- A layer takes the measured choice nearest below its share, by bytes, among those that no other
  choice of it beats; its smallest where none is below. Predicted losses decide nothing else.
- Units that are tied across blocks have the mean of their influences.

Where banks may be reduced first, a bank is one layer: see :mod:`moesaic.search._shared_out`.
"""

import math
from collections.abc import Sequence

from moesaic.search._descent import Ladder, descend, ladders, plan
from moesaic.search.base import Plan, Problem

EPSILON = 0.1
# Share of a layer that is removed at most, as long as the budget can be had so.
MOST = 0.8

SHARES_OUT = True


def search(problem: Problem) -> Plan:
    """The plan of the least mean share that fits the budget.

    Raises:
        Infeasible: even the smallest choices are too large.
        ValueError: a loss that is not finite, ties that cannot be kept, or a unit of whose block
            the influence is not known.

    Example::

        layers = {"q": Layer(bytes=2048, influence=0.05), …}
        plan = search(Problem(choices, [], Budget(total, fixed), layers=layers))
    """
    groups = ladders(problem)
    influence = [_influence(problem, group.units) for group in groups]
    # Shares to within a factor common to all, which R takes up.
    weights = [math.exp((min(influence) - s) / EPSILON) for s in influence]
    return plan(problem, groups, descend(problem, groups, _due(groups, weights)))


def _influence(problem: Problem, units: Sequence[str]) -> float:
    found = []
    for unit in units:
        known = problem.layers[unit].influence if unit in problem.layers else None
        if known is None:
            raise ValueError(f"unit {unit}: the influence of its block is not known")
        found.append(known)
    return sum(found) / len(found)


def _due(groups: Sequence[Ladder], weights: Sequence[float]) -> list[list[float]]:
    """Mean share from which on each position is forbidden, to within a common factor."""
    shares = [[group.removed(step) for step in range(len(group.bytes) - 1)] for group in groups]
    ratios = [
        [(share >= MOST, share / weight) for share in own]
        for own, weight in zip(shares, weights, strict=True)
    ]
    # What lies beyond the most that is removed comes after all else.
    within = max((ratio for own in ratios for beyond, ratio in own if not beyond), default=0.0)
    return [[ratio + within * beyond for beyond, ratio in own] for own in ratios]
