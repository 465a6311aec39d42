"""MAN: drops the experts whose outputs are smallest on average (Liu et al., 2606.15716).

An expert's score is the mean of ‖f‖ over the tokens routed to it, however many they are and
whatever their gates: REAP without gates, EAN without the load.
"""

from moesaic.methods.pruning import PruneOptions, keep_best, pruned_outline
from moesaic.methods.reduction import ExpertLayer, Reduction

NEEDS = frozenset({"load", "norm"})


class Options(PruneOptions):
    """Options of MAN."""


outline = pruned_outline


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the experts of the largest mean norm ``[E]``; one that no token reached has 0."""
    mean = layer.stats["norm"].double() / layer.frequency.clamp_min(1)
    return keep_best(layer, mean, options)
