"""What reducers that keep the experts of the highest scores have in common."""

from torch import Tensor

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


class PruneOptions(MethodOptions):
    """Options of every reducer that keeps the best experts."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def pruned_outline(shape: LayerShape, options: PruneOptions) -> Outline:
    """As many experts as asked for, with a router row each."""
    count = kept_experts(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def keep_best(layer: ExpertLayer, scores: Tensor, options: PruneOptions) -> Reduction:
    """Keeps the experts of the highest ``scores [E]``."""
    count = kept_experts(layer.shape, options.keep)
    return prune(layer, top_experts(layer.shape, scores, count), unreached(layer))
