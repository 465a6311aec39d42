"""Plain merging, the baseline of all others: experts of like outputs become their mean, weighted
with the number of tokens routed to each.

Grouped by linkage it is HC-SMoE (2410.08589); grouped by k-means it is Sub-MoE at full rank
(2506.23266).
"""

from moesaic.methods import merging
from moesaic.methods.clustering import Grouping, grouping_option, output_groups
from moesaic.methods.merging import MergeOptions, merged_outline
from moesaic.methods.reduction import ExpertLayer, LayerShape, Outline, Reduction

NEEDS = frozenset({"load", "all_tokens", "all_sum", "cosine"})


class Options(MergeOptions):
    """Options of the plain average."""

    grouping: Grouping = grouping_option("linkage")


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for."""
    return merged_outline(shape, options.keep, options.router)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Averages gate, up and down of each group."""
    count = outline(layer.shape, options).experts
    groups = output_groups(layer, count, options.router, options.grouping)
    return merging.frequency_average(layer, groups, options.router)
