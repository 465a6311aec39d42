"""MAN: drops the experts whose outputs are smallest on average (Liu et al., 2606.15716).

An expert's score is the mean of ‖f‖ over the tokens routed to it, however many they are and
whatever their gates: REAP without gates, EAN without the load.
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
    """Options of MAN."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, with a router row each."""
    count = kept_experts(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the experts of the largest mean norm ``[E]``; one that no token reached has 0."""
    count = kept_experts(layer.shape, options.keep)
    mean = layer.stats["norm"].double() / layer.frequency.clamp_min(1)
    return prune(layer, top_experts(layer.shape, mean, count), unreached(layer))
