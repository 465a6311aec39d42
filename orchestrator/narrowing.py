"""Dense parts of blocks made narrower: opened for a reducer, kept in the store, put into place.

An entry ``reductions`` of a part is written like a piece: what is left of every linear, where it
stands, and how it was reached. Chains that begin with the reducer compress what is left, with the
statistics of what is left. A plan's piece puts that back into the layer's own shape, in the format
``channels``, so that everything around it is as it was; engines that know no such format get the
narrower matrices themselves, where ``config.json`` can say so.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import channels, dense
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Event, Stats, Unit
from moesaic.methods.parts import (
    Narrowed,
    Part,
    PartKind,
    PartReduction,
    PartShape,
    part_reducer,
)
from moesaic.orchestrator.pieces import read_piece, write_piece
from moesaic.orchestrator.statistics import SEPARATOR
from moesaic.orchestrator.store import Entry, Store
from moesaic.orchestrator.streaming import StreamedModel

# Member of a linear's piece besides its weight.
LINEAR_BIAS = "bias"
# What an entry holds of a role: fields of Narrowed.
_TENSORS = ("weight", "rows", "columns", "error", "bias", "inputs", "slopes")
_NORM = "norm"


@dataclass(frozen=True)
class BlockPart:
    """A part of a block whose linears can be cut together.

    Attributes:
        name: what it is called.
        block: index of the block.
        units: role → unit.
        shape: its sizes.
    """

    name: str
    block: int
    units: Mapping[str, Unit]
    shape: PartShape

    def role(self, unit: str) -> str:
        """The role of a unit."""
        return next(role for role, own in self.units.items() if own.name == unit)


def block_parts(model: StreamedModel) -> list[BlockPart]:
    """The parts of all blocks whose linears the family names, in model order."""
    found = []
    for layout in model.layouts:
        by_module = {layout.modules[unit.name]: unit for unit in layout.units}
        prefix = model.family.block.format(block=layout.index)
        kinds: dict[PartKind, Mapping[str, str]] = {
            "attention": {str(r): path for r, path in model.family.attention_roles.items()},
            "mlp": {str(r): path for r, path in model.family.mlp_roles.items()},
        }
        for kind, modules in kinds.items():
            units = {role: by_module[path] for role, path in modules.items() if path in by_module}
            if modules and len(units) == len(modules):
                shape = _part_shape(model, kind, units)
                found.append(BlockPart(f"{prefix}.{kind}", layout.index, units, shape))
    return found


def _part_shape(model: StreamedModel, kind: PartKind, units: Mapping[str, Unit]) -> PartShape:
    shapes: dict[str, tuple[int, int]] = {}
    for role, unit in units.items():
        out, inputs = unit.shapes["weight"]
        shapes[role] = (out, inputs)
    if kind == "mlp":
        return PartShape(kind, shapes)
    heads: int = model.config.num_attention_heads
    kv_heads: int = getattr(model.config, "num_key_value_heads", None) or heads
    rope = getattr(model.config, "rope_parameters", None) or {}
    turned = rope.get("partial_rotary_factor") or getattr(model.config, "partial_rotary_factor", 1)
    return PartShape(kind, shapes, heads, kv_heads, model.family.paired and turned in (None, 1))


def narrowed_unit(unit: Unit, shape: tuple[int, int]) -> Unit:
    """The linear that a reduction leaves."""
    return replace(unit, shapes={"weight": shape})


def unit_place_bytes(unit: Unit, shape: tuple[int, int]) -> int:
    """Bytes of the places of what is left of a linear."""
    pairs = zip(unit.shapes["weight"], shape, strict=True)
    return sum(channels.place_bytes(before, after) for before, after in pairs)


@dataclass(frozen=True)
class NarrowedPart:
    """A part after a reduction.

    Attributes:
        linears: unit → what is left of it.
        norm: unit → Σ over the tokens of the square of each output, float64 ``[out]``.
        entry: of the store.
    """

    part: BlockPart
    linears: Mapping[str, Narrowed]
    norm: Mapping[str, Tensor]
    entry: Entry

    @property
    def seconds(self) -> float:
        return float(self.entry.metadata["seconds"])

    @property
    def events(self) -> list[Event]:
        return [Event(**event) for event in self.entry.metadata["events"]]

    def unit(self, name: str) -> Unit:
        """A unit with its new shape."""
        unit = self.part.units[self.part.role(name)]
        out, inputs = self.linears[name].weight.shape
        return narrowed_unit(unit, (out, inputs))

    def gradients(self, stats: Mapping[str, Stats], names: list[str]) -> dict[str, Stats]:
        """What the reverse pass left of units, for what is left of them."""
        keys = {name: f"{name}{SEPARATOR}weight" for name in names}
        return {key: self.linears[name].narrow_gradients(stats[key]) for name, key in keys.items()}

    def placed(self, name: str, weight: CompressedTensor) -> dict[str, CompressedTensor]:
        """Members of the piece of a unit of which ``weight`` is left."""
        linear, unit = self.linears[name], self.part.units[self.part.role(name)]
        shape = unit.shapes["weight"]
        members = {"weight": channels.pack(weight, shape, rows=linear.rows, columns=linear.columns)}
        return members if linear.bias is None else {**members, LINEAR_BIAS: dense.pack(linear.bias)}

    def loss(self, gradients: Mapping[str, Stats], all_tokens: int) -> float:
        """Second-order estimate of the KL that the cut costs by itself, in nats per token:
        ½ · Σ E[g²] · E[Δy²] over the outputs of its linears, for which all else is as it was.

        Args:
            gradients: ``unit|member`` → sums of the reverse pass.
            all_tokens: of the reverse pass.
        """
        tokens = max(1, int(self.entry.metadata["tokens"]))
        total = 0.0
        for name, linear in self.linears.items():
            squares = gradients[f"{name}{SEPARATOR}weight"]["grad_sq"].double() / all_tokens
            total += 0.5 * float((squares * linear.error).sum()) / tokens
        return total

    @property
    def error(self) -> float:
        """Part of the outputs' square that changes, of the linears that change any."""
        changed = {n: float(x.error.sum()) for n, x in self.linears.items() if x.error.any()}
        norm = sum(float(self.norm[name].sum()) for name in changed)
        return sum(changed.values()) / max(norm, 1e-30)


