"""Plans drawn at random near a budget: what scores are compared on, and trusted by none of them.

Every group of tied units is given a random importance, every choice of it a random factor, and the
loss falls by four per bit whatever was measured. A price per byte, bisected, brings the plan to its
size. So plans of one size differ in where their bits are, and no score has a hand in it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesaic.methods.base import Chain
from moesaic.search.base import Plan, Problem

# Sizes are between these factors of the budget's bytes for units.
SMALLEST, LARGEST = 0.95, 1.05
# Standard deviations of the logarithms of importances (a bit is 1.4) and of factors.
_IMPORTANCE, _FACTOR = 1.4, 0.7
_BISECTIONS = 60
# Draws for each plan that is wanted; plans that came before do not count.
_DRAWS = 20


def random_plans(problem: Problem, count: int, seed: int) -> list[Plan]:
    """Distinct plans, ``count`` of them or as many as are found.

    Raises:
        ValueError: ties that cannot be kept, or alternatives that are still to be picked.
    """
    groups = problem.groups()
    sizes = [np.array([size for _, size, _ in offers], dtype=np.float64) for _, offers in groups]
    # Dense bytes of each group, which stand for 16 bits.
    dense = [
        float(sum(problem.layers[unit].bytes for unit in units))
        if all(unit in problem.layers for unit in units)
        else float(size.max())
        for (units, _), size in zip(groups, sizes, strict=True)
    ]
    low, high = (sum(float(pick(size)) for size in sizes) for pick in (np.min, np.max))
    random = np.random.default_rng(seed)
    found: dict[tuple[int, ...], Plan] = {}
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        factor = math.exp(random.uniform(math.log(SMALLEST), math.log(LARGEST)))
        target = min(max(problem.budget.unit_bytes * factor, low), high)
        losses = [
            np.exp(random.normal(0, _IMPORTANCE) + random.normal(0, _FACTOR, len(size)))
            * whole
            * 4.0 ** (-16 * size / max(whole, 1.0))
            for size, whole in zip(sizes, dense, strict=True)
        ]
        picked = _at_size(sizes, losses, target)
        if picked not in found:
            found[picked] = problem.plan(_chosen(groups, picked))
    return list(found.values())


def _at_size(
    sizes: Sequence[NDArray[np.float64]], losses: Sequence[NDArray[np.float64]], target: float
) -> tuple[int, ...]:
    """The choice of each group at the highest size within the target that a price leads to."""

    def at(price: float) -> tuple[int, ...]:
        pairs = zip(sizes, losses, strict=True)
        return tuple(int(np.argmin(loss + price * size)) for size, loss in pairs)

    cheap, dear = -40.0, 40.0  # logarithms of prices
    picked = at(math.exp(dear))
    for _ in range(_BISECTIONS):
        middle = (cheap + dear) / 2
        tried = at(math.exp(middle))
        if sum(size[i] for size, i in zip(sizes, tried, strict=True)) <= target:
            dear, picked = middle, tried
        else:
            cheap = middle
    return picked


def _chosen(
    groups: Sequence[tuple[tuple[str, ...], Sequence[tuple[Chain, int, float]]]],
    picked: Sequence[int],
) -> dict[str, Chain]:
    chosen: dict[str, Chain] = {}
    for (units, offers), index in zip(groups, picked, strict=True):
        chosen |= dict.fromkeys(units, offers[index][0])
    return chosen
