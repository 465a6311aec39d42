"""Weight-only integers of 2 to 8 bits with one scale per group: the ``pack-quantized`` layout.

A weight ``w[o, i]`` is stored as an integer code and read back as

    w[o, i] = (code[o, i] - zero_point[o, g]) * scale[o, g],    g = i // group_size

with codes and zero points in ``[-2^(bits-1), 2^(bits-1) - 1]``. The parts are those that the
compressed-tensors package (0.18 and later) and the engines that read its checkpoints expect:

``weight_packed``      int32 ``[*batch, out, ceil(in·bits/32)]``. Each row is one little-endian bit
                       stream: value ``i`` occupies bits ``i·bits`` and up, biased by ``2^(bits-1)``
                       so that it is unsigned. Values of 3, 5, 6 and 7 bits straddle words; 32
                       values take exactly ``bits`` words. Unused bits of the last word are zero.
``weight_scale``       ``[*batch, out, groups]`` in the dense dtype; one group if per channel.
``weight_shape``       int64 ``[*batch, 2]``: ``out, in``.
``weight_zero_point``  only if asymmetric: int32 ``[*batch, ceil(out·bits/32), groups]``, packed the
                       same way, but down the columns.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor, Param

FORMAT = "int_group"
MIN_BITS, MAX_BITS = 2, 8
DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values handled at a time: temporaries stay in the cache, and small beside a large bank.
_BLOCK_VALUES = 1 << 20


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> CompressedTensor:
    """Packs integer codes, scales and zero points.

    Args:
        codes: integers ``[*batch, out, in]`` in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        scale: ``[*batch, out, groups]`` in ``dtype``.
        zero_point: integers like ``scale`` in the range of the codes; None if symmetric.
        bits: 2 to 8.
        group_size: inputs that share a scale, a divisor of ``in``; -1 for one scale per row.
        dtype: dtype of the dense weight: float32, float16 or bfloat16.

    Raises:
        ValueError: a shape, dtype or value that does not fit.
    """
    params: dict[str, Param] = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": zero_point is None,
    }
    shape = tuple(codes.shape)
    expected = part_shapes(shape, dtype, params)
    if (tuple(scale.shape), scale.dtype) != expected["weight_scale"]:
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)}, a weight {shape} in {dtype} with group "
            f"size {group_size} needs {dtype} {expected['weight_scale'][0]}"
        )
    _check_integers("code", codes, bits)
    *batch, out, inputs = shape
    parts = {
        "weight_packed": _pack_rows(codes, bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([out, inputs], device=codes.device)
        .expand(*batch, 2)
        .contiguous(),
    }
    if zero_point is not None:
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"zero_point is {tuple(zero_point.shape)}, scale is {tuple(scale.shape)}"
            )
        _check_integers("zero point", zero_point, bits)
        parts["weight_zero_point"] = _pack_rows(zero_point.mT, bits).mT.contiguous()
    return CompressedTensor(FORMAT, parts, shape, dtype, MappingProxyType(params))


def unpack(tensor: CompressedTensor) -> Tensor:
    """Dense weight ``[*batch, out, in]`` in ``tensor.dtype``.

    Codes and zero points are exact in every dense dtype, so that each weight is rounded once.
    """
    scale = tensor.parts["weight_scale"]  # [*batch, out, groups]
    grouped = codes(tensor).view(*scale.shape, -1).to(tensor.dtype)  # [*batch, out, groups, size]
    zero_point = zero_points(tensor)
    if zero_point is not None:
        grouped -= zero_point.to(tensor.dtype).unsqueeze(-1)
    grouped *= scale.unsqueeze(-1)
    return grouped.flatten(-2)


def codes(tensor: CompressedTensor) -> Tensor:
    """Signed codes, int8 ``[*batch, out, in]``."""
    return _unpack_rows(tensor.parts["weight_packed"], tensor.shape[-1], _bits(tensor))


def zero_points(tensor: CompressedTensor) -> Tensor | None:
    """Signed zero points, int8 ``[*batch, out, groups]``; None if symmetric."""
    if tensor.params["symmetric"]:
        return None
    packed = tensor.parts["weight_zero_point"]  # [*batch, words, groups]
    return _unpack_rows(packed.mT, tensor.shape[-2], _bits(tensor)).mT


def part_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of a weight ``[*batch, out, in]``.

    Raises:
        ValueError: a weight that this format cannot hold: bits, dtype or group size do not fit.
    """
    bits = int(params["bits"])
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, the format {FORMAT} has {MIN_BITS} to {MAX_BITS}")
    if dtype not in DENSE_DTYPES:
        raise ValueError(f"dense dtype is {dtype}, the format {FORMAT} has {DENSE_DTYPES}")
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"a weight of shape {shape} is no matrix")
    *batch, out, inputs = shape
    groups = group_count(inputs, int(params["group_size"]))
    parts = {
        "weight_packed": ((*batch, out, _words(inputs, bits)), torch.int32),
        "weight_scale": ((*batch, out, groups), dtype),
        "weight_shape": ((*batch, 2), torch.int64),
    }
    if not params["symmetric"]:
        parts["weight_zero_point"] = ((*batch, _words(out, bits), groups), torch.int32)
    return parts


