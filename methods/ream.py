"""REAM: merges experts where REAP would drop them (Jha et al., 2604.04356, section 4).

The experts of the highest saliency by REAP, the mean of g·‖f‖ over the tokens routed to each, are
centroids. The centroids, most salient first, take in the most similar experts that are still free,
until a group is full: most stay alone, a few groups grow. Similarity is the mean of two in 0 … 1:
that of router logits over all tokens, 1 − d over the largest d, with d the distance of the
vectors scaled to length 1 (equation 5); and that of outputs, (1 + mean cosine) / 2 (equation 8).
Members' channels are matched to the centroid's by weights and by values on the sample, and averaged
with their saliency.

Three things differ from the paper. Cosines are taken over all sampled tokens, not over those that
are routed to both experts. By default all rows of the router stay and lead to the merged experts;
``router: centroid`` leaves the centroids' rows alone, as the paper does. And statistics of all
layers come from the model as it was, where the paper goes through the layers in turn.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.methods.base import option
from moesaic.methods.clustering import (
    centroid_groups,
    in_parts,
    output_similarity,
    router_similarity,
)
from moesaic.methods.merging import (
    Merging,
    aligned_channels,
    leader,
    merged,
    merged_outline,
)
from moesaic.methods.reduction import (
    ExpertLayer,
    LayerShape,
    Outline,
    Reduction,
    group_shares,
)

NEEDS = frozenset({"load", "gated_norm", "logits_gram", "all_tokens", "cosine"})


class Options(Merging):
    """Options of REAM."""

    router: Literal["map", "mean", "centroid"] = option(
        "map",
        "the router of a merged layer: map keeps all rows and adds up the gates of a group; mean"
        " has one row per group, centroid only the rows of centroids, as every engine knows it",
        ["map", "centroid"],
    )
    group_size: int = option(
        16,
        "most experts in a group, as long as all find a place; 1 lets every expert go to the"
        " centroid most like it, however many do",
        [16, 1],
        ge=1,
    )

    @property
    def moves_channels(self) -> bool:
        return True


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for."""
    return merged_outline(shape, options.keep, options.router)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Merges the less salient experts into the more salient ones."""
    count = outline(layer.shape, options).experts
    saliency = (layer.stats["gated_norm"].double() / layer.frequency.clamp_min(1)).cpu()
    similarity = combined_similarity(layer)
    groups = in_parts(
        layer.shape,
        count,
        options.router,
        lambda part, m: centroid_groups(
            saliency[part], similarity[part, part], m, options.group_size
        ),
    )
    channels = aligned_channels(layer, groups, saliency, activations=True)
    shares = group_shares(saliency, groups)
    reduction = merged(layer, groups, shares, options.router, channels=channels)
    if options.router == "centroid":
        rows = [leader(group, saliency) for group in groups]
        router = {name: value[rows] for name, value in layer.router.items()}
        reduction = replace(reduction, router=router)
    return reduction


def combined_similarity(layer: ExpertLayer) -> Tensor:
    """The similarity of the module's docstring, float64 ``[E, E]``."""
    distance = (2 - 2 * router_similarity(layer)).clamp_min(0).sqrt()
    logits = 1 - distance / distance.max().clamp_min(torch.finfo(torch.float64).tiny)
    return (logits + (1 + output_similarity(layer)) / 2) / 2
