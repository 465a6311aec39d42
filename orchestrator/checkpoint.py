"""A model folder of safetensors files, read one tensor at a time.

Only the headers are kept in memory. :meth:`Checkpoint.read` copies the bytes of one tensor out of
its file by plain positioned reads: a memory map would keep touched pages resident for as long as
any tensor that views it lives, and the bound on memory (one block) would be lost.

Everything that can be wrong with a folder is found before the first weight is read and answered
with a :class:`UserError`. Shard names from the index must stay inside the folder as written.
Symbolic links must, too, wherever they stand in the folder: a checkpoint from elsewhere could lead
to private files, and what belongs to a model is copied into the folder that is published. The
folders of the Hugging Face cache consist of links to ``blobs`` beside them, and those of our store
to its entries: these are followed.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.errors import UserError, denials
from moesaic.orchestrator.foreign import parse_header, read_json, shown
from moesaic.orchestrator.store import MODELS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``begin`` is an absolute offset in ``file``, in bytes."""

    file: Path
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A folder with ``config.json`` and ``model.safetensors`` or an index and its shards.

    Args:
        path: the folder.

    Raises:
        UserError: the folder, its configuration, its index or the header of a shard is wrong, or
            may not be read.
    """

    @denials()
    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such model folder")
        _check_links(self.path)
        self.config: dict[str, Any] = read_object(self.path / "config.json")
        _refuse_quantized(self.path, self.config)
        self.files = _weight_files(self.path, self._file, self._is_there)
        self._entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in self._header(file).items():
                if name in self._entries:
                    first = self._entries[name].file.name
                    raise UserError(f"{file}: tensor {shown(name)} is in {first} as well")
                self._entries[name] = entry
        self._check_index()

    def _file(self, shard: str) -> Path:
        """Where a file of weights lies that the index names."""
        return self.path / shard

    def _is_there(self, file: Path) -> bool:
        # Unlike Path.is_file it says False of a name that is too long.
        return os.path.isfile(file)

    def _header(self, file: Path) -> dict[str, Entry]:
        """Where the tensors of a file lie."""
        _check_inside(file, self.path)
        with open(file, "rb") as stream:
            return entries_of(file, file.stat().st_size, stream.read)

    def _readable(self, file: Path) -> Path:
        """A file of weights, ready to be opened."""
        return file

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entries(self) -> dict[str, Entry]:
        """Where every tensor lies, by name."""
        return self._entries

    def fetch(self) -> None:
        """Has all files of weights on this node, until pins are released."""
        for file in self.files:
            self._readable(file)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self._entry(name).nbytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the safetensors files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    @denials()
    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """The tensor ``name``, copied from its file.

        Args:
            out: a CPU tensor of the same shape to put it into; values are converted where the
                dtype differs. Without it, a new tensor.

        Raises:
            UserError: the file has become shorter since its header was read.
        """
        entry = self._entry(name)
        if out is not None and out.shape != entry.shape:
            raise ValueError(f"{name} has shape {entry.shape}, not {tuple(out.shape)}")
        if out is None or out.dtype != entry.dtype or not out.is_contiguous():
            target = torch.empty(entry.shape, dtype=entry.dtype)
        else:
            target = out
        if entry.nbytes:
            raw = target.view(-1).view(torch.uint8).numpy().data
            with open(self._readable(entry.file), "rb", buffering=0) as stream:
                stream.seek(entry.begin)
                _fill(stream, raw, entry, name)
        return target if out is None or target is out else out.copy_(target)

    @denials()
    def read_rows(self, name: str, low: int, high: int) -> Tensor:
        """Rows ``low … high - 1`` of a tensor's first dimension, copied from its file.

        Raises:
            UserError: the file has become shorter since its header was read.
        """
        entry = self._entry(name)
        target = torch.empty((high - low, *entry.shape[1:]), dtype=entry.dtype)
        if target.numel():
            raw = target.view(-1).view(torch.uint8).numpy().data
            with open(self._readable(entry.file), "rb", buffering=0) as stream:
                stream.seek(entry.begin + low * (entry.nbytes // entry.shape[0]))
                _fill(stream, raw, entry, name)
        return target

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raises a :class:`UserError` that names the tensor if a value is NaN or infinite."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        # NaN spreads through minimum and maximum, and neither makes a mask as large as the tensor.
        low, high = torch.aminmax(wide)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            file = self._entry(name).file
            count = int((~torch.isfinite(wide)).sum())
            raise UserError(
                f"{file}: tensor {name} has {count} values of {tensor.numel()} that are NaN or "
                "infinite: copy the file again, or take another checkpoint of the model"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: ``config.json`` and every byte of every shard, 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        for file in [self.path / "config.json", *self.files]:
            digest.update(json.dumps([file.name, file_digest(file)]).encode())
        return digest.hexdigest()

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"{self.path} has no tensor {name}")
        return self._entries[name]

    def _check_index(self) -> None:
        index = self.path / INDEX
        if self.files == [self.path / SINGLE]:
            return
        promised = read_object(index)["weight_map"]
        for name, shard in promised.items():
            if name not in self._entries or self._entries[name].file != self._file(shard):
                raise UserError(f"{index}: tensor {shown(name)} is not in {shard}")


def _fill(stream: Any, raw: memoryview, entry: Entry, name: str) -> None:
    done = 0
    while done < len(raw):
        count = stream.readinto(raw[done:])
        if not count:
            raise UserError(f"{entry.file}: ends inside tensor {name}; copy the file again")
        done += count


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder; raises a :class:`UserError` for what is none."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; a model folder needs it")
    try:
        content = read_json(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON: {shown(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def _check_links(folder: Path) -> None:
    """Raises a :class:`UserError` for a symbolic link that leads out of the folder.

    Further below only files of weights are opened, which are looked at when that happens.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.is_symlink():
            _check_inside(path, folder)


