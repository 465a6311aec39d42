"""A quantized weight and its low-rank correction in one kernel launch.

``out = x @ dequantized(base)ᵀ + (x @ rightᵀ) @ leftᵀ``: the loop over the inputs that dequantizes
tiles of ``base`` also sums ``t = right @ xᵀ``, from the tile of ``x`` that is there anyway; after
it ``left @ t`` joins the sum. As in ``_int_group_triton``, everything is transposed, and with few
rows the inputs are shared by sections, each with the ``t`` of its inputs.

Every block of outputs reads ``right`` and sums ``t`` anew: with few rows and a large rank two
launches may win, and for ranks above ``MAX_RANK`` they are the only way. ``plan`` measures.
"""
# Triton's decorators and kernel arguments, and torch.cuda.device_of, carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _plan, int_group
from moesaic.kernels._tiles_triton import (
    Config,
    add_sections,
    operands,
    partial_sums,
    section_of_inputs,
    sections_for,
    weight_tile,
)
from moesaic.kernels.tensor import CompressedTensor

MAX_RANK = 128

# Every configuration that ships: what _int_group_triton has, with room for the factors. "wide" is
# for ranks up to 64 and a scale for 32 inputs or more.
CONFIGS = {
    "decode": Config(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=3),
    "wide": Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    "prefill": Config(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=3),
    "odd": Config(block_m=32, block_n=32, block_k=32, num_warps=8, num_stages=2),
}
MAX_WIDE_RANK, WIDE_SPAN = 64, 32


def config_for(rows: int, inputs: int, span: int, rank: int) -> Config:
    """The configuration for x ``[rows, inputs]`` when ``span`` inputs in a row share a scale."""
    if span < 16 or inputs % 16 or rank % 16:
        return CONFIGS["odd"]
    if rows <= CONFIGS["decode"].block_m:
        return CONFIGS["decode"]
    return CONFIGS["wide" if rank <= MAX_WIDE_RANK and span >= WIDE_SPAN else "prefill"]


def matmul_reference(x: Tensor, base: CompressedTensor, right: Tensor, left: Tensor) -> Tensor:
    """``x [*, in] @ baseᵀ + (x @ right [r, in]ᵀ) @ left [out, r]ᵀ -> [*, out]``."""
    return F.linear(x, base.dense().to(x.dtype)) + low_rank.matmul_reference(x, right, left)


def matmul(
    x: Tensor,
    base: CompressedTensor,
    right: Tensor,
    left: Tensor,
    path: low_rank.Path | None = None,
) -> Tensor:
    """``x [*, in] @ baseᵀ + (x @ rightᵀ) @ leftᵀ -> [*, out]``, the fastest way that was measured.

    Args:
        x: float16 or bfloat16, on a GPU (or on the CPU when Triton was imported under
            ``TRITON_INTERPRET=1``).
        base: one weight ``[out, in]`` in the format ``int_group``.
        right: ``[r, in]`` of the dtype and on the device of ``x``.
        left: ``[out, r]``, likewise.
        path: ``fused`` or ``products``, one launch for each of the summands, instead of measuring.

    Raises:
        ValueError: formats, shapes, dtypes or devices that do not fit, or ``fused`` beyond
            ``MAX_RANK``.
        RuntimeError: no GPU.
    """
    if base.format != int_group.FORMAT:
        raise ValueError(f"the base is in the format {base.format}, not {int_group.FORMAT}")
    low_rank.check(x, right=right, left=left)
    low_rank.check_factors("correction", x.shape[-1], right, left)
    if base.shape != (len(left), right.shape[1]):
        raise ValueError(f"base is {base.shape}, its correction {len(left), right.shape[1]}")
    held_on = base.parts["weight_packed"].device
    if held_on != x.device:
        raise ValueError(f"x is on {x.device}, the base on {held_on}")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    if plan(len(rows), base, len(right), x.dtype, path) == "products":
        return int_group.matmul(x, base).add_(low_rank.matmul(x, right, left))
    out = low_rank.empty_output(x, (len(rows), len(left)))
    launch(rows, base, right.contiguous(), left.contiguous(), out)
    return out.to(x.dtype).view(*x.shape[:-1], len(left))