def group_count(inputs: int, group_size: int) -> int:
    """Groups in a row of ``inputs`` weights; raises ValueError if they do not come out even."""
    if group_size == -1:
        return 1
    if group_size < 1 or inputs % group_size:
        raise ValueError(f"group size {group_size} does not divide the {inputs} inputs")
    return inputs // group_size


def quantization_args(params: Mapping[str, Param]) -> dict[str, Any]:
    """What ``config.json`` says of such a weight: the ``weights`` of a compressed-tensors group."""
    group_size = int(params["group_size"])
    return {
        "num_bits": int(params["bits"]),
        "type": "int",
        "symmetric": bool(params["symmetric"]),
        "group_size": None if group_size == -1 else group_size,
        "strategy": "channel" if group_size == -1 else "group",
        "dynamic": False,
    }


def matmul_reference(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]`` in ``x.dtype``.

    Weights are rounded to ``tensor.dtype``, products accumulate in float32 (float64 where ``x``
    is float64), and the sum is rounded to ``x.dtype``.
    """
    _check_operands(x, tensor)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ unpack(tensor).to(wide).T).to(x.dtype)


def matmul(x: Tensor, tensor: CompressedTensor) -> Tensor:
    """``x [*, in] @ weightᵀ -> [*, out]`` by the Triton kernel, which never stores the weight.

    Args:
        x: float16 or bfloat16, on the GPU that holds the parts (or on the CPU when Triton was
            imported under ``TRITON_INTERPRET=1``).
        tensor: one weight; the members of a bank are multiplied one at a time.

    Weights are rounded to ``x.dtype``, products accumulate in float32. There is no backward pass.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: no GPU, or Triton is not installed.
    """
    _check_operands(x, tensor)
    try:
        from moesaic.kernels import _int_group_triton as kernel
    except ModuleNotFoundError as error:
        raise RuntimeError("install triton to use int_group.matmul, or matmul_reference") from error
    if x.dtype not in kernel.ACTIVATION_DTYPES:
        raise ValueError(f"x is {x.dtype}, int_group.matmul takes {kernel.ACTIVATION_DTYPES}")
    if not (x.is_cuda or kernel.INTERPRETED):
        raise RuntimeError(f"int_group.matmul needs a GPU, x is on {x.device}: matmul_reference")
    held_on = tensor.parts["weight_packed"].device
    if held_on != x.device:
        raise ValueError(f"x is on {x.device}, the weight on {held_on}")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    # The interpreter would cut bfloat16 off instead of rounding it.
    dtype = torch.float32 if kernel.INTERPRETED else x.dtype
    out = torch.empty((rows.shape[0], tensor.shape[0]), dtype=dtype, device=x.device)
    kernel.launch(rows, tensor, out)
    return out.to(x.dtype).view(*x.shape[:-1], tensor.shape[0])


def _check_operands(x: Tensor, tensor: CompressedTensor) -> None:
    if len(tensor.shape) != 2:
        raise ValueError(f"weight is {tensor.shape}: multiply by one member of a bank at a time")
    if x.ndim < 1 or x.shape[-1] != tensor.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, the weight {tensor.shape} has other inputs")


def _check_integers(what: str, values: Tensor, bits: int) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{what}s are {values.dtype}, not integers")
    if values.numel() == 0:
        return
    low, high = (int(value) for value in values.aminmax())
    limit = 1 << (bits - 1)
    if low < -limit or high >= limit:
        raise ValueError(
            f"{what}s reach from {low} to {high}, {bits} bits hold {-limit} to {limit - 1}"
        )


def _bits(tensor: CompressedTensor) -> int:
    return int(tensor.params["bits"])


def _words(values: int, bits: int) -> int:
    """32-bit words that ``values`` values of ``bits`` bits take."""
    return -(-values * bits // 32)


# Packing rests on one fact: whatever the width, 8 values of `bits` bits are exactly `bits` bytes.
# So 8 values are collected in an int64 and its low `bits` bytes are the stream, and back (on a
# little-endian machine: bytes are viewed as words).


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """Signed integers ``[*batch, n]`` → int32 ``[*batch, ceil(n·bits/32)]``."""
    *batch, n = values.shape
    rows = values.reshape(-1, n)
    padded, words = -(-n // 32) * 32, _words(n, bits)
    packed = torch.empty((rows.shape[0], words), dtype=torch.int32, device=values.device)
    step = max(1, _BLOCK_VALUES // padded)
    for source, target in zip(torch.split(rows, step), torch.split(packed, step), strict=True):
        biased = torch.zeros((len(source), padded), dtype=torch.uint8, device=values.device)
        biased[:, :n] = source  # negative values wrap modulo 256 …
        biased[:, :n] += 1 << (bits - 1)  # … and come back here
        octets = biased.view(-1, 8)
        stream = octets[:, 0].to(torch.int64)
        for i in range(1, 8):
            stream |= octets[:, i].to(torch.int64) << (bits * i)
        in_bytes = stream.view(torch.uint8).view(-1, 8)[:, :bits].reshape(len(source), -1)
        target.copy_(in_bytes.view(torch.int32)[:, :words])
    return packed.view(*batch, words)


def _unpack_rows(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of :func:`_pack_rows`: int32 ``[*batch, words]`` → int8 ``[*batch, n]``."""
    *batch, words = packed.shape
    rows = packed.reshape(-1, words)
    padded = -(-n // 32) * 32
    values = torch.empty((rows.shape[0], n), dtype=torch.int8, device=packed.device)
    step = max(1, _BLOCK_VALUES // padded)
    for source, target in zip(torch.split(rows, step), torch.split(values, step), strict=True):
        whole = source.new_zeros((len(source), padded * bits // 32))
        whole[:, :words] = source
        octets = torch.zeros((whole.numel() * 4 // bits, 8), dtype=torch.uint8, device=rows.device)
        octets[:, :bits] = whole.view(torch.uint8).view(-1, bits)
        stream = octets.view(torch.int64).squeeze(1)
        biased = torch.empty_like(octets)
        for i in range(8):
            biased[:, i] = (stream >> (bits * i)) & ((1 << bits) - 1)
        biased -= 1 << (bits - 1)  # negative values wrap modulo 256, as int8 reads them
        target.copy_(biased.view(torch.int8).view(len(source), -1)[:, :n])
    return values.view(*batch, n)
