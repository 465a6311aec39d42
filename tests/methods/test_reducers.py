"""What every reducer must do, whatever the router."""

from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Case:
    """Options of a reducer for the layer of ``make_layer``: 8 experts of width 12.

    Attributes:
        key: the option that says how much stays, which complaints must name.
        everything: nothing is taken away.
        half: half of it is.
        impossible: values of ``key`` that no such layer can have.
        illegal: values of ``key`` that no layer at all can have.
    """

    key: str = "keep"
    everything: dict[str, Any] = field(default_factory=lambda: {"keep": 1.0})
    half: dict[str, Any] = field(default_factory=lambda: {"keep": 0.5})
    impossible: tuple[float, ...] = (1, 9, 0.1, 1.5)
    illegal: tuple[float, ...] = (0, -1, 0.0)


# Reducers whose options are not those of most.
CASES = {name: Case() for name in reducers()} | {
    "modegpt": Case(
        everything={"keep": 1.0},
        half={"keep": 0.5},
        impossible=(0.01,),
        illegal=(0, -1, 1.5),
    ),
    "slim": Case(
        key="width",
        everything={"width": 1.0},
        half={"width": 0.5},
        impossible=(3, 13, 0.1, 1.5),
    ),
}


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
    reduction = run(name, layer, **CASES[name].everything)
    x = layer.stats["sample"]
    dense = mixture(layer, None, x)
    torch.testing.assert_close(mixture(layer, reduction, x), dense, rtol=1e-4, atol=1e-5)


def test_outline_is_what_comes_out(name: str, layer: ExpertLayer) -> None:
    options = Spec.of(name, CASES[name].half).parsed()
    module = reducer_module(name)
    reduction = module.reduce(layer, options)
    assert module.outline(layer.shape, options) == reduction.outline
    assert reduction.weights["down"].shape[1] == layer.shape.hidden
    assert {w.dtype for w in reduction.weights.values()} == {layer.weights["gate"].dtype}
    assert len(reduction.groups) == reduction.outline.experts


def test_result_is_finite_and_routes_top_k(name: str, layer: ExpertLayer) -> None:
    reduction = run(name, layer, **CASES[name].half)
    x = layer.stats["sample"]
    index, gates = layer.gating(x, reduction.router)
    assert index.shape == gates.shape == (len(x), layer.shape.top_k)
    assert int(index.max()) < reduction.outline.rows
    assert torch.isfinite(mixture(layer, reduction, x)).all()
    error = (mixture(layer, reduction, x) - mixture(layer, None, x)).norm()
    assert 0 < error < 2 * mixture(layer, None, x).norm()


def test_same_layer_gives_the_same_bits(name: str, layer: ExpertLayer) -> None:
    first, second = run(name, layer, **CASES[name].half), run(name, layer, **CASES[name].half)
    assert all(torch.equal(first.weights[m], second.weights[m]) for m in first.weights)
    assert all(torch.equal(first.router[m], second.router[m]) for m in first.router)


def test_bfloat16_weights_are_no_obstacle(name: str) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    reduction = run(name, layer, **CASES[name].half)
    assert all(w.dtype == torch.bfloat16 for w in reduction.weights.values())
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_an_expert_that_no_token_reached_is_told(name: str) -> None:
    def silence(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][3] = -1e4

    reduction = run(name, make_layer(change=silence), **CASES[name].half)
    assert "unreached_experts" in {event.kind for event in reduction.events}
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_all_tokens_to_the_same_experts(name: str) -> None:
    def attract(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        router["bias"] = torch.zeros(8)
        router["bias"][:2] = 1e4

    reduction = run(name, make_layer(change=attract), **CASES[name].half)
    assert all(bool(torch.isfinite(w).all()) for w in reduction.weights.values())


def test_identical_experts_are_no_obstacle(name: str) -> None:
    def copy(weights: dict[str, torch.Tensor], router: dict[str, torch.Tensor]) -> None:
        for weight in weights.values():
            weight[1::2] = weight[::2]

    layer = make_layer(change=copy)
    reduction = run(name, layer, **CASES[name].half)
    assert torch.isfinite(mixture(layer, reduction, layer.stats["sample"])).all()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in reducers() for value in CASES[name].impossible]
)
def test_impossible_counts_are_refused(name: str, value: float) -> None:
    key, layer = CASES[name].key, make_layer()
    options = Spec.of(name, {key: value}).parsed()
    with pytest.raises(ValueError, match=key):
        reducer_module(name).outline(layer.shape, options)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in reducers() for value in CASES[name].illegal]
)
def test_keeping_nothing_is_refused_by_the_options(name: str, value: float) -> None:
    key = CASES[name].key
    with pytest.raises(ValueError, match=key):
        Spec.of(name, {key: value})
