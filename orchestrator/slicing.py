"""A narrower model before everything else: the original, sliced once into a folder of the store.

:mod:`moesaic.methods.slicegpt` says what is computed. Here the calibration text passes the original
block by block, on the stream's own axes: cutting a stream is projecting it, and a hook behind every
attention and MLP does that, so that each place sees what the places before it have left. From the
sums over the stream come its axes, from those the weights of one block at a time.

    STORE/bases    axes of a place, float64
    STORE/sliced   one file of weights per block, and one for embedding, last norm and head
    STORE/models   a folder of links to these with their index and config.json

Everything about the sliced model but its numbers follows from the original's headers: a
:class:`SlicedCheckpoint` can be planned with before any of it is there.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesaic.methods import slicegpt
from moesaic.methods.base import Event, Stats, Unit
from moesaic.orchestrator.calibrate import Walk, load_tensor, opened, save_tensor, token_ids
from moesaic.orchestrator.checkpoint import DTYPES, INDEX, Checkpoint, Entry
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.pieces import tensor_blob
from moesaic.orchestrator.shortcuts import CONFIG_KEY, shortcut_name
from moesaic.orchestrator.statistics import (
    Node,
    SiteStats,
    add_gram,
    covered,
    load_stats,
    mirror,
    save_stats,
    tree_sum,
)
from moesaic.orchestrator.store import (
    MODELS,
    Store,
    code_digest,
    digest,
    scratch_folder,
    write_atomically,
    write_text,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.tensorfile import Blob, file_bytes, write_file
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

_METADATA = {"format": "pt"}
_STREAM = "stream"
# What a block makes of the stream may differ from what is expected of it by this share.
_ROUNDING = 0.02

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
        return Store(Path(self.walk.store))

    @property
    def scratch(self) -> Path:
        """Folder of unfinished work: hidden states, partial sums."""
        return scratch_folder(Path(self.walk.store), self.stream_key)

    @property
    def folder(self) -> Path:
        """Folder of the sliced model."""
        return Path(self.walk.store) / MODELS / self.key

    def basis(self, place: int) -> Tensor:
        """Axes that were found, ``[hidden, width]``, float64."""
        path = self.store.path("bases", self.basis_key(place))
        with safe_open(path, framework="pt") as file:
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
        return " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
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
            file = self.path / f"model-{part + 1:05}-of-{self.cut.parts:05}.safetensors"
            blobs = _blobs(sliced_part(_Promised(model, self.cut), part))
            size = file_bytes(blobs, _METADATA)
            begin = size - sum(blob.nbytes for blob in blobs)
            for blob in sorted(blobs, key=lambda blob: -DTYPES[blob.dtype].itemsize):
                dtype = DTYPES[blob.dtype]
                self._entries[blob.name] = Entry(file, begin, blob.nbytes, blob.shape, dtype)
                begin += blob.nbytes
            self.files.append(file)
            self._sizes.append(size)

    def _write_folder(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        weight_map = {name: entry.file.name for name, entry in sorted(self._entries.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        for name, content in (("config.json", self.config), (INDEX, index)):
            text = json.dumps(content, indent=2) + "\n"
            file = self.path / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                write_text(file, text)
        for part, file in enumerate(self.files):
            target = self.cut.store.path("sliced", self.cut.part_key(part))
            with suppress(FileExistsError):
                file.symlink_to(os.path.relpath(target, self.path))


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


# Axes


class _Enough(Exception):
    """A block has been run as far as it is wanted."""


class Passage:
    """A block whose residual stream is watched, and projected, while this is open; a context
    manager.

    Args:
        family: what the block's parts are called.
        block: the module.
        bases: sublayer → axes that the stream is projected on behind it.
        seen: called with a sublayer and what its norm is given.
        last: the sublayer in front of which the block may stop; None runs all of it.
    """

    def __init__(
        self,
        family: Family,
        block: nn.Module,
        bases: Mapping[int, Tensor],
        seen: Callable[[int, Tensor], None],
        last: int | None,
    ) -> None:
        self.family, self.bases, self.seen, self.last = family, bases, seen, last
        self.stream: Tensor | None = None
        self.block = block
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Passage":
        for number, (norm, module) in enumerate(self.family.shortcut_pairs()):
            own, sublayer = self.block.get_submodule(norm), self.block.get_submodule(module)
            self._hooks += [
                own.register_forward_pre_hook(self._enters(number)),
                own.register_forward_hook(self._normed),
                sublayer.register_forward_hook(self._added(number)),
            ]
        return self

    def __exit__(self, *failure: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def run(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """What the block makes of ``x``; None where it was stopped."""
        self.stream = None
        try:
            y = call(x)
        except _Enough:
            return None
        self._check(y, "the block")
        return y

    def _enters(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
            if number:
                self._check(arguments[0], f"sublayer {number}")
            self.stream = arguments[0]
            self.seen(number, arguments[0])
            if number == self.last:
                raise _Enough

        return hook

    def _normed(self, norm: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        x = arguments[0].float()
        wanted = x * x.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt() * norm.weight
        self._compare(output, wanted, f"{type(norm).__name__} is no RMSNorm")

    def _added(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            assert self.stream is not None, "a sublayer without its norm"
            first = output[0] if isinstance(output, tuple) else output
            if number in self.bases:
                first = slicegpt.projected(self.stream, first, self.bases[number])
            self.stream = self.stream + first
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def _check(self, stream: Tensor, what: str) -> None:
        assert self.stream is not None, "a block that does not call its norms"
        text = "is given something else than the sum of what the sublayers before it gave"
        self._compare(stream, self.stream, f"{what} {text}")

    def _compare(self, found: Tensor, wanted: Tensor, text: str) -> None:
        difference = (found.float() - wanted.float()).norm()
        if not difference <= _ROUNDING * wanted.float().norm() and found.isfinite().all():
            kind = self.family.model_type
            raise RecipeError(
                f"slice: {kind} cannot be sliced: {text}; families/{kind}.yaml should say"
                " sublayers: []"
            )


class _StreamSums:
    """Sums n nᵀ over the stream, n of length √D."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.gram = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        add_gram(self.gram, rows * rows.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt())
        self.tokens += len(rows)

    def finish(self) -> SiteStats:
        mirror(self.gram)
        return {_STREAM: Stats({"tokens": self.tokens, "gram": self.gram})}


