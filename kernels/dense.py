"""Dense: a weight as it is. What a chain that only reduces experts leaves is stored so."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels.tensor import CompressedTensor, Param

_PART = "dense"


def pack(weight: Tensor) -> CompressedTensor:
    """The weight, of any shape, as a compressed tensor that shares its memory."""
    return CompressedTensor("dense", {_PART: weight}, tuple(weight.shape), weight.dtype)


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight, ``tensor.shape`` and ``tensor.dtype``."""
    return tensor.parts[_PART]


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the one part."""
    return {_PART: (shape, dtype)}


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``"""
    return F.linear(x, tensor.parts[_PART].to(x.dtype))


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU, where PyTorch's own product is the kernel for dense weights."""
    if not x.is_cuda:
        raise RuntimeError(f"dense.matmul needs a GPU, x is on {x.device}: matmul_reference")
    return matmul_reference(x, tensor)
