"""SVD-LLM v2's allocation: within a type of layer, shares removed go by 1/log of the error.

Wang et al., SVD-LLM V2, 2025, 2503.12340, section 3.1. All layers of one type (every block's
``q_proj``, say) are first cut by one target ratio R; L is then the error of a layer's output,
‖WX − ŴX‖ over the calibration tokens. The share that layer i of the type's n layers loses is

    removed_i = R · n · w_i / Σ w,    w_i = 1 / log L_i

so that R is the mean over the type. Here

- L is the Frobenius norm of the paper, √(error · norm) of the measurements, over all units of a
  tied group; where the norms are not known, relative errors stand for absolute ones.
- *Guard*: log L is negative below 1 and w without bound near it. A type whose smallest L is below
  e is scaled as a whole until that is e: w_i = 1 / (1 + log(L_i / smallest)). A layer without any
  error (left as it is, say) counts as the smallest that has one.
- L is measured at the uniform ratio that the budget allows: the least share which, removed from
  all layers, fits. Then R is the least one that fits with the w of that; so the plan is the
  largest within the budget.
- A layer takes the measured choice nearest below its share, by bytes, among those that no other
  choice of it beats; its smallest where none is below. So candidates should be many: with few,
  shares are rounded down and what is left goes unused.
- The type is a unit's name without the numbers of block and expert; units that are tied have one
  type together.

Where banks may be reduced first, a bank is one layer: see :mod:`moesaic.search._shared_out`.
"""

import math
from collections.abc import Sequence

from moesaic.search._descent import Ladder, descend, ladders, plan
from moesaic.search.base import Plan, Problem

SHARES_OUT = True


def search(problem: Problem) -> Plan:
    """The plan of the least target ratio that fits the budget.

    Raises:
        Infeasible: even the smallest choices are too large.
        ValueError: a loss or an error that is not finite, or ties that cannot be kept.

    Example::

        plan = search(Problem(choices, ties=[("q", "k", "v")], budget=Budget(total, fixed)))
    """
    groups = ladders(problem)
    uniform = descend(problem, groups, _due(groups, [1.0] * len(groups)), together=True)
    by_type: dict[tuple[str, ...], list[int]] = {}
    for number, group in enumerate(groups):
        by_type.setdefault(unit_type(group.units), []).append(number)
    weights = [1.0] * len(groups)
    for members in by_type.values():
        errors = [output_error(problem, groups[n], uniform[n]) for n in members]
        for number, weight in zip(members, shares(errors), strict=True):
            weights[number] = weight
    return plan(problem, groups, descend(problem, groups, _due(groups, weights)))


def _due(groups: Sequence[Ladder], weights: Sequence[float]) -> list[list[float]]:
    """Target ratio from which on a group's share forbids each position."""
    return [
        [group.removed(step) / weight for step in range(len(group.bytes) - 1)]
        for group, weight in zip(groups, weights, strict=True)
    ]


def unit_type(units: Sequence[str]) -> tuple[str, ...]:
    """What tied units have in common with others: their names without numbers, each once.

    Example: ``model.layers.3.mlp.experts.17.up`` → ``model.layers.mlp.experts.up``.
    """
    names = (".".join(p for p in unit.split(".") if not p.isdecimal()) for unit in units)
    return tuple(dict.fromkeys(names))


def output_error(problem: Problem, group: Ladder, step: int) -> float:
    """‖(W − Ŵ) X‖ of a group's units together, with the choice at a position.

    Raises:
        ValueError: it is not finite.
    """
    chain = group.chains[step]
    squared = 0.0
    for unit in group.units:
        found = next(m for m in problem.choices[unit] if m.chain == chain)
        squared += found.error * (1.0 if found.norm is None else found.norm)
    if not 0 <= squared < math.inf:
        raise ValueError(f"unit {group.units[0]}: its squared error is {squared}")
    return math.sqrt(squared)


def shares(errors: Sequence[float]) -> list[float]:
    """What each layer of a type loses relative to the mean, from the layers' errors."""
    smallest = min((error for error in errors if error > 0), default=1.0)
    raised = max(1.0, math.e / smallest)
    weights = [1 / math.log(max(error, smallest) * raised) for error in errors]
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]