def _check_inside(path: Path, folder: Path) -> None:
    """Raises a :class:`UserError` for a path that links lead out of the folder."""
    inside = folder.resolve()
    allowed = [inside]
    # What is beside the folder counts only where it is itself no link.
    if inside.parent.name == "snapshots":  # of the Hugging Face cache: REPO/snapshots/COMMIT
        allowed.append(inside.parents[1] / "blobs")
    if inside.parent.name == MODELS:  # of a store
        allowed.append(inside.parents[1] / "sliced")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{path}: is a symbolic link that leads nowhere") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{path}: is a symbolic link to {shown(target)}, outside the model folder: put the"
            " file itself there"
        )


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise UserError(
        f"{folder / 'config.json'}: quantization_config says that the model is already quantized "
        f"({shown(kind)}); give the original checkpoint in 16 or 32 bits"
    )


def _weight_files(
    folder: Path, place: Callable[[str], Path], is_there: Callable[[Path], bool]
) -> list[Path]:
    """The safetensors files of the model: the single file, else the shards of the index.

    Args:
        place: where the file of a name lies.
    """
    if is_there(place(SINGLE)):
        return [place(SINGLE)]
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if pickled:
            raise UserError(
                f"{folder}: weights in pickle files ({pickled[0]}) are refused, because loading "
                "one can run any code; convert them to safetensors"
            )
        packed = sorted(p.name for p in folder.iterdir() if p.suffix == ".gguf")
        if packed:
            raise UserError(
                f"{folder}: only GGUF weights ({packed[0]}): load them with transformers"
                " (from_pretrained, gguf_file=…) and save_pretrained them as safetensors"
            )
        raise UserError(f"{folder}: no weights: neither {SINGLE} nor {INDEX}")
    index = folder / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: key weight_map must map tensor names to file names")
    for name, shard in weight_map.items():
        pure = PurePosixPath(shard) if isinstance(shard, str) else None
        if (
            pure is None
            or pure.is_absolute()
            or ".." in pure.parts
            or pure.suffix != ".safetensors"
        ):
            raise UserError(
                f"{index}: tensor {shown(name)}: {str(shard)[:80]!r} is not a name of a"
                " .safetensors file inside the folder"
            )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_there(place(shard)):
            raise UserError(f"{index}: names {shown(shard[:80])}, which is not in the folder")
    return [place(shard) for shard in shards]


def entries_of(
    file: Path, size: int, read: Callable[[int], bytes], where: str = ""
) -> dict[str, Entry]:
    """Entries of one safetensors file; its tensors must tile the rest of the file exactly.

    Args:
        size: of the file, in bytes.
        read: gives the next bytes of it, as many as it is told.
        where: what people call it, if not ``file``.
    """
    try:
        placed, _ = parse_header(size, read)
    except OSError as error:
        raise UserError(f"{where or file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{where or file}: {error}") from None
    return {
        name: Entry(file, own.begin, own.nbytes, own.shape, DTYPES[own.dtype])
        for name, own in placed.items()
    }
