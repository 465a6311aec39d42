"""What reducers leave of the banks and dense parts of a model: shapes, bytes, what can be loaded.

A bank is reduced by itself; the linears of a dense part are reduced together. Both have an *owner*:
the bank's own name, or that of the part. Nothing is computed here but numbers from headers.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from moesaic.methods.base import Chain, Unit, merge_of, reverse_needs
from moesaic.methods.parts import cuts_parts, outline_part
from moesaic.methods.reduction import LayerShape, Outline, is_open
from moesaic.orchestrator.narrowing import BlockPart, block_parts, narrowed_unit, unit_place_bytes
from moesaic.orchestrator.reductions import layer_shape, outline, reduced_unit, side_bytes
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import Serve, part_problem, reduction_problem


class Shaping:
    """The banks and parts of some units.

    Args:
        model: whose units they are.
        units: those that may be compressed; a part that lacks one cannot be reduced.
        serve: who is to load the result.

    Attributes:
        parts: name → part, in model order.
        owners: unit → what is reduced where it is, for all that can be.
    """

    def __init__(self, model: StreamedModel, units: Sequence[Unit], serve: Serve) -> None:
        self.model, self.units, self.serve = model, units, serve
        names = {unit.name for unit in units}
        self.parts: dict[str, BlockPart] = {
            part.name: part
            for part in block_parts(model)
            if names >= {unit.name for unit in part.units.values()}
        }
        self.owners: Mapping[str, str] = {
            unit.name: part.name for part in self.parts.values() for unit in part.units.values()
        } | {unit.name: unit.name for unit in units if unit.kind == "bank"}
        self._together: dict[str, list[Unit]] = {}
        for unit in units:
            if unit.name in self.owners:
                self._together.setdefault(self.owners[unit.name], []).append(unit)

    def units_of(self, owner: str) -> list[Unit]:
        """The units that are reduced together: the linears of a part, or a bank."""
        return self._together.get(owner, [])

    def part(self, unit: str) -> BlockPart | None:
        """The part that a linear belongs to, if it can be reduced."""
        return self.parts.get(self.owners.get(unit, ""))

    def meant(self, unit: Unit, prefix: Chain) -> bool:
        """Whether reducers are meant for a unit: all are for banks, some for parts, too."""
        part = self.part(unit.name)
        own = unit.kind == "bank" or part is not None
        return not prefix or (
            own and (part is None or all(part.shape.kind in cuts_parts(s.method) for s in prefix))
        )

    @cached_property
    def _layers(self) -> dict[str, LayerShape]:
        return {u.name: layer_shape(self.model, u) for u in self.units if u.kind == "bank"}

    def _outline(self, bank: Unit, prefix: Chain) -> Outline:
        return outline(self._layers[bank.name], prefix)

    def reduced(self, unit: Unit, prefix: Chain) -> Unit:
        """What reducers leave of a unit.

        Raises:
            ValueError: they cannot be used on it, in one line.
        """
        if not prefix:
            return unit
        part = self.part(unit.name)
        if part is None:
            return reduced_unit(unit, self._outline(unit, prefix))
        return narrowed_unit(unit, outline_part(part.shape, prefix)[part.role(unit.name)])

    def stand_ins(self, unit: Unit, chain: Chain) -> int:
        """How many merged experts a unit's own are corrected from; 0 where none are.

        Raises:
            ValueError: a bank cannot be merged so, in one line.
        """
        merge = merge_of(chain)
        return self._outline(unit, merge).experts if merge and unit.kind == "bank" else 0

    def unknown(self, unit: Unit, prefix: Chain, rest: Chain) -> str | None:
        """Why methods cannot follow reducers on a unit, of whose new inputs too little is known;
        None if they can."""
        part = self.part(unit.name)
        if not prefix or part is None or part.shape.kind != "attention":
            return None
        wanting = next((spec.method for spec in rest if "fisher" in reverse_needs((spec,))), None)
        if wanting is None:
            return None
        return f"{wanting} cannot follow {prefix[0].method} in an attention, whose values are new"

    def form(self, unit: Unit, prefix: Chain) -> str:
        """What engines must know of a bank or of a linear's part: number and width of experts, or
        the width of an MLP."""
        part = self.part(unit.name)
        if part is None:
            experts, width, _ = self.reduced(unit, prefix).shapes["gate"]
            return f"{experts}x{width}"
        left = outline_part(part.shape, prefix) if prefix else part.shape.shapes
        return str(left["down"][1]) if "down" in left else ""

    def side_bytes(self, unit: Unit, prefix: Chain) -> int:
        """Bytes of what a reduced unit holds besides its members, against the unit as it is."""
        part = self.part(unit.name)
        if part is not None:
            (shape,) = self.reduced(unit, prefix).shapes.values()
            return unit_place_bytes(unit, (shape[0], shape[1])) if self.serve == "moesaic" else 0
        return self._bank_side_bytes(unit, prefix)

    def _bank_side_bytes(self, bank: Unit, prefix: Chain) -> int:
        model, shape = self.model, self._layers[bank.name]
        disk = model.layouts[bank.block].kept
        router, biases = model.router_names(bank.block), model.bias_names(bank.block)
        now = sum(model.checkpoint.nbytes(disk[name]) for name in [*router.values(), *biases])

        def item(name: str) -> int:
            return model.checkpoint.dtype(disk[name]).itemsize

        each = {role: item(name) for role, name in router.items()}
        bias = item(biases[0]) if biases else 0
        weight = model.stored_dtype(bank).itemsize
        return side_bytes(shape, self._outline(bank, prefix), each, bias, weight) - now

    def unservable(self, unit: Unit, prefix: Chain) -> str | None:
        """Why the target cannot load a unit reduced so; None if it can."""
        if self.serve != "moesaic" and any(is_open(spec.parsed()) for spec in prefix):
            return f"serve: {self.serve} needs equally many experts in all blocks: give window: 1"
        part = self.part(unit.name)
        if part is None:
            left = self._outline(unit, prefix)
            return reduction_problem(unit, left, self.serve, self.model.family)
        biased = any(self.model.bias_name(own) for own in part.units.values())
        return part_problem(part.shape.kind, biased, self.serve, self.model.family)
