"""A piece: what a chain made of a unit, as one safetensors file.

Tensors are named ``{member}.{part}``; those of a bank have the experts as first dimension. What a
:class:`CompressedTensor` knows besides its parts is JSON in the file's metadata, so that a piece
explains itself. Equal pieces are equal files.

A *cut* is a piece without tensors of its own: it names a piece of the same store, made at a larger
rank, and the rank of every member. It is read like any other.

Whoever shares the store may have written a piece, so what it says of itself is checked before it is
used: the parts of a member have the shapes and dtypes that its format gives a weight of that shape.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor, Param, format_module
from moesaic.orchestrator.dtypes import DTYPES
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.foreign import parse_json, shown
from moesaic.orchestrator.shared import fetched
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Blob, Stored, read_file, write_file

_MEMBERS = "members"
_METADATA = "metadata"
_CUT = "cut"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_MOST_DIMENSIONS, _MOST_ELEMENTS = 8, 2**48


@dataclass(frozen=True)
class Member:
    """A compressed member without its tensors.

    Attributes:
        format, shape, dtype, params: as in :class:`CompressedTensor`.
        parts: part → where it lies.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    params: Mapping[str, Param]
    parts: Mapping[str, Stored]

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return describe(self.format, self.shape, self.dtype, self.params)


def write_piece(
    path: Path, members: Mapping[str, CompressedTensor], metadata: Mapping[str, str]
) -> None:
    """Writes a piece; member names must not contain a dot."""
    blobs, described = [], {}
    for name in sorted(members):
        if "." in name:
            raise ValueError(f"member name {name!r} contains a dot")
        member = members[name]
        described[name] = describe(member.format, member.shape, member.dtype, member.params)
        blobs += [
            tensor_blob(f"{name}.{part}", member.parts[part]) for part in sorted(member.parts)
        ]
    texts = {_MEMBERS: described, _METADATA: dict(metadata)}
    write_file(path, blobs, {key: json.dumps(text, sort_keys=True) for key, text in texts.items()})


def write_cut(path: Path, of: str, ranks: Mapping[str, int], metadata: Mapping[str, str]) -> None:
    """Writes a cut of the piece with the key ``of``; other members than those of ``ranks`` are its.

    Args:
        ranks: member → rank.
    """
    texts = {_CUT: {"of": of, "ranks": dict(ranks)}, _METADATA: dict(metadata)}
    write_file(path, [], {key: json.dumps(text, sort_keys=True) for key, text in texts.items()})


def is_cut(path: Path) -> bool:
    """Whether the piece is a cut of another one."""
    return _CUT in read_file(fetched(path))[1]


def _uncut(path: Path, of: Any) -> Path:
    """Where the piece with the key ``of`` lies in the store of the piece at ``path``."""
    if not isinstance(of, str) or not re.fullmatch(r"[0-9a-f]+", of):
        raise ValueError(f"it is a cut of {shown(of)}, which is no key")
    return path.parents[1] / of[:2] / f"{of}{path.suffix}"


@contextmanager
def _trusting_nothing(path: Path) -> Iterator[None]:
    """What a piece says that cannot be so, as one line."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise RunError(
            f"{path}: is no piece of moesaic, or was altered ({reason}): remove it and run the same"
            " command again"
        ) from error


def read_piece(path: Path) -> dict[str, CompressedTensor]:
    """The members of a piece; tensors are views of a memory map of the file.

    Raises:
        RunError: the file is cut off, or no piece.
    """
    text = read_file(fetched(path))[1].get(_CUT)
    if text is not None:
        with _trusting_nothing(path):
            cut = parse_json(text.encode())
            uncut = _uncut(path, cut["of"])
            try:
                whole = _read_whole(uncut)
            except FileNotFoundError:
                raise ValueError(f"it is a cut of {uncut.name}, which is gone") from None
            if not cut["ranks"].keys() <= whole.keys():
                raise ValueError("it cuts members that are not there")
            return {
                name: member.cut(cut["ranks"][name]) if name in cut["ranks"] else member
                for name, member in whole.items()
            }
    return _read_whole(path)


def _read_whole(path: Path) -> dict[str, CompressedTensor]:
    pieces = {}
    members = piece_header(path)
    with safe_open(path, framework="pt") as file:
        for name, member in members.items():
            parts = {part: file.get_tensor(f"{name}.{part}") for part in member.parts}
            pieces[name] = CompressedTensor(
                member.format, parts, member.shape, member.dtype, member.params
            )
    return pieces


def piece_header(path: Path) -> dict[str, Member]:
    """The members of a piece that is no cut, without their tensors.

    Raises:
        RunError: the file is cut off, or no piece.
    """
    stored, metadata = read_file(fetched(path))
    members = {}
    with _trusting_nothing(path):
        for name, text in parse_json(metadata[_MEMBERS].encode()).items():
            prefix = f"{name}."
            parts = {n.removeprefix(prefix): s for n, s in stored.items() if n.startswith(prefix)}
            members[name] = Member(**parse(text), parts=parts)
            _check_parts(name, members[name])
    return members


def _check_parts(name: str, member: Member) -> None:
    """Raises ValueError unless the parts are those of a weight of that format and shape."""
    module = format_module(member.format)
    wanted = module.part_shapes(member.shape, member.dtype, member.params)
    found = {part: (s.shape, DTYPES[s.dtype]) for part, s in member.parts.items()}
    if found != {part: (tuple(shape), dtype) for part, (shape, dtype) in wanted.items()}:
        raise ValueError(
            f"the parts of {name} are not those of a weight of shape {list(member.shape)} in the"
            f" format {member.format}"
        )


def piece_metadata(path: Path) -> dict[str, str]:
    """The metadata that the piece was written with.

    Raises:
        RunError: the file is cut off, or no piece.
    """
    with _trusting_nothing(path):
        text: dict[str, str] = parse_json(read_file(fetched(path))[1][_METADATA].encode())
        if not isinstance(text, dict):
            raise ValueError("its metadata is no mapping")
    return text


def describe(
    format_name: str, shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, Any]:
    """A compressed tensor without its parts, as JSON; :func:`parse` reads it back."""
    return {
        "format": format_name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "params": dict(params),
    }


def parse(text: Mapping[str, Any]) -> dict[str, Any]:
    """Format, shape, dtype and params from :func:`describe`.

    Raises:
        ValueError, LookupError, TypeError: no such description.
    """
    name, shape, dtype, params = (text[key] for key in ("format", "shape", "dtype", "params"))
    if not isinstance(name, str) or dtype not in _DTYPES:
        raise ValueError(f"format {shown(name)} of dtype {shown(dtype)} is unknown")
    legal = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
    if not legal or not all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in shape):
        raise ValueError(f"shape {shown(shape)} is none")
    if math.prod(shape) >= _MOST_ELEMENTS:
        raise ValueError(f"shape {shape} is too large")
    if not isinstance(params, dict) or not all(isinstance(v, Param) for v in params.values()):
        raise ValueError("params must map names to numbers and texts")
    return {"format": name, "shape": tuple(shape), "dtype": _DTYPES[dtype], "params": params}


def tensor_blob(name: str, tensor: Tensor) -> Blob:
    """A tensor in memory, to be written."""

    def chunks() -> Iterator[memoryview]:
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data

    return Blob(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), chunks)


def dense_members(pieces: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The weights that pieces stand for: unit → member → ``[*batch, out, in]``."""
    return {
        unit: {member: tensor.effective() for member, tensor in read_piece(Path(path)).items()}
        for unit, path in pieces.items()
    }
