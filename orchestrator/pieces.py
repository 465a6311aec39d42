"""A piece: what a chain made of a unit, as one safetensors file.

Tensors are named ``{member}.{part}``; those of a bank have the experts as first dimension. What a
:class:`CompressedTensor` knows besides its parts is JSON in the file's metadata, so that a piece
explains itself. Equal pieces are equal files.

A *cut* is a piece without tensors of its own: it names a piece of the same store, made at a larger
rank, and the rank of every member. It is read like any other.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor, Param
from moesaic.orchestrator.shared import fetched
from moesaic.orchestrator.tensorfile import DTYPE_NAMES, Blob, Stored, read_file, write_file

_MEMBERS = "members"
_METADATA = "metadata"
_CUT = "cut"


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


def _uncut(path: Path, of: str) -> Path:
    """Where the piece with the key ``of`` lies in the store of the piece at ``path``."""
    return path.parents[1] / of[:2] / f"{of}{path.suffix}"


def read_piece(path: Path) -> dict[str, CompressedTensor]:
    """The members of a piece; tensors are views of a memory map of the file.

    Raises:
        RunError: the file is cut off.
    """
    text = read_file(fetched(path))[1].get(_CUT)
    if text is not None:
        cut = json.loads(text)
        whole = read_piece(_uncut(path, cut["of"]))
        return {
            name: member.cut(cut["ranks"][name]) if name in cut["ranks"] else member
            for name, member in whole.items()
        }
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
        RunError: the file is cut off.
    """
    stored, metadata = read_file(fetched(path))
    members = {}
    for name, text in json.loads(metadata[_MEMBERS]).items():
        prefix = f"{name}."
        parts = {n.removeprefix(prefix): s for n, s in stored.items() if n.startswith(prefix)}
        members[name] = Member(**parse(text), parts=parts)
    return members


def piece_metadata(path: Path) -> dict[str, str]:
    """The metadata that the piece was written with."""
    text: dict[str, str] = json.loads(read_file(fetched(path))[1][_METADATA])
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
    """Format, shape, dtype and params from :func:`describe`."""
    dtype = getattr(torch, text["dtype"])
    return {**text, "shape": tuple(text["shape"]), "dtype": dtype}


def tensor_blob(name: str, tensor: Tensor) -> Blob:
    """A tensor in memory, to be written."""

    def chunks() -> Iterator[memoryview]:
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data

    return Blob(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), chunks)
