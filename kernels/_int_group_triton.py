"""The Triton kernel of ``int_group``: ``x [M, K] @ weightᵀ -> [M, N]`` from packed codes.

The product is computed transposed, ``outᵀ = weight @ xᵀ``: output channels take the large
dimension of the tensor-core instruction, so that decoding with a handful of rows wastes little.

One row or two, as in decoding, go through ``int_group_matvec``: multiplied where it was unpacked,
a weight crosses no threads, and nothing waits for tensor cores that would be idle anyway. Whether
that is faster ``plan`` measures, once per shape.

Imported only when a product is asked for, since Triton does not run everywhere.
"""
# Triton's decorators and kernel arguments, and torch.cuda.device_of, carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels import _plan
from moesaic.kernels._tiles_triton import INTERPRETED as INTERPRETED
from moesaic.kernels._tiles_triton import (
    SMALLEST_TILE,
    Config,
    add_sections,
    group_span,
    operands,
    partial_sums,
    row_blocks,
    section_of_inputs,
    sections_for,
    values_tile,
    weight_tile,
)
from moesaic.kernels.tensor import CompressedTensor

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)

# Every configuration that ships. The tests compile each one ahead of time for sm_80 and sm_90 and
# look at spills, shared memory and tensor cores; of what passes, these are the fastest on an H200
# (tests/benchmarks/kernel_configs.py).
CONFIGS = {
    # Of int_group_matvec; block_m: the rows up to which it is offered.
    "vector": Config(block_m=2, block_n=4, block_k=1024, num_warps=4, num_stages=2),
    "decode": Config(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    "batch": Config(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=4),
    "prefill": Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    # For group sizes and rows that are no multiple of 16: many scales, and loads of single values,
    # want the registers that larger tiles would take.
    "odd": Config(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2),
}


def config_for(rows: int, inputs: int, span: int) -> Config:
    """The configuration for x ``[rows, inputs]`` when ``span`` inputs in a row share a scale."""
    if span < 16 or inputs % 16:
        return CONFIGS["odd"]
    fitting = (name for name in ("vector", "decode", "batch") if rows <= CONFIGS[name].block_m)
    return CONFIGS[next(fitting, "prefill")]


class Plan(NamedTuple):
    """How to multiply: a configuration, and how many sections the inputs have."""

    config: Config
    sections: int


@cache
def _small_plans(rows: int, outputs: int, inputs: int, device: torch.device) -> dict[str, Plan]:
    """Ways to compare for few rows, by name; asked for with every token, so remembered."""
    names = [name for name in ("vector", "decode") if rows <= CONFIGS[name].block_m]
    found = {}
    for name in names:
        several = sections_for(rows, outputs, inputs, CONFIGS[name], device)
        for sections in sorted({1, several}):
            found[f"{name}, {sections}"] = Plan(CONFIGS[name], sections)
    return found


def plan(rows: int, weight: CompressedTensor, dtype: torch.dtype) -> Plan:
    """The way for x ``[rows, inputs]``; for few rows the fastest, measured when first met.

    With as few rows as ``decode`` takes, what is fastest depends on the card: one row at a time or
    tensor cores, and how many programs share a sum. ``weight`` itself takes part in measuring. The
    interpreter has nothing to measure.
    """
    outputs, inputs = weight.shape
    device = weight.parts["weight_packed"].device
    span = group_span(max(0, int(weight.params["group_size"])))
    usual = config_for(rows, inputs, span)
    if INTERPRETED or rows == 0 or usual not in (CONFIGS["vector"], CONFIGS["decode"]):
        return Plan(usual, sections_for(rows, outputs, inputs, usual, device))
    bucket = _plan.row_bucket(rows)
    found = _small_plans(bucket, outputs, inputs, device)

    def ways() -> _plan.Ways:
        x = torch.randn((bucket, inputs), dtype=dtype, device=device)
        out = x.new_empty((bucket, outputs))
        return {name: partial(launch, x, weight, out, way) for name, way in found.items()}

    params = tuple(sorted(weight.params.items()))
    key = ("int_group", bucket, weight.shape, params, dtype, device)
    return found[_plan.fastest(key, ways, next(iter(found)), device)]


def launch(x: Tensor, weight: CompressedTensor, out: Tensor, way: Plan | None = None) -> None:
    """Writes ``x @ weightᵀ`` into ``out``.

    Args:
        x: float16 or bfloat16 ``[M, K]``, contiguous.
        weight: ``[N, K]`` in the format ``int_group``, on the device of ``x``.
        out: ``[M, N]``, contiguous, of any floating dtype.
        way: instead of ``plan``.
    """
    outputs, inputs = weight.shape
    parts, constants = operands(weight)
    packed, scale, _ = parts
    config, sections = way or plan(len(x), weight, x.dtype)
    target = out if sections == 1 else partial_sums(sections, out)
    sizes = (len(x), outputs, inputs, packed.shape[1], scale.shape[1])
    options = constants | config.arguments
    if config.block_m < SMALLEST_TILE:
        kernel = int_group_matvec
        del options["BLOCK_M"]
    else:
        kernel = int_group_matmul
        options["UPCAST"] = INTERPRETED and x.dtype == torch.bfloat16
    grid = (row_blocks(len(x), config), triton.cdiv(outputs, config.block_n), sections)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](x, *parts, target, *sizes, **options)
    if sections > 1:
        add_sections(target, out)


@triton.jit
def int_group_matvec(
    x,
    packed,
    scale,
    zero,
    out,
    rows,
    outputs,
    inputs,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # inputs that surely share a scale, 1 to 32
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of x for each program: sums stay in the threads that unpack, tensor cores rest."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None, None]
    total = tl.zeros([BLOCK_N, BLOCK_K // SPAN, 1], dtype=tl.float32)
    begin, end = section_of_inputs(inputs, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        value, group, inside = values_tile(
            packed,
            zero,
            row,
            start,
            outputs,
            words,
            groups,
            BITS,
            GROUP_SIZE,
            SPAN,
            SYMMETRIC,
            BLOCK_K,
        )
        k = start + tl.arange(0, BLOCK_K // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        xs = tl.load(x + m * inputs + k, mask=k < inputs, other=0).to(tl.float32)
        xs = xs.reshape(1, BLOCK_K // SPAN, SPAN)
        step = tl.load(scale + row * groups + group, mask=inside, other=0).to(tl.float32)
        total += tl.sum(value * xs, 2, keep_dims=True) * step
    y = tl.sum(tl.sum(total, 2), 1)
    out += (tl.program_id(2).to(tl.int64) * rows + m) * outputs
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def int_group_matmul(
    x,
    packed,
    scale,
    zero,
    out,
    rows,
    outputs,
    inputs,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # inputs that surely share a scale, 1 to 32
    SYMMETRIC: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 is wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: a row number times a row length passes 2^31 for long prompts and large vocabularies.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None, None]
    compute: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    begin, end = section_of_inputs(inputs, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weight = weight_tile(
            packed,
            scale,
            zero,
            row,
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

        # Inputs beyond the last are zeros, whatever the weight there.
        inside = (m < rows)[None, :] & (k < inputs)[:, None]
        xt = tl.load(x + m[None, :] * inputs + k[:, None], mask=inside, other=0)
        total = tl.dot(weight, xt.to(compute), total, input_precision="ieee")
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    out += tl.program_id(2).to(tl.int64) * rows * outputs
    target = out + m[None, :] * outputs + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
