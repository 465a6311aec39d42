"""Residual: a compressed weight and a correction of low rank, ``W = base + L·R``.

The base is a compressed tensor of any format, its parts are named ``base_{part}``. The correction
is a tensor of the format ``lowrank``, its parts are named ``residual_{part}``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.kernels import lowrank, mosaic, nesting
from moesaic.kernels.tensor import CompressedTensor, Param, format_module


def pack(base: CompressedTensor, correction: CompressedTensor) -> CompressedTensor:
    """Joins a base and its correction, both ``[*batch, out, in]``; memory is shared.

    Raises:
        ValueError: shapes or dtypes differ, or the correction is not of low rank.
    """
    if correction.format != "lowrank":
        raise ValueError(f"the correction is in the format {correction.format}, not lowrank")
    if base.shape != correction.shape or base.dtype != correction.dtype:
        raise ValueError(
            f"base {base.shape} {base.dtype} and correction {correction.shape} {correction.dtype}"
            " do not add"
        )
    members = {"base": base, "residual": correction}
    return nesting.nested("residual", members, base.shape, base.dtype, {})


def members(tensor: CompressedTensor) -> tuple[CompressedTensor, CompressedTensor]:
    """The base and the correction; parts are shared."""
    return (
        nesting.member(tensor, "base", tensor.shape),
        nesting.member(tensor, "residual", tensor.shape),
    )


def cut(tensor: CompressedTensor, rank: int) -> CompressedTensor:
    """The same base with a correction of a smaller rank; see :func:`lowrank.cut`."""
    base, correction = members(tensor)
    return pack(base, lowrank.cut(correction, rank))


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Member ``index`` of a bank."""
    base, correction = members(tensor)
    return pack(base[index], correction[index])


def take(tensor: CompressedTensor, slices: Sequence[int]) -> CompressedTensor:
    """Some members of a bank; see :func:`mosaic.take`."""
    base, correction = members(tensor)
    return pack(mosaic.take(base, slices), mosaic.take(correction, slices))


def take_params(params: Mapping[str, Param], slices: Sequence[int]) -> dict[str, Param]:
    """The params of what :func:`take` gives."""
    found = {}
    for name in ("base", "residual"):
        inner, own = nesting.member_format(params, name)
        found[name] = (inner, mosaic.taken_params(inner, own, slices))
    return nesting.nested_params(found)


def joined(banks: Sequence[CompressedTensor]) -> CompressedTensor:
    """Banks one behind the other; see :func:`mosaic.joined`."""
    base, correction = zip(*map(members, banks), strict=True)
    return pack(mosaic.joined(base), mosaic.joined(correction))


def effective(tensor: CompressedTensor) -> Tensor:
    """The sum in float32, or in float64 where that is the dtype."""
    base, correction = members(tensor)
    return lowrank.effective(correction).add_(base.effective())


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``; the sum is rounded once."""
    return effective(tensor).to(tensor.dtype)


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of base and correction."""
    return nesting.member_shapes(params, {"base": shape, "residual": shape}, dtype)


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``: the sum of both products, each by its reference.

    They are added in float32 (float64 where ``x`` is); the result is rounded to ``x.dtype``.
    """
    lowrank.check_matrix(tensor)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    base, correction = members(tensor)
    product = format_module(base.format).matmul_reference(wide, base)
    return (product + lowrank.matmul_reference(wide, correction)).to(x.dtype)


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU.

    A base in ``int_group`` and dense factors: one Triton kernel or a launch for each summand, as
    measured for the shape (``_residual_triton``). Others by the formats' kernels, added in
    ``x.dtype``.
    """
    lowrank.check_matrix(tensor)
    base, correction = members(tensor)
    left, right = lowrank.factors(correction)
    if (base.format, left.format, right.format) == ("int_group", "dense", "dense"):
        try:
            from moesaic.kernels import _residual_triton as kernel
        except ModuleNotFoundError as error:
            raise RuntimeError("install triton for residual.matmul, or matmul_reference") from error
        return kernel.matmul(x, base, right.dense().to(x.dtype), left.dense().to(x.dtype))
    return format_module(base.format).matmul(x, base) + lowrank.matmul(x, correction)
