"""Which tensor on disk is what: a family's patterns applied to a checkpoint, names only.

Every tensor of a block is claimed by exactly one pattern, and the claims must provide exactly the
parameters, with the shapes, of the module that transformers builds from ``config.json``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moesaic.methods.base import Unit
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.family import Bank, Family, Linears
from moesaic.orchestrator.shortcuts import shortcut_name

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class BlockLayout:
    """One block.

    Attributes:
        units: its units, in model order.
        tensors: unit → member → names on disk, in expert order.
        modules: unit → path of its module within the block.
        kept: parameter of the block's module → name on disk, for all that no unit covers.
    """

    index: int
    units: list[Unit] = field(default_factory=list)
    tensors: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


class _Reader:
    """Claims the tensors of one block and remembers which parameters they provide."""

    def __init__(
        self, family: Family, checkpoint: Checkpoint, index: int, names: Sequence[str]
    ) -> None:
        self.family = family
        self.checkpoint = checkpoint
        self.prefix = family.block.format(block=index) + "."
        self.disk = dict.fromkeys(names)  # a set in a fixed order
        self.claimed: set[str] = set()
        self.provided: dict[str, tuple[int, ...]] = {}
        self.layout = BlockLayout(index)

    def claim(self, name: str) -> bool:
        """Whether the block has ``name``; each may be claimed once."""
        if name not in self.disk:
            return False
        if name in self.claimed:
            raise UserError(f"family {self.family.model_type}: two patterns match {name}")
        self.claimed.add(name)
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self.prefix + name)

    def keep(self, name: str) -> None:
        if self.claim(name):
            module = self.family.renames.get(name, name)
            self.layout.kept[module] = self.prefix + name
            self.provided[module] = self.shape(name)

    def linear(self, part: str, group: Linears, path: str) -> None:
        self.keep(f"{path}.bias")
        weight = f"{path}.weight"
        if weight in self.disk and 0 in self.shape(weight):
            self.keep(weight)  # a configuration may make a part that is not wanted 0 wide
            return
        if not self.claim(weight):
            return
        self.provided[weight] = self.shape(weight)
        unit = Unit(
            name=self.prefix + path,
            kind="linear",
            block=self.layout.index,
            part=part,
            shapes={"weight": self.shape(weight)},
            sites={"weight": self.prefix + group.site},
            fused=self.prefix + group.fused if group.fused else "",
        )
        self.add(unit, path, {"weight": [self.prefix + weight]})

    def add(self, unit: Unit, module: str, tensors: dict[str, list[str]]) -> None:
        self.layout.units.append(unit)
        self.layout.modules[unit.name] = module
        self.layout.tensors[unit.name] = tensors

    def bank(self, bank: Bank) -> None:
        for name in bank.kept:
            self.keep(name)
        found = self.fused_bank(bank) if bank.fused else self.split_bank(bank)
        if found is None:
            return
        tensors, gate, down = found
        experts, width, hidden = gate
        rows = (experts, 2 * width, hidden)
        self.provided[f"{bank.module}.gate_up_proj"] = _stored(rows, bank.transposed)
        self.provided[f"{bank.module}.down_proj"] = _stored(down, bank.transposed)
        name = self.prefix + bank.name
        unit = Unit(
            name=name,
            kind="bank",
            block=self.layout.index,
            part="experts",
            shapes={"gate": gate, "up": gate, "down": down},
            sites={"gate": f"{name}:in", "up": f"{name}:in", "down": f"{name}:mid"},
        )
        self.add(unit, bank.module, tensors)

    def fused_bank(
        self, bank: Bank
    ) -> tuple[dict[str, list[str]], tuple[int, ...], tuple[int, ...]] | None:
        both = [self.claim(bank.gate_up), self.claim(bank.down)]
        if not all(both):
            return None
        experts, rows, hidden = _stored(self.shape(bank.gate_up), bank.transposed)
        gate_up, down = self.prefix + bank.gate_up, self.prefix + bank.down
        tensors = {"gate": [gate_up], "up": [gate_up], "down": [down]}
        gate = (experts, rows // 2, hidden)
        return tensors, gate, _stored(self.shape(bank.down), bank.transposed)

    def split_bank(
        self, bank: Bank
    ) -> tuple[dict[str, list[str]], tuple[int, ...], tuple[int, ...]] | None:
        pattern = re.compile(re.escape(bank.down).replace(r"\{expert\}", r"(\d+)"))
        found = [match for match in map(pattern.fullmatch, self.disk) if match]
        count = 1 + max((int(match[1]) for match in found), default=-1)
        if count == 0:
            return None
        tensors: dict[str, list[str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for member, template in {"gate": bank.gate, "up": bank.up, "down": bank.down}.items():
            names = [template.format(expert=expert) for expert in range(count)]
            for name in names:
                if not self.claim(name):
                    raise UserError(f"{self.checkpoint.path}: no tensor {self.prefix}{name}")
                if self.shape(name) != self.shape(names[0]):
                    raise UserError(
                        f"{self.checkpoint.path}: tensor {self.prefix}{name} has shape "
                        f"{list(self.shape(name))}, expert 0 has {list(self.shape(names[0]))}"
                    )
            tensors[member] = [self.prefix + name for name in names]
            shapes[member] = (count, *self.shape(names[0]))
        return tensors, shapes["gate"], shapes["down"]

    def finish(self, expected: Shapes) -> BlockLayout:
        """Checks that nothing is left, and that the module gets what it wants."""
        path, kind = self.checkpoint.path, self.family.model_type
        for name in self.disk:
            if name not in self.claimed:
                raise UserError(
                    f"{path}: tensor {self.prefix}{name} matches no pattern of family {kind}"
                )
        check_provided(path.joinpath("config.json"), self.prefix, self.provided, expected)
        return self.layout


def check_provided(config: object, prefix: str, provided: Shapes, expected: Shapes) -> None:
    """Raises a UserError for the first parameter that is missing, unwanted or of another shape."""
    for name, shape in expected.items():
        if name not in provided:
            raise UserError(f"{config}: asks for a parameter {prefix}{name} that is in no file")
        if provided[name] != shape:
            raise UserError(
                f"{config}: asks for {prefix}{name} of shape {list(shape)}, "
                f"the files have {list(provided[name])}"
            )
    for name in provided:
        if name not in expected:
            raise UserError(f"{config}: the model has no parameter {prefix}{name}, the files do")


def _stored(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    experts, rows, columns = shape
    return (experts, columns, rows) if transposed else shape


def group_names(family: Family, checkpoint: Checkpoint) -> tuple[dict[int, list[str]], list[str]]:
    """Names on disk: those of each block, without the block's prefix, and all others."""
    pattern = re.compile(re.escape(family.block).replace(r"\{block\}", r"(\d+)") + r"\.(.*)")
    blocks: dict[int, list[str]] = {}
    others = []
    for name in checkpoint.names():
        match = pattern.fullmatch(name)
        if match:
            blocks.setdefault(int(match[1]), []).append(match[2])
        else:
            others.append(name)
    return blocks, others


