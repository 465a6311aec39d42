"""Channels: a weight of which only some rows and columns are stored; the others are zero.

What is left of ``W`` ``[*batch, out, in]`` is a compressed tensor of its own, its parts named
``inner_{part}``; all members of a bank have the same places. ``rows`` and ``columns`` say where it
stands, rising, int16 ``[n]`` (int32 where there are more channels than that can count); a part
lacks where all channels are there. A layer that was made narrower so fits the modules around it:
what it no longer computes is zero, and what it no longer reads does not matter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels import lowrank, nesting
from moesaic.kernels.tensor import CompressedTensor, Param, format_module

_INNER = "inner"
# Part → its dimension of the shape; the count is the param of the same name.
_PLACES = {"rows": -2, "columns": -1}


def pack(
    inner: CompressedTensor,
    shape: tuple[int, ...],
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> CompressedTensor:
    """Puts a smaller weight into its place; memory is shared.

    Args:
        inner: ``[*batch, len(rows), len(columns)]``.
        shape: of the whole weight, ``(*batch, out, in)``.
        rows, columns: places of the rows and columns of ``inner``, rising; None: all.

    Raises:
        ValueError: they do not rise, do not fit ``inner``, or lie outside of ``shape``.
    """
    places = {"rows": rows, "columns": columns}
    params: dict[str, Param] = {}
    parts: dict[str, Tensor] = {}
    for name, dim in _PLACES.items():
        place = places[name]
        params[name] = shape[dim] if place is None else len(place)
        if inner.shape[dim] != params[name]:
            raise ValueError(f"{name}: {params[name]} places for a weight {inner.shape}")
        if place is None:
            continue
        steps = place.long().diff()
        ends = place.tolist()[:1] + place.tolist()[-1:]
        if not ends or min(ends) < 0 or max(ends) >= shape[dim] or bool((steps <= 0).any()):
            raise ValueError(f"{name}: places must rise within 0 … {shape[dim] - 1}")
        if len(place) < shape[dim]:
            parts[name] = place.to(_place_dtype(shape[dim]))
    whole = nesting.nested("channels", {_INNER: inner}, shape, inner.dtype, params)
    return CompressedTensor("channels", {**whole.parts, **parts}, shape, inner.dtype, whole.params)


def _place_dtype(channels: int) -> torch.dtype:
    return torch.int16 if channels <= 1 << 15 else torch.int32


def place_bytes(channels: int, kept: int) -> int:
    """Bytes of the places of ``kept`` channels."""
    return 0 if kept == channels else kept * _place_dtype(channels).itemsize


def inner(tensor: CompressedTensor) -> CompressedTensor:
    """What is left, ``[*batch, rows, columns]``; parts are shared."""
    return nesting.member(tensor, _INNER, inner_shape(tensor.shape, tensor.params))


def inner_shape(shape: tuple[int, ...], params: Mapping[str, Param]) -> tuple[int, ...]:
    """Shape of what is left."""
    return (*shape[:-2], int(params["rows"]), int(params["columns"]))


def described_inner(params: Mapping[str, Param]) -> tuple[str, Mapping[str, Param]]:
    """Format and params of what is left, from the params of the whole."""
    return nesting.member_format(params, _INNER)


def inner_part(name: str) -> str | None:
    """Name of a part of the whole within what is left; None for places."""
    return name.removeprefix(f"{_INNER}_") if name.startswith(f"{_INNER}_") else None


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Member ``index`` of a bank."""
    rows, columns = (tensor.parts.get(name) for name in _PLACES)
    return pack(inner(tensor)[index], tensor.shape[1:], rows=rows, columns=columns)


def placed(tensor: CompressedTensor, small: Tensor) -> Tensor:
    """``small`` ``[*batch, rows, columns]`` where ``tensor`` has its channels, zero elsewhere:
    ``[*batch, out, in]``."""
    rows, columns = (tensor.parts.get(name) for name in _PLACES)
    if columns is not None:
        wide = small.new_zeros(*small.shape[:-1], tensor.shape[-1])
        small = wide.index_copy_(-1, columns.long(), small)
    if rows is not None:
        small = small.new_zeros(tensor.shape).index_copy_(-2, rows.long(), small)
    return small


def unpack(tensor: CompressedTensor) -> Tensor:
    """The dense weight, ``tensor.shape`` and ``tensor.dtype``, zero where nothing is left."""
    return placed(tensor, inner(tensor).dense())


def effective(tensor: CompressedTensor) -> Tensor:
    """The same from what products with the inner weight amount to."""
    return placed(tensor, inner(tensor).effective())


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part."""
    found = nesting.member_shapes(params, {_INNER: inner_shape(shape, params)}, dtype)
    for name, dim in _PLACES.items():
        if int(params[name]) < shape[dim]:
            found[name] = ((int(params[name]),), _place_dtype(shape[dim]))
    return found


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``: the inner weight's reference on the columns read."""
    small = inner(tensor)
    y = format_module(small.format).matmul_reference(_read(x, tensor), small)
    return _written(y, tensor)


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU, by the inner weight's kernel."""
    small = inner(tensor)
    return _written(format_module(small.format).matmul(_read(x, tensor), small), tensor)


def _read(x: Tensor, tensor: CompressedTensor) -> Tensor:
    lowrank.check_matrix(tensor)
    columns = tensor.parts.get("columns")
    return x if columns is None else x.index_select(-1, columns.long())


def _written(y: Tensor, tensor: CompressedTensor) -> Tensor:
    rows = tensor.parts.get("rows")
    if rows is None:
        return y
    return y.new_zeros(*y.shape[:-1], tensor.shape[-2]).index_copy_(-1, rows.long(), y)
