"""ASVD's rank search: one threshold on what each choice costs alone, for all layers.

Yuan et al., ASVD, 2023, 2312.05821, section 3.4 (sensitivity-based truncation rank search, STRS).
The *sensitivity* of a layer at a ratio is what the model loses when that layer alone is cut to it.
All layers × ratios are sorted by sensitivity, and the threshold is bisected until the budget holds:
every layer takes its smallest choice whose sensitivity is at most the threshold, or its best one
where none is. Steps of equal sensitivity are taken in model order. What a threshold takes is known
here from sums, so that the steps can be counted off instead of bisected; the result is the same.

ASVD measures a perplexity per layer and ratio. Here the sensitivity is the predicted loss of each
measured choice (``Measurement.loss``): a second-order estimate of the KL, or, where no gradients
were collected, the relative error of the layer's output. It need not be a rank that makes choices
smaller: bits will do. The size of a layer does not count, which is what knapsack does better: a
loss is as bad where it saves a megabyte as where it saves a kilobyte.

Where banks may be reduced first, a bank is one layer: see :mod:`moesaic.search._shared_out`.
"""

from moesaic.search._descent import descend, ladders, plan
from moesaic.search.base import Plan, Problem

SHARES_OUT = True


def search(problem: Problem) -> Plan:
    """The plan of the lowest threshold that fits the budget.

    Raises:
        Infeasible: even the smallest choices are too large.
        ValueError: a loss that is not finite, or ties that cannot be kept.

    Example::

        plan = search(Problem(choices, ties=[("q", "k", "v")], budget=Budget(total, fixed)))
    """
    groups = ladders(problem)
    return plan(problem, groups, descend(problem, groups, [group.loss[1:] for group in groups]))
