"""Dense parts of blocks made narrower: opened for a reducer, kept in the store, put into place.

An entry ``reductions`` of a part holds what is left of every linear, where it stands, and how it
was reached. Chains that begin with the reducer compress what is left, with the statistics of what
is left. A plan's piece puts that back into the layer's own shape, in the format
``channels``, so that everything around it is as it was; engines that know no such format get the
narrower matrices themselves, where ``config.json`` can say so.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.kernels import channels, dense
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Stats, Unit
from moesaic.methods.parts import (
    Narrowed,
    Part,
    PartKind,
    PartReduction,
    PartShape,
    part_reducer,
)
from moesaic.orchestrator.experts import clips
from moesaic.orchestrator.reduction_entries import KIND, Reduced, get_reduction, put_reduction
from moesaic.orchestrator.statistics import SEPARATOR
from moesaic.orchestrator.store import Store
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
            if kind == "attention" and clips(model.config):
                continue  # which looks at single channels of queries, keys and values
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
class NarrowedPart(Reduced):
    """A part after a reduction.

    Attributes:
        linears: unit → what is left of it.
        norm: unit → Σ over the tokens of the square of each output, float64 ``[out]``.
    """

    part: BlockPart
    linears: Mapping[str, Narrowed]
    norm: Mapping[str, Tensor]

    def shaped(self, unit: str) -> Unit:
        out, inputs = self.linears[unit].weight.shape
        return narrowed_unit(self.part.units[self.part.role(unit)], (out, inputs))

    def gradients(self, stats: Mapping[str, Stats], unit: str) -> dict[str, Stats]:
        key = f"{unit}{SEPARATOR}weight"
        return {key: self.linears[unit].narrow_gradients(stats[key])}

    def placed(self, name: str, weight: CompressedTensor) -> dict[str, CompressedTensor]:
        """Members of the piece of a unit of which ``weight`` is left."""
        linear, unit = self.linears[name], self.part.units[self.part.role(name)]
        shape = unit.shapes["weight"]
        members = {"weight": channels.pack(weight, shape, rows=linear.rows, columns=linear.columns)}
        return members if linear.bias is None else {**members, LINEAR_BIAS: dense.pack(linear.bias)}

    def loss(self, gradients: Mapping[str, Stats], all_tokens: int) -> float:
        """½ · Σ E[g²] · E[Δy²] over the outputs of its linears, for which all else is as it was."""
        tokens = max(1, int(self.entry.metadata["tokens"]))
        total = 0.0
        for name, linear in self.linears.items():
            squares = gradients[f"{name}{SEPARATOR}weight"]["grad_sq"].double() / all_tokens
            total += 0.5 * float((squares * linear.error).sum()) / tokens
        return total

    @property
    def relative_error(self) -> float:
        """Of the outputs of those linears that change any."""
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
    if store.get(KIND, key) is None:
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
    tokens = int(next(iter(opened.stats.values()))["tokens"])
    put_reduction(store, key, part.name, tensors, reduction.events, seconds, tokens=tokens)


def read_narrowed(store: Store, key: str, part: BlockPart) -> NarrowedPart | None:
    """A finished reduction of ``part``; None where there is none. Tensors are mapped."""
    found = get_reduction(store, key)
    if found is None:
        return None
    entry, tensors = found
    linears, norm = {}, {}
    for role, unit in part.units.items():
        fields = {name: tensors.get(f"{role}{SEPARATOR}{name}") for name in _TENSORS}
        linears[unit.name] = Narrowed(**fields)  # type: ignore[arg-type]
        norm[unit.name] = tensors[f"{role}{SEPARATOR}{_NORM}"]
    return NarrowedPart(entry, part, linears, norm)
