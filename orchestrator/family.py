"""A model family says what a model type calls its parts. It is data: ``families/<type>.yaml``.

All names are relative to the block unless said otherwise. A pattern may match nothing in some
block (dense blocks of a Mixture-of-Experts model, a query that is not factorised), but every
tensor on disk must match exactly one pattern, and every parameter that transformers' module wants
must come from exactly one tensor; :mod:`moesaic.orchestrator.layout` checks both.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import shown
from moesaic.orchestrator.yardsticks import LANGUAGE, SENTENCES, Yardstick

FOLDER = Path(__file__).parent / "families"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Linears(_Strict):
    """Linear layers that read the same activations.

    Attributes:
        site: name of those activations.
        linears: module paths. A linear is one unit; its bias, if it has one, is kept as it is.
        fused: name of the one layer that serving engines make of them; empty if they do not.
    """

    site: str
    linears: list[str] = Field(min_length=1)
    fused: str = ""


class Bank(_Strict):
    """The experts of a block: members gate and up ``[E, I, H]`` and down ``[E, H, I]``.

    On disk there is either a matrix per expert (``gate``, ``up``, ``down`` with ``{expert}``) or
    one tensor for all of them (``gate_up`` and ``down`` without).

    Attributes:
        name: what the unit is called.
        module: path of the module that holds ``gate_up_proj`` and ``down_proj``.
        transposed: the fused tensors are ``[E, in, out]``.
        interleaved: rows of the fused gate_up are gate 0, up 0, gate 1 … instead of gates first.
        kept: parameters of the experts that are no matrices (biases), kept as they are.
    """

    name: str
    module: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    down: str
    transposed: bool = False
    interleaved: bool = False
    kept: list[str] = []

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts."""
        return bool(self.gate_up)

    @model_validator(mode="after")
    def _one_layout(self) -> "Bank":
        single = {"gate": self.gate, "up": self.up}
        if self.fused and any(single.values()):
            raise ValueError("give gate and up, or gate_up, not both")
        if not self.fused and not all("{expert}" in name for name in (*single.values(), self.down)):
            raise ValueError("gate, up and down must contain {expert} (or give gate_up)")
        if not self.fused and (self.transposed or self.interleaved):
            raise ValueError("transposed and interleaved are for fused tensors (gate_up)")
        return self


class Router(_Strict):
    """What chooses the experts: tensors with a row per expert, all of them also in ``kept``.

    Attributes:
        weight: ``[E, H]``.
        bias: of the logits, ``[E]``, if there is one.
        correction: added for the choice only, ``[E]``, if there is one.
        count: key of ``config.json`` that says how many experts there are.
        width: key that says how wide they are, where it says nothing else.
    """

    weight: str
    bias: str = ""
    correction: str = ""
    count: str
    width: str = ""

    def tensors(self) -> dict[str, str]:
        """``weight``, ``bias``, ``correction`` → name on disk, for those that there are."""
        names = {"weight": self.weight, "bias": self.bias, "correction": self.correction}
        return {role: name for role, name in names.items() if name}


class Sublayer(_Strict):
    """A norm and what stands behind it; the block adds its output to the norm's input as it is.

    Attributes:
        norm: path of the norm, which is an RMSNorm.
        module: path of what is called with the norm's output and gives what is added.
        reads: what multiplies the norm's output: sites of linears and experts (``mlp:in``), and
            names of kept tensors ``[*, H]`` (routers).
        writes: what is added: sites of the linears and experts that make it, whose biases belong to
            it, and names of kept tensors ``[*, H]`` (biases of experts).
    """

    norm: str
    module: str
    reads: list[str] = Field(min_length=1)
    writes: list[str] = Field(min_length=1)


