"""Reduced banks of every family: opened right, computed right, with statistics that add up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.methods.base import Chain, Spec, Stats, Unit, reducers
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    Outline,
    mixture,
    reducer_module,
)
from moesaic.orchestrator.bank import side_members
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.reductions import (
    ReducedBank,
    layer_shape,
    open_layer,
    outline,
    reduced_bank,
    side_bytes,
)
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel
from tests.methods.layers import statistics
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import IDS
from tests.orchestrator.tiny import save_tiny, tiny_model

FAMILIES = [name for name in families() if load_family(name).experts is not None]
# Where routing takes three experts of one group of four, six of eight is the least.
FEWER: Mapping[str, Keep] = {"deepseek_v2": 6, "deepseek_v3": 6}
MERGERS = [name for name in reducers() if "router" in reducer_module(name).Options.model_fields]
SHAPES = {
    "deepseek_v2": (8, 24, 3, 2, 6, ("weight",), False),
    "deepseek_v3": (8, 24, 3, 2, 6, ("weight", "correction"), False),
    "glm4_moe": (8, 24, 2, 2, 4, ("weight", "correction"), False),
    "gpt_oss": (6, 56, 2, 1, 2, ("weight", "bias"), True),
    "granitemoe": (6, 26, 2, 1, 2, ("weight",), False),
    "dots1": (8, 24, 2, 2, 4, ("weight", "correction"), False),
    "solar_open": (8, 24, 2, 2, 4, ("weight", "correction"), False),
    "flex_olmo": (6, 25, 2, 1, 2, ("weight",), False),
    "granitemoeshared": (6, 26, 2, 1, 2, ("weight",), False),
    "qwen3_next": (8, 23, 2, 1, 2, ("weight",), False),
    "mixtral": (5, 27, 2, 1, 2, ("weight",), False),
    "olmoe": (8, 25, 3, 1, 3, ("weight",), False),
    "phimoe": (6, 56, 2, 1, 2, ("weight",), False),
    "qwen2_moe": (6, 21, 2, 1, 2, ("weight",), False),
    "qwen3_moe": (8, 23, 2, 1, 2, ("weight",), False),
}


def chain(name: str, options: Mapping[str, Any]) -> Chain:
    return (Spec.of(name, options),)


def fewer(model_type: str, name: str) -> dict[str, Any]:
    """Options that take something away from a layer of the tiny model."""
    if name == "slim":
        return {"width": 0.5}
    return {"keep": 0.7 if name == "modegpt" else FEWER.get(model_type, 0.7)}


def everything(name: str) -> dict[str, Any]:
    return {"width": 1.0} if name == "slim" else {"keep": 1.0}


@dataclass(frozen=True)
class Opened:
    """A tiny model with all of its expert layers.

    Attributes:
        inputs: bank → what its experts module was called with in transformers' model.
        outputs: bank → what that gave.
    """

    model: StreamedModel
    layers: Mapping[str, ExpertLayer]
    inputs: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    outputs: Mapping[str, Tensor]
    logits: Tensor

    @property
    def banks(self) -> list[Unit]:
        return [unit for unit in self.model.units() if unit.kind == "bank"]


def open_all(folder: Path) -> Opened:
    """Every layer has statistics of all tokens of ``IDS`` and of noise, by their definitions."""
    model = StreamedModel(Checkpoint(folder))
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    inputs, outputs, layers = {}, {}, {}
    banks = [unit for unit in model.units() if unit.kind == "bank"]
    for unit in banks:
        path = f"{model.family.block.format(block=unit.block)}.{model.unit_module(unit)}"

        def hook(_: Any, args: Any, output: Tensor, name: str = unit.name) -> None:
            inputs[name], outputs[name] = args, output

        whole.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        logits = whole(IDS).logits
        for unit in banks:
            layer = open_layer(model, unit, Stats({}))
            noise = torch.randn(80, model.hidden_size, generator=torch.Generator().manual_seed(1))
            x = torch.cat([inputs[unit.name][0], noise])
            layers[unit.name] = open_layer(model, unit, statistics(layer, x))
    return Opened(model, layers, inputs, outputs, logits)


@pytest.fixture(scope="module")
def opened(tiny: Tiny) -> Callable[[str], Opened]:
    return cache(lambda model_type: open_all(tiny(model_type)))


def make(opened: Opened, unit: Unit, prefix: Chain, folder: Path) -> ReducedBank:
    """A bank reduced by way of the store."""
    stats = opened.layers[unit.name].stats
    key = f"{unit.block}{prefix[0].method}"
    return reduced_bank(Store(folder), key, opened.model, unit, prefix, stats)


def members(bank: ReducedBank) -> dict[str, Tensor]:
    return {**bank.members, **bank.side}


@torch.no_grad()
def streamed(
    model: StreamedModel, replaced: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Tensor, dict[str, tuple[Any, Tensor]]]:
    """Logits for ``IDS``, and what the experts modules of the banks were given and gave."""
    seen: dict[str, tuple[Any, Tensor]] = {}
    hidden = model.embed(IDS)
    for index, layout in enumerate(model.layouts):
        block = model.load_block(index, replaced)
        for unit in (u for u in layout.units if u.kind == "bank"):

            def hook(_: Any, args: Any, output: Tensor, name: str = unit.name) -> None:
                seen[name] = args, output

            block.get_submodule(model.unit_module(unit)).register_forward_hook(hook)
        hidden = model.run_block(index, block, hidden)
    return model.logits(model.final_norm(hidden)), seen


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_opened_layer_is_the_models(model_type: str, opened: Callable[[str], Opened]) -> None:
    own = opened(model_type)
    assert own.banks
    for unit in own.banks:
        layer = own.layers[unit.name]
        hidden, index, gates = own.inputs[unit.name]
        experts, width, top_k, groups, least, router, biased = SHAPES[model_type]
        assert layer.shape == LayerShape(
            experts, width, 48, top_k, groups, least=least, router=router, biased=biased
        )
        assert {name: t.shape[0] for name, t in layer.router.items()} == dict.fromkeys(
            router, experts
        )
        found, weights = layer.gating(hidden, layer.router)
        order, wanted = found.argsort(1), index.argsort(1)
        assert torch.equal(found.gather(1, order), index.gather(1, wanted))
        assert close(weights.gather(1, order), gates.gather(1, wanted))
        assert close(mixture(layer, None, hidden), own.outputs[unit.name])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_least_number_of_rows_still_routes(
    model_type: str, opened: Callable[[str], Opened]
) -> None:
    layer = next(iter(opened(model_type).layers.values()))
    shape, x = layer.shape, layer.stats["sample"]
    size, each = shape.experts // shape.routing_groups, shape.least // shape.routing_groups
    rows = [g * size + row for g in range(shape.routing_groups) for row in range(each)]
    index, gates = layer.gating(x, {name: t[rows] for name, t in layer.router.items()})
    assert index.shape == gates.shape == (len(x), shape.top_k)
    assert all(len(set(chosen)) == shape.top_k for chosen in index.tolist())
    assert bool(gates.gt(0).all()) and int(index.max()) < shape.least


@pytest.mark.parametrize("name", reducers())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_reduced_block_computes_what_the_reduction_says(
    model_type: str, name: str, opened: Callable[[str], Opened], tmp_path: Path
) -> None:
    own = opened(model_type)
    prefix, unit = chain(name, fewer(model_type, name)), own.banks[-1]
    bank, layer = make(own, unit, prefix, tmp_path), own.layers[unit.name]
    logits, seen = streamed(own.model, {unit.name: members(bank)})
    assert bool(logits.isfinite().all()) and not close(logits, own.logits)
    reduction = reducer_module(name).reduce(layer, prefix[0].parsed())
    left = reduction.outline
    assert left == outline(layer.shape, prefix) == found_outline(bank)
    items = dict.fromkeys(layer.router, 4)
    assert sum(t.nbytes for t in bank.side.values()) == side_bytes(layer.shape, left, items, 4, 4)
    assert (left.experts < layer.shape.experts) != (left.width < layer.shape.width)
    (hidden, index, gates), output = seen[unit.name]
    assert index.shape == gates.shape == (len(hidden), layer.shape.top_k)
    assert all(len(set(rows)) == layer.shape.top_k for rows in index.tolist())
    assert int(index.max()) < left.rows
    assert close(output, mixture(layer, reduction, hidden))
    x = layer.stats["sample"]
    change = (mixture(layer, reduction, x) - mixture(layer, None, x)).double()
    torch.testing.assert_close(bank.error, change.square().mean(0))
    torch.testing.assert_close(bank.norm, mixture(layer, None, x).double().square().mean(0))


def found_outline(bank: ReducedBank) -> Outline:
    experts, width, _ = bank.members["gate"].shape
    constants = bank.side.get("constants")
    return Outline(
        experts,
        width,
        len(bank.side["router_weight"]),
        "expert_map" in bank.side,
        0 if constants is None else len(constants),
    )


@pytest.mark.parametrize("name", reducers())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_removing_nothing_changes_nothing(
    model_type: str, name: str, opened: Callable[[str], Opened]
) -> None:
    own = opened(model_type)
    options = Spec.of(name, everything(name)).parsed()
    replaced = {}
    for unit, layer in own.layers.items():
        reduction = reducer_module(name).reduce(layer, options)
        replaced[unit] = {**reduction.weights, **side_members(reduction)}
    logits, _ = streamed(own.model, replaced)
    assert close(logits, own.logits)


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_merged_gates_add_up(model_type: str, name: str, copies: Any, tmp_path: Path) -> None:
    """Where all experts are copies of one, whatever is merged must give the same."""
    own = copies(model_type)
    prefix = chain(name, fewer(model_type, name))
    banks = {unit.name: make(own, unit, prefix, tmp_path) for unit in own.banks}
    assert all("expert_map" in bank.side for bank in banks.values())
    logits, _ = streamed(own.model, {unit: members(bank) for unit, bank in banks.items()})
    assert bool((logits - own.logits).abs().max() <= 1e-4 * own.logits.abs().max())


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """Models whose experts are all alike."""

    def make_copies(model_type: str) -> Opened:
        model = tiny_model(model_type)
        for module in model.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
                for tensor in module.parameters(recurse=False):
                    tensor.data[:] = tensor.data[:1].clone()
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        return open_all(folder)

    return cache(make_copies)


# Statistics of merged experts


def inputs_of(layer: ExpertLayer) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Expert → inputs of gate and of down, for the sampled tokens that are routed to it."""
    x = layer.stats["sample"]
    index, _ = layer.gating(x, layer.router)
    gate = {e: x[(index == e).any(1)] for e in range(layer.shape.experts)}
    return gate, {expert: layer.middle(expert, own) for expert, own in gate.items()}


