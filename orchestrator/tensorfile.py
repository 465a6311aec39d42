"""Safetensors files copied and written as bytes: no tensor library, no file in memory.

A file is eight bytes of header length, a JSON header, and the tensors' bytes without gaps. The
header can be written before the first tensor is read, because shapes and dtypes are known; so a
file of any size is written in one pass through a small buffer. The same tensors always give the
same bytes: the safetensors package writes its metadata in random order, which is why it is not
used here. Tensors lie in descending order of their element size (stable), so that each one is
aligned and can be used straight from a memory map.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.foreign import METADATA, read_header

_CHUNK_BYTES = 1 << 22
# The header is padded with spaces to a multiple of this, as the safetensors package does.
_ALIGNMENT = 8
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file.

    Attributes:
        file: the file.
        begin: offset of the first byte in the file.
        dtype: as safetensors calls it, such as ``BF16``.
        shape: its shape.
    """

    file: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __getitem__(self, index: int) -> "Stored":
        """Row ``index`` along the first dimension."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of a tensor of shape {self.shape}")
        row = Stored(self.file, self.begin, self.dtype, self.shape[1:])
        return Stored(self.file, self.begin + index * row.nbytes, self.dtype, row.shape)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few MB at a time.

        Raises:
            RunError: the file ends too early.
        """
        left = self.nbytes
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise RunError(f"{self.file}: ends {left} bytes too early")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Blob:
    """A tensor to be written: its description and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, name: str, stored: Stored) -> "Blob":
        """A tensor of another file under a new name."""
        return cls(name, stored.dtype, stored.shape, stored.chunks)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def _header(blobs: Sequence[Blob], metadata: Mapping[str, str]) -> tuple[bytes, list[Blob]]:
    """The padded JSON header and the tensors in the order of the file."""
    ordered = sorted(blobs, key=lambda blob: -DTYPES[blob.dtype].itemsize)
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    position = 0
    for blob in ordered:
        offsets = [position, position + blob.nbytes]
        header[blob.name] = {"dtype": blob.dtype, "shape": blob.shape, "data_offsets": offsets}
        position += blob.nbytes
    if len(header) != len(ordered) + 1:
        raise ValueError("two tensors of one name in a file")
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT), ordered


def file_bytes(blobs: Sequence[Blob], metadata: Mapping[str, str]) -> int:
    """Size of the file that :func:`write_file` would write."""
    return 8 + len(_header(blobs, metadata)[0]) + sum(blob.nbytes for blob in blobs)


def write_file(path: Path, blobs: Sequence[Blob], metadata: Mapping[str, str]) -> None:
    """Writes ``blobs`` to ``path``; equal arguments give equal bytes."""
    text, ordered = _header(blobs, metadata)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for blob in ordered:
            written = sum(stream.write(chunk) for chunk in blob.chunks())
            if written != blob.nbytes:
                raise RunError(f"{blob.name}: {written} bytes instead of {blob.nbytes}")


class Canvas:
    """A file whose tensors are filled in any order, some rows at a time; a context manager.

    Args:
        path: of the new file.
        shapes: name → dtype, as safetensors calls it, and shape.

    Raises:
        RunError: when it is left without an error while bytes are missing.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        blobs = [Blob(name, *shapes[name], tuple) for name in sorted(shapes)]
        text, ordered = _header(blobs, {})
        self._text = len(text).to_bytes(8, "little") + text
        self._blobs = {blob.name: blob for blob in ordered}
        self._begins: dict[str, int] = {}
        self._end = len(self._text)
        for blob in ordered:
            self._begins[blob.name] = self._end
            self._end += blob.nbytes
        self._left = self._end - len(self._text)

    def __enter__(self) -> "Canvas":
        self._stream = self.path.open("wb")
        self._stream.write(self._text)
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        self._stream.close()
        if kind is None and self._left:
            raise RunError(f"{self.path}: {self._left} bytes were not filled in")

    def put(self, name: str, data: memoryview, first: int = 0) -> None:
        """Bytes of a tensor from row ``first`` of its first dimension on."""
        blob = self._blobs[name]
        row = blob.nbytes // blob.shape[0] if first else 0
        begin = first * row
        if begin + data.nbytes > blob.nbytes:
            raise ValueError(f"{name}: {data.nbytes} bytes from row {first} on are too many")
        self._stream.seek(self._begins[name] + begin)
        self._stream.write(data)
        self._left -= data.nbytes


def read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where each tensor of ``path`` lies, in the order of the file, and the metadata.

    Raises:
        RunError: not a safetensors file, or cut off.
    """
    try:
        placed, metadata = read_header(path)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None
    stored = {name: Stored(path, own.begin, own.dtype, own.shape) for name, own in placed.items()}
    return stored, metadata
