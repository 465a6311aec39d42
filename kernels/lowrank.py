"""Low rank: a weight as the product of two factors, ``W = L·R``.

``L`` is ``[*batch, out, rank]``, ``R`` is ``[*batch, rank, in]``. Each is a compressed tensor of
its own, dense or quantized, whose parts are named ``left_{part}`` and ``right_{part}``;
``params["rank"]`` is the rank.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from moesaic.kernels import dense, mosaic, nesting
from moesaic.kernels.tensor import CompressedTensor, Param, format_module

_RANK = "rank"


def pack(left: CompressedTensor, right: CompressedTensor) -> CompressedTensor:
    """Joins two factors; memory is shared.

    Args:
        left: ``[*batch, out, rank]``.
        right: ``[*batch, rank, in]``, of the same dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    *batch, out, rank = left.shape
    *other, rows, inputs = right.shape
    if batch != other or rank != rows or left.dtype != right.dtype:
        raise ValueError(
            f"factors {left.shape} {left.dtype} and {right.shape} {right.dtype} do not multiply"
        )
    members = {"left": left, "right": right}
    return nesting.nested("lowrank", members, (*batch, out, inputs), left.dtype, {_RANK: rank})


def factor_params(format_name: str, params: Mapping[str, Param], rank: int) -> dict[str, Param]:
    """The params of a tensor whose factors both have this format and these params."""
    both = dict.fromkeys(("left", "right"), (format_name, params))
    return {_RANK: rank, **nesting.nested_params(both)}


def factors(tensor: CompressedTensor) -> tuple[CompressedTensor, CompressedTensor]:
    """The factors ``[*batch, out, rank]`` and ``[*batch, rank, in]``; parts are shared."""
    shapes = _shapes(tensor.shape, tensor.params)
    return (
        nesting.member(tensor, "left", shapes["left"]),
        nesting.member(tensor, "right", shapes["right"]),
    )


def _shapes(shape: tuple[int, ...], params: Mapping[str, Param]) -> dict[str, tuple[int, ...]]:
    *batch, out, inputs = shape
    rank = int(params[_RANK])
    return {"left": (*batch, out, rank), "right": (*batch, rank, inputs)}


def cut(tensor: CompressedTensor, rank: int) -> CompressedTensor:
    """The first ``rank`` columns of the left factor with the first rows of the right one.

    Raises:
        ValueError: the factors are not dense, or have no such rank.
    """
    left, right = factors(tensor)
    if {left.format, right.format} != {"dense"}:
        raise ValueError(f"factors in {left.format} and {right.format} cannot be cut: only dense")
    if not 1 <= rank <= left.shape[-1]:
        raise ValueError(f"factors of rank {left.shape[-1]} cannot be cut to rank {rank}")
    return pack(
        dense.pack(left.dense()[..., :rank].contiguous()),
        dense.pack(right.dense()[..., :rank, :].contiguous()),
    )


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Member ``index`` of a bank."""
    left, right = factors(tensor)
    return pack(left[index], right[index])


def take(tensor: CompressedTensor, slices: Sequence[int]) -> CompressedTensor:
    """Some members of a bank; see :func:`mosaic.take`."""
    left, right = factors(tensor)
    return pack(mosaic.take(left, slices), mosaic.take(right, slices))


def joined(banks: Sequence[CompressedTensor]) -> CompressedTensor:
    """Banks one behind the other; see :func:`mosaic.joined`."""
    left, right = zip(*map(factors, banks), strict=True)
    return pack(mosaic.joined(left), mosaic.joined(right))


def effective(tensor: CompressedTensor) -> Tensor:
    """``L·R``, ``tensor.shape`` in float32, or in float64 where that is the dtype.

    Matrix by matrix, so that an expert's product does not depend on its bank.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    left, right = (factor.dense().to(wide) for factor in factors(tensor))
    if left.dim() == 2:
        return left @ right
    out = left.new_empty(tensor.shape)
    for one, a, b in zip(out, left, right, strict=True):
        torch.matmul(a, b, out=one)
    return out


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``, rounded once."""
    return effective(tensor).to(tensor.dtype)


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of both factors."""
    return nesting.member_shapes(params, _shapes(shape, params), dtype)


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``: ``(x Rᵀ) Lᵀ``, each by its format's reference.

    What lies between is float32 (float64 where ``x`` is); the result is rounded to ``x.dtype``.
    """
    check_matrix(tensor)
    left, right = factors(tensor)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    middle = format_module(right.format).matmul_reference(wide, right)  # [*, rank]
    return format_module(left.format).matmul_reference(middle, left).to(x.dtype)


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU; what lies between the factors is ``x.dtype``.

    Dense factors in 16 bits: one Triton kernel or two products, as measured for the shape
    (``_lowrank_triton``). Others: two products, each by its format's kernel.
    """
    check_matrix(tensor)
    kernel = _triton()
    if not (x.is_cuda or (kernel and kernel.INTERPRETED)):
        raise RuntimeError(f"lowrank.matmul needs a GPU, x is on {x.device}: matmul_reference")
    left, right = factors(tensor)
    if kernel and x.dtype in kernel.DTYPES and left.format == right.format == "dense":
        result: Tensor = kernel.matmul(x, right.dense().to(x.dtype), left.dense().to(x.dtype))
        return result
    return format_module(left.format).matmul(format_module(right.format).matmul(x, right), left)


def _triton() -> ModuleType | None:
    """The Triton kernel's module; None where Triton is not installed."""
    try:
        from moesaic.kernels import _lowrank_triton
    except ModuleNotFoundError:
        return None
    return _lowrank_triton


def check_matrix(tensor: CompressedTensor) -> None:
    """Raises ValueError if ``tensor`` is a bank: members are multiplied one at a time."""
    if len(tensor.shape) != 2:
        raise ValueError(f"weight is {tensor.shape}: multiply by one member of a bank at a time")