def sums(inputs: Mapping[int, Tensor]) -> Stats:
    own = [inputs[expert] for expert in sorted(inputs)]
    return Stats(
        {
            "tokens": torch.tensor([len(x) for x in own]),
            "hessian": torch.stack([x.T @ x for x in own]),
            "abs": torch.stack([x.abs().sum(0) for x in own]),
        }
    )


@pytest.mark.parametrize("name", ["reap", "hc_smoe", "m_smoe", "mone", "slim"])
def test_statistics_of_merged_experts_add_up(
    name: str, opened: Callable[[str], Opened], tmp_path: Path
) -> None:
    own = opened("gpt_oss")
    unit = own.banks[0]
    layer = own.layers[unit.name]
    prefix = chain(name, {"width": 0.5} if name == "slim" else {"keep": 3})
    bank = make(own, unit, prefix, tmp_path)
    reduction = reducer_module(name).reduce(layer, prefix[0].parsed())
    gate, middle = inputs_of(layer)
    outputs = {e: torch.randn(len(x), 56) for e, x in gate.items()}  # as gradients of gate and up
    channels = reduction.channels
    assert (channels is not None) == (name in ("m_smoe", "slim"))

    def moved(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {e: x if channels is None else x[:, channels[e]] for e, x in values.items()}

    def merged(values: Mapping[int, Tensor]) -> Stats:
        groups = enumerate(reduction.groups)
        return sums({new: torch.cat([values[old] for old in group]) for new, group in groups})

    found = bank.merged_inputs(
        {unit.sites["gate"]: sums(gate), unit.sites["down"]: sums(middle)},
    )
    pairs = [
        (found[unit.sites["gate"]], merged(gate)),
        (found[unit.sites["down"]], merged(moved(middle))),
    ]
    for stats, wanted in pairs:
        assert stats.sums.keys() == wanted.sums.keys()
        for key, value in wanted.sums.items():
            torch.testing.assert_close(stats[key], value, rtol=1e-4, atol=1e-4)

    def squares(values: Mapping[int, Tensor]) -> Stats:
        own = [values[expert] for expert in sorted(values)]
        return Stats(
            {
                "grad_tokens": torch.tensor([len(x) for x in own]),
                "grad_sq": torch.stack([x.square().sum(0) for x in own]),
            }
        )

    slopes = {f"{unit.name}|{m}": squares(outputs) for m in ("gate", "up")}
    slopes[f"{unit.name}|down"] = squares(gate)
    back = bank.gradients(slopes, unit.name)
    groups = list(enumerate(reduction.groups))
    for member, values in (("gate", moved(outputs)), ("up", moved(outputs)), ("down", gate)):
        wanted = squares({n: torch.cat([values[old] for old in group]) for n, group in groups})
        for key, value in wanted.sums.items():
            torch.testing.assert_close(back[f"{unit.name}|{member}"][key], value)
    pooled = torch.cat([*gate.values()])
    slope = Stats({"grad_sq": pooled.square().sum(0)})
    loss = bank.loss({f"{unit.name}|output": slope}, len(pooled))
    expected = 0.5 * (pooled.double().square().mean(0) * bank.error).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5) and loss > 0