@torch.no_grad()
def gather(state: WorkerState, cut: dict[str, Any], step: int, span: Node) -> dict[str, Any]:
    """Sums over the stream for the shards of ``span``, and what enters the next block."""
    plan = Cut.of(cut)
    walk, nodes = plan.walk, covered((0, plan.walk.shards), span)
    model = opened(state, walk)
    block, last = _reached(plan, step)
    module = None if block < 0 else model.load_block(block)

    def shard_stats(shard: int) -> SiteStats:
        sums = _StreamSums(model.hidden_size, model.device)
        hidden = _entering(plan, model, block, shard)
        if module is None:
            sums.add(hidden.to(model.device))
            after = [hidden]
        else:
            after = _through(plan, model, block, module, hidden, last, sums)
        if after:
            whole = torch.cat(after)
            if not torch.isfinite(whole).all():
                raise RunError(
                    f"block {block}: its output has NaN or Inf values in {model.dtype};"
                    " try compute.dtype: float32"
                )
            save_tensor(plan.hidden_path(block + 1, shard), whole)
        return sums.finish()

    for node in nodes:
        total = tree_sum(node, lambda n: shard_stats(n[0]) if n[1] - n[0] == 1 else None)
        write_atomically(plan.node_path(step, node), lambda p, total=total: save_stats(p, total))  # type: ignore[misc]
    if block > 0:
        for shard in range(*span):
            plan.hidden_path(block - 1, shard).unlink(missing_ok=True)
    return {"peak_bytes": peak_memory_bytes()}


def _reached(cut: Cut, step: int) -> tuple[int, int | None]:
    """The block that a step runs, -1 for the embedding, and the sublayer in front of which it may
    stop."""
    if not cut.shortcuts:
        return step, None
    block, sublayer = divmod(step - 1, cut.sublayers)
    return block, sublayer + 1 if sublayer + 1 < cut.sublayers else None


