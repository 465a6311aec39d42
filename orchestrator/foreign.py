"""Bytes that others wrote, read within bounds: JSON documents and headers of safetensors files.

A model folder, a shared store or a run's folder may come from anybody. What is read of them is
limited before it is read or parsed: bytes of a file, values and digits in a JSON text, dimensions
of a tensor. Everything that is wrong is a ``ValueError`` whose text says what, for the reader to
put the file's name in front of; nothing here runs code or follows a name out of a folder.

**Headers.** Eight bytes of length, a JSON object ``name → {dtype, shape, data_offsets}``, then the
tensors' bytes. As the safetensors library demands, the tensors must tile the rest of the file
without gaps or overlaps, and a header has at most 100 MB; here it also has at most a quarter of the
file, where that is more than 16 MiB: a small file cannot ask for much memory.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of a number; dtypes.py has torch's names of these, which importing this must not need.
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
METADATA = "__metadata__"
# The safetensors library refuses longer headers, too.
MAX_HEADER_BYTES = 100_000_000
_ANY_HEADER_BYTES, _HEADER_SHARE = 16 << 20, 4
MAX_JSON_BYTES = 64 << 20
# Brackets that a JSON text may have besides one in so many bytes: an empty list takes 60 bytes of
# memory for two of text. A header has three in at least fifty bytes.
_ANY_BRACKETS, _BYTES_PER_BRACKET = 200_000, 12
_MOST_DIMENSIONS, _MOST_ELEMENTS = 16, 2**63
_SHOWN_CHARACTERS = 120


def shown(text: object) -> str:
    """A text of others in a message: on one line, printable, cut where it is long."""
    plain = printable(str(text)[: _SHOWN_CHARACTERS + 1])
    return plain if len(plain) <= _SHOWN_CHARACTERS else f"{plain[:_SHOWN_CHARACTERS]} …"


def printable(text: str) -> str:
    """The text with everything escaped that would end its line or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_bounded(file: Path | str, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: as the system says it.
        ValueError: it is no regular file, or has more than ``limit`` bytes.
    """
    state = os.stat(file)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("is no regular file")
    parts, left = [], limit + 1
    with open(file, "rb", buffering=0) as stream:
        # It may grow meanwhile, and a read may bring less than it was asked for.
        while left and (part := stream.read(min(left, state.st_size + 1))):
            parts.append(part)
            left -= len(part)
    raw = b"".join(parts)
    if len(raw) > limit:
        raise ValueError(f"has {max(state.st_size, len(raw))} bytes, limit {limit} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, nests too deeply, has a key twice in one object, or holds so many
            lists and objects that they would fill the memory.
    """
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets > _ANY_BRACKETS + len(raw) // _BYTES_PER_BRACKET:
        raise ValueError(f"{brackets} lists and objects in {len(raw)} bytes are too many")
    try:
        return _DECODER.decode(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path | str, limit: int = MAX_JSON_BYTES) -> Any:
    """The value that a JSON file holds; raises as :func:`read_bounded` and :func:`parse_json`."""
    return parse_json(read_bounded(file, limit))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(twice)} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


@dataclass(frozen=True)
class Placed:
    """A tensor as a header describes it.

    Attributes:
        begin: offset of its first byte in the file.
        nbytes: how many it has.
        shape: its shape.
        dtype: as safetensors calls it, such as ``BF16``.
    """

    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> tuple[dict[str, Placed], dict[str, str]]:
    """Where each tensor of a safetensors file lies, in the order of the file, and the metadata.

    Raises:
        OSError: as the system says it.
        ValueError: it is no such file, cut off, or not to be trusted; see the module's text.
    """
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("is no regular file")
    with file.open("rb") as stream:
        return parse_header(state.st_size, stream.read)


def parse_header(
    size: int, read: Callable[[int], bytes]
) -> tuple[dict[str, Placed], dict[str, str]]:
    """As :func:`read_header`, of a file that lies anywhere.

    Args:
        size: of the file, in bytes.
        read: gives the next bytes of it, as many as it is told.

    Raises:
        ValueError: as there.
    """
    prefix = read(8)
    if len(prefix) < 8:
        raise ValueError(f"truncated: {size} bytes are no safetensors file")
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, max(_ANY_HEADER_BYTES, size // _HEADER_SHARE))
    if length > MAX_HEADER_BYTES or limit < length <= size - 8:
        bound = MAX_HEADER_BYTES if length > MAX_HEADER_BYTES else limit
        raise ValueError(f"header of {length} bytes, limit {bound} bytes: no safetensors file")
    if 8 + length > size:
        raise ValueError(f"truncated: header of {length} bytes, file of {size} bytes")
    raw = read(length)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"header is not readable as JSON: {shown(error)}") from None
    if not isinstance(header, dict):
        raise ValueError("header must be a JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"header's {METADATA} must map names to texts")
    placed = {name: _placed(name, info, 8 + length) for name, info in header.items()}
    in_order = sorted(placed.items(), key=lambda item: (item[1].begin, item[1].nbytes))
    _check_extent(size, 8 + length, dict(in_order))
    return dict(in_order), metadata


def _placed(name: str, info: Any, data_begin: int) -> Placed:
    try:
        dtype, shape = info["dtype"], tuple(info["shape"])
        begin, end = info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"header entry of tensor {shown(name)} is incomplete") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(
            f"tensor {shown(name)} has dtype {shown(dtype)}; known: {', '.join(ITEM_BYTES)}"
        )
    legal = len(shape) <= _MOST_DIMENSIONS and all(
        type(n) is int and 0 <= n < _MOST_ELEMENTS for n in (*shape, begin, end)
    )
    if not legal or math.prod(shape) >= _MOST_ELEMENTS:
        raise ValueError(f"tensor {shown(name)} has an illegal shape or offset")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise ValueError(
            f"tensor {shown(name)} of shape {list(shape)} needs {nbytes} bytes, "
            f"its offsets give {end - begin}"
        )
    return Placed(data_begin + begin, nbytes, shape, dtype)


def _check_extent(size: int, data_begin: int, in_order: Mapping[str, Placed]) -> None:
    position = data_begin
    for name, placed in in_order.items():
        if placed.begin != position:
            raise ValueError(f"tensor {shown(name)} overlaps another one or leaves a gap")
        position += placed.nbytes
    if position > size:
        raise ValueError(
            f"truncated: the header says {position} bytes, the file has {size}; "
            "copy or download it again"
        )
    if position < size:
        raise ValueError(f"{size - position} bytes behind the last tensor")