def narrowed_part(
    store: Store,
    key: str,
    model: StreamedModel,
    part: BlockPart,
    prefix: Chain,
    stats: Mapping[str, Stats],
) -> NarrowedPart:
    """The part under the reducers of a chain: from the store, or made and put there.

    Args:
        stats: site → statistics.
    """
    if store.get("reductions", key) is None:
        started = time.monotonic()
        opened = _open_part(model, part, stats)
        (spec,) = prefix
        with torch.no_grad():
            reduction = part_reducer(spec.method).reduce_part(opened, spec.parsed())
        _write(store, key, part, opened, reduction, time.monotonic() - started)
    found = read_narrowed(store, key, part)
    assert found is not None, "it was just written"
    return found


def _open_part(model: StreamedModel, part: BlockPart, stats: Mapping[str, Stats]) -> Part:
    return Part(
        shape=part.shape,
        weights={role: model.read_unit(unit)["weight"] for role, unit in part.units.items()},
        biases={
            role: bias
            for role, unit in part.units.items()
            for bias in [model.read_bias(unit)]
            if bias is not None
        },
        stats={role: stats[unit.sites["weight"]] for role, unit in part.units.items()},
    )


def _write(
    store: Store,
    key: str,
    part: BlockPart,
    opened: Part,
    reduction: PartReduction,
    seconds: float,
) -> None:
    tensors: dict[str, Tensor] = {}
    for role, linear in reduction.linears.items():
        weight, hessian = opened.weights[role].double(), opened.stats[role]["hessian"].double()
        tensors[f"{role}{SEPARATOR}{_NORM}"] = ((weight @ hessian) * weight).sum(-1)
        for name in _TENSORS:
            value: Tensor | None = getattr(linear, name)
            if value is not None:
                tensors[f"{role}{SEPARATOR}{name}"] = value
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{part.name}: the reduction's {name} is not finite")
    members = {name: dense.pack(tensor.contiguous()) for name, tensor in tensors.items()}
    metadata: dict[str, Any] = {
        "unit": part.name,
        "seconds": seconds,
        "tokens": int(next(iter(opened.stats.values()))["tokens"]),
        "events": [
            {"kind": e.kind, "message": e.message, "unit": part.name, "value": e.value}
            for e in reduction.events
        ],
    }
    store.put("reductions", key, lambda p: write_piece(p, members, {"unit": part.name}), metadata)


def read_narrowed(store: Store, key: str, part: BlockPart) -> NarrowedPart | None:
    """A finished reduction of ``part``; None where there is none. Tensors are mapped."""
    entry = store.get("reductions", key)
    if entry is None:
        return None
    tensors = {name: member.dense() for name, member in read_piece(entry.path).items()}
    linears, norm = {}, {}
    for role, unit in part.units.items():
        fields = {name: tensors.get(f"{role}{SEPARATOR}{name}") for name in _TENSORS}
        linears[unit.name] = Narrowed(**fields)  # type: ignore[arg-type]
        norm[unit.name] = tensors[f"{role}{SEPARATOR}{_NORM}"]
    return NarrowedPart(part, linears, norm, entry)
