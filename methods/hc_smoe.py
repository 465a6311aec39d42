"""HC-SMoE: merges experts of like outputs, hierarchically (Chen et al., 2410.08589, section 3).

An expert is its mean output over all sampled tokens, whether they are routed to it or not. The two
groups of experts of least mean Euclidean distance (average linkage) are joined until as many are
left as asked for. A group becomes the mean of its members, weighted with the number of tokens
routed to each.
"""

from moesaic.methods.clustering import output_groups
from moesaic.methods.merging import MergeOptions, frequency_average, merged_outline
from moesaic.methods.reduction import ExpertLayer, LayerShape, Outline, Reduction

NEEDS = frozenset({"load", "all_tokens", "all_sum"})


class Options(MergeOptions):
    """Options of HC-SMoE."""


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for."""
    return merged_outline(shape, options.keep, options.router)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Merges experts of like mean outputs."""
    count = outline(layer.shape, options).experts
    groups = output_groups(layer, count, options.router, "linkage")
    return frequency_average(layer, groups, options.router)
