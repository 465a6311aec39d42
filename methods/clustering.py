"""Groups of experts, by what calibration knows of them.

Every way gives exactly as many groups as asked for, none of them empty, members rising, groups in
the order of their first members, and the same ones every time; equal experts are no obstacle.

SciPy and scikit-learn are imported where they are used: they take long to start, and this folder is
imported whole.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.methods.base import option
from moesaic.methods.reduction import ExpertLayer, LayerShape, open_outline

Groups = list[list[int]]
Grouping = Literal["linkage", "kmeans"]

# Starts of k-means, the best of which counts.
_STARTS = 10


def grouping_option(default: Grouping) -> Any:
    """The option that says how experts of like outputs are found."""
    return option(
        default,
        "how experts are grouped: average linkage of their mean outputs (as HC-SMoE does) or"
        " k-means++ of their outputs' directions (as Sub-MoE does)",
        ["linkage", "kmeans"],
    )


def in_parts(
    shape: LayerShape, count: int, router: str, find: Callable[[slice, int], Groups]
) -> Groups:
    """``count`` groups of all experts; of each routing group alone where rows are merged with them.

    Args:
        router: ``map`` leaves the router's rows and so its groups as they are; otherwise each
            routing group must be left with equally many rows, of its own experts.
        find: ``(which experts, number of groups) -> groups``, experts counted from the first.
    """
    parts = 1 if router == "map" else shape.routing_groups
    size = shape.experts // parts
    groups: Groups = []
    for start in range(0, shape.experts, size):
        found = find(slice(start, start + size), count // parts)
        groups += [[start + member for member in group] for group in found]
    return sorted(groups)


def output_groups(layer: ExpertLayer, count: int, router: str, grouping: Grouping) -> Groups:
    """Groups of experts with like outputs; needs ``all_tokens`` and, by the way of grouping,
    ``all_sum`` (linkage) or ``cosine`` (k-means)."""
    if grouping == "linkage":
        features = mean_outputs(layer)
        distance = torch.cdist(
            features, features, compute_mode="donot_use_mm_for_euclid_dist"
        ).fill_diagonal_(0)
        return in_parts(
            layer.shape, count, router, lambda part, m: linkage_groups(distance[part, part], m)
        )
    features = embedding(output_similarity(layer))
    weights = layer.frequency.cpu().clamp_min(1)
    return in_parts(
        layer.shape, count, router, lambda part, m: kmeans_groups(features[part], m, weights[part])
    )


# What experts are compared by; all in float64 on the CPU


def mean_outputs(layer: ExpertLayer) -> Tensor:
    """Mean output of each expert over all sampled tokens, ``[E, H]``."""
    return _sum(layer, "all_sum") / _sum(layer, "all_tokens").clamp_min(1)


def output_similarity(layer: ExpertLayer) -> Tensor:
    """Mean over all sampled tokens of the cosine between two experts' outputs, ``[E, E]``."""
    return _sum(layer, "cosine") / _sum(layer, "all_tokens").clamp_min(1)


def router_similarity(layer: ExpertLayer) -> Tensor:
    """Cosine between two experts' router logits as vectors over all tokens, ``[E, E]``."""
    gram = _sum(layer, "logits_gram")
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)
    return (gram / scale).clamp(-1, 1)


def embedding(gram: Tensor) -> Tensor:
    """Points ``[n, n]`` with these inner products, ``[n, n]``, which have to be possible ones.

    Of mean cosines: squared distances of the points are mean squared distances of the experts'
    outputs scaled to length 1, so k-means of the points is k-means of those outputs over all
    sampled tokens, none of which has to be kept.
    """
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    points: Tensor = vectors * values.clamp_min(0).sqrt()
    return points


def _sum(layer: ExpertLayer, name: str) -> Tensor:
    return layer.stats[name].double().cpu()


# Ways of grouping


def linkage_groups(distance: Tensor, count: int) -> Groups:
    """Average linkage: joins the two groups of least mean distance until ``count`` are left.

    Args:
        distance: ``[n, n]``, symmetric with a diagonal of zeros.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    size = len(distance)
    found = {member: [member] for member in range(size)}
    if count < size:
        joins = linkage(squareform(distance.numpy(), checks=False), "average")
        # Cut by number: a cut at a height gives too few groups where heights are equal.
        for step, (first, second, _, _) in enumerate(joins[: size - count]):
            found[size + step] = found.pop(int(first)) + found.pop(int(second))
    return sorted(sorted(group) for group in found.values())


def kmeans_groups(
    features: Tensor, count: int, weights: Tensor | None = None, seed: int = 0
) -> Groups:
    """k-means, started with k-means++ several times.

    Where there are fewer different points than groups, the group that is spread most gives away
    its farthest member until there are enough.

    Args:
        features: ``[n, d]``.
        weights: how much each point counts, ``[n]``, positive; alike if left out.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    points = features.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points than groups: see above
        found = KMeans(count, n_init=_STARTS, random_state=seed).fit(
            points, sample_weight=None if weights is None else weights.numpy()
        )
    labels = found.labels_.tolist()
    groups = [[m for m, label in enumerate(labels) if label == own] for own in sorted(set(labels))]
    while len(groups) < count:
        offs = [(features[group] - features[group].mean(0)).square().sum(1) for group in groups]
        _, _, widest = max(
            (float(off.sum()), len(off), -number) for number, off in enumerate(offs) if len(off) > 1
        )
        group, off = groups[-widest], offs[-widest].tolist()
        _, farthest = max((value, place) for place, value in enumerate(off))
        groups.append([group.pop(farthest)])
    return sorted(groups)


