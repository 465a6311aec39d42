"""Reduced expert layers: opened for a reducer, measured, and kept in the store.

An entry ``reductions`` holds the new experts, what comes with them, and how it was reached. It is
made once per bank and reducer; every chain that begins so reads it and goes on from there.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Stats, Unit
from moesaic.methods.reduction import (
    ExpertLayer,
    LayerShape,
    Outline,
    Reduction,
    mixture,
    reducer_module,
)
from moesaic.methods.stand_ins import stand_ins
from moesaic.orchestrator.bank import CONSTANTS, side_members, split_biases
from moesaic.orchestrator.reduction_entries import KIND, Reduced, get_reduction, put_reduction
from moesaic.orchestrator.reshape import resize_router
from moesaic.orchestrator.statistics import SEPARATOR
from moesaic.orchestrator.store import Store, code_digest, digest
from moesaic.orchestrator.streaming import StreamedModel

Gating = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]

# Members of an entry besides those of the piece.
_GROUP, _CHANNELS, _ERROR, _NORM = "group", "channels", "output_error", "output_norm"


# Shapes


def layer_shape(model: StreamedModel, unit: Unit) -> LayerShape:
    """Sizes of a bank's layer, and what its router asks for."""
    experts, width, hidden = unit.shapes["gate"]
    router: Any = model.prototype(unit.block).get_submodule(model.router_module)
    roles = tuple(model.router_names(unit.block))
    top_k: int = router.top_k
    groups = int(getattr(router, "num_group", None) or 1)
    if getattr(router, "topk_method", "") == "greedy":
        groups = 1
    # Groups are compared by their two best experts where a correction is added, else by the best.
    each = 2 if "correction" in roles else 1
    if groups > 1:
        each = max(each, -(-top_k // int(router.topk_group)))
    return LayerShape(
        experts=experts,
        width=width,
        hidden=hidden,
        top_k=top_k,
        routing_groups=groups,
        least=max(top_k, groups * each),
        router=roles,
        biased=bool(model.bias_names(unit.block)),
    )


def outline(shape: LayerShape, prefix: Chain) -> Outline:
    """What the reducers of a chain leave of a layer.

    Raises:
        ValueError: the layer cannot be reduced so.
    """
    if len(prefix) != 1:
        raise ValueError("one reduction per chain")
    (spec,) = prefix
    found = reducer_module(spec.method).outline(shape, spec.parsed())
    return found


def reduced_unit(unit: Unit, left: Outline) -> Unit:
    """The bank that a reduction leaves."""
    gate = (left.experts, left.width, unit.shapes["gate"][2])
    return replace(unit, shapes={"gate": gate, "up": gate, "down": (gate[0], gate[2], gate[1])})


def side_bytes(
    shape: LayerShape, left: Outline, router: Mapping[str, int], bias: int, weight: int
) -> int:
    """Bytes of what comes with a reduced bank.

    Args:
        router: role → bytes of an element.
        bias, weight: bytes of an element of the experts' biases and weights; constants are stored
            like the latter.
    """
    row = sum(item * (shape.hidden if role == "weight" else 1) for role, item in router.items())
    size = left.rows * row
    if shape.biased:
        size += left.experts * (2 * left.width + shape.hidden) * bias
    if left.mapped:
        size += left.rows * 8
    return size + left.constants * shape.hidden * weight


def reduction_key(fingerprint: str, owner: str, prefix: Chain, stats_key: str) -> str:
    """Digest of everything that a reduction depends on.

    Args:
        owner: name of the bank or part that is reduced.
    """
    return digest(
        {
            "model": fingerprint,
            "unit": owner,
            "chain": [[spec.method, spec.options] for spec in prefix],
            "stats": stats_key,
            "code": code_digest(
                "methods",
                "orchestrator/narrowing.py",
                "orchestrator/reduction_entries.py",
                "orchestrator/reductions.py",
                "orchestrator/bank.py",
                "orchestrator/reshape.py",
            ),
        }
    )


# Computing


def open_gating(model: StreamedModel, block: int) -> Gating:
    """How a block's router chooses, on the CPU in float32: see :class:`ExpertLayer`."""
    router = model.prototype(block).get_submodule(model.router_module)
    attributes = model.router_names(block)

    def gating(x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(router)
        resize_router(module, len(tensors["weight"]))
        path = f"{model.router_module}."
        state = {attributes[role].removeprefix(path): t.float() for role, t in tensors.items()}
        module.load_state_dict(state, assign=True)
        with torch.no_grad():
            _, gates, index = module(x.float())
        return index, gates

    return gating


def open_layer(model: StreamedModel, unit: Unit, stats: Stats) -> ExpertLayer:
    """A bank with its router, on the CPU, computing in float32 as the model does."""
    experts: Any = model.prototype(unit.block).get_submodule(model.unit_module(unit))
    attributes = model.router_names(unit.block)
    kept = model.read_kept(unit.block)
    biases = [kept[name] for name in model.bias_names(unit.block)]

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        joined = torch.cat([gate, up], -1)
        if not experts.is_concatenated:
            joined = torch.stack([gate, up], -1).flatten(-2)
        activated: Tensor = experts._apply_gate(joined)
        return activated

    return ExpertLayer(
        shape=layer_shape(model, unit),
        weights=model.read_unit(unit),
        biases=split_biases(biases[0], biases[1], model.bank) if biases else {},
        router={role: kept[name] for role, name in attributes.items()},
        stats=stats,
        gating=open_gating(model, unit.block),
        activation=activation,
    )


@dataclass(frozen=True)
class ReducedBank(Reduced):
    """A bank after a reduction.

    Attributes:
        unit: with its new shapes.
        members: ``gate``, ``up``, ``down`` of the new experts.
        side: what comes with them, by member name.
        group: old expert → new one, or -1; int64 ``[E]``.
        channels: see :class:`~moesaic.methods.reduction.Reduction`.
        error, norm: mean squares over the sample of every component ``[H]`` of the change of the
            layer's output, and of the output.
    """

    unit: Unit
    members: Mapping[str, Tensor]
    side: Mapping[str, Tensor]
    group: Tensor
    channels: Tensor | None
    error: Tensor
    norm: Tensor

    def shaped(self, unit: str) -> Unit:
        return self.unit

    def merged_inputs(self, stats: Mapping[str, Stats]) -> dict[str, Stats]:
        """Statistics of the new experts' sites: sums over the old ones that went into each."""
        sites = self.unit.sites
        found = {}
        for member in ("gate", "down"):
            channels = self.channels if member == "down" else None
            sums = stats[sites[member]].sums
            found[sites[member]] = Stats({k: self._merged(v, channels) for k, v in sums.items()})
        return found

    def stand_ins(self) -> dict[str, CompressedTensor]:
        """The new experts of a merger in the places of the old ones."""
        return stand_ins(self.members, self.group, self.channels)

    def gradients(self, stats: Mapping[str, Stats], unit: str) -> dict[str, Stats]:
        """Sums over the old experts, as for their inputs."""
        found = {}
        for member in self.unit.shapes:
            name = f"{self.unit.name}{SEPARATOR}{member}"
            sums = {}
            for key, value in stats[name].sums.items():
                # Channels are what gate and up give, and what down reads.
                inside = (key == "fisher") == (member == "down")
                sums[key] = self._merged(value, self.channels if inside else None)
            found[name] = Stats(sums)
        return found

    def loss(self, gradients: Mapping[str, Stats], all_tokens: int) -> float:
        """½ · Σ_c E[g_c²] · E[Δy_c²], with the gradient g at the layer's output and the change Δy
        of that output really run, routers included, on the sampled tokens."""
        squares = gradients[f"{self.unit.name}{SEPARATOR}output"]["grad_sq"].double() / all_tokens
        return 0.5 * float((squares * self.error).sum())

    @property
    def relative_error(self) -> float:
        return float(self.error.sum()) / max(float(self.norm.sum()), 1e-30)

    def _merged(self, value: Tensor, channels: Tensor | None) -> Tensor:
        """A statistic ``[E, ...]`` of the old experts as that of the new ones."""
        width = [] if channels is None else [channels.shape[1]] * (value.dim() - 1)
        total = value.new_zeros(self.unit.shapes["gate"][0], *(width or value.shape[1:]))
        for expert, new in enumerate(self.group.tolist()):
            if new < 0:
                continue
            own = value[expert]
            for dim in range(len(width)):
                own = own.index_select(dim, channels[expert].to(own.device))  # type: ignore[index]
            total[new] += own
        return total


def reduced_bank(
    store: Store, key: str, model: StreamedModel, unit: Unit, prefix: Chain, stats: Stats
) -> ReducedBank:
    """The bank under the reducers of a chain: from the store, or made and put there.

    Args:
        stats: of the expert layer.
    """
    if store.get(KIND, key) is None:
        started = time.monotonic()
        layer = open_layer(model, unit, stats)
        (spec,) = prefix
        with torch.no_grad():
            reduction = reducer_module(spec.method).reduce(layer, spec.parsed())
            error, norm = _output_error(layer, reduction)
        _write(store, key, unit, reduction, error, norm, time.monotonic() - started)
    found = read_reduction(store, key, unit)
    assert found is not None, "it was just written"
    return found


def read_reduction(store: Store, key: str, unit: Unit) -> ReducedBank | None:
    """A finished reduction of ``unit``; None where there is none. Tensors are mapped."""
    found = get_reduction(store, key)
    if found is None:
        return None
    entry, tensors = found
    gate = tensors["gate"]
    left = Outline(experts=gate.shape[0], width=gate.shape[1], rows=0)
    own = {*unit.shapes, _GROUP, _CHANNELS, _ERROR, _NORM}
    return ReducedBank(
        unit=reduced_unit(unit, left),
        members={name: tensors[name] for name in unit.shapes},
        side={name: tensor for name, tensor in tensors.items() if name not in own},
        group=tensors[_GROUP],
        channels=tensors.get(_CHANNELS),
        error=tensors[_ERROR],
        norm=tensors[_NORM],
        entry=entry,
    )


def _output_error(layer: ExpertLayer, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Mean squares of the change of the layer's output, and of the output, float64 ``[H]``."""
    x = layer.stats["sample"]
    before = mixture(layer, None, x).double()
    change = mixture(layer, reduction, x).double() - before
    return change.square().mean(0), before.square().mean(0)


def _write(
    store: Store,
    key: str,
    unit: Unit,
    reduction: Reduction,
    error: Tensor,
    norm: Tensor,
    seconds: float,
) -> None:
    experts = unit.shapes["gate"][0]
    group = torch.full((experts,), -1, dtype=torch.int64)
    for new, old in enumerate(reduction.groups):
        group[list(old)] = new
    tensors = {**reduction.weights, **side_members(reduction), _GROUP: group}
    tensors |= {_ERROR: error, _NORM: norm}
    if CONSTANTS in tensors:
        tensors[CONSTANTS] = tensors[CONSTANTS].to(tensors["gate"].dtype)
    if reduction.channels is not None:
        tensors[_CHANNELS] = reduction.channels
    put_reduction(store, key, unit.name, tensors, reduction.events, seconds)
