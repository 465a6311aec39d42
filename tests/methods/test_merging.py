"""Reducers that merge: groups, alignment, subspaces, refits, and what the papers say of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.methods import merge_moe, merging, ream, sub_moe
from moesaic.methods.base import Spec, is_reducer
from moesaic.methods.clustering import (
    centroid_groups,
    embedding,
    in_parts,
    kmeans_groups,
    linkage_groups,
    mean_outputs,
    output_groups,
    output_similarity,
    router_similarity,
)
from moesaic.methods.reduction import (
    ExpertLayer,
    LayerShape,
    Reduction,
    group_shares,
    mixture,
    reducer_module,
)
from tests.methods.layers import make_layer, statistics

MERGERS = ("frequency_average", "hc_smoe", "m_smoe", "merge_moe", "ream", "sub_moe")
# Options with which a merger groups experts of like outputs.
BY_OUTPUT: dict[str, dict[str, Any]] = {name: {} for name in MERGERS} | {
    "m_smoe": {"similarity": "outputs"},
    "ream": {"group_size": 2},
}
MEMBERS = ("gate", "up", "down")
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def run(name: str, layer: ExpertLayer, **options: Any) -> Reduction:
    module = reducer_module(name)
    parsed: Any = Spec.of(name, options).parsed()
    reduction = module.reduce(layer, parsed)
    assert module.outline(layer.shape, parsed) == reduction.outline
    return reduction


def pairs(noise: float = 0.0) -> Callable[..., None]:
    """Makes every second expert, with its router row, like the one before it."""

    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        for value in [*weights.values(), *router.values()]:
            value[1::2] = value[::2] + noise * value[1::2]

    return change


def shuffled_pairs(orders: Tensor) -> Callable[..., None]:
    """The same exactly, but with the channels of every second expert in another order."""

    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        pairs()(weights, router)
        for expert in range(1, len(orders), 2):
            for name in ("gate", "up"):
                weights[name][expert] = weights[name][expert][orders[expert]]
            weights["down"][expert] = weights["down"][expert][:, orders[expert]]

    return change


def with_odd_experts_rare(layer: ExpertLayer) -> ExpertLayer:
    """Of every pair the second matters less: two equal ones would both be centroids."""
    layer.stats["load"][:, 1::2] = 1
    layer.stats["gated_norm"][1::2] = 1e-3
    return layer


def error(layer: ExpertLayer, reduction: Reduction, x: Tensor | None = None) -> float:
    """Relative error of the layer's output."""
    x = layer.stats["sample"] if x is None else x
    dense = mixture(layer, None, x)
    return float((mixture(layer, reduction, x) - dense).norm() / dense.norm())


