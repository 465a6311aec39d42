"""A narrower model before everything else: the original, sliced once into a folder of the store.

:mod:`moesaic.methods.slicegpt` says what is computed. In :mod:`moesaic.orchestrator.slice_walk` the
calibration text passes the original, and what it makes of the residual stream gives the stream's
axes. From those come the weights here, one block at a time.

    STORE/bases    axes of a place, float64
    STORE/sliced   one file of weights per block, and one for embedding, last norm and head
    STORE/models   a model folder of these with their index and config.json

Everything about the sliced model but its numbers follows from the original's headers: a
:class:`SlicedCheckpoint` can be planned with before any of it is there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.methods import slicegpt
from moesaic.methods.base import Event, Unit
from moesaic.orchestrator.checkpoint import Checkpoint, Entry
from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.foreign import printable
from moesaic.orchestrator.pieces import tensor_blob
from moesaic.orchestrator.shared import fetched, open_store
from moesaic.orchestrator.shortcuts import CONFIG_KEY, shortcut_name
from moesaic.orchestrator.statistics import Node
from moesaic.orchestrator.store import Store, code_digest, digest, scratch_folder
from moesaic.orchestrator.stored_model import model_folder, shard_file, write_stored
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.tensorfile import Blob, file_bytes, write_file
from moesaic.orchestrator.walk import Walk, opened
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

_METADATA = {"format": "pt"}

Members = dict[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """What is cut out of a model, with which text; plain data for workers.

    A *place* is where the stream enters a norm: in front of sublayer k of block b it has the number
    ``b * sublayers + k``, in front of the head ``blocks * sublayers``. A *step* is one passage of
    the text: with ``shortcuts`` there is one for every place, else one for every block.

    Attributes:
        walk: the original model and the calibration text.
        width: hidden size that is left.
        shortcuts: whether each place has axes of its own.
        blocks, sublayers: of the model, and of each block.
    """

    walk: Walk
    width: int
    shortcuts: bool
    blocks: int
    sublayers: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Cut":
        """From what ``asdict`` made."""
        return cls(**{**plain, "walk": Walk(**plain["walk"])})

    @cached_property
    def stream_key(self) -> str:
        """Digest of everything that fixes the stream; without shortcuts it passes the original,
        whatever is cut out of it afterwards."""
        code = code_digest(
            "methods/slicegpt.py",
            "orchestrator/slicing.py",
            "orchestrator/slice_walk.py",
            "orchestrator/shortcuts.py",
            "orchestrator/tensorfile.py",
        )
        return digest([self.walk.key, code, *([self.width] if self.shortcuts else [])])

    @property
    def key(self) -> str:
        """Digest of everything that fixes the sliced model."""
        return digest([self.stream_key, self.width, self.shortcuts])

    @property
    def sums_key(self) -> str:
        """Key of the sums over the stream at all places; only without shortcuts."""
        return digest([self.stream_key, "sums"])

    @property
    def places(self) -> int:
        """How many places have axes."""
        return self.blocks * self.sublayers + 1 if self.shortcuts else 1

    @property
    def steps(self) -> int:
        return self.places if self.shortcuts else self.blocks

    @property
    def parts(self) -> int:
        """Files of weights."""
        return self.blocks + 1

    def place(self, block: int, sublayer: int) -> int:
        """Whose axes the stream has in front of a sublayer."""
        return block * self.sublayers + sublayer if self.shortcuts else 0

    def basis_key(self, place: int) -> str:
        return digest([self.key, "basis", place])

    def part_key(self, part: int) -> str:
        return digest([self.key, "part", part])

    @property
    def store(self) -> Store:
        return open_store(self.walk.store)

    @property
    def scratch(self) -> Path:
        """Folder of unfinished work: hidden states, partial sums."""
        return scratch_folder(Path(self.walk.store), self.stream_key)

    @property
    def folder(self) -> Path:
        """Folder of the sliced model."""
        return model_folder(Path(self.walk.store), self.key)

    def basis(self, place: int) -> Tensor:
        """Axes that were found, ``[hidden, width]``, float64."""
        path = self.store.path("bases", self.basis_key(place))
        with safe_open(fetched(path), framework="pt") as file:
            found: Tensor = file.get_tensor("basis").clone()
            return found

    def hidden_path(self, block: int, shard: int) -> Path:
        """What enters a block, before it is projected."""
        return self.scratch / f"hidden-{block:04d}-{shard:04d}.safetensors"

    def node_path(self, step: int, node: Node) -> Path:
        return self.scratch / f"gram-{step:05d}-{node[0]:04d}-{node[1]:04d}.safetensors"

    def entries(self) -> Iterator[Path]:
        """Files of the store, and folders, that belong to it."""
        yield from (self.scratch, self.folder)
        store = self.store
        yield from (store.path("bases", self.basis_key(place)) for place in range(self.places))
        if not self.shortcuts:
            yield store.path("stats", self.sums_key)
        yield from (store.path("sliced", self.part_key(part)) for part in range(self.parts))


# What can be told before any work


def sliced_width(model: StreamedModel, options: slicegpt.Options) -> int:
    """The hidden size that is left.

    A share is rounded down to what the model's configuration can have; some types want a multiple
    of their heads.

    Raises:
        RecipeError: the model type cannot be sliced, or not to this width.
    """
    family = model.family
    if not family.sublayers:
        raise RecipeError(
            f"slice: {family.model_type} cannot be sliced (families/{family.model_type}.yaml names"
            " no sublayers: only RMSNorms in front of attention and MLP commute with rotations):"
            " take it out"
        )
    try:
        width = slicegpt.wanted_width(model.hidden_size, options.hidden)
    except ValueError as error:
        raise RecipeError(f"slice.hidden: {error}") from None
    reason = _refused(model, width)
    if reason is None:
        return width
    step = slicegpt.WIDTH_MULTIPLE
    lower = [w for w in range(width - width % step, 0, -step) if _refused(model, w) is None]
    if lower and isinstance(options.hidden, float):
        return lower[0]
    upper = [w for w in range(width + step, model.hidden_size, step) if _refused(model, w) is None]
    near = [str(w) for w in [*lower[:1], *upper[:1]]]
    advice = f": give {' or '.join(near)}" if near else ""
    raise RecipeError(
        f"slice.hidden: {width} is no width for {family.model_type}: {reason}{advice}"
    )


def _refused(model: StreamedModel, width: int) -> str | None:
    """What transformers says against a width."""
    try:
        type(model.config).from_dict(sliced_config(model, width, shortcuts=False))
    except Exception as error:
        return printable(" ".join(str(error.__cause__ or error).split())[:200].rstrip("."))
    return None


def sliced_config(model: StreamedModel, width: int, shortcuts: bool) -> dict[str, Any]:
    """``config.json`` of the sliced model; what followed from the hidden size is said now."""
    config = model.config
    heads = getattr(config, "head_dim", None) or model.hidden_size // config.num_attention_heads
    changed = {"hidden_size": width, "head_dim": heads, "tie_word_embeddings": False}
    return {**model.checkpoint.config, **changed, **({CONFIG_KEY: True} if shortcuts else {})}


class SlicedCheckpoint(Checkpoint):
    """The sliced model's folder, which is made ready here; its weights may be still to come.

    Args:
        model: the original.
        cut: what is cut out of it.
    """

    def __init__(self, model: StreamedModel, cut: Cut) -> None:
        self.cut = cut
        self.path = cut.folder
        self.config = sliced_config(model, cut.width, cut.shortcuts)
        self.files = []
        self._entries: dict[str, Entry] = {}
        self._sizes: list[int] = []
        self._lay_out(model)
        self._write_folder()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that the content follows from."""
        return self.cut.key

    @property
    def file_bytes(self) -> int:
        return sum(self._sizes)

    def _lay_out(self, model: StreamedModel) -> None:
        """Where every tensor will lie; as ``write_file`` has it."""
        for part in range(self.cut.parts):
            file = shard_file(self.path, self._shard(part), self.cut.part_key(part))
            blobs = _blobs(sliced_part(_Promised(model, self.cut), part))
            size = file_bytes(blobs, _METADATA)
            begin = size - sum(blob.nbytes for blob in blobs)
            for blob in sorted(blobs, key=lambda blob: -DTYPES[blob.dtype].itemsize):
                dtype = DTYPES[blob.dtype]
                self._entries[blob.name] = Entry(file, begin, blob.nbytes, blob.shape, dtype)
                begin += blob.nbytes
            self.files.append(file)
            self._sizes.append(size)

    def _shard(self, part: int) -> str:
        return f"model-{part + 1:05}-of-{self.cut.parts:05}.safetensors"

    def _readable(self, file: Path) -> Path:
        try:
            return fetched(file)
        except FileNotFoundError as error:
            raise RunError(f"{error.filename}: is gone; run the same command again") from None

    def _write_folder(self) -> None:
        shards = {file: self._shard(part) for part, file in enumerate(self.files)}
        weight_map = {name: shards[entry.file] for name, entry in sorted(self._entries.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        keys = {self._shard(part): self.cut.part_key(part) for part in range(self.cut.parts)}
        write_stored(self.path, self.config, index, keys)


# Weights


class _Original:
    """Where the tensors and axes of a cut come from: files."""

    def __init__(self, model: StreamedModel, cut: Cut) -> None:
        self.model, self.cut = model, cut

    def basis(self, place: int) -> Tensor:
        return self.cut.basis(place).to(self.model.device)

    def unit(self, unit: Unit) -> Members:
        """Member → weight ``[*batch, out, in]``."""
        members = self.model.read_unit(unit)
        return {name: member.to(self.model.device) for name, member in members.items()}

    def kept(self, name: str) -> Tensor:
        tensor = self.model.checkpoint.read(name)
        self.model.checkpoint.check_finite(name, tensor)
        return tensor.to(self.model.device)


class _Promised(_Original):
    """The same without values, on the meta device."""

    def basis(self, place: int) -> Tensor:
        shape = (self.model.hidden_size, self.cut.width)
        return torch.empty(shape, dtype=torch.float64, device="meta")

    def unit(self, unit: Unit) -> Members:
        dtype = self.model.checkpoint.dtype(next(iter(self.model.unit_tensors(unit).values()))[0])
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape in unit.shapes.items()
        }

    def kept(self, name: str) -> Tensor:
        checkpoint = self.model.checkpoint
        return torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta")


def sliced_part(source: _Original, part: int) -> dict[str, Tensor]:
    """Tensors of a file of the sliced model: a block's, or the last file's, by name on disk."""
    if part == source.cut.blocks:
        return _around(source)
    model, cut = source.model, source.cut
    family, layout = model.family, model.layouts[part]
    prefix = family.block.format(block=part) + "."
    kept = {name.removeprefix(prefix): name for name in layout.kept.values()}
    found = {name: source.kept(name) for name in kept.values()}
    units = {unit.name: source.unit(unit) for unit in layout.units}
    for number, sublayer in enumerate(family.sublayers):
        before = source.basis(cut.place(part, number))
        after = source.basis(cut.place(part, number + 1))
        norm = found[kept[f"{sublayer.norm}.weight"]]
        for name in (kept[own] for own in sublayer.reads if own in kept):
            found[name] = slicegpt.read(found[name], norm, before)
        for name in (kept[own] for own in sublayer.writes if own in kept):
            found[name] = slicegpt.added(found[name], after)
        for unit in layout.units:
            members, site = units[unit.name], {m: s[len(prefix) :] for m, s in unit.sites.items()}
            for member in members:
                if site[member] in sublayer.reads:
                    members[member] = slicegpt.read(members[member], norm, before)
                elif site[member] in sublayer.writes:
                    members[member] = slicegpt.written(members[member], after)
                    bias = kept.get(f"{unit.name.removeprefix(prefix)}.bias")
                    if bias is not None:
                        found[bias] = slicegpt.added(found[bias], after)
        found[kept[f"{sublayer.norm}.weight"]] = _ones(norm, cut.width)
        if cut.shortcuts:
            found[prefix + shortcut_name(number)] = slicegpt.shortcut(before, after).to(norm.dtype)
    for unit in layout.units:
        found |= model.write_unit(unit, units.pop(unit.name))
    return found


def _around(source: _Original) -> dict[str, Tensor]:
    """Embedding, last norm and head, which no longer shares the embedding's weight."""
    model, cut, family = source.model, source.cut, source.model.family
    embed, norm, head = (f"{path}.weight" for path in (family.embed, family.norm, family.head))
    weight = source.kept(norm)
    last = source.basis(cut.place(cut.blocks, 0))
    found = {
        embed: slicegpt.added(source.kept(embed), source.basis(cut.place(0, 0))),
        norm: _ones(weight, cut.width),
        head: slicegpt.read(source.kept(head if head in model.checkpoint else embed), weight, last),
    }
    bias = f"{family.head}.bias"
    return found | ({bias: source.kept(bias)} if bias in model.checkpoint else {})


def _ones(norm: Tensor, width: int) -> Tensor:
    return torch.ones(width, dtype=norm.dtype, device=norm.device)


def _blobs(tensors: Mapping[str, Tensor]) -> list[Blob]:
    return [tensor_blob(name, tensor) for name, tensor in tensors.items()]


def write(state: WorkerState, cut: dict[str, Any], part: int) -> dict[str, Any]:
    """Writes a file of the sliced model."""
    plan = Cut.of(cut)
    model = opened(state, plan.walk)
    blobs = _blobs(sliced_part(_Original(model, plan), part))
    plan.store.put("sliced", plan.part_key(part), lambda p: write_file(p, blobs, _METADATA))
    return {"peak_bytes": peak_memory_bytes()}


# What came of it


def slicing_events(cut: Cut) -> list[Event]:
    """What happened while the axes were found, each with its place."""
    events = []
    for place in range(cut.places):
        entry = cut.store.get("bases", cut.basis_key(place))
        for event in entry.metadata["events"] if entry is not None else ():
            where = f"place {place} of the residual stream" if cut.shortcuts else "residual stream"
            events.append(Event(**{**event, "unit": where}))
    return events


def dropped_share(cut: Cut) -> float | None:
    """Share of the stream that is cut away, the mean over the places; None where it is unknown."""
    entries = [cut.store.get("bases", cut.basis_key(place)) for place in range(cut.places)]
    found = [entry.metadata["dropped"] for entry in entries if entry is not None]
    return sum(found) / len(found) if len(found) == cut.places else None
