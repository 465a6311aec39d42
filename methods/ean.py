"""EAN: drops the experts of the smallest summed activation norm.

From Jaiswal et al., 2504.05586; a baseline of REAP (Lasby et al., 2510.13999, section 5). An
expert's score is the sum of ‖f‖ over the tokens routed to it: large where it is used much, or
says much. Gates do not enter.
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

NEEDS = frozenset({"load", "norm"})


class Options(MethodOptions):
    """Options of EAN."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, with a router row each."""
    count = kept_experts(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the experts of the largest summed norm ``[E]``; no token, no norm."""
    count = kept_experts(layer.shape, options.keep)
    return prune(layer, top_experts(layer.shape, layer.stats["norm"], count), unreached(layer))
