"""Delta: what the experts of a bank have in common, and what each adds in low rank.

``W_e = base + L_e·R_e``. The base ``[out, in]`` is a compressed tensor that lies there once for all
experts; its parts, ``base_{part}``, have no dimension of experts. The rest is a tensor of the
format ``lowrank``, its parts are named ``delta_{part}``. A slice of a bank is a ``residual``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.kernels import lowrank, mosaic, nesting, residual
from moesaic.kernels.tensor import CompressedTensor, Param


def pack(base: CompressedTensor, deltas: CompressedTensor) -> CompressedTensor:
    """Joins a base ``[out, in]`` and the deltas ``[*batch, out, in]``; memory is shared.

    Raises:
        ValueError: shapes or dtypes do not fit, or the deltas are not of low rank.
    """
    if deltas.format != "lowrank":
        raise ValueError(f"the deltas are in the format {deltas.format}, not lowrank")
    if base.shape != deltas.shape[-2:] or base.dtype != deltas.dtype:
        raise ValueError(
            f"base {base.shape} {base.dtype} and deltas {deltas.shape} {deltas.dtype} do not add"
        )
    parts = {"base": base, "delta": deltas}
    return nesting.nested("delta", parts, deltas.shape, deltas.dtype, {})


def members(tensor: CompressedTensor) -> tuple[CompressedTensor, CompressedTensor]:
    """The base ``[out, in]`` and the deltas ``[*batch, out, in]``; parts are shared."""
    return (
        nesting.member(tensor, "base", tensor.shape[-2:]),
        nesting.member(tensor, "delta", tensor.shape),
    )


def cut(tensor: CompressedTensor, rank: int) -> CompressedTensor:
    """The same base with deltas of a smaller rank; see :func:`lowrank.cut`."""
    base, deltas = members(tensor)
    return pack(base, lowrank.cut(deltas, rank))


def select(tensor: CompressedTensor, index: int) -> CompressedTensor:
    """Member ``index`` of a bank, as a residual of the shared base."""
    base, deltas = members(tensor)
    return residual.pack(base, deltas[index])


def take(tensor: CompressedTensor, slices: Sequence[int]) -> CompressedTensor:
    """Some members of a bank, with the whole base: a base that is taken twice lies there twice."""
    base, deltas = members(tensor)
    return pack(base, mosaic.take(deltas, slices))


def effective(tensor: CompressedTensor) -> Tensor:
    """The sums in float32, or in float64 where that is the dtype."""
    base, deltas = members(tensor)
    return lowrank.effective(deltas).add_(base.effective())


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``; the sums are rounded once."""
    return effective(tensor).to(tensor.dtype)


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of base and deltas."""
    return nesting.member_shapes(params, {"base": shape[-2:], "delta": shape}, dtype)


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]`` for a tensor without experts, as a residual."""
    lowrank.check_matrix(tensor)
    return residual.matmul_reference(x, residual.pack(*members(tensor)))


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU."""
    lowrank.check_matrix(tensor)
    return residual.matmul(x, residual.pack(*members(tensor)))
