"""Sparse: the weights that are left, and a bitmask that says which they are.

Every ``block`` inputs of a row hold equally many weights, ``kept``: 2 of 4 is ``n:m`` sparsity, and
with whole rows as blocks (-1) nothing else is asked of where they lie. So the parts are regular,
and bytes follow from the shape:

``compressed``  ``[*batch, out, kept·blocks]`` in the dense dtype: what is left of a row, from its
                first input to its last.
``bitmask``     uint8 ``[*batch, out, ceil(in/8)]``. Input ``i`` is bit ``i % 8``, counted from the
                lowest, of byte ``i // 8``; unused bits of the last byte are zero.

Where no weight that is left is zero, these are the bytes of a matrix in ``sparse-bitmask``, and for
2:4 in ``sparse-24-bitmask``, as compressed-tensors 0.9 wrote them; the ``row_offsets`` of the first
are multiples of a row's count here and need not be stored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels import lowrank
from moesaic.kernels.tensor import CompressedTensor, Param

_VALUES, _MASK = "compressed", "bitmask"


def pack(weight: Tensor, mask: Tensor, *, block: int = -1) -> CompressedTensor:
    """Keeps the weights that a mask names; what else ``weight`` holds is dropped.

    Args:
        weight: ``[*batch, out, in]``.
        mask: bool, like ``weight``. True as often in every block of a row.
        block: inputs of a block, a divisor of ``in``; -1: all inputs of a row.

    Raises:
        ValueError: the shapes differ, the block does not divide the inputs, or one block has more
            weights left than another.
    """
    shape = tuple(weight.shape)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, a weight {shape} needs torch.bool {shape}"
        )
    size = block_inputs(shape[-1], block)
    counts = mask.reshape(*shape[:-1], -1, size).sum(-1)  # [*batch, out, blocks]
    least, most = (int(end) for end in counts.aminmax())
    if least != most:
        raise ValueError(f"one block of {size} inputs keeps {least} weights, another {most}")
    parts = {
        _VALUES: weight[mask].view(*shape[:-1], -1),
        _MASK: _packed(mask),
    }
    params: dict[str, Param] = {"kept": least, "block": block}
    return CompressedTensor("sparse", parts, shape, weight.dtype, params)


def block_inputs(inputs: int, block: int) -> int:
    """Inputs of a block in rows of ``inputs``; raises ValueError where it does not divide them."""
    size = inputs if block == -1 else block
    if size < 1 or inputs % size:
        raise ValueError(f"blocks of {block} do not divide {inputs} inputs")
    return size


def _packed(mask: Tensor) -> Tensor:
    """Bits of ``[*, in]`` as bytes ``[*, ceil(in/8)]``."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    bits = padded.view(*mask.shape[:-1], -1, 8)
    return (bits << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, inputs: int) -> Tensor:
    """The mask ``[*, in]`` of bytes ``[*, ceil(in/8)]``."""
    bits = (packed[..., None] >> _shifts(packed.device)) & 1
    return bits.flatten(-2)[..., :inputs].bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def unpack(tensor: CompressedTensor) -> Tensor:
    """The dense weight, ``tensor.shape`` and ``tensor.dtype``, zero where nothing is left."""
    values = tensor.parts[_VALUES]
    mask = _unpacked(tensor.parts[_MASK], tensor.shape[-1])
    return values.new_zeros(tensor.shape).masked_scatter_(mask, values)


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part."""
    blocks = shape[-1] // block_inputs(shape[-1], int(params["block"]))
    return {
        _VALUES: ((*shape[:-1], int(params["kept"]) * blocks), dtype),
        _MASK: ((*shape[:-1], -(-shape[-1] // 8)), torch.uint8),
    }


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]``"""
    lowrank.check_matrix(tensor)
    return F.linear(x, unpack(tensor).to(x.dtype))


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """The same on a GPU: the weight is unpacked, and PyTorch's own product does the rest.

    That saves memory, not time: there is no sparse kernel, and each call writes a dense weight.
    """
    if not x.is_cuda:
        raise RuntimeError(f"sparse.matmul needs a GPU, x is on {x.device}: matmul_reference")
    return matmul_reference(x, tensor)