class Family(_Strict):
    """What a model type calls its parts.

    Attributes:
        model_type: as in ``config.json``; the name of the file.
        embed: path of the embedding, from the top.
        norm: path of the last norm, from the top; empty where blocks end with theirs.
        head: path of the output layer, from the top; absent on disk where it is tied. Empty for an
            encoder, which has none: it gives embeddings of sentences.
        block: prefix of a block with ``{block}``, on disk and in the module tree alike.
        attention, mlp, shared_experts: linears of each part.
        experts: the expert bank, if the model type has one.
        router: what chooses among the experts.
        mlp_roles: ``gate`` (if there is one), ``up`` and ``down`` → module path, where a block's
            MLP can be made narrower.
        attention_roles: ``query``, ``key``, ``value`` and ``output`` → module path, likewise.
        mlp_width: key of ``config.json`` that says how wide all MLPs are, and nothing else.
        paired: rotary embeddings turn channels i and i + d/2 of every query and key head together,
            and nothing else, such as a norm, looks at single channels of them.
        sublayers: what the residual stream passes in a block, in order; such models can be sliced.
            Empty where a block does anything else with the stream.
        kept: everything else in a block, kept as it is: norms, routers, sinks …
        renames: name on disk → name in the module, for kept tensors where they differ.
        unused: tensors on disk that the module does not want, copied unread.
        unused_outside: the same outside of blocks, from the top: tensors, or whole modules, which
            are taken out of the model.
        beside: modules, from the top, that hidden states pass between the embedding and the first
            block: learned positions, a norm.
        renames_outside: name on disk → path in the module tree, for modules outside of blocks.
        extra_blocks: whether blocks behind the last one (multi-token prediction) may be on disk;
            they are copied unread.
    """

    model_type: str
    embed: str
    norm: str
    head: str
    block: str
    attention: list[Linears]
    mlp: list[Linears] = []
    experts: Bank | None = None
    router: Router | None = None
    shared_experts: list[Linears] = []
    mlp_roles: dict[Literal["gate", "up", "down"], str] = {}
    attention_roles: dict[Literal["query", "key", "value", "output"], str] = {}
    mlp_width: str = ""
    paired: bool = False
    sublayers: list[Sublayer] = []
    kept: list[str]
    renames: dict[str, str] = {}
    unused: list[str] = []
    unused_outside: list[str] = []
    beside: list[str] = []
    renames_outside: dict[str, str] = {}
    extra_blocks: bool = False

    @model_validator(mode="after")
    def _router_is_kept(self) -> "Family":
        if (self.experts is None) != (self.router is None):
            raise ValueError("experts and router go together")
        for name in self.router.tensors().values() if self.router else ():
            if name not in self.kept:
                raise ValueError(f"the router's {name} must be in kept")
        return self

    @model_validator(mode="after")
    def _roles_are_linears(self) -> "Family":
        known = {path for _, group in self.parts() for path in group.linears}
        for path in (*self.mlp_roles.values(), *self.attention_roles.values()):
            if path not in known:
                raise ValueError(f"the roles name {path}, which is no linear of the family")
        if self.mlp_roles and not {"up", "down"} <= self.mlp_roles.keys():
            raise ValueError("mlp_roles needs up and down")
        if self.attention_roles and len(self.attention_roles) < 4:
            raise ValueError("attention_roles needs query, key, value and output")
        return self

    @model_validator(mode="after")
    def _sublayers_name_what_is_there(self) -> "Family":
        sites = {group.site for _, group in self.parts()}
        sites |= (
            {f"{self.experts.name}:{side}" for side in ("in", "mid")} if self.experts else set()
        )
        known = {*sites, *self.kept, *(self.experts.kept if self.experts else [])}
        for sublayer in self.sublayers:
            for name in (f"{sublayer.norm}.weight", *sublayer.reads, *sublayer.writes):
                if name not in known:
                    raise ValueError(f"sublayers name {name}, which the family does not have")
        return self

    def shortcut_pairs(self) -> list[tuple[str, str]]:
        """Paths of each norm and of the module behind it, within a block."""
        return [(sublayer.norm, sublayer.module) for sublayer in self.sublayers]

    @property
    def is_encoder(self) -> bool:
        """Whether it gives embeddings of sentences instead of a next token."""
        return not self.head

    @property
    def yardstick(self) -> Yardstick:
        """What such models are judged by."""
        return SENTENCES if self.is_encoder else LANGUAGE

    def is_unused_outside(self, name: str) -> bool:
        """Whether a tensor outside of blocks plays no part."""
        return any(name == path or name.startswith(f"{path}.") for path in self.unused_outside)

    def in_module(self, name: str) -> str:
        """Path in the module tree of a tensor outside of blocks, by its name on disk."""
        for disk, path in self.renames_outside.items():
            if name.startswith(f"{disk}."):
                return path + name.removeprefix(disk)
        return name

    def on_disk(self, path: str) -> str:
        """Name on disk of a tensor outside of blocks; the inverse of :meth:`in_module`."""
        for disk, module in self.renames_outside.items():
            if path.startswith(f"{module}."):
                return disk + path.removeprefix(module)
        return path

    def parts(self) -> list[tuple[str, Linears]]:
        """All groups of linears with the name of their part, in model order."""
        return [
            *(("attention", group) for group in self.attention),
            *(("mlp", group) for group in self.mlp),
            *(("shared_experts", group) for group in self.shared_experts),
        ]


def families() -> list[str]:
    """Known model types, in alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@cache
def load_family(model_type: str) -> Family:
    """The family of ``model_type``.

    Raises:
        UserError: the type is unknown, or its file is wrong.
    """
    if model_type not in families():
        name = shown(model_type)
        raise UserError(
            f"unknown model type '{name}': known are {', '.join(families())}\n"
            f"to add a family, put a file {name}.yaml that names its parts into {FOLDER}"
        )
    file = FOLDER / f"{model_type}.yaml"
    try:
        return Family(model_type=model_type, **_resolved(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: key {key}: {first['msg']}") from error


def _resolved(file: Path) -> dict[str, Any]:
    """The file's keys over those of the family that it ``extends``; a key is replaced whole."""
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a mapping")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if parent == file.stem or parent not in families():
        raise UserError(f"{file}: key extends: {parent!r} is none of {', '.join(families())}")
    return {**_resolved(FOLDER / f"{parent}.yaml"), **content}
