"""From chosen pieces to a model folder.

Nothing is computed: the tensors of the original files that no piece replaces and the tensors of the
pieces are copied as bytes into new shards, in the order of the model, a few MB at a time. Folders
of equal content are equal byte for byte.

The folder is made under a hidden name beside its place, checked, flushed to disk and renamed: at
any moment there is a complete folder under the final name that passed the check, or none. One that
does not pass is removed.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import is_reduced
from moesaic.orchestrator.checkpoint import INDEX, SINGLE
from moesaic.orchestrator.companions import COMPANIONS, PARTS
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.export import (
    Piece,
    check_plan,
    form,
    largest_piece,
    natural_key,
    quantization_config,
    replaced_names,
    resized_config,
    unit_tensors,
    unplaced,
)
from moesaic.orchestrator.files import disk_errors
from moesaic.orchestrator.pieces import piece_header
from moesaic.orchestrator.stated_dtype import stated_dtype
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import Serve, can_be_packed
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Blob, Stored, file_bytes, write_file

MAX_SHARD_BYTES = 5_000_000_000
# A part of a mosaic is called group{number}_{part}; integer groups have at most four parts.
_GROUP_NAME_BYTES = 10
# Map and constants of a reduced bank, names of the bank aside.
_STAND_IN_BYTES = 2 * 128
_METADATA = {"format": "pt"}
# Length, metadata and padding.
_SHARD_HEADER_BYTES = 64
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_REWRITTEN = {"config.json", INDEX, "README.md"}


def assemble(
    model: StreamedModel,
    source: Path,
    chosen: Mapping[str, Path | None],
    serve: Serve,
    output: Path,
    card: str,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the model folder ``output``; an earlier one is replaced.

    Args:
        model: the original model.
        source: its folder.
        chosen: unit → its piece; None, or no entry, leaves the unit as it is.
        serve: who is to load the folder.
        card: text of ``README.md``.
        max_shard_bytes: a shard is closed before it would grow over this.
        check: called with the finished folder before it gets its name; what it raises is passed on,
            and an earlier ``output`` stays.

    Raises:
        RunError: the plan cannot be loaded by ``serve``, a piece is damaged, or the disk is full.
    """
    pieces = _read_headers(model, chosen, serve)
    check_plan(model, pieces, serve)
    tensors = _tensors(model, pieces, serve)
    model.checkpoint.fetch()
    with disk_errors(output), _new_folder(output) as folder:
        _write_shards(folder, tensors, int(max_shard_bytes))
        config = {**model.checkpoint.config, **stated_dtype(model, pieces)}
        if serve != "moesaic":
            config |= resized_config(model, pieces)
        quantization = quantization_config(model, pieces, serve)
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        _copy_companions(source, folder)
        check(folder)


def header_bytes_bound(
    model: StreamedModel,
    units: Sequence[Unit],
    serve: Serve,
    schemes: int = 1,
    stand_ins: bool = False,
    chained: bool = False,
    narrowed: bool = False,
) -> int:
    """What the headers of the model's files take at most, in bytes.

    Args:
        units: those that may be compressed; the others are left as they are.
        schemes: how many different choices a bank may mix, where ``serve`` loads that.
        stand_ins: whether banks may come with a map and constants.
        chained: whether weights may be factors, or have corrections.
        narrowed: whether linears may have lost some of their channels.
    """
    checkpoint = model.checkpoint
    compressible = {unit.name for unit in units}
    digits = len(str(checkpoint.total_bytes))

    def size(tensors: Iterable[Blob]) -> int:
        return sum(_header_entry_bytes(blob, digits) for blob in tensors)

    originals = _originals(model)
    total = size(originals[name] for name in model.fixed_names())
    for unit in model.units():
        names = {name for group in model.unit_tensors(unit).values() for name in group}
        dense = size(originals[name] for name in names)
        packed = 0
        if unit.name in compressible and can_be_packed(unit, serve, model.family):
            largest = largest_piece(unit, serve, chained, narrowed)
            packed = size(unit_tensors(model, unit, largest, serve))
            if serve == "moesaic" and unit.kind == "bank" and schemes > 1:
                groups = min(schemes, unit.shapes["gate"][0])
                parts = sum(len(member.parts) for member in largest.values())
                packed = groups * (packed + _GROUP_NAME_BYTES * parts)
        if stand_ins and unit.kind == "bank":
            packed += _STAND_IN_BYTES + 2 * len(unit.name)
        total += max(dense, packed)
    # Two neighbouring shards hold more than the limit together.
    shards = 1 + 2 * checkpoint.total_bytes // MAX_SHARD_BYTES
    return total + shards * _SHARD_HEADER_BYTES


