"""MergeMoE: merges experts' outputs, not their weights (Miao et al., 2510.14436).

A group's new expert shall give the mean of its members' outputs, weighted with the shares f_j of
the tokens routed to each. Gate and up are the weighted means of the members'. With them the new
expert's intermediate values at the sampled tokens are P [I, T]; the members' own are Q_j. The down
projection is refitted to what the members together give there:

    W_D' = [f_1 W_D1 … f_n W_Dn] · Q · P⁺

This is solved for the change from the weighted mean W̄_D, in float64:

    W_D' = W̄_D + R Pᵀ (P Pᵀ + λI)⁻¹,    R = Σ f_j W_Dj Q_j − W̄_D P

which is the same where the sample determines W_D' and λ = 0. Where it does not (fewer tokens than
channels), the paper's is zero in all directions that the sample leaves open and this one keeps the
mean. For every λ the error on the sample is at most that of the mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.methods.base import Event, option
from moesaic.methods.clustering import Grouping, grouping_option, output_groups
from moesaic.methods.merging import MergeOptions, mean_weights, merged, merged_outline
from moesaic.methods.reduction import (
    ExpertLayer,
    LayerShape,
    Outline,
    Reduction,
    group_mean,
    group_shares,
)

NEEDS = frozenset({"load", "all_tokens", "all_sum", "cosine"})

# Eigenvalues of P Pᵀ below this share of the largest are rounding of P, which is in float32.
CUTOFF = 1e-12


class Options(MergeOptions):
    """Options of MergeMoE."""

    grouping: Grouping = grouping_option("linkage")
    ridge: float = option(
        0.1,
        "λ over the mean of P Pᵀ's diagonal: how much the sample has to say before the down"
        " projection leaves the members' mean",
        [0.01, 0.1, 1.0],
        ge=0,
    )


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for."""
    return merged_outline(shape, options.keep, options.router)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Averages gate and up of each group and refits down."""
    count = outline(layer.shape, options).experts
    groups = output_groups(layer, count, options.router, options.grouping)
    shares = group_shares(layer.frequency, groups)
    if count == layer.shape.experts:
        return merged(layer, groups, shares, options.router)
    weights = mean_weights(layer, groups, shares)
    x = layer.stats["sample"].to(weights["gate"].device)
    biases = {name: group_mean(bias, groups, shares) for name, bias in layer.biases.items()}
    new = Reduction(weights=weights, biases=biases, router=layer.router, groups=groups)
    average = new.applied(layer)
    ranks = []
    for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
        if len(group) == 1:
            continue
        wanted = torch.zeros(len(x), layer.shape.hidden, dtype=torch.float64, device=x.device)
        mean = torch.zeros_like(layer.weights["down"][0], dtype=torch.float64)
        for expert, part in zip(group, share.tolist(), strict=True):
            if part > 0:
                down = layer.weights["down"][expert].double()
                wanted.addmm_(layer.middle(expert, x).double(), down.T, alpha=part)
                mean.add_(down, alpha=part)
        fit = refit(average.middle(number, x).double(), wanted, mean, options.ridge)
        weights["down"][number] = fit.weight.to(weights["down"].dtype)
        ranks.append(fit.rank)
    return merged(
        layer, groups, shares, options.router, weights, events=_open_directions(layer, ranks)
    )


@dataclass(frozen=True)
class Fit:
    """A refitted projection: ``weight``, float64 ``[out, in]``, and how many of its input
    directions the sample determines."""

    weight: Tensor
    rank: int


def refit(inputs: Tensor, wanted: Tensor, mean: Tensor, ridge: float) -> Fit:
    """The weight nearest to ``mean`` that gives ``wanted``, in the sense of the module's docstring.

    Args:
        inputs: Pᵀ, float64 ``[T, in]``.
        wanted: float64 ``[T, out]``.
        mean: float64 ``[out, in]``.
        ridge: λ over the mean of P Pᵀ's diagonal.
    """
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    strong = values > CUTOFF * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = values[strong], vectors[:, strong]
    penalty = ridge * float(values.sum()) / inputs.shape[1]
    miss = wanted - inputs @ mean.T
    change = (miss.T @ inputs) @ (vectors / (values + penalty)) @ vectors.T
    return Fit(mean + change, int(strong.sum()))


def _open_directions(layer: ExpertLayer, ranks: list[int]) -> list[Event]:
    """An event if the sample does not determine some group's down projection."""
    width = layer.shape.width
    least = min(ranks)
    if least == width:
        return []
    short = sum(rank < width for rank in ranks)
    text = (
        f"{len(layer.stats['sample'])} sampled tokens determine {least} of {width} directions of"
        f" merged down projections, in {short} of {len(ranks)} groups not all"
    )
    return [Event("few_tokens", text, value=least)]
