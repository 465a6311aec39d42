"""REAP: drops the experts whose gated outputs are smallest (Lasby et al., 2510.13999, section 4).

An expert's saliency is the mean of g·‖f‖ over the tokens routed to it, with the model's own gates
g. Its router row goes with it, and the gates of the others are renormalised as the model does.
"""

from moesaic.methods.base import MethodOptions
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    Outline,
    Reduction,
    keep_option,
    kept_experts,
    prune,
    top_experts,
    unreached,
)

NEEDS = frozenset({"load", "gated_norm"})


class Options(MethodOptions):
    """Options of REAP."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, with a router row each."""
    count = kept_experts(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the most salient experts; one that no token reached has saliency 0."""
    count = kept_experts(layer.shape, options.keep)
    saliency = layer.stats["gated_norm"].double() / layer.frequency.clamp_min(1)
    return prune(layer, top_experts(layer.shape, saliency, count), unreached(layer))