def _header_entry_bytes(blob: Blob, digits: int) -> int:
    offsets = [10**digits - 1] * 2
    entry = {blob.name: {"dtype": blob.dtype, "shape": blob.shape, "data_offsets": offsets}}
    return len(json.dumps(entry, separators=(",", ":"))) - 1  # braces go, a comma comes


def _read_headers(
    model: StreamedModel, chosen: Mapping[str, Path | None], serve: Serve
) -> dict[str, Piece]:
    units = {unit.name: unit for unit in model.units()}
    unknown = next((name for name in chosen if name not in units), None)
    if unknown is not None:
        raise ValueError(f"the model has no unit {unknown}")
    pieces: dict[str, Piece] = {}
    for name, unit in units.items():
        path = chosen.get(name)
        if path is None:
            continue
        piece = piece_header(path)
        shapes = {member: piece[member].shape for member in unit.shapes if member in piece}
        if shapes != dict(_expected(unit, piece)):
            raise RunError(f"{path}: holds shapes {shapes}, unit {name} has {dict(unit.shapes)}")
        pieces[name] = piece
    return _as_loaded(pieces, serve)


def _as_loaded(pieces: Mapping[str, Piece], serve: Serve) -> dict[str, Piece]:
    """Pieces as ``serve`` has them."""
    return {
        name: piece if serve == "moesaic" else unplaced(piece) for name, piece in pieces.items()
    }


def _expected(unit: Unit, piece: Piece) -> Mapping[str, tuple[int, ...]]:
    """Shapes that a unit's piece must have; a reduced bank has fewer or narrower experts."""
    if not is_reduced(piece):
        return unit.shapes
    experts, width = (min(pair) for pair in zip(form(unit, piece), form(unit, None), strict=True))
    gate = (experts, width, unit.shapes["gate"][2])
    return {"gate": gate, "up": gate, "down": (experts, gate[2], width)}


def _tensors(model: StreamedModel, pieces: Mapping[str, Piece], serve: Serve) -> list[Blob]:
    """Every tensor of the new files in the order of the model."""
    owner = {
        name: unit
        for unit in model.units()
        if unit.name in pieces
        for name in replaced_names(model, unit, pieces[unit.name])
    }
    originals = _originals(model)
    tensors: list[Blob] = []
    done = set()
    for name in sorted(originals, key=natural_key):
        unit = owner.get(name)
        if unit is None:
            tensors.append(originals[name])
        elif unit.name not in done:
            done.add(unit.name)
            tensors += unit_tensors(model, unit, pieces[unit.name], serve)
    return tensors


def _originals(model: StreamedModel) -> dict[str, Blob]:
    """The tensors of the original model, as they lie in its files; these need not be there yet."""
    return {
        name: Blob.of(name, Stored(own.file, own.begin, DTYPE_NAMES[own.dtype], own.shape))
        for name, own in model.checkpoint.entries().items()
    }


def folder_bytes(
    model: StreamedModel,
    pieces: Mapping[str, Piece],
    serve: Serve,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> int:
    """Bytes of all safetensors files that :func:`assemble` would write, headers included.

    Args:
        pieces: unit → what the file of its piece says of itself, or will say.
    """
    tensors = _tensors(model, _as_loaded(pieces, serve), serve)
    return sum(file_bytes(shard, _METADATA) for shard in _shards(tensors, int(max_shard_bytes)))


def _shards(tensors: list[Blob], limit_bytes: int) -> list[list[Blob]]:
    """The tensors of each file."""
    shards: list[list[Blob]] = [[]]
    size = 0
    for blob in tensors:
        if shards[-1] and size + blob.nbytes > limit_bytes:
            shards.append([])
            size = 0
        shards[-1].append(blob)
        size += blob.nbytes
    return shards


def _write_shards(folder: Path, tensors: list[Blob], limit_bytes: int) -> None:
    shards = _shards(tensors, limit_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        write_file(folder / file, shard, _METADATA)
        weight_map |= dict.fromkeys((blob.name for blob in shard), file)
    if len(shards) > 1:
        total = sum(blob.nbytes for blob in tensors)
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        belongs = path.suffix in COMPANIONS or path.name.startswith(_LICENCES)
        weights = path.name in _REWRITTEN or path.name.endswith(".index.json")
        if path.is_file() and belongs and not weights:
            shutil.copyfile(path, folder / path.name)
    for part in sorted(source.glob(PARTS)):
        (folder / part.parent.name).mkdir()
        shutil.copyfile(part, folder / part.parent.name / part.name)


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``output`` when all went well."""
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    output.parent.mkdir(parents=True, exist_ok=True)
    # What a killed run left behind: it may have died between the two renames below.
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in (*sorted(partial.rglob("*")), partial):
            _flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    _flush(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
