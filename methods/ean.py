"""EAN: drops the experts of the smallest summed activation norm.

From Jaiswal et al., 2504.05586; a baseline of REAP (Lasby et al., 2510.13999, section 5). An
expert's score is the sum of ‖f‖ over the tokens routed to it: large where it is used much, or
says much. Gates do not enter.
"""

from moesaic.methods.pruning import PruneOptions, keep_best, pruned_outline
from moesaic.methods.reduction import ExpertLayer, Reduction

NEEDS = frozenset({"load", "norm"})


class Options(PruneOptions):
    """Options of EAN."""


outline = pruned_outline


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the experts of the largest summed norm ``[E]``; no token, no norm."""
    return keep_best(layer, layer.stats["norm"], options)
