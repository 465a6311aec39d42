"""Sub-MoE: merging in the subspace that a group's weights share (Li et al., 2506.23266, section 3).

Groups are found by k-means++ on the experts' outputs at all sampled tokens, each scaled to length
1: the mean token-wise cosines are their inner products, whose embedding has the same distances.
Experts count by the tokens routed to them (the paper does not say): where no two are alike, all
groupings are equally good without, and the busiest experts may be merged with each other.

The weights W_i [out, in] of a group, side by side along the input axis, have one singular value
decomposition [W_1 … W_n] = U Σ [V_1 … V_n]ᵀ. U is shared, the V_i are averaged with the shares f_i
of the tokens routed to each, and the first r singular values stay:

    W = U_r Σ_r (Σ f_i V_i)ᵀ = U_r U_rᵀ · Σ f_i W_i

because Σ_r V_iᵀ = U_rᵀ W_i. So at full rank W is the frequency-weighted mean itself, and U comes
from the eigenvectors of Σ W_i W_iᵀ, [out, out], without the long matrix.

Whitened († in the paper): the weights are W_i S_i, with S_i S_iᵀ the second moments C_i of expert
i's inputs, and V_i is mapped back with S_i⁻¹. That cancels, Σ_r V_i'ᵀ S_i⁻¹ = U_rᵀ W_i: only U
differs, which now comes from Σ W_i C_i W_iᵀ, and no C_i is ever factored or inverted. C_i sums over
the sampled tokens that the router gives to expert i, so that busy experts count for more, plus a
small multiple of the identity, which orders the directions that the sample leaves open.

Only groups of more than one expert are truncated. The result is stored as full matrices: a rank
below 1 leaves out what members do not share, it saves nothing by itself.

The paper shares out the number of groups over two layers at a time, by a rule that it does not
give. With a ``window`` of layers, each merge is charged what it adds to the sum of squares within
groups (Ward's criterion on the same distances, weighted with the tokens that meet the expert), and
the cheapest merges of the window are made.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.methods.base import Event, option
from moesaic.methods.clustering import Groups, cheapest_merges, merge_costs, output_groups
from moesaic.methods.merging import MergeOptions, mean_weights, merged, merged_outline
from moesaic.methods.reduction import (
    ExpertLayer,
    LayerShape,
    LayerView,
    Outline,
    Reduction,
    group_shares,
    is_open,
    open_outline,
    window_option,
)

NEEDS = frozenset({"load", "all_tokens", "cosine"})

# Multiple of the identity that is added to second moments, over their mean diagonal.
RIDGE = 0.01


class Options(MergeOptions):
    """Options of Sub-MoE."""

    rank: float = option(
        1.0,
        "singular values of a group's common decomposition that stay: their share; at 1.0 the"
        " result is the frequency-weighted mean",
        [1.0, 0.875, 0.75],
        gt=0,
        le=1,
    )
    window: int = window_option()
    whiten: bool = option(
        False,
        "whether the decomposition heeds what experts' inputs are like; of no effect at rank 1.0",
        [False, True],
    )


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, of full width; at least so many with a window."""
    keep = open_outline(shape, options.keep) if is_open(options) else options.keep
    return merged_outline(shape, keep, options.router)


def allot(layers: Mapping[str, LayerView], options: Options) -> dict[str, int]:
    """How many groups each layer gets, their sum being ``keep`` of all experts."""
    costs = {
        name: merge_costs(layer.stats["cosine"] / layer.stats["all_tokens"], layer.stats["load"])
        for name, layer in layers.items()
    }
    shapes = {name: layer.shape for name, layer in layers.items()}
    return cheapest_merges(costs, shapes, float(options.keep))


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Merges experts of like outputs, in their common subspace."""
    count = outline(layer.shape, options).experts
    groups = output_groups(layer, count, options.router, "kmeans")
    shares = group_shares(layer.frequency, groups)
    if options.rank == 1 or count == layer.shape.experts:
        return merged(layer, groups, shares, options.router)
    weights = mean_weights(layer, groups, shares)
    routed = _routed(layer) if options.whiten else []
    for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
        if len(group) == 1:
            continue
        inputs = _inputs(layer, group, routed) if options.whiten else {}
        for name, weight in layer.weights.items():
            members = [weight[expert].double() for expert in group]
            mean = union_mean(members, share, options.rank, inputs.get(name))
            weights[name][number] = mean.to(weight.dtype)
    events = _few_tokens(layer, groups, routed) if options.whiten else []
    return merged(layer, groups, shares, options.router, weights, events=events)


def union_mean(
    weights: list[Tensor], share: Tensor, rank: float, inputs: list[Tensor] | None = None
) -> Tensor:
    """Mean of a group's weights in their common subspace, float64 ``[out, in]``.

    Args:
        weights: the members', float64 ``[out, in]``.
        share: of the members in the mean, ``[members]``.
        rank: share of min(out, members · in) singular values that stay, at least one.
        inputs: the members', ``[tokens, in]`` each, for the whitened variant.
    """
    out, width = weights[0].shape
    gram = torch.zeros(out, out, dtype=torch.float64, device=weights[0].device)
    mean = torch.zeros_like(weights[0])
    for number, weight in enumerate(weights):
        mean.add_(weight, alpha=float(share[number]))
        if inputs is None:
            gram.addmm_(weight, weight.T)
            continue
        x = inputs[number].double()
        energy = float(x.square().sum()) / width or 1.0
        y = x @ weight.T
        gram.addmm_(y.T, y)
        gram.addmm_(weight, weight.T, alpha=RIDGE * energy)
    full = min(out, len(weights) * width)
    kept = max(1, round(rank * full))
    basis: Tensor = torch.linalg.eigh(gram).eigenvectors[:, out - kept :]  # largest come last
    return basis @ (basis.T @ mean)


def _routed(layer: ExpertLayer) -> list[Tensor]:
    """Of each expert, the sampled tokens that the router gives to it, ``[tokens, H]``."""
    x = layer.stats["sample"].to(layer.weights["gate"].device)
    chosen, _ = layer.gating(x, layer.router)
    return [x[(chosen == expert).any(1)] for expert in range(layer.shape.experts)]


def _inputs(layer: ExpertLayer, group: list[int], routed: list[Tensor]) -> dict[str, list[Tensor]]:
    """Inputs of each member's weights at its own tokens, ``[tokens, in]``."""
    own = [routed[expert] for expert in group]
    middle = [layer.middle(expert, x) for expert, x in zip(group, own, strict=True)]
    return {"gate": own, "up": own, "down": middle}


def _few_tokens(layer: ExpertLayer, groups: Groups, routed: list[Tensor]) -> list[Event]:
    """An event if the samples of some group cannot fill its second moments."""
    tokens = min(sum(len(routed[e]) for e in group) for group in groups if len(group) > 1)
    width = max(layer.shape.hidden, layer.shape.width)
    if tokens >= width:
        return []
    text = f"whitened with {tokens} sampled tokens, inputs have up to {width} dimensions"
    return [Event("few_tokens", text, value=tokens)]
