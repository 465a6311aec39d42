"""M-SMoE: experts are put into one order of channels before they are averaged (Li et al.,
2310.01334, section 3).

The most used experts stay and each takes in the others most like it: whose router logits over all
tokens, as vectors, make the smallest angle with its own. Intermediate channels of an expert have no
order of their own, so those of each member are first matched to those of the group's most used
one. Then weights are averaged, weighted with the number of tokens routed to each.

The paper chooses the most used experts among those of all layers at once; here each layer's number
is given.
"""

from typing import Literal

from moesaic.methods.base import option
from moesaic.methods.clustering import (
    centroid_groups,
    in_parts,
    output_similarity,
    router_similarity,
)
from moesaic.methods.merging import MergeOptions, aligned_channels, merged, merged_outline
from moesaic.methods.reduction import ExpertLayer, LayerShape, Outline, Reduction, group_shares

NEEDS = frozenset({"load", "logits_gram", "all_tokens", "cosine"})


class Options(MergeOptions):
    """Options of M-SMoE."""

    similarity: Literal["router", "outputs"] = option(
        "router",
        "what makes experts alike: their router logits, as in the paper, or the directions of their"
        " outputs",
        ["router", "outputs"],
    )
    align: bool = option(
        True, "whether members' channels are matched before they are averaged", [True, False]
    )

    @property
    def moves_channels(self) -> bool:
        return self.align


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for."""
    return merged_outline(shape, options.keep, options.router)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Merges the rarely used into the most used experts."""
    count = outline(layer.shape, options).experts
    frequency = layer.frequency.cpu()
    compare = router_similarity if options.similarity == "router" else output_similarity
    similarity = compare(layer)
    groups = in_parts(
        layer.shape,
        count,
        options.router,
        lambda part, m: centroid_groups(frequency[part], similarity[part, part], m),
    )
    channels = aligned_channels(layer, groups, frequency) if options.align else None
    shares = group_shares(frequency, groups)
    return merged(layer, groups, shares, options.router, channels=channels)