def correlated(tokens: int, hidden: int, seed: int = 0) -> Tensor:
    """Tokens whose directions differ in strength by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    x = torch.randn(tokens, hidden, generator=generator) * torch.logspace(1, -1, hidden)
    return x @ turn


# Groups


def clustered_points(generator: torch.Generator) -> tuple[Tensor, list[list[int]]]:
    """Three groups of 30 points, far from each other."""
    label = torch.randint(3, (30,), generator=generator)
    centres = 10 * torch.eye(3, 5, dtype=torch.float64)
    points = centres[label] + torch.randn(30, 5, generator=generator, dtype=torch.float64)
    groups = [[m for m in range(30) if label[m] == k] for k in range(3)]
    return points, sorted(groups)


@pytest.mark.parametrize("seed", range(5))
def test_clear_clusters_are_found_by_every_way_of_grouping(seed: int) -> None:
    points, expected = clustered_points(torch.Generator().manual_seed(seed))
    distance = torch.cdist(points, points).fill_diagonal_(0)
    scores = torch.zeros(30)
    scores[[group[-1] for group in expected]] = 1.0
    assert linkage_groups(distance, 3) == expected
    assert kmeans_groups(points, 3) == expected
    assert kmeans_groups(embedding(points @ points.T), 3) == expected
    assert centroid_groups(scores, -distance, 3) == expected


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("kinds", [1, 2, 7])
def test_groups_are_as_many_as_asked_for_whatever_points_are_equal(kinds: int, count: int) -> None:
    points = (torch.arange(7) % kinds)[:, None].double() * torch.ones(3, dtype=torch.float64)
    distance = torch.cdist(points, points).fill_diagonal_(0)
    for groups in (
        linkage_groups(distance, count),
        kmeans_groups(points, count),
        centroid_groups(points[:, 0], -distance, count),
        centroid_groups(points[:, 0], -distance, count, most=2),
    ):
        assert len(groups) == count and all(groups)
        assert sorted(member for group in groups for member in group) == list(range(7))
        assert groups == sorted(sorted(group) for group in groups)


def test_average_linkage_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    distance = torch.cdist(points, points).fill_diagonal_(0)
    groups = [[member] for member in range(9)]
    while len(groups) > 1:
        assert linkage_groups(distance, len(groups)) == sorted(groups)
        near = min(
            (float(distance[a][:, b].mean()), i, j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups)
            if i < j
        )
        joined = sorted(groups[near[1]] + groups[near[2]])
        groups = [g for k, g in enumerate(groups) if k not in near[1:]] + [joined]


def test_centroids_fill_up_in_the_order_of_their_scores() -> None:
    scores = torch.tensor([1.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    similarity = torch.eye(6, dtype=torch.float64)
    similarity[0, 1:] = torch.tensor([0.9, 0.0, 0.8, 0.7, 0.6])
    similarity[2, [1, 3, 4, 5]] = torch.tensor([0.5, 0.4, 0.65, 0.1], dtype=torch.float64)
    assert centroid_groups(scores, similarity, 2) == [[0, 1, 3, 4, 5], [2]]
    assert centroid_groups(scores, similarity, 2, most=3) == [[0, 3, 5], [1, 2, 4]]
    assert centroid_groups(scores, similarity, 2, most=2) == [[0, 1, 3, 5], [2, 4]]


def test_embedding_keeps_mean_distances_of_outputs() -> None:
    layer = make_layer()
    points = embedding(output_similarity(layer))
    unit = torch.nn.functional.normalize(
        torch.stack(list(layer.outputs(layer.stats["sample"]))).double(), dim=-1
    )
    expected = (unit[:, None] - unit).square().sum(-1).mean(-1)
    torch.testing.assert_close(torch.cdist(points, points).square(), expected, atol=1e-5, rtol=0)


def test_what_experts_are_compared_by_equals_brute_force() -> None:
    layer = make_layer(kind="biased")
    x = layer.stats["sample"]
    expected = torch.stack([y.mean(0) for y in layer.outputs(x)]).double()
    torch.testing.assert_close(mean_outputs(layer), expected, atol=1e-5, rtol=0)
    logits = (x @ layer.router["weight"].T + layer.router["bias"]).double()
    unit = logits / logits.norm(dim=0)
    torch.testing.assert_close(router_similarity(layer), unit.T @ unit, atol=1e-5, rtol=0)


def test_parts_are_the_routing_groups_only_where_rows_are_merged() -> None:
    shape = LayerShape(experts=8, width=1, hidden=1, top_k=2, routing_groups=2)
    seen: list[tuple[slice, int]] = []

    def find(part: slice, count: int) -> list[list[int]]:
        seen.append((part, count))
        return [list(range(part.stop - part.start))]

    assert in_parts(shape, 4, "map", find) == [list(range(8))]
    assert in_parts(shape, 4, "mean", find) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen == [(slice(0, 8), 4), (slice(0, 4), 2), (slice(4, 8), 2)]


# All mergers


@pytest.mark.parametrize("name", ["clustering", "merging"])
def test_shared_code_is_no_reducer(name: str) -> None:
    assert not is_reducer(name)


@pytest.mark.parametrize("name", MERGERS)
def test_identical_experts_merge_without_loss(name: str) -> None:
    layer = make_layer(change=pairs(), kind="biased")
    for bias in layer.biases.values():
        bias[1::2] = bias[::2]
    layer.stats.sums.update(statistics(layer, layer.stats["sample"]).sums)
    with_odd_experts_rare(layer)
    for router in ("map", "mean"):
        reduction = run(name, layer, keep=0.5, router=router, **BY_OUTPUT[name])
        assert reduction.groups == PAIRS
        # With a map, gates of both copies add up; without one, a token reaches others instead.
        assert (error(layer, reduction) < 1e-4) == (router == "map")


@pytest.mark.parametrize("name", MERGERS)
def test_router_map_leads_from_each_row_to_its_group(name: str) -> None:
    layer = make_layer()
    reduction = run(name, layer, keep=5)
    assert reduction.expert_map is not None and reduction.expert_map.dtype == torch.int64
    for number, group in enumerate(reduction.groups):
        assert {int(reduction.expert_map[expert]) for expert in group} == {number}
    assert all(torch.equal(reduction.router[k], layer.router[k]) for k in layer.router)


@pytest.mark.parametrize(
    ("name", "router"), [*((name, "mean") for name in MERGERS), ("ream", "centroid")]
)
def test_merged_rows_stay_in_their_routing_groups(name: str, router: str) -> None:
    layer = make_layer(kind="grouped")
    reduction = run(name, layer, keep=0.5, router=router)
    assert reduction.outline.ordinary
    assert reduction.router["weight"].shape == (4, layer.shape.hidden)
    assert reduction.router["correction"].shape == (4,)
    sides = [{expert // 4 for expert in group} for group in reduction.groups]
    assert sides == [{0}, {0}, {1}, {1}]
    assert 0 < error(layer, reduction) < 2
    with pytest.raises(ValueError, match="keep: 5 experts do not divide"):
        run(name, layer, keep=5, router=router)


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("router", ["map", "mean"])
def test_nothing_merged_is_an_ordinary_layer(name: str, router: str) -> None:
    layer = make_layer(kind="biased")
    reduction = run(name, layer, keep=8, router=router)
    assert reduction.outline.ordinary
    assert all(torch.equal(reduction.weights[k], layer.weights[k]) for k in layer.weights)


@pytest.mark.parametrize("name", MERGERS)
def test_an_expert_alone_keeps_its_weights(name: str) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    reduction = run(name, layer, keep=6)
    alone = [(m, group[0]) for m, group in enumerate(reduction.groups) if len(group) == 1]
    assert alone
    for new, old in alone:
        assert all(torch.equal(reduction.weights[k][new], layer.weights[k][old]) for k in MEMBERS)


@pytest.mark.parametrize("name", MERGERS)
def test_a_member_without_tokens_leaves_its_group_as_it_was(name: str) -> None:
    layer = with_odd_experts_rare(make_layer(change=pairs(0.1)))
    layer.stats["load"][:, 3] = 0
    layer.stats["gated_norm"][3] = 0
    reduction = run(name, layer, keep=0.5, **BY_OUTPUT[name])
    new = list(reduction.groups).index([2, 3])
    order = torch.arange(12) if reduction.channels is None else reduction.channels[2]
    assert torch.equal(order, torch.arange(12))
    for member in MEMBERS:
        torch.testing.assert_close(reduction.weights[member][new], layer.weights[member][2])
    assert "unreached_experts" in {event.kind for event in reduction.events}


@pytest.mark.parametrize("name", MERGERS)
def test_a_layer_without_any_token_is_averaged_evenly(name: str) -> None:
    layer = make_layer(change=pairs(0.1))
    empty = {key: torch.zeros_like(value) for key, value in layer.stats.sums.items()}
    empty["sample"] = empty["sample"][:0]
    layer.stats.sums.update(empty)
    reduction = run(name, layer, keep=0.5, router="mean")
    for new, group in enumerate(reduction.groups):
        mean = layer.router["weight"][list(group)].mean(0)
        torch.testing.assert_close(reduction.router["weight"][new], mean)
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


# Averages


@pytest.mark.parametrize("grouping", ["linkage", "kmeans"])
def test_frequency_average_equals_brute_force(grouping: str) -> None:
    layer = make_layer(kind="biased", change=pairs(0.2))
    reduction = run("frequency_average", layer, keep=0.5, router="mean", grouping=grouping)
    for new, group in enumerate(reduction.groups):
        share = layer.frequency[list(group)]
        share = share / share.sum()
        for old, merged in (
            *((layer.weights[k], reduction.weights[k]) for k in MEMBERS),
            *((layer.biases[k], reduction.biases[k]) for k in MEMBERS),
            *((layer.router[k], reduction.router[k]) for k in layer.router),
        ):
            mean = sum(f * old[e].double() for f, e in zip(share, group, strict=True))
            torch.testing.assert_close(merged[new].double(), mean, rtol=1e-6, atol=1e-6)


def test_hc_smoe_is_the_average_of_linked_outputs() -> None:
    layer = make_layer()
    first, second = run("hc_smoe", layer), run("frequency_average", layer)
    assert first.groups == second.groups == output_groups(layer, 6, "map", "linkage")
    assert all(torch.equal(first.weights[k], second.weights[k]) for k in MEMBERS)


# Sub-MoE


def group_of(
    members: int, out: int, width: int, seed: int = 0, tokens: int = 0
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Weights of a group, its shares and its inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(out, width, generator=generator, dtype=torch.float64)
    weights = [
        common + torch.randn(out, width, generator=generator, dtype=torch.float64)
        for _ in range(members)
    ]
    share = torch.rand(members, generator=generator, dtype=torch.float64)
    inputs = [correlated(tokens, width, seed).double()] * members
    return weights, share / share.sum(), inputs


def literal_union(
    weights: list[Tensor], share: Tensor, kept: int, roots: list[Tensor] | None = None
) -> Tensor:
    """Sub-MoE as the paper writes it: one decomposition of the long matrix, V averaged.

    Args:
        roots: S_i, for the whitened variant.
    """
    parts = [w if roots is None else w @ roots[i] for i, w in enumerate(weights)]
    left, values, right = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    each = list(right[:kept].split(weights[0].shape[1], dim=1))
    if roots is not None:
        each = [v @ torch.linalg.inv(s) for v, s in zip(each, roots, strict=True)]
    mean = sum((f * v for f, v in zip(share, each, strict=True)), torch.zeros_like(each[0]))
    return (left[:, :kept] * values[:kept]) @ mean


@pytest.mark.parametrize(("out", "width"), [(12, 17), (17, 12), (40, 11)])
def test_sub_moe_at_full_rank_is_the_frequency_average(out: int, width: int) -> None:
    weights, share, inputs = group_of(3, out, width, tokens=100)
    mean = sum(f * w for f, w in zip(share, weights, strict=True))
    full = min(out, 3 * width)
    for found in (
        literal_union(weights, share, full),
        sub_moe.union_mean(weights, share, 1.0),
        sub_moe.union_mean(weights, share, 1.0, inputs),
    ):
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("out", "width"), [(12, 17), (17, 12), (40, 11)])
def test_sub_moe_truncated_is_the_papers_decomposition(out: int, width: int) -> None:
    weights, share, inputs = group_of(3, out, width, tokens=100)
    kept = round(0.4 * min(out, 3 * width))
    plain = literal_union(weights, share, kept)
    torch.testing.assert_close(sub_moe.union_mean(weights, share, 0.4), plain, rtol=0, atol=1e-9)
    roots = []
    for x in inputs:
        moment = x.T @ x
        moment += sub_moe.RIDGE * moment.diagonal().mean() * torch.eye(width)
        roots.append(torch.linalg.cholesky(moment))
    white = literal_union(weights, share, kept, roots)
    torch.testing.assert_close(
        sub_moe.union_mean(weights, share, 0.4, inputs), white, rtol=0, atol=1e-7
    )
    assert (white - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("seed", range(5))
def test_whitened_truncation_gives_nearer_outputs_when_inputs_are_correlated(seed: int) -> None:
    weights, share, inputs = group_of(2, 24, 32, seed, tokens=400)
    mean = sum((f * w for f, w in zip(share, weights, strict=True)), torch.zeros(24, 32))
    x = inputs[0]
    for rank in (0.25, 0.5, 0.75):
        plain = sub_moe.union_mean(weights, share, rank)
        white = sub_moe.union_mean(weights, share, rank, inputs)
        assert torch.linalg.matrix_rank(white) == torch.linalg.matrix_rank(plain) == 24 * rank
        assert (x @ (white - mean).T).norm() < 0.9 * (x @ (plain - mean).T).norm()


def test_whitened_layer_loses_less_than_a_plain_one_of_equal_rank() -> None:
    layer = make_layer(hidden=32, width=24, change=pairs(0.2), tokens=10)
    layer.stats.sums.update(statistics(layer, correlated(400, 32)).sums)
    options: dict[str, Any] = {"keep": 0.5, "rank": 0.5}
    plain, white = run("sub_moe", layer, **options), run("sub_moe", layer, whiten=True, **options)
    assert plain.groups == white.groups == PAIRS
    assert error(layer, white) < 0.9 * error(layer, plain)


def test_sub_moe_at_full_rank_skips_the_decomposition_alike() -> None:
    layer = make_layer()
    average = run("frequency_average", layer, keep=0.5, grouping="kmeans")
    for whiten in (False, True):
        full = run("sub_moe", layer, keep=0.5, whiten=whiten)
        assert all(torch.equal(full.weights[k], average.weights[k]) for k in MEMBERS)


def test_few_tokens_are_told_where_they_matter() -> None:
    layer = make_layer(tokens=7)
    index, _ = layer.gating(layer.stats["sample"], layer.router)
    white = run("sub_moe", layer, rank=0.5, whiten=True)
    groups = [torch.tensor(group) for group in white.groups if len(group) > 1]
    for found, expected in (
        (white, min(int(torch.isin(index, group).sum()) for group in groups)),
        (run("merge_moe", layer), 7),
    ):
        (event,) = [e for e in found.events if e.kind == "few_tokens"]
        assert event.value == expected
    assert "few_tokens" not in {e.kind for e in run("sub_moe", layer, rank=0.5).events}
    assert "few_tokens" not in {e.kind for e in run("merge_moe", make_layer()).events}


# Alignment


@pytest.mark.parametrize("name", ["m_smoe", "ream"])
def test_hidden_orders_of_channels_are_found_exactly(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(8)])
    layer = with_odd_experts_rare(make_layer(change=shuffled_pairs(orders)))
    reduction = run(name, layer, keep=0.5, **BY_OUTPUT[name])
    assert reduction.groups == PAIRS
    assert error(layer, reduction) < 1e-4
    assert reduction.channels is not None
    for new, group in enumerate(reduction.groups):
        for old in group:
            order = reduction.channels[old]
            assert sorted(order.tolist()) == list(range(12))
            for member in ("gate", "up"):
                expected = layer.weights[member][old][order]
                torch.testing.assert_close(reduction.weights[member][new], expected)
            expected = layer.weights["down"][old][:, order]
            torch.testing.assert_close(reduction.weights["down"][new], expected)
    # Without it, channels that have nothing to do with each other are averaged.
    if name == "m_smoe":
        plain = run(name, layer, keep=0.5, align=False, **BY_OUTPUT[name])
        assert plain.channels is None and error(layer, plain) > 0.1


def test_statistics_of_merged_channels_belong_to_the_new_ones() -> None:
    generator = torch.Generator().manual_seed(5)
    orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(8)])
    layer = with_odd_experts_rare(make_layer(change=shuffled_pairs(orders)))
    reduction = run("m_smoe", layer, keep=0.5, similarity="outputs")
    assert reduction.channels is not None
    x = layer.stats["sample"]
    for new, group in enumerate(reduction.groups):
        own = reduction.applied(layer).middle(new, x)
        for old in group:
            moved = layer.middle(old, x)[:, reduction.channels[old]]
            torch.testing.assert_close(own, moved, rtol=1e-4, atol=1e-5)


def test_alignment_moves_biases_along() -> None:
    layer = make_layer(kind="biased")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    for name in ("gate", "up"):
        layer.weights[name][1] = layer.weights[name][0][order]
        layer.biases[name][1] = layer.biases[name][0][order]
    layer.weights["down"][1] = layer.weights["down"][0][:, order]
    layer.biases["down"][1] = layer.biases["down"][0]
    groups = [[0, 1], *([expert] for expert in range(2, 8))]
    scores = torch.ones(8)
    channels = merging.aligned_channels(layer, groups, scores)
    reduction = merging.merged(
        layer, groups, group_shares(scores, groups), "map", channels=channels
    )
    assert torch.equal(channels[0], torch.arange(12))
    for name in ("gate", "up"):
        torch.testing.assert_close(reduction.biases[name][0], layer.biases[name][0])
    assert error(layer, reduction) < 1e-5


def test_alignment_is_the_best_order_of_all() -> None:
    layer = make_layer(width=4, experts=2)
    channels = merging.aligned_channels(layer, [[0, 1]], torch.tensor([0.0, 1.0]))
    assert torch.equal(channels[1], torch.arange(4))

    def distance(order: list[int]) -> float:
        total = (layer.weights["down"][0][:, order] - layer.weights["down"][1]).square().sum()
        for name in ("gate", "up"):
            total += (layer.weights[name][0][order] - layer.weights[name][1]).square().sum()
        return float(total)

    best = min(torch.cartesian_prod(*[torch.arange(4)] * 4).tolist(), key=_or_never(distance))
    assert channels[0].tolist() == best


def _or_never(distance: Callable[[list[int]], float]) -> Callable[[list[int]], float]:
    return lambda order: distance(order) if len(set(order)) == len(order) else float("inf")


def test_m_smoe_keeps_the_most_used_and_ream_the_most_salient() -> None:
    layer = make_layer()
    frequency = layer.frequency
    saliency = layer.stats["gated_norm"].double() / frequency.clamp_min(1)
    for name, scores in (("m_smoe", frequency), ("ream", saliency)):
        best = set(scores.sort(descending=True, stable=True).indices[:5].tolist())
        groups = run(name, layer, keep=5).groups
        assert {merging.leader(group, scores) for group in groups} == best


def test_ream_drops_all_rows_but_the_centroids() -> None:
    layer = make_layer(kind="biased")
    reduction = run("ream", layer, keep=5, router="centroid")
    saliency = layer.stats["gated_norm"].double() / layer.frequency.clamp_min(1)
    rows = [merging.leader(group, saliency) for group in reduction.groups]
    assert reduction.outline.ordinary
    for name, value in layer.router.items():
        assert torch.equal(reduction.router[name], value[rows])


def test_ream_similarity_lies_between_0_and_1_and_is_highest_for_copies() -> None:
    similarity = ream.combined_similarity(make_layer(change=pairs()))
    assert similarity.min() >= 0 and similarity.max() <= 1 + 1e-6
    for first, second in PAIRS:
        assert similarity[first, second] > 0.99
        others = [e for e in range(8) if e not in (first, second)]
        assert similarity[first, others].max() < 0.95


# MergeMoE


def member_outputs(layer: ExpertLayer, group: list[int], x: Tensor) -> Tensor:
    share = layer.frequency[group] / layer.frequency[group].sum()
    outputs = [f * layer.output(e, x).double() for f, e in zip(share, group, strict=True)]
    return torch.stack(outputs).sum(0)


@pytest.mark.parametrize("kind", ["softmax", "biased"])
def test_refit_equals_least_squares(kind: str) -> None:
    layer = make_layer(kind=kind, change=pairs(0.3))
    x = layer.stats["sample"]
    reduction = run("merge_moe", layer, keep=0.5, ridge=0)
    new_layer = reduction.applied(layer)
    for new, group in enumerate(reduction.groups):
        if len(group) == 1:
            continue
        share = layer.frequency[list(group)] / layer.frequency[list(group)].sum()
        inputs = new_layer.middle(new, x).double()  # Pᵀ
        # [f_1 W_D1 … f_n W_Dn] · Q · P⁺, transposed
        downs = [f * layer.weights["down"][e].double() for f, e in zip(share, group, strict=True)]
        own = torch.cat([layer.middle(e, x).double() for e in group], dim=1)
        expected = torch.linalg.lstsq(inputs, own @ torch.cat(downs, dim=1).T).solution.T
        found = reduction.weights["down"][new].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [5, 12, 200])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0])
def test_refit_is_never_worse_than_averaging_on_the_sample(tokens: int, ridge: float) -> None:
    layer = make_layer(kind="biased", change=pairs(0.3), tokens=tokens)
    x = layer.stats["sample"]
    average = run("frequency_average", layer, keep=0.5)
    refitted = run("merge_moe", layer, keep=0.5, ridge=ridge)
    assert average.groups == refitted.groups
    better = 0
    for new, group in enumerate(average.groups):
        wanted = member_outputs(layer, list(group), x) if len(group) > 1 else None
        if wanted is None or not torch.isfinite(wanted).all():  # no token reached the group
            continue
        plain, fit = (
            float((r.applied(layer).output(new, x).double() - wanted).norm())
            for r in (average, refitted)
        )
        assert fit <= plain * (1 + 1e-4)
        better += fit < 0.99 * plain
    assert better


def test_refit_keeps_the_mean_where_the_sample_says_nothing() -> None:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    wanted, mean = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    fit = merge_moe.refit(inputs, wanted, mean, 0.0)
    assert fit.rank == 5
    torch.testing.assert_close(inputs @ fit.weight.T, wanted)
    silent = torch.linalg.svd(inputs).Vh[5:]
    torch.testing.assert_close(fit.weight @ silent.T, mean @ silent.T)
    nothing = merge_moe.refit(inputs[:0], wanted[:0], mean, 0.1)
    assert nothing.rank == 0 and torch.equal(nothing.weight, mean)


def test_refit_with_a_ridge_solves_the_penalised_problem() -> None:
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, wanted, mean = random(30, 6), random(30, 4), random(4, 6)
    fit = merge_moe.refit(inputs, wanted, mean, 0.2)
    penalty = 0.2 * inputs.square().sum() / 6
    above = torch.cat([inputs, penalty.sqrt() * torch.eye(6)])
    below = torch.cat([wanted, penalty.sqrt() * mean.T])
    torch.testing.assert_close(fit.weight, torch.linalg.lstsq(above, below).solution.T)


def test_float64_work_leaves_the_layer_untouched() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    before: Mapping[str, Tensor] = {k: v.clone() for k, v in layer.weights.items()}
    frozen = replace(layer, weights=dict(layer.weights))
    for name in MERGERS:
        run(name, frozen, keep=0.5)
        assert all(torch.equal(frozen.weights[k], before[k]) for k in before)