def centroid_groups(scores: Tensor, similarity: Tensor, count: int, most: int = 1) -> Groups:
    """The experts of the ``count`` highest scores, each with others that are like it.

    The centroids, highest score first, take in the experts most like them that are still free,
    until their group has ``most`` members. Those that are left go to the centroid most like them:
    all of them where ``most`` is 1.

    Args:
        scores: ``[n]``; of equal ones the earlier expert comes first.
        similarity: ``[n, n]``.
    """
    order = sorted(range(len(scores)), key=lambda m: (-float(scores[m]), m))
    groups = {centroid: [centroid] for centroid in order[:count]}
    free = sorted(order[count:])
    for centroid, group in groups.items():
        near = similarity[centroid, free].sort(descending=True, stable=True).indices
        taken = [free[place] for place in near[: most - 1].tolist()]
        group += taken
        free = [member for member in free if member not in taken]
    for member in free:
        groups[max(groups, key=lambda c: (float(similarity[c, member]), -c))].append(member)
    return sorted(sorted(group) for group in groups.values())


def merge_costs(similarity: Tensor, load: Tensor) -> list[float]:
    """What the first, second, … merge of a layer's experts adds to the loss within groups.

    Ward's criterion for experts at points whose inner products are ``similarity``: two groups of
    weights a and b at distance d cost a·b/(a + b)·d². Weights are shares of all routed tokens, so
    that layers can be compared; an expert that nobody meets costs nothing.

    Args:
        similarity: mean cosines of the experts' outputs, ``[E, E]``.
        load: tokens routed to each expert, ``[sources, E]``.

    Returns:
        E − 1 costs, none below the one before it.
    """
    inner = similarity.double().cpu()
    square = inner.diagonal()
    apart = (square[:, None] + square[None, :] - 2 * inner).clamp_min(0)
    tokens = load.double().cpu().sum(0)
    weight = tokens / tokens.sum().clamp_min(1)
    costs: list[float] = []
    left = list(range(len(inner)))
    while len(left) > 1:
        own = weight[left]
        both = own[:, None] + own[None, :]
        cost = own[:, None] * own[None, :] / both.clamp_min(1e-300) * apart[left][:, left]
        cost.fill_diagonal_(torch.inf)
        first, second = divmod(int(cost.argmin()), len(left))
        costs.append(max(float(cost[first, second]), costs[-1] if costs else 0.0))
        a, b = left[first], left[second]
        total = float(weight[a] + weight[b])
        shares = (float(weight[a]) / total, float(weight[b]) / total) if total else (0.5, 0.5)
        # Squared distances from the joint mean (Lance & Williams 1967).
        apart[a] = shares[0] * apart[a] + shares[1] * apart[b] - shares[0] * shares[1] * apart[a, b]
        apart[:, a] = apart[a]
        apart[a, a] = 0.0
        weight[a] = total
        left.remove(b)
    return costs


def cheapest_merges(
    costs: Mapping[str, Sequence[float]], shapes: Mapping[str, LayerShape], keep: float
) -> dict[str, int]:
    """Groups per layer when the cheapest merges of all layers are made until ``keep`` is left.

    Of equal costs those of earlier layers come first. Layers with routing groups lose as many
    experts at a time as there are groups.

    Raises:
        ValueError: the share is none, or less than all layers need, in one line.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep:g} is no share of the experts: above 0, at most 1.0")
    left = {name: shape.experts for name, shape in shapes.items()}
    floors = {name: open_outline(shape, 1.0) for name, shape in shapes.items()}
    target = round(keep * sum(left.values()))
    if target < sum(floors.values()):
        raise ValueError(
            f"keep: {keep:g} of {sum(left.values())} experts is {target}, but the layers need"
            f" {sum(floors.values())}"
        )
    steps = []
    for number, (name, shape) in enumerate(shapes.items()):
        each = shape.routing_groups
        for step in range((shape.experts - floors[name]) // each):
            charged = list(costs[name][step * each : (step + 1) * each])
            steps.append((sum(charged) / each, number, name))
    for _, _, name in sorted(steps):
        step = shapes[name].routing_groups
        if sum(left.values()) - step < target:
            continue
        left[name] -= step
    return left