def check_naming(
    family: Family, checkpoint: Checkpoint, blocks: Mapping[int, object], others: Sequence[str]
) -> None:
    """Raises a UserError where tensors are named as a model without its head saves them.

    Args:
        blocks, others: names on disk, as :func:`group_names` gives them.
    """
    top, _, inner = family.block.partition(".")
    bare = re.escape(inner).replace(r"\{block\}", r"\d+") + r"\..*"
    if not blocks and any(re.fullmatch(bare, name) for name in others):
        raise UserError(
            f"{checkpoint.path}: its tensors are named without {top!r}, as a model without its head"
            " saves them: load it with AutoModelForCausalLM and save it again"
        )


def model_layout(
    family: Family, checkpoint: Checkpoint, expected: Sequence[Shapes], outer: Shapes
) -> list[BlockLayout]:
    """The layout of every block.

    Args:
        expected: per block, parameter (or persistent buffer) of its module → shape.
        outer: the same for embedding, last norm and head, without those that are tied.

    Raises:
        UserError: family, files and configuration do not fit together.
    """
    blocks, others = group_names(family, checkpoint)
    config = checkpoint.path / "config.json"
    behind = [index for index in sorted(blocks) if index >= len(expected)]
    if behind and not family.extra_blocks:
        raise UserError(
            f"{config}: {len(expected)} blocks (num_hidden_layers), but the files have block "
            f"{behind[-1]}"
        )
    wanted = [name for name in others if not family.is_unused_outside(name)]
    for name in wanted:
        if family.on_disk(family.in_module(name)) != name:
            raise UserError(
                f"{checkpoint.path}: tensor {name} matches no pattern of family {family.model_type}"
            )
    provided = {family.in_module(name): checkpoint.shape(name) for name in wanted}
    check_provided(config, "", provided, outer)
    return [
        _block_layout(family, checkpoint, index, blocks.get(index, []), shapes)
        for index, shapes in enumerate(expected)
    ]


def _block_layout(
    family: Family, checkpoint: Checkpoint, index: int, names: Sequence[str], expected: Shapes
) -> BlockLayout:
    reader = _Reader(family, checkpoint, index, names)
    for part, group in family.parts():
        for path in group.linears:
            reader.linear(part, group, path)
    if family.experts is not None:
        reader.bank(family.experts)
    for name in family.kept:
        reader.keep(name)
    for number in range(len(family.sublayers)):
        reader.keep(shortcut_name(number))
    for name in family.unused:
        reader.claim(name)
    return reader.finish(expected)