def plan(
    rows: int,
    base: CompressedTensor,
    rank: int,
    dtype: torch.dtype,
    path: low_rank.Path | None = None,
) -> low_rank.Path:
    """The fastest way for ``rows`` rows in ``dtype``, measured the first time a shape is met.

    ``base`` itself takes part in measuring. ``path`` decides instead; so does the interpreter,
    which has nothing to measure, for ``fused``.

    Raises:
        ValueError: ``path`` is unknown, or ``fused`` and the rank exceeds ``MAX_RANK``.
    """
    low_rank.check_path(path, rank, MAX_RANK)
    if path == "products" or rank > MAX_RANK or rows == 0:
        return "products"
    if path == "fused" or low_rank.INTERPRETED:
        return "fused"
    bucket = _plan.row_bucket(rows)
    device = base.parts["weight_packed"].device

    def ways() -> _plan.Ways:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        outputs, inputs = base.shape
        x, right, left = random(bucket, inputs), random(rank, inputs), random(outputs, rank)
        out = random(bucket, outputs)
        return {
            "products": lambda: int_group.matmul(x, base).add_(low_rank.matmul(x, right, left)),
            "fused": lambda: launch(x, base, right, left, out),
        }

    params = tuple(sorted(base.params.items()))
    key = ("residual", bucket, base.shape, params, rank, dtype, device)
    best = _plan.fastest(key, ways, "products", device)
    return "fused" if best == "fused" else "products"


def launch(
    x: Tensor,
    base: CompressedTensor,
    right: Tensor,
    left: Tensor,
    out: Tensor,
    sections: int | None = None,
) -> None:
    """Writes ``x @ baseᵀ + (x @ rightᵀ) @ leftᵀ`` into ``out``.

    Args:
        x: float16 or bfloat16 ``[M, K]``, contiguous like the others.
        base: ``[N, K]`` in the format ``int_group``, on the device of ``x``.
        right: ``[r, K]`` with r at most ``MAX_RANK``.
        left: ``[N, r]``.
        out: ``[M, N]`` of any floating dtype.
        sections: of the inputs, summed by different programs; ``sections_for``, if None.
    """
    outputs, inputs = base.shape
    parts, constants = operands(base)
    packed, scale, _ = parts
    config = config_for(len(x), inputs, constants["SPAN"], len(right))
    if sections is None:
        sections = sections_for(len(x), outputs, inputs, config, x.device)
    grid = (triton.cdiv(len(x), config.block_m), triton.cdiv(outputs, config.block_n), sections)
    target = out if sections == 1 else partial_sums(sections, out)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        residual_matmul[grid](
            x,
            *parts,
            right,
            left,
            target,
            len(x),
            outputs,
            inputs,
            packed.shape[1],
            scale.shape[1],
            len(right),
            **constants,
            UPCAST=low_rank.INTERPRETED and x.dtype == torch.bfloat16,
            RANK=low_rank.padded_rank(len(right)),
            **config.arguments,
        )
    if sections > 1:
        add_sections(target, out)


@triton.jit
def residual_matmul(
    x,
    packed,
    scale,
    zero,
    right,
    left,
    out,
    rows,
    outputs,
    inputs,
    words,
    groups,
    rank,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # inputs that surely share a scale, 1 to 32
    SYMMETRIC: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 is wrong
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: a row number times a row length passes 2^31 for long prompts and large vocabularies.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    compute: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    t = tl.zeros([RANK, BLOCK_M], dtype=tl.float32)
    begin, end = section_of_inputs(inputs, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weight = weight_tile(
            packed,
            scale,
            zero,
            n[:, None, None],
            start,
            outputs,
            words,
            groups,
            BITS,
            GROUP_SIZE,
            SPAN,
            SYMMETRIC,
            BLOCK_K,
        ).to(compute)
        inside = (r < rank)[:, None] & (k < inputs)[None, :]
        factor = tl.load(right + r[:, None] * inputs + k[None, :], mask=inside, other=0)

        # Inputs beyond the last are zeros, whatever the weight there.
        inside = (m < rows)[None, :] & (k < inputs)[:, None]
        xt = tl.load(x + m[None, :] * inputs + k[:, None], mask=inside, other=0).to(compute)
        total = tl.dot(weight, xt, total, input_precision="ieee")
        t = tl.dot(factor.to(compute), xt, t, input_precision="ieee")
    inside = (n < outputs)[:, None] & (r < rank)[None, :]
    factor = tl.load(left + n[:, None] * rank + r[None, :], mask=inside, other=0)  # [N, RANK]
    total = tl.dot(factor.to(compute), t.to(compute), total, input_precision="ieee")
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    out += tl.program_id(2).to(tl.int64) * rows * outputs
    target = out + m[None, :] * outputs + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