# What may happen


def test_silent_and_identical_experts_are_told_and_never_give_nan(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All tokens go to two experts, whose weights are those of two others as well."""
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[:] = torch.tensor([0.0, 1e3, 0.0, 0.0, 1e3, 0.0])
        for tensor in layer.mlp.experts.parameters(recurse=False):
            tensor.data[[0, 5]] = tensor.data[[1, 4]].clone()
    model.save_pretrained(tmp_path / "model")
    own = open_all(tmp_path / "model")
    unit = own.banks[0]
    assert own.layers[unit.name].frequency.tolist() == [0, 102, 0, 0, 102, 0]
    for name in reducers():
        bank = make(own, unit, chain(name, fewer("gpt_oss", name)), tmp_path / "store")
        assert "unreached_experts" in {event.kind for event in bank.events}, name
        assert {event.unit for event in bank.events} == {unit.name}
        logits, _ = streamed(own.model, {unit.name: members(bank)})
        assert bool(logits.isfinite().all()), name


def test_a_reduction_that_is_not_finite_is_refused(
    opened: Callable[[str], Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = opened("qwen3_moe")
    unit = own.banks[0]
    module: Any = reducer_module("reap")
    reduce = module.reduce

    def broken(layer: ExpertLayer, options: Any) -> Any:
        reduction = reduce(layer, options)
        reduction.weights["gate"][0, 0, 0] = torch.nan
        return reduction

    monkeypatch.setattr(module, "reduce", broken)
    with pytest.raises(ValueError, match="gate is not finite"):
        make(own, unit, chain("reap", {"keep": 0.5}), tmp_path)
    assert not list(tmp_path.glob("reductions/*/*"))


def test_greedy_routing_does_not_ask_for_groups(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "deepseek_v2", topk_method="greedy")
    model = StreamedModel(Checkpoint(folder))
    unit = next(unit for unit in model.units() if unit.kind == "bank")
    shape = layer_shape(model, unit)
    assert (shape.routing_groups, shape.least) == (1, 3)
