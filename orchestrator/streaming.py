"""A model that is read block by block: at any time at most one block's weights are in memory.

The numbers are those of transformers: the blocks are its modules with weights from the files, and
they are called with the arguments that the model's own forward would pass.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import (
    BIAS,
    CONSTANTS,
    EXPERT_MAP,
    ROUTER,
    fuse,
    fuse_biases,
    is_reduced,
    split,
)
from moesaic.orchestrator.bank_slices import BankSlices
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experts import StandIns
from moesaic.orchestrator.family import Bank, load_family
from moesaic.orchestrator.layout import BlockLayout, model_layout
from moesaic.orchestrator.reshape import resize_experts, resize_router
from moesaic.orchestrator.skeleton import (
    Call,
    Skeleton,
    config_errors,
    fill_buffers,
    read_config,
)

Replaced = Mapping[str, Mapping[str, Tensor]]
# Calls are kept for this many shapes of a batch: full ones, the last one, and those of evaluation.
KEPT_SHAPES = 4


def dtype_named(name: str) -> torch.dtype | None:
    """A dtype by its name; None for ``auto``, the checkpoint's own."""
    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype


class StreamedModel:
    """A checkpoint as blocks between an embedding and a head.

    Embedding, last norm and head are read when first asked for; embedding and head are let go by
    :meth:`load_block`.

    Args:
        checkpoint: the files.
        dtype: dtype to compute in; by default the checkpoint's own.
        device: where blocks and hidden states are.
        trust_remote_code: whether code in the model folder may run.
        rounded: dtype that the files' tensors are rounded to first, as transformers does when it
            loads them in this one; by default none.

    Attributes:
        config: transformers' configuration.
        family: what the model type calls its parts.
        layouts: what the tensors of each block are.
        blocks: number of blocks.

    Raises:
        UserError: the model type is unknown, or files and configuration do not fit together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        rounded: torch.dtype | None = None,
    ) -> None:
        model_type = checkpoint.config.get("model_type")
        if not isinstance(model_type, str):
            raise UserError(f"{checkpoint.path / 'config.json'}: key model_type is missing")
        self.checkpoint = checkpoint
        self.family = load_family(model_type)
        self.config: Any = read_config(checkpoint, self.family, trust_remote_code)
        self.device = torch.device(device)
        with config_errors(checkpoint.path / "config.json"):
            self.dtype = dtype or self._own_dtype()
            self._skeleton = Skeleton(
                self.config, self.family, self.dtype, self.device, trust_remote_code
            )
        self._fp32 = self._skeleton.fp32_names(self.dtype)
        self._rounded = rounded
        self._not_rounded = self._skeleton.fp32_names(rounded) if rounded else ()
        self.blocks = len(self._skeleton.prototypes)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.layouts: list[BlockLayout] = model_layout(
            self.family,
            checkpoint,
            [_shapes(block) for block in self._skeleton.prototypes],
            self._outer_shapes(),
        )
        self._calls: OrderedDict[tuple[int, int], list[Call]] = OrderedDict()

    # What there is

    def units(self) -> list[Unit]:
        """All units in model order; no weight is read."""
        return [unit for layout in self.layouts for unit in layout.units]

    def unit_tensors(self, unit: Unit) -> dict[str, list[str]]:
        """Member → its names on disk: one per expert, or the one that holds all of them."""
        return self.layouts[unit.block].tensors[unit.name]

    def stored_dtype(self, unit: Unit) -> torch.dtype:
        """Dtype of the unit's weights in the files."""
        return self.checkpoint.dtype(next(iter(self.unit_tensors(unit).values()))[0])

    def stored_dtypes(self, unit: Unit) -> list[torch.dtype]:
        """Dtypes of the unit's weights in the files, each once."""
        names = (name for own in self.unit_tensors(unit).values() for name in own)
        return list(dict.fromkeys(map(self.checkpoint.dtype, names)))

    def unit_module(self, unit: Unit) -> str:
        """Path of the unit's module within its block."""
        return self.layouts[unit.block].modules[unit.name]

    @property
    def router_module(self) -> str:
        """Path of the router within a block that has experts."""
        assert self.family.router is not None, "only families with experts have routers"
        weight = self.family.router.weight
        return self.family.renames.get(weight, weight).removesuffix(".weight")

    def router_names(self, block: int) -> dict[str, str]:
        """Role → parameter of the block, for the tensors of its router."""
        family = self.family
        names = family.router.tensors() if family.router else {}
        known = self.layouts[block].kept
        found = {role: family.renames.get(name, name) for role, name in names.items()}
        return {role: name for role, name in found.items() if name in known}

    def bias_names(self, block: int) -> list[str]:
        """Parameters of the block that are its experts' biases: of gate and up, of down."""
        kept = self.family.experts.kept if self.family.experts else []
        return [name for name in kept if name in self.layouts[block].kept]

    def prototype(self, block: int) -> nn.Module:
        """The block's module without weights; it must not be changed."""
        return self._skeleton.prototypes[block]

    def constants(self) -> dict[str, Tensor]:
        """Buffers around the blocks that no file holds, by path: what they are in the dtype that
        is computed in, whatever transformers rounds them to when it loads a model."""
        return {
            f"{path}.{name}": module._buffers[name]
            for path, module in self._skeleton.model.named_modules()
            for name in sorted(module._non_persistent_buffers_set)
            if module._buffers[name] is not None
        }

    def fixed_names(self) -> list[str]:
        """Names on disk of everything that no unit covers."""
        covered = {
            name
            for layout in self.layouts
            for tensors in layout.tensors.values()
            for names in tensors.values()
            for name in names
        }
        return [name for name in self.checkpoint.names() if name not in covered]

    # Units

    def read_unit(self, unit: Unit) -> dict[str, Tensor]:
        """Member → dense weight ``[*batch, out, in]`` on the CPU, in the dtype of the file."""
        tensors = self.unit_tensors(unit)
        if unit.kind == "linear":
            return {"weight": self._read(tensors["weight"][0])}
        if self.bank.fused:
            fused = self._read(tensors["gate"][0]), self._read(tensors["down"][0])
            members = split(*fused, self.bank)
            return {member: weight.contiguous() for member, weight in members.items()}
        return {member: self._stack(names) for member, names in tensors.items()}

    def bias_name(self, unit: Unit) -> str | None:
        """Name on disk of a linear's bias; None if it has none."""
        return self.layouts[unit.block].kept.get(f"{self.unit_module(unit)}.bias")

    def read_bias(self, unit: Unit) -> Tensor | None:
        """A linear's bias ``[out]`` in the dtype of the file; None if it has none."""
        name = self.bias_name(unit)
        return None if name is None else self._read(name)

    def read_kept(self, block: int) -> dict[str, Tensor]:
        """Router and biases of a block's experts by parameter, in the dtype of the file."""
        names = [*self.router_names(block).values(), *self.bias_names(block)]
        return {name: self._read(self.layouts[block].kept[name]) for name in names}

    def write_unit(self, unit: Unit, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name on disk → tensor as the file holds it; the inverse of :meth:`read_unit`."""
        tensors = self.unit_tensors(unit)
        if unit.kind == "bank" and self.bank.fused:
            gate_up, down = fuse(members, self.bank)
            return {tensors["gate"][0]: gate_up, tensors["down"][0]: down}
        if unit.kind == "linear":
            return {tensors["weight"][0]: members["weight"]}
        return {
            name: weight
            for member, names in tensors.items()
            for name, weight in zip(names, members[member], strict=True)
        }

    # Running

    def load_block(
        self, index: int, replaced: Replaced | None = None, experts: int = 0
    ) -> nn.Module:
        """Block ``index`` with its weights, frozen; it is freed when the caller drops it.

        Args:
            replaced: unit → member → dense weight to use instead of the file's; a reduced bank
                comes with its router and has all of its members.
            experts: how many of a bank that is not replaced are on the device at a time (see
                :mod:`moesaic.orchestrator.bank_slices`); 0 for all.

        Raises:
            UserError: a weight is NaN or infinite, or a file has become shorter.
        """
        self.drop_outer()
        return self.build_block(index, replaced, experts)

    def build_block(
        self, index: int, replaced: Replaced | None = None, experts: int = 0
    ) -> nn.Module:
        """As :meth:`load_block`, which is for who holds one block at a time: embedding and head
        stay where they are."""
        layout = self.layouts[index]
        # The configuration is shared, not copied: it is the model's one place for settings.
        block = copy.deepcopy(self._skeleton.prototypes[index], {id(self.config): self.config})
        fill_buffers(self._skeleton.model, block, self.device)
        state = {module: self._read(name) for module, name in layout.kept.items()}
        for unit in layout.units:
            given = (replaced or {}).get(unit.name, {})
            if unit.kind == "bank" and experts and not given:
                slices = BankSlices(unit.shapes["gate"][0], experts, self._reader(unit))
                slices.put_into(block.get_submodule(self.unit_module(unit)))
            elif is_reduced(given):
                state |= self._reduced_state(block, unit, given)
            else:
                state |= self._unit_state(unit, given)
        prefix = self.family.block.format(block=index)
        for name in state:  # one by one: where the dtype changes, the old tensor is freed at once
            state[name] = self._placed(f"{prefix}.{name}", state[name])
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False)

    def unit_state(self, unit: Unit, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of a unit's module within its block, as :meth:`load_block` would make them.

        Args:
            members: dense weights to use instead of the file's, not of a reduced bank.
        """
        state = self._unit_state(unit, members)
        bias = f"{self.unit_module(unit)}.bias"
        if bias in self.layouts[unit.block].kept and bias not in state:
            state[bias] = self._read(self.layouts[unit.block].kept[bias])
        prefix = self.family.block.format(block=unit.block)
        return {name: self._placed(f"{prefix}.{name}", value) for name, value in state.items()}

    def embed(self, ids: Tensor) -> Tensor:
        """Input of the first block, ``[B, T] -> [B, T, hidden]``."""
        self._fill_outer(self.family.embed)
        recorded = self._around(input_ids=ids.to(self.device))
        shape = (ids.shape[0], ids.shape[1])
        self._remember(shape, [call for _, call in recorded])
        return recorded[0][0]

    def run_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """``[B, T, hidden] -> [B, T, hidden]`` through ``block``, without padding; which tokens see
        which is as the model has it."""
        args, kwargs = self._block_calls((hidden.shape[0], hidden.shape[1]))[index]
        output = block(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The last norm, which the head's input has passed; without one, what it is given."""
        if not self.family.norm:
            return hidden
        self._fill_outer(self.family.norm)
        normed: Tensor = self._skeleton.model.get_submodule(self.family.norm)(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """``[B, T, hidden] -> [B, T, vocab]`` from *normed* hidden states, scaled and capped as
        the model does."""
        self._fill_outer(self.family.head)
        return self._skeleton.head(hidden)

    def outputs(self, hidden: Tensor) -> Tensor:
        """What the model gives in the end for the last block's ``hidden``: logits, or of an encoder
        the hidden states themselves."""
        normed = self.final_norm(hidden)
        return normed if self.family.is_encoder else self.logits(normed)

    # Weights

    @property
    def bank(self) -> Bank:
        """What the family's expert banks look like."""
        assert self.family.experts is not None, "only families with experts have banks"
        return self.family.experts

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        self.checkpoint.check_finite(name, tensor)
        return self._as_loaded(name, tensor)

    def _as_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a file, rounded where that is asked for; its dtype stays."""
        if self._rounded is None or not tensor.is_floating_point():
            return tensor
        if any(part in name for part in self._not_rounded):
            return tensor
        return tensor.to(self._rounded).to(tensor.dtype)

    def _read_rows(self, name: str, low: int, high: int) -> Tensor:
        tensor = self.checkpoint.read_rows(name, low, high)
        self.checkpoint.check_finite(name, tensor)
        return self._as_loaded(name, tensor)

    def _stack(self, names: list[str]) -> Tensor:
        """``[len(names), …]``, each read into its place."""
        shape, dtype = self.checkpoint.shape(names[0]), self.checkpoint.dtype(names[0])
        stacked = torch.empty((len(names), *shape), dtype=dtype)
        for name, place in zip(names, stacked, strict=True):
            self._read_into(name, place)
        return stacked

    def _read_into(self, name: str, place: Tensor) -> None:
        self.checkpoint.check_finite(name, self.checkpoint.read(name, out=place))
        if self._rounded is not None:
            place.copy_(self._as_loaded(name, place))

    def _unit_state(self, unit: Unit, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the unit's module."""
        module, tensors = self.unit_module(unit), self.unit_tensors(unit)
        if unit.kind == "linear":
            weight = replaced.get("weight")
            state = {
                f"{module}.weight": self._read(tensors["weight"][0]) if weight is None else weight
            }
            return state | ({f"{module}.bias": replaced["bias"]} if "bias" in replaced else {})
        if replaced:
            missing = unit.shapes.keys() - replaced.keys()
            members = {**(self.read_unit(unit) if missing else {}), **replaced}
            gate_up, down = fuse(members, self.bank)
        elif self.bank.fused:
            gate_up, down = self._read(tensors["gate"][0]), self._read(tensors["down"][0])
        else:
            gate_up, down = self._stack_gate_up(unit), self._stack(tensors["down"])
        return {f"{module}.gate_up_proj": gate_up, f"{module}.down_proj": down}

    def _reader(self, bank: Unit) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        """Gives ``gate_up`` and ``down`` of some experts, ready to compute with."""
        tensors = self.unit_tensors(bank)
        prefix = f"{self.family.block.format(block=bank.block)}.{self.unit_module(bank)}"

        def read(low: int, high: int) -> tuple[Tensor, Tensor]:
            if self.bank.fused:
                gate_up, down = (
                    self._read_rows(tensors[member][0], low, high) for member in ("gate", "down")
                )
            else:
                gate_up = self._stack_gate_up(bank, range(low, high))
                down = self._stack(tensors["down"][low:high])
            return (
                self._placed(f"{prefix}.gate_up_proj", gate_up),
                self._placed(f"{prefix}.down_proj", down),
            )

        return read

    def _reduced_state(
        self, block: nn.Module, unit: Unit, members: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Parameters of a reduced bank and its router, whose modules are made ready for them."""
        path, experts = self.unit_module(unit), block.get_submodule(self.unit_module(unit))
        resize_experts(experts, *members["gate"].shape[:2])
        router = self.router_names(unit.block)
        rows = members[f"{ROUTER}weight"].shape[0]
        resize_router(block.get_submodule(self.router_module), rows)
        gate_up, down = fuse(members, self.bank)
        state = {f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": down}
        state |= {name: members[f"{ROUTER}{role}"] for role, name in router.items()}
        biases = {
            name: members[f"{BIAS}{name}"] for name in unit.shapes if f"{BIAS}{name}" in members
        }
        if biases:
            fused = fuse_biases(biases, self.bank)
            state |= dict(zip(self.bias_names(unit.block), fused, strict=True))
        if EXPERT_MAP in members:
            constants = members.get(CONSTANTS)
            StandIns(
                members[EXPERT_MAP].to(self.device),
                None if constants is None else constants.to(self.device),
            ).put_into(experts)
        return state

    def _stack_gate_up(self, unit: Unit, span: range | None = None) -> Tensor:
        """``[E, 2I, H]`` of all experts, or of some, without a second copy in between."""
        tensors = self.unit_tensors(unit)
        experts, width, hidden = unit.shapes["gate"]
        span = range(experts) if span is None else span
        dtype = self.checkpoint.dtype(tensors["gate"][0])
        stacked = torch.empty((len(span), 2 * width, hidden), dtype=dtype)
        for place, expert in enumerate(span):
            self._read_into(tensors["gate"][expert], stacked[place, :width])
            self._read_into(tensors["up"][expert], stacked[place, width:])
        return stacked

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        """On the device, in the dtype that transformers computes with."""
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        wide = any(part in name for part in self._fp32)
        return tensor.to(self.device, torch.float32 if wide else self.dtype)

    # Around the blocks

    def _own_dtype(self) -> torch.dtype:
        if self.config.dtype is not None:
            return torch.empty(0, dtype=self.config.dtype).dtype
        dtypes = (
            self.checkpoint.dtype(name)
            for name in self.checkpoint.names()
            if name.startswith(f"{self.family.embed}.")
        )
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def _tied_head(self) -> bool:
        """Whether the head's weight is the embedding's and so not on disk."""
        if self.family.is_encoder:
            return False
        on_disk = self.family.on_disk(f"{self.family.head}.weight") in self.checkpoint
        return bool(self.config.tie_word_embeddings) and not on_disk

    def _outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters around the blocks → shape.

        Raises:
            UserError: something that the family names is not there, or something else is.
        """
        family, model = self.family, self._skeleton.model
        shapes = _shapes(model)
        known = list(filter(None, (family.embed, *family.beside, family.norm, family.head)))
        modules = {name for name, _ in model.named_modules()}
        missing = [path for path in known if path not in modules]
        other = [name for name in shapes if not name.startswith(tuple(f"{p}." for p in known))]
        if missing or other:
            what = f"has no {missing[0]}" if missing else f"has {other[0]} outside of its blocks"
            raise UserError(
                f"{self.checkpoint.path / 'config.json'}: the model {what}, which family"
                f" {family.model_type} does not know"
            )
        if self._tied_head():
            del shapes[f"{self.family.head}.weight"]
        return shapes

    def _around(self, **inputs: Tensor) -> list[tuple[Tensor, Call]]:
        """Hidden state and call of every block; the model's forward passes what stands beside the
        embedding and the last norm, too."""
        for path in (*self.family.beside, self.family.norm):
            self._fill_outer(path)
        return self._skeleton.run(**inputs)

    def _fill_outer(self, path: str) -> None:
        """Reads the weights of the embedding, the last norm or the head, unless they are there.

        Of the last two some models have none: an empty path.
        """
        if not path:
            return
        module = self._skeleton.model.get_submodule(path)
        state = {}
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:
                continue
            full = f"{path}.{name}"
            tied = path == self.family.head and name == "weight" and self._tied_head()
            disk = self.family.on_disk(f"{self.family.embed}.weight" if tied else full)
            state[name] = self._placed(full, self._read(disk))
        if state:
            module.load_state_dict(state, assign=True)
            module.requires_grad_(False)

    def drop_outer(self) -> None:
        """Lets go of embedding and head; they are read again when asked for."""
        for path in filter(None, (self.family.embed, self.family.head)):
            module = self._skeleton.model.get_submodule(path)
            for name, parameter in list(module.named_parameters()):
                owner, _, last = name.rpartition(".")
                empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                setattr(module.get_submodule(owner), last, empty)

    def _block_calls(self, shape: tuple[int, int]) -> list[Call]:
        """What each block is called with for hidden states of ``shape``; they do not matter."""
        if shape not in self._calls:
            if self.family.is_encoder:  # which adds positions, and norms, before the first block
                self._fill_outer(self.family.embed)
            hidden = torch.zeros(*shape, self.hidden_size, dtype=self.dtype, device=self.device)
            recorded = self._around(inputs_embeds=hidden)
            self._remember(shape, [call for _, call in recorded])
        self._calls.move_to_end(shape)
        return self._calls[shape]

    def _remember(self, shape: tuple[int, int], calls: list[Call]) -> None:
        self._calls[shape] = calls
        while len(self._calls) > KEPT_SHAPES:
            self._calls.popitem(last=False)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters and persistent buffers → shape."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