def _entering(cut: Cut, model: StreamedModel, block: int, shard: int) -> Tensor:
    """The stream in front of a block, of the shard's sequences ``[sequences, length, hidden]``."""
    if block > 0 or (block == 0 and cut.shortcuts):
        hidden = load_tensor(cut.hidden_path(block, shard))
        if hidden is None:
            raise RunError(f"the hidden states before block {block} of shard {shard} are missing")
        return hidden
    ids = token_ids(cut.walk, shard)
    return torch.cat([model.embed(p.to(model.device)).cpu() for p in ids.split(cut.walk.batch)])


def _through(
    cut: Cut,
    model: StreamedModel,
    block: int,
    module: nn.Module,
    hidden: Tensor,
    last: int | None,
    sums: _StreamSums,
) -> list[Tensor]:
    """What a block makes of the stream, batch by batch; nothing where it stops before the end."""
    first = block * cut.sublayers
    known = range(1, cut.sublayers if last is None else last) if cut.shortcuts else range(0)
    bases = {k - 1: cut.basis(first + k).to(model.device) for k in known}
    entry = cut.basis(first).to(model.device) if cut.shortcuts else None
    ends = last is None and (cut.shortcuts or block + 1 == cut.blocks)

    def seen(sublayer: int, stream: Tensor) -> None:
        if not cut.shortcuts or sublayer == last:
            sums.add(stream)

    after = []
    with Passage(model.family, module, bases, seen, last) as passage:
        for part in hidden.split(cut.walk.batch):
            x = part.to(model.device)
            if entry is not None:
                x = slicegpt.projected(torch.zeros_like(x), x, entry)
            y = passage.run(lambda stream: model.run_block(block, module, stream), x)
            if y is not None:
                if ends:
                    sums.add(y)
                after.append(y.cpu())
    return after


def add_up(state: WorkerState, cut: dict[str, Any]) -> dict[str, Any]:
    """Sums over the stream of all steps, which share their axes."""
    plan = Cut.of(cut)
    totals = [_total(plan, step) for step in range(plan.steps)]
    gram = sum((total["gram"].double() for total in totals), torch.zeros((), dtype=torch.float64))
    tokens = totals[0]["tokens"] // plan.sublayers
    sums = {_STREAM: Stats({"tokens": tokens, "gram": gram})}
    plan.store.put("stats", plan.sums_key, lambda p: save_stats(p, sums))
    return {"peak_bytes": peak_memory_bytes()}


def settle(state: WorkerState, cut: dict[str, Any], place: int) -> dict[str, Any]:
    """Axes of a place from the sums there; of all places where they share them."""
    plan = Cut.of(cut)
    if plan.shortcuts:
        sums = _total(plan, place)
    else:
        sums = load_stats(plan.store.path("stats", plan.sums_key))[_STREAM]
    gram, tokens = sums["gram"].to(state.device), int(sums["tokens"])
    basis, dropped, events = slicegpt.principal_axes(gram, plan.width, tokens)
    if plan.shortcuts and place:
        basis = slicegpt.aligned(basis, plan.basis(place - 1).to(basis.device))
    found = {"dropped": dropped, "events": [asdict(event) for event in events]}
    tensors = {"basis": basis.cpu().contiguous()}
    plan.store.put("bases", plan.basis_key(place), lambda p: save_file(tensors, p), found)
    return {"peak_bytes": peak_memory_bytes()}


def _total(cut: Cut, step: int) -> Stats:
    def leaf(node: Node) -> SiteStats | None:
        path = cut.node_path(step, node)
        if path.exists():
            return load_stats(path)
        if node[1] - node[0] == 1:
            raise RunError(f"slice: the sums of step {step}, shard {node[0]} are missing")
        return None

    return tree_sum((0, cut.walk.shards), leaf)[_STREAM]


def gathered(cut: Cut, step: int, node: Node | None = None) -> bool:
    """Whether the sums of all shards are there, in whatever pieces."""
    low, high = node or (0, cut.walk.shards)
    if cut.node_path(step, (low, high)).exists():
        return True
    middle = (low + high) // 2
    return high - low > 1 and all(
        gathered(cut, step, half) for half in ((low, middle), (middle, high))
    )


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
