"""REAP: drops the experts whose gated outputs are smallest (Lasby et al., 2510.13999, section 4).

An expert's saliency is the mean of g·‖f‖ over the tokens routed to it, with the model's own gates
g. Its router row goes with it, and the gates of the others are renormalised as the model does.
"""

from moesaic.methods.pruning import PruneOptions, keep_best, pruned_outline
from moesaic.methods.reduction import ExpertLayer, Reduction

NEEDS = frozenset({"load", "gated_norm"})


class Options(PruneOptions):
    """Options of REAP."""


outline = pruned_outline


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the most salient experts; one that no token reached has saliency 0."""
    saliency = layer.stats["gated_norm"].double() / layer.frequency.clamp_min(1)
    return keep_best(layer, saliency, options)
