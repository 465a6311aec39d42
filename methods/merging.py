"""What all reducers that merge experts have in common."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moesaic.methods.base import Event, MethodOptions, option
from moesaic.methods.clustering import Groups
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    Outline,
    Reduction,
    group_mean,
    group_shares,
    keep_option,
    kept_experts,
    merge,
    prune,
    unreached,
)


class Merging(MethodOptions):
    """What tells that a reducer merges: every old expert goes into exactly one new one."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()

    @property
    def moves_channels(self) -> bool:
        """Whether a reduction that merges anything says where ``channels`` of old experts went."""
        return False


class MergeOptions(Merging):
    """Options of reducers that merge, with a choice of two routers."""

    router: Literal["map", "mean"] = option(
        "map",
        "the router of a merged layer: map keeps all rows and adds up the gates of a group; mean"
        " has one row per group, as every engine knows it",
        ["map", "mean"],
    )


def merged_outline(shape: LayerShape, keep: Keep, router: str) -> Outline:
    """As many experts as asked for; with a map, all rows stay. Where nothing is merged there is
    none, and the layer stays as it is."""
    mapped = router == "map"
    count = kept_experts(shape, keep, mapped)
    mapped = mapped and count < shape.experts
    rows = shape.experts if mapped else count
    return Outline(experts=count, width=shape.width, rows=rows, mapped=mapped)


def merged(
    layer: ExpertLayer,
    groups: Groups,
    shares: Sequence[Tensor],
    router: str,
    weights: dict[str, Tensor] | None = None,
    channels: Tensor | None = None,
    events: Sequence[Event] = (),
) -> Reduction:
    """One new expert per group; the layer as it is where each expert is a group.

    Args:
        weights: of the new experts; by default the members' means, moved along ``channels``.
        events: besides :func:`unreached`.
    """
    events = [*unreached(layer), *events]
    if len(groups) == layer.shape.experts:
        return prune(layer, range(len(groups)), events)
    if weights is None:
        weights = mean_weights(layer, groups, shares, channels)
    return merge(layer, groups, weights, shares, router, channels, events=events)


def frequency_average(layer: ExpertLayer, groups: Groups, router: str) -> Reduction:
    """Members' means, weighted with the number of tokens routed to them."""
    return merged(layer, groups, group_shares(layer.frequency, groups), router)


def mean_weights(
    layer: ExpertLayer,
    groups: Groups,
    shares: Sequence[Tensor],
    channels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted means of the members' weights, in the file's dtype.

    Args:
        shares: of the members in each group.
        channels: ``[E, I]``, old channel at each new place; None where they stay.
    """
    means = {}
    for name, weight in layer.weights.items():
        if channels is None:
            means[name] = group_mean(weight, groups, shares)
            continue
        axis = 1 if name == "down" else 0
        each = []
        for group, share in zip(groups, shares, strict=True):
            members = [
                weight[expert].index_select(axis, channels[expert].to(weight.device))
                for expert in group
            ]
            each.append(group_mean(torch.stack(members), [range(len(group))], [share])[0])
        means[name] = torch.stack(each)
    return means


def leader(group: Sequence[int], scores: Tensor) -> int:
    """The member of the highest score, the first of equal ones."""
    return max(group, key=lambda expert: (float(scores[expert]), -expert))


def aligned_channels(
    layer: ExpertLayer, groups: Groups, scores: Tensor, activations: bool = False
) -> Tensor:
    """Orders of intermediate channels in which members of a group match its leader, the one of the
    highest score; int64 ``[E, I]`` on the CPU, old channel at each new place.

    Channels are assigned to the leader's one to one (Hungarian algorithm; its time grows with I³ in
    the worst case) so that their weights are nearest in sum of squares: rows of gate and up with
    their biases, columns of down.

    Args:
        scores: ``[E]``.
        activations: instead, distances of weights, plus distances of values on the sample, each
            over their largest.
    """
    from scipy.optimize import linear_sum_assignment

    order = torch.arange(layer.shape.width).repeat(layer.shape.experts, 1)
    x = layer.stats["sample"].to(layer.weights["gate"].device)
    for group in groups:
        head = leader(group, scores)
        if len(group) == 1:
            continue
        heads = [_channel_weights(layer, head)]
        if activations:
            heads.append(layer.middle(head, x).T)
        for expert in group:
            if expert == head:
                continue
            own = _channel_weights(layer, expert)
            if activations:
                values = layer.middle(expert, x).T
                costs = [torch.cdist(a, b) for a, b in zip(heads, (own, values), strict=True)]
                tiny = torch.finfo(torch.float32).tiny
                cost = sum((c / c.max().clamp_min(tiny) for c in costs), torch.zeros(()))
            else:
                # Norms are the same whatever the order: only products matter.
                cost = -(heads[0] @ own.T)
            _, found = linear_sum_assignment(cost.double().cpu().numpy())
            order[expert] = torch.from_numpy(found)
    return order


def _channel_weights(layer: ExpertLayer, expert: int) -> Tensor:
    """All weights of each intermediate channel of an expert, float32 ``[I, 3H (+ 2)]``."""
    parts = [layer.weights["gate"][expert], layer.weights["up"][expert]]
    parts.append(layer.weights["down"][expert].T)
    if layer.biases:
        parts += [layer.biases[name][expert][:, None] for name in ("gate", "up")]
    return torch.cat([part.float() for part in parts], dim=1)
