"""Reducers that drop experts or channels: each against a computation from the layer itself."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.methods import nystrom, slim, stun
from moesaic.methods.base import Spec
from moesaic.methods.reduction import ExpertLayer, Reduction, mixture, prune, reducer_module
from tests.methods.layers import make_layer

KINDS = ("softmax", "biased", "grouped")
PRUNERS = ("ean", "man", "stun", "naee", "reap")


def run(name: str, layer: ExpertLayer, **options: Any) -> Reduction:
    return reducer_module(name).reduce(layer, Spec.of(name, options).parsed())


def kept(reduction: Reduction) -> list[int]:
    return [expert for (expert,) in reduction.groups]


def outputs_of_routed(layer: ExpertLayer, expert: int) -> Tensor:
    """Outputs of an expert for the tokens routed to it, float64 ``[tokens, H]``, one by one."""
    x = layer.stats["sample"]
    index, _ = layer.gating(x, layer.router)
    tokens = [t for t in range(len(x)) if expert in index[t].tolist()]
    rows = [layer.output(expert, x[t : t + 1]).double() for t in tokens]
    return torch.cat(rows) if rows else torch.zeros(0, x.shape[1], dtype=torch.float64)


def best(scores: list[float], count: int, groups: int = 1) -> list[int]:
    size = len(scores) // groups
    found = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        found += sorted(members, key=lambda e: (-scores[e], e))[: count // groups]
    return sorted(found)


def error(layer: ExpertLayer, reduction: Reduction) -> float:
    x = layer.stats["sample"]
    return float((mixture(layer, reduction, x) - mixture(layer, None, x)).double().square().sum())


# Scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ean", "man"])
def test_norm_scores_are_those_of_the_routed_outputs(name: str, kind: str) -> None:
    layer = make_layer(kind=kind, seed=3)
    scores = []
    for expert in range(8):
        norms = outputs_of_routed(layer, expert).norm(dim=1)
        scores.append(float(norms.sum() if name == "ean" else norms.mean()))
    groups = layer.shape.routing_groups
    assert kept(run(name, layer, keep=4)) == best(scores, 4, groups)


def test_norm_scores_differ_when_a_loud_expert_is_rare() -> None:
    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][5] = -1.0
        weights["down"][5] *= 4

    layer = make_layer(change=change)
    assert 5 in kept(run("man", layer, keep=2))
    assert 5 not in kept(run("ean", layer, keep=2))


@pytest.mark.parametrize("name", PRUNERS)
def test_routing_groups_keep_equally_many(name: str) -> None:
    layer = make_layer(kind="grouped", seed=1)
    for count in (4, 6):
        experts = kept(run(name, layer, keep=count))
        assert sum(expert < 4 for expert in experts) == count // 2
        assert experts == sorted(set(experts))
    with pytest.raises(ValueError, match="5 experts do not divide into the router's 2 groups"):
        run(name, layer, keep=5)


@pytest.mark.parametrize("name", PRUNERS)
def test_pruned_layer_has_the_old_rows(name: str) -> None:
    layer = make_layer(kind="biased")
    reduction = run(name, layer, keep=0.5)
    for new, old in enumerate(kept(reduction)):
        assert torch.equal(reduction.weights["down"][new], layer.weights["down"][old])
        assert torch.equal(reduction.biases["up"][new], layer.biases["up"][old])
        assert torch.equal(reduction.router["weight"][new], layer.router["weight"][old])
        assert torch.equal(reduction.router["bias"][new], layer.router["bias"][old])


@pytest.mark.parametrize("name", ["ean", "man", "mone"])
def test_unreached_expert_goes_first(name: str) -> None:
    def silence(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][3] = -1e4

    assert kept(run(name, make_layer(change=silence), keep=7)) == [0, 1, 2, 4, 5, 6, 7]


# NAEE


@pytest.mark.parametrize(("kind", "count"), [("softmax", 3), ("biased", 6), ("grouped", 4)])
def test_naee_is_the_best_of_all_subsets(kind: str, count: int) -> None:
    layer = make_layer(kind=kind, tokens=60, seed=5)
    groups = layer.shape.routing_groups
    errors = {
        subset: error(layer, prune(layer, subset))
        for subset in itertools.combinations(range(8), count)
        if groups == 1 or sum(expert < 4 for expert in subset) == count // 2
    }
    reduction = run("naee", layer, keep=count)
    assert tuple(kept(reduction)) == min(errors, key=errors.__getitem__)
    for other in ("reap", "ean", "man", "stun"):
        assert error(layer, reduction) <= error(layer, run(other, layer, keep=count)) * (1 + 1e-6)


def test_naee_in_chunks_sees_all_tokens() -> None:
    layer = make_layer(tokens=1100)
    module: Any = reducer_module("naee")
    subset = [0, 2, 3, 5, 7]
    (found,) = module.subset_errors(layer, [subset]).tolist()
    assert found == pytest.approx(error(layer, prune(layer, subset)), rel=1e-5)


def test_naee_refuses_many_experts() -> None:
    with pytest.raises(ValueError, match="9 experts have too many subsets to try, at most 8"):
        run("naee", make_layer(experts=9), keep=0.5)


# MoNE


def test_mone_keeps_the_largest_deviations_and_the_means_of_the_others() -> None:
    layer = make_layer(kind="biased", seed=2)
    routed = [outputs_of_routed(layer, expert) for expert in range(8)]
    scores = [float((f - f.mean(0)).square().sum()) for f in routed]
    reduction = run("mone", layer, keep=5)
    assert kept(reduction) == best(scores, 5)
    assert reduction.expert_map is not None and reduction.constants is not None
    for expert, stand_in in enumerate(reduction.expert_map.tolist()):
        if stand_in < 5:
            assert kept(reduction)[stand_in] == expert
        else:
            mean = routed[expert].mean(0).float()
            torch.testing.assert_close(
                reduction.constants[stand_in - 5], mean, rtol=1e-5, atol=1e-6
            )
    assert sorted(reduction.expert_map.tolist()) == list(range(8))
    assert torch.equal(reduction.router["weight"], layer.router["weight"])


def test_mone_loses_nothing_when_the_dropped_outputs_are_constant() -> None:
    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        weights["down"][[1, 6]] = 0  # what is left is the bias

    layer = make_layer(kind="biased", change=change)
    reduction = run("mone", layer, keep=6)
    assert kept(reduction) == [0, 2, 3, 4, 5, 7]
    x = layer.stats["sample"]
    torch.testing.assert_close(
        mixture(layer, reduction, x), mixture(layer, None, x), rtol=1e-4, atol=1e-5
    )


def test_mone_heeds_no_routing_groups() -> None:
    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        weights["down"][:3] = 0

    assert kept(run("mone", make_layer(kind="grouped", change=change), keep=5)) == [3, 4, 5, 6, 7]


def test_mone_gives_an_unreached_expert_its_mean_over_all_tokens() -> None:
    def silence(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][3] = -1e4

    layer = make_layer(change=silence)
    reduction = run("mone", layer, keep=7)
    assert reduction.constants is not None
    mean = layer.output(3, layer.stats["sample"]).mean(0)
    torch.testing.assert_close(reduction.constants[0], mean, rtol=1e-5, atol=1e-6)


# STUN


def complete_linkage(distance: Tensor, count: int) -> list[list[int]]:
    """Clusters by the definition: the two whose farthest members are nearest, again and again."""
    found = [[expert] for expert in range(len(distance))]
    while len(found) > count:
        pairs = itertools.combinations(range(len(found)), 2)
        a, b = min(
            pairs, key=lambda p: max(distance[i, j] for i in found[p[0]] for j in found[p[1]])
        )
        found[a] = sorted(found[a] + found.pop(b))
    return found


def brute_distance(layer: ExpertLayer, weight: float) -> Tensor:
    rows, x = layer.router["weight"].double(), layer.stats["sample"]
    index, _ = layer.gating(x, layer.router)
    choices = [set(row) for row in index.tolist()]
    distance = torch.zeros(8, 8, dtype=torch.float64)
    pairs = list(itertools.permutations(range(8), 2))
    mean = sum(float((rows[i] - rows[j]).norm()) for i, j in pairs) / len(pairs)
    for i, j in pairs:
        both = sum({i, j} <= chosen for chosen in choices)
        each = sum(i in chosen for chosen in choices) * sum(j in chosen for chosen in choices)
        distance[i, j] = (rows[i] - rows[j]).norm() / mean - weight * both / max(each, 1) ** 0.5
    return distance


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("representative", ["weights", "load"])
def test_stun_keeps_one_of_every_cluster(weight: float, representative: str) -> None:
    layer = make_layer(seed=4)
    groups = complete_linkage(brute_distance(layer, weight), 4)
    expected = []
    for group in groups:
        flat = torch.stack(
            [torch.cat([w[e].flatten() for w in layer.weights.values()]) for e in group]
        )
        scores = -(flat - flat.mean(0)).norm(dim=1)
        if representative == "load" or len(group) == 2:  # two are equally far from their mean
            scores = layer.frequency[group]
        expected.append(group[int(scores.argmax())])
    options = {"coactivation": weight, "representative": representative}
    assert kept(run("stun", layer, keep=4, **options)) == sorted(expected)


def test_stun_clusters_are_those_under_a_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(13, 13, generator=generator, dtype=torch.float64)
    distance = distance + distance.T
    merges = stun.agglomerate(distance)
    heights = [height for height, _, _ in merges]
    assert heights == sorted(heights)
    for count in range(1, 14):
        found = stun.clusters(merges, 13, count)
        assert found == sorted(complete_linkage(distance, count))
        threshold = heights[13 - count] if count > 1 else torch.inf
        assert all(distance[i, j] < threshold for c in found for i in c for j in c if i != j)


def test_stun_takes_the_first_of_equal_pairs() -> None:
    merges = stun.agglomerate(torch.ones(4, 4, dtype=torch.float64))
    assert stun.clusters(merges, 4, 3) == [[0, 1], [2], [3]]
    assert stun.clusters(merges, 4, 2) == [[0, 1, 2], [3]]


def test_stun_puts_copies_of_an_expert_into_one_cluster() -> None:
    def copy(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        for value in (*weights.values(), *router.values()):
            value[[2, 5]] = value[[0, 3]]

    assert kept(run("stun", make_layer(change=copy), keep=6, coactivation=0.0)) == [
        0,
        1,
        3,
        4,
        6,
        7,
    ]


def layers_of_unlike_routers(kinds: list[str]) -> dict[str, ExpertLayer]:
    """Layers whose routers hold more and more near copies."""
    layers = {}
    for number, kind in enumerate(kinds):

        def change(weights: dict[str, Tensor], router: dict[str, Tensor], n: int = number) -> None:
            for expert in range(n):
                row = router["weight"][7 - expert]
                router["weight"][expert] = row + 0.1 * router["weight"][expert]

        layers[f"layer{number}"] = make_layer(kind=kind, seed=number, change=change)
    return layers


@pytest.mark.parametrize("kinds", [["softmax"] * 4, ["grouped"] * 3, ["softmax", "grouped"]])
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.75, 0.9, 1.0])
def test_global_keeps_are_those_of_one_threshold(kinds: list[str], keep: float) -> None:
    layers = layers_of_unlike_routers(kinds)
    shapes = {name: layer.shape for name, layer in layers.items()}
    total = 8 * len(layers)
    least = sum(max(shape.least, shape.top_k) for shape in shapes.values())
    inputs = {
        name: (layer.router["weight"], layer.stats["coactivation"], layer.stats["load"])
        for name, layer in layers.items()
    }
    if keep * total < least:
        with pytest.raises(ValueError, match=f"keep: {keep:g} of {total} experts .* need {least}"):
            stun.global_keeps(inputs, shapes, keep, 1.0)
        return

    distances = {name: brute_distance(layer, 1.0) for name, layer in layers.items()}

    @functools.cache
    def widest(name: str, at: int, size: int, clusters: int) -> float:
        """Largest distance within a cluster of a routing group that has so many clusters."""
        block = distances[name][at : at + size, at : at + size]
        pairs = (
            block[i, j]
            for cluster in complete_linkage(block, clusters)
            for i, j in itertools.combinations(cluster, 2)
        )
        return max(map(float, pairs))

    def clusters_at(threshold: float) -> dict[str, int]:
        """Of every layer."""
        counts = {}
        for name, layer in layers.items():
            groups = layer.shape.routing_groups
            size, most = 8 // groups, 0
            for at in range(0, 8, size):
                left = size
                while left > 1 and widest(name, at, size, left - 1) < threshold:
                    left -= 1
                most = max(most, left)
            counts[name] = max(most * groups, layer.shape.least, layer.shape.top_k)
        return counts

    # Thresholds between all distances that occur, and beyond.
    at = sorted({float(d) for distance in distances.values() for d in distance.flatten()})
    thresholds = [-10.0, *((a + b) / 2 for a, b in itertools.pairwise(at)), 10.0]
    found = stun.global_keeps(inputs, shapes, keep, 1.0)
    candidates = [clusters_at(threshold) for threshold in thresholds]
    nearest = min(abs(sum(counts.values()) - keep * total) for counts in candidates)
    assert found in candidates
    assert abs(sum(found.values()) - keep * total) == pytest.approx(nearest)
    assert all(count % shapes[name].routing_groups == 0 for name, count in found.items())
    for name, layer in layers.items():
        assert len(kept(run("stun", layer, keep=found[name]))) == found[name]


def test_global_keeps_leave_more_to_layers_whose_experts_differ() -> None:
    layers = layers_of_unlike_routers(["softmax"] * 5)
    inputs = {
        name: (layer.router["weight"], layer.stats["coactivation"], layer.stats["load"])
        for name, layer in layers.items()
    }
    shapes = {name: layer.shape for name, layer in layers.items()}
    found = stun.global_keeps(inputs, shapes, 0.75, 0.0)
    assert sum(found.values()) == 30
    assert found["layer4"] < found["layer0"]


def test_global_keeps_cut_the_first_of_equal_layers() -> None:
    layer = make_layer()
    inputs = (layer.router["weight"], layer.stats["coactivation"], layer.stats["load"])
    twins, shapes = {"a": inputs, "b": inputs}, {"a": layer.shape, "b": layer.shape}
    assert stun.global_keeps(twins, shapes, 15 / 16, 1.0) == {"a": 7, "b": 8}


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_global_keeps_refuse_what_is_no_share(keep: float) -> None:
    with pytest.raises(ValueError, match="keep: .* is no share of the experts"):
        stun.global_keeps({}, {}, keep, 1.0)


# slim


@pytest.mark.parametrize("kind", KINDS)
def test_slim_at_full_width_keeps_every_bit(kind: str) -> None:
    dtype = torch.float32 if kind == "biased" else torch.bfloat16
    layer = make_layer(kind=kind, dtype=dtype)
    reduction = run("slim", layer, width=12)
    for name, weight in layer.weights.items():
        assert torch.equal(reduction.weights[name], weight)
    assert reduction.channels is not None
    assert reduction.channels.tolist() == [list(range(12))] * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_slim_is_least_squares_on_the_weighted_sample(kind: str, spread: float) -> None:
    layer = make_layer(kind=kind, width=14)
    x = layer.stats["sample"]
    index, gates = layer.gating(x, layer.router)
    reduction = run("slim", layer, width=8, spread=spread, ridge=1e-8)
    assert reduction.channels is not None
    for expert in range(8):
        weight = torch.zeros(len(x), dtype=torch.float64)
        for t in range(len(x)):
            for position, chosen in enumerate(index[t].tolist()):
                if chosen == expert:
                    weight[t] = float(gates[t, position]) ** 2
        weight = weight / weight[weight > 0].mean() + spread
        a = layer.middle(expert, x).double() * weight.sqrt()[:, None]
        down = layer.weights["down"][expert].double()
        importance = [float((a[:, c] ** 2).sum() * (down[:, c] ** 2).sum()) for c in range(14)]
        channels = best(importance, 8)
        assert reduction.channels[expert].tolist() == channels
        fitted = torch.linalg.lstsq(a[:, channels], a @ down.T, driver="gelsd").solution.T
        torch.testing.assert_close(
            reduction.weights["down"][expert], fitted.float(), rtol=1e-4, atol=1e-5
        )
        for name in ("gate", "up"):
            assert torch.equal(
                reduction.weights[name][expert], layer.weights[name][expert, channels]
            )
            if layer.biases:
                assert torch.equal(
                    reduction.biases[name][expert], layer.biases[name][expert, channels]
                )


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 10.0])
def test_slim_never_errs_more_than_plain_selection(tokens: int, ridge: float) -> None:
    layer = make_layer(tokens=tokens, seed=tokens)
    x = layer.stats["sample"]
    for expert in range(8):
        a, down = layer.middle(expert, x).double(), layer.weights["down"][expert].double()
        covariance = a.T @ a
        energy = nystrom.energy(covariance, down)
        channels = nystrom.top_channels(energy, 6)
        fitted = nystrom.refit(covariance, down, channels, ridge)
        whole, part = a @ down.T, a[:, channels]
        plain = (part @ down[:, channels].T - whole).square().sum()
        assert (part @ fitted.T - whole).square().sum() <= plain * (1 + 1e-9)


def test_slim_without_damping_is_the_nystrom_formula() -> None:
    layer = make_layer()
    a, down = layer.middle(0, layer.stats["sample"]).double(), layer.weights["down"][0].double()
    c = a.T @ a
    s = torch.tensor([0, 3, 4, 9])
    formula = torch.linalg.pinv(c[s][:, s]) @ c[s] @ down.T
    torch.testing.assert_close(nystrom.refit(c, down, s, 1e-14), formula.T, rtol=1e-9, atol=1e-9)


def test_slim_leverage_is_the_formula_and_drops_what_others_stand_in_for() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(100, 6, generator=generator, dtype=torch.float64)
    a[:, 5] = a[:, 0] + a[:, 1]  # large, and needless
    c, down = a.T @ a, torch.ones(3, 6, dtype=torch.float64)
    scores = nystrom.leverage(c, down, 1e-2)
    ridge = 1e-2 * c.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(scores, (c @ torch.linalg.inv(c + ridge)).diagonal())
    assert scores.min() > 0 and scores.max() < 1
    # The three dependent channels score alike and low; by energy the sum of the two comes first.
    assert set(nystrom.top_channels(scores, 3).tolist()) == {2, 3, 4}
    assert 5 in nystrom.top_channels(nystrom.energy(c, down), 1).tolist()
    silent = nystrom.leverage(torch.zeros(6, 6, dtype=torch.float64), down, 1e-2)
    assert torch.equal(silent, torch.zeros(6, dtype=torch.float64))


def test_slim_loses_nothing_when_the_cut_channels_repeat_others() -> None:
    def change(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        for name in ("gate", "up"):
            weights[name][:, 6:] = weights[name][:, :6]

    layer = make_layer(change=change)
    x = layer.stats["sample"]
    a, down = layer.middle(2, x).double(), layer.weights["down"][2].double()
    channels = torch.arange(6)
    fitted = nystrom.refit(a.T @ a, down, channels, 1e-8)
    torch.testing.assert_close(a[:, :6] @ fitted.T, a @ down.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "options", "new"),
    [
        (768, {"width": 0.75}, 576),
        (1408, {"width": 0.5}, 704),
        (1408, {"width": 0.875}, 1248),  # 38.5 steps of 32
        (1408, {"width": 0.875, "multiple": 128}, 1280),  # 9.6 steps of 128
        (720, {"width": 0.75}, 544),  # 33.75 steps of 16
        (100, {"width": 0.5, "multiple": 1}, 50),
        (100, {"width": 48}, 48),
    ],
)
def test_slim_width_stays_a_multiple(old: int, options: dict[str, Any], new: int) -> None:
    shape = replace(make_layer().shape, width=old)
    outline = slim.outline(shape, slim.Options(**options))
    assert (outline.experts, outline.rows, outline.width) == (8, 8, new)
    assert outline.ordinary


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0.01, "width: 0.01 of 768 channels is none, in steps of 32"),
        (1.5, "width: 1.5 is no share of the channels: at most 1.0"),
        (769, "width: 769 channels are more than the 768"),
        (100, r"width: 100 of 768 channels is no multiple of 32 \(multiple: 32\)"),
    ],
)
def test_slim_refuses_impossible_widths(width: float, message: str) -> None:
    shape = replace(make_layer().shape, width=768)
    with pytest.raises(ValueError, match=f"^{message}$"):
        slim.outline(shape, slim.Options(width=width))


def test_slim_tells_of_few_tokens_and_fits_on_all_where_none_is_routed() -> None:
    def silence(weights: dict[str, Tensor], router: dict[str, Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][3] = -1e4

    layer = make_layer(change=silence)
    reduction = run("slim", layer, width=0.5, spread=0.0, ridge=1e-8)
    kinds = {event.kind: event for event in reduction.events}
    assert kinds["few_tokens"].value == 1
    assert "the least 0" in kinds["few_tokens"].message
    assert reduction.channels is not None
    a = layer.middle(3, layer.stats["sample"]).double()
    whole = a @ layer.weights["down"][3].double().T
    fitted = torch.linalg.lstsq(a[:, reduction.channels[3]], whole, driver="gelsd").solution.T
    torch.testing.assert_close(reduction.weights["down"][3], fitted.float(), rtol=1e-4, atol=1e-5)
    assert "few_tokens" not in {event.kind for event in run("slim", layer, width=1.0).events}
