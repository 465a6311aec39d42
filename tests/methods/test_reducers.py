"""What every reducer must do, whatever the router."""

import pytest
import torch

from moesaic.methods.base import Spec, is_reducer, reducers
from moesaic.methods.reduction import (
    EXPERT_STATISTICS,
    ExpertLayer,
    Reduction,
    mixture,
    reducer_module,
)
from tests.methods.layers import make_layer

KINDS = ("softmax", "biased", "grouped")
# Options under which a reducer takes nothing away, where that is not keep: 1.0.
EVERYTHING = {name: {"keep": 1.0} for name in reducers()}


@pytest.fixture(params=reducers())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> ExpertLayer:
    return make_layer(kind=request.param)


def run(name: str, layer: ExpertLayer, **options: object) -> Reduction:
    return reducer_module(name).reduce(layer, Spec.of(name, options).parsed())


def test_needs_are_statistics_that_calibration_knows(name: str) -> None:
    assert EXPERT_STATISTICS.keys() >= reducer_module(name).NEEDS
    assert is_reducer(name)


def test_taking_nothing_away_changes_nothing(name: str, layer: ExpertLayer) -> None:
    reduction = run(name, layer, **EVERYTHING[name])
    x = layer.stats["sample"]
    dense = mixture(layer, None, x)
    torch.testing.assert_close(mixture(layer, reduction, x), dense, rtol=1e-4, atol=1e-5)


def test_outline_is_what_comes_out(name: str, layer: ExpertLayer) -> None:
    options = Spec.of(name, {"keep": 0.5}).parsed()
    module = reducer_module(name)
    reduction = module.reduce(layer, options)
    assert module.outline(layer.shape, options) == reduction.outline
    assert reduction.weights["down"].shape[1] == layer.shape.hidden
    assert {w.dtype for w in reduction.weights.values()} == {layer.weights["gate"].dtype}
    assert len(reduction.groups) == reduction.outline.experts


def test_result_is_finite_and_routes_top_k(name: str, layer: ExpertLayer) -> None:
    reduction = run(name, layer, keep=0.5)
    x = layer.stats["sample"]
    index, gates = layer.gating(x, reduction.router)
    assert index.shape == gates.shape == (len(x), layer.shape.top_k)
    assert int(index.max()) < reduction.outline.rows
    assert torch.isfinite(mixture(layer, reduction, x)).all()
    error = (mixture(layer, reduction, x) - mixture(layer, None, x)).norm()
    assert 0 < error < 2 * mixture(layer, None, x).norm()


def test_same_layer_gives_the_same_bits(name: str, layer: ExpertLayer) -> None:
    first, second = run(name, layer, keep=0.5), run(name, layer, keep=0.5)
    assert all(torch.equal(first.weights[m], second.weights[m]) for m in first.weights)
    assert all(torch.equal(first.router[m], second.router[m]) for m in first.router)


def test_bfloat16_weights_are_no_obstacle(name: str) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    reduction = run(name, layer, keep=0.5)
    assert all(w.dtype == torch.bfloat16 for w in reduction.weights.values())
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_an_expert_that_no_token_reached_is_told(name: str) -> None:
    def silence(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][3] = -1e4

    reduction = run(name, make_layer(change=silence), keep=0.5)
    assert "unreached_experts" in {event.kind for event in reduction.events}
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_all_tokens_to_the_same_experts(name: str) -> None:
    def attract(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][:2] = 1e4

    reduction = run(name, make_layer(change=attract), keep=0.5)
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_identical_experts_are_no_obstacle(name: str) -> None:
    def copy(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        for weight in weights.values():
            weight[1::2] = weight[::2]

    layer = make_layer(change=copy)
    reduction = run(name, layer, keep=0.5)
    assert torch.isfinite(mixture(layer, reduction, layer.stats["sample"])).all()


@pytest.mark.parametrize("keep", [1, 9, 0.1, 1.5])
def test_impossible_counts_are_refused(name: str, keep: float) -> None:
    if name == "slim":
        pytest.skip("keeps all experts; its own test has its limits")
    layer = make_layer()
    options = Spec.of(name, {"keep": keep}).parsed()
    with pytest.raises(ValueError, match="keep"):
        reducer_module(name).outline(layer.shape, options)


@pytest.mark.parametrize("keep", [0, -1, 0.0])
def test_keeping_nothing_is_refused_by_the_options(name: str, keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        Spec.of(name, {"keep": keep})
