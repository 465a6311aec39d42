"""Compressed tensors inside of one another: what a mosaic, factors and a residual are made of.

The parts of a member are named with a prefix. Its format and params go into the whole's params as
JSON, so that the whole explains itself.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor, Param, format_module

_MEMBERS = "members"


def nested(
    format_name: str,
    members: Mapping[str, CompressedTensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    params: Mapping[str, Param],
) -> CompressedTensor:
    """A tensor of ``members``, whose parts are named ``{member}_{part}``; memory is shared.

    Args:
        params: what the format must know besides its members.
    """
    described = {name: (member.format, member.params) for name, member in members.items()}
    parts: dict[str, Tensor] = {}
    for name, member in members.items():
        parts |= prefixed(f"{name}_", member)
    return CompressedTensor(
        format_name, parts, shape, dtype, {**params, **nested_params(described)}
    )


def nested_params(members: Mapping[str, tuple[str, Mapping[str, Param]]]) -> dict[str, Param]:
    """What :func:`nested` puts into the params, from format and params of every member."""
    described = {
        name: {"format": inner, "params": dict(params)} for name, (inner, params) in members.items()
    }
    return {_MEMBERS: json.dumps(described, sort_keys=True)}


def member(tensor: CompressedTensor, name: str, shape: tuple[int, ...]) -> CompressedTensor:
    """A member of :func:`nested` again; ``shape`` is the dense one."""
    return unprefixed(tensor, f"{name}_", _described(tensor.params)[name], shape)


def member_shapes(
    params: Mapping[str, Param], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of the members with these dense ``shapes``."""
    described = _described(params)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in shapes.items():
        found |= prefixed_shapes(f"{name}_", described[name], shape, dtype)
    return found


def member_format(params: Mapping[str, Param], name: str) -> tuple[str, Mapping[str, Param]]:
    """Format and params of a member of :func:`nested`."""
    described = _described(params)[name]
    return described["format"], described["params"]


def _described(params: Mapping[str, Param]) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(str(params[_MEMBERS]))
    return described


def prefixed(prefix: str, tensor: CompressedTensor) -> dict[str, Tensor]:
    """The parts under names that begin with ``prefix``."""
    return {f"{prefix}{name}": part for name, part in tensor.parts.items()}


def unprefixed(
    tensor: CompressedTensor, prefix: str, described: Mapping[str, Any], shape: tuple[int, ...]
) -> CompressedTensor:
    """The member that :func:`describe` and :func:`prefixed` were asked about."""
    parts = {
        name.removeprefix(prefix): part
        for name, part in tensor.parts.items()
        if name.startswith(prefix)
    }
    return CompressedTensor(described["format"], parts, shape, tensor.dtype, described["params"])


def prefixed_shapes(
    prefix: str, described: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of such a member."""
    inner = format_module(described["format"]).part_shapes(shape, dtype, described["params"])
    return {f"{prefix}{name}": part for name, part in inner.items()}
