"""STUN's expert pruning: one expert of every cluster of similar ones (Lee et al., 2409.06211,
section 4; its second stage, unstructured pruning, is not part of it).

Experts are similar whose router rows are near and that the same tokens are routed to:

    d_ij = ‖r_i − r_j‖ / mean distance of two rows − λ · n_ij / √(n_i n_j)

with n_ij the tokens routed to both, n_i those routed to one. No expert is run. (The paper leaves
the scales of both terms open. These have no unit, so that λ and a threshold mean the same in every
layer.)

Agglomerative clustering under a threshold: two clusters merge if no two of their experts are
farther apart than the threshold, nearest first. A layer is cut where the wanted number of clusters
is left; a threshold that all layers share gives each as many as it needs (:func:`global_keeps`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moesaic.methods.base import MethodOptions, option
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    LayerView,
    Outline,
    Reduction,
    is_open,
    keep_option,
    kept_experts,
    open_outline,
    prune,
    unreached,
    window_option,
)

NEEDS = frozenset({"load", "coactivation"})


class Options(MethodOptions):
    """Options of STUN."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()
    coactivation: float = option(
        0.0,
        "λ: how much it counts for similarity that two experts are used by the same tokens",
        [0.0, 1.0],
        ge=0,
    )
    window: int = window_option()
    representative: Literal["load", "weights"] = option(
        "load",
        "which expert of a cluster stays: the one with most tokens, or the one nearest to the mean"
        " of their weights, as in the paper",
        ["load", "weights"],
    )


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, with a router row each; at least so many with a window."""
    count = kept_experts(shape, options.keep)
    if is_open(options):
        count = open_outline(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def allot(layers: Mapping[str, LayerView], options: Options) -> dict[str, int]:
    """How many experts each layer keeps under one threshold for all; see :func:`global_keeps`."""
    inputs = {
        name: (layer.router["weight"], layer.stats["coactivation"], layer.stats["load"])
        for name, layer in layers.items()
    }
    shapes = {name: layer.shape for name, layer in layers.items()}
    return global_keeps(inputs, shapes, float(options.keep), options.coactivation)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps one expert per cluster; every routing group is clustered on its own."""
    shape, stats = layer.shape, layer.stats
    count = kept_experts(shape, options.keep)
    distance = distances(
        layer.router["weight"], stats["coactivation"], stats["load"], options.coactivation
    )
    kept = []
    size = shape.experts // shape.routing_groups
    for start in range(0, shape.experts, size):
        merges = agglomerate(distance[start : start + size, start : start + size])
        for members in clusters(merges, size, count // shape.routing_groups):
            experts = [start + member for member in members]
            kept.append(_representative(layer, experts, options.representative))
    return prune(layer, sorted(kept), unreached(layer))


def distances(router: Tensor, coactivation: Tensor, load: Tensor, weight: float) -> Tensor:
    """The distance d of the module's docstring, float64 ``[E, E]`` on the CPU.

    Args:
        router: rows ``[E, H]``.
        coactivation: tokens routed to both of two experts ``[E, E]``.
        load: tokens routed to each expert ``[sources, E]``.
        weight: λ.
    """
    rows = router.double().cpu()
    experts = len(rows)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = apart.sum() / max(experts * (experts - 1), 1)
    tokens = load.double().cpu().sum(0)
    together = coactivation.double().cpu() / (tokens[:, None] * tokens).sqrt().clamp_min(1)
    return apart / mean.clamp_min(torch.finfo(torch.float64).tiny) - weight * together


Merge = tuple[float, int, int]


def agglomerate(distance: Tensor) -> list[Merge]:
    """The E − 1 merges of complete linkage, nearest first: (height, a, b), a < b.

    Clusters are called by their first expert: b joins a. Heights never fall. Of equally near pairs
    the first comes first.

    Args:
        distance: symmetric, ``[E, E]``; the diagonal does not count.
    """
    experts = len(distance)
    far = distance.clone().fill_diagonal_(torch.inf)
    merges = []
    for _ in range(experts - 1):
        first, second = divmod(int(far.argmin()), experts)
        merges.append((float(far[first, second]), first, second))
        # The distance of two clusters is that of their farthest experts; b is gone: infinitely far.
        far[first] = torch.maximum(far[first], far[second])
        far[second] = torch.inf
        far[:, first] = far[first]
        far[:, second] = torch.inf
    return merges


def clusters(merges: Sequence[Merge], experts: int, count: int) -> list[list[int]]:
    """The clusters when ``count`` are left, each and all in the order of their experts."""
    found = {expert: [expert] for expert in range(experts)}
    for _, first, second in merges[: experts - count]:
        found[first] = sorted(found[first] + found.pop(second))
    return [found[first] for first in sorted(found)]


def _representative(layer: ExpertLayer, experts: list[int], rule: str) -> int:
    """The expert that stands for a cluster.

    Two experts are equally near to their mean: of such, the one with most tokens, then the first.
    """
    if len(experts) > 2 and rule == "weights":
        off = _distances_from_mean(layer, experts)
        nearest = (off <= off.min() * (1 + 1e-6)).tolist()
        experts = [expert for expert, near in zip(experts, nearest, strict=True) if near]
    return experts[int(layer.frequency[experts].argmax())]


def _distances_from_mean(layer: ExpertLayer, experts: list[int]) -> Tensor:
    """Squared distance of each expert's weights from the mean of all, float64 ``[experts]``."""
    off = torch.zeros(len(experts), dtype=torch.float64)
    for weight in layer.weights.values():
        mean = torch.zeros_like(weight[experts[0]], dtype=torch.float32)
        for expert in experts:
            mean += weight[expert].float() / len(experts)
        for number, expert in enumerate(experts):
            off[number] += (weight[expert].float() - mean).square().sum().item()
    return off


def global_keeps(
    layers: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    shapes: Mapping[str, LayerShape],
    keep: float,
    coactivation: float,
) -> dict[str, int]:
    """How many experts each layer keeps under one threshold for all: more where they differ more.

    The threshold is the least at which ``keep`` of all experts are left, to the nearest number that
    the layers can make up. A layer with routing groups keeps as many of each as the group with most
    clusters needs; none goes below its least number of rows. Where equal heights lie on both sides,
    the layers that come first are cut first.

    All merges are sorted by their heights, which finds the threshold without a search.

    Args:
        layers: name → router rows ``[E, H]``, coactivation ``[E, E]``, load ``[sources, E]``.
        shapes: of the same layers.
        keep: share of all experts.
        coactivation: λ.

    Raises:
        ValueError: the share is none, or less than all layers need, in one line.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep:g} is no share of the experts: above 0, at most 1.0")
    keeps, floors = {}, {}
    steps = []  # (height, number of the layer, its name): one expert less per group
    for number, (name, (router, together, load)) in enumerate(layers.items()):
        shape = shapes[name]
        groups = shape.routing_groups
        size = shape.experts // groups
        distance = distances(router, together, load, coactivation)
        heights = [
            [height for height, _, _ in agglomerate(distance[at : at + size, at : at + size])]
            for at in range(0, shape.experts, size)
        ]
        keeps[name] = shape.experts
        floors[name] = -(-max(shape.least, shape.top_k) // groups) * groups
        possible = (shape.experts - floors[name]) // groups
        steps += [(max(each), number, name) for each in list(zip(*heights, strict=True))[:possible]]
    total = sum(keeps.values())
    target, least = keep * total, sum(floors.values())
    if target < least:
        raise ValueError(
            f"keep: {keep:g} of {total} experts is {target:g}, but the layers need {least}"
        )
    for _, _, name in sorted(steps):
        step = shapes[name].routing_groups
        if abs(total - step - target) >= abs(total - target):
            break
        keeps[name] -= step
        total -= step
    return keeps
