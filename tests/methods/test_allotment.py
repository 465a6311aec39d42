"""Layers that share out how many experts each keeps."""

import itertools

import pytest
import torch
from scipy.cluster.hierarchy import linkage

from moesaic.methods.base import Spec
from moesaic.methods.clustering import cheapest_merges, merge_costs
from moesaic.methods.reduction import (
    Allotting,
    LayerShape,
    LayerView,
    is_open,
    reducer_module,
    windows,
)
from tests.methods.layers import make_layer

SHAPE = LayerShape(experts=6, width=4, hidden=4, top_k=2, least=2)


def test_costs_of_equal_experts_are_ward_s() -> None:
    points = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = merge_costs(points @ points.T, torch.full((2, 7), 50))
    heights = linkage(points.numpy(), method="ward")[:, 2]
    # SciPy's height is √(2ab/(a + b))·d for groups of a and b points of weight 1; ours weigh 1/7.
    torch.testing.assert_close(
        torch.tensor(costs, dtype=torch.float64),
        torch.tensor(heights).square() / 2 / 7,
        rtol=1e-9,
        atol=1e-12,
    )


def test_costs_count_use_and_never_fall() -> None:
    cosine = torch.eye(4, dtype=torch.float64)
    costs = merge_costs(cosine, torch.tensor([[0, 10, 10, 80]]))
    assert costs[0] == 0.0  # nobody misses the first
    assert costs[1] == pytest.approx(0.1 * 0.1 / 0.2 * 2)
    assert costs == sorted(costs)
    assert all(c == 0 for c in merge_costs(torch.ones(3, 3), torch.ones(1, 3)))
    assert all(c == 0 for c in merge_costs(cosine, torch.zeros(1, 4)))


def test_the_cheapest_merges_are_those_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(1)
    costs = {n: torch.rand(5, generator=generator).sort().values.tolist() for n in "abc"}
    shapes = dict.fromkeys("abc", SHAPE)
    found = cheapest_merges(costs, shapes, 0.5)
    assert sum(found.values()) == 9

    def total(keeps: tuple[int, ...]) -> float:
        return sum(sum(costs[n][: 6 - k]) for n, k in zip("abc", keeps, strict=True))

    possible = [k for k in itertools.product(range(2, 7), repeat=3) if sum(k) == 9]
    assert total(tuple(found.values())) == pytest.approx(min(map(total, possible)))


def test_routing_groups_lose_equally_many_and_floors_hold() -> None:
    grouped = LayerShape(experts=8, width=4, hidden=4, top_k=2, routing_groups=2, least=4)
    costs = {"a": [0.0] * 7, "b": [1.0] * 7}
    found = cheapest_merges(costs, dict.fromkeys("ab", grouped), 0.625)
    assert found == {"a": 4, "b": 6}
    with pytest.raises(ValueError, match="the layers need 8"):
        cheapest_merges(costs, dict.fromkeys("ab", grouped), 0.25)


def test_windows_cut_the_layers_in_order() -> None:
    assert windows("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert windows("abc", 0) == [["a", "b", "c"]]


@pytest.mark.parametrize("name", ["stun", "sub_moe"])
def test_a_window_leaves_the_number_open_and_allot_closes_it(name: str) -> None:
    module = reducer_module(name)
    options = Spec.of(name, {"keep": 0.75, "window": 0}).parsed()
    layers = {str(seed): make_layer(seed=seed) for seed in range(3)}
    assert is_open(options) and not is_open(Spec.of(name, {"keep": 0.75}).parsed())
    assert module.outline(layers["0"].shape, options).experts == layers["0"].shape.least
    views = {n: LayerView(layer.shape, layer.router, layer.stats) for n, layer in layers.items()}
    allotting: Allotting = module  # type: ignore[assignment]
    found = allotting.allot(views, options)
    assert found.keys() == layers.keys() and sum(found.values()) == 18
    with pytest.raises(ValueError, match="give their share"):
        module.outline(layers["0"].shape, Spec.of(name, {"keep": 6, "window": 0}).parsed())
