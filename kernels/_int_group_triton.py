"""The Triton kernel of ``int_group``: ``x [M, K] @ weightᵀ -> [M, N]`` from packed codes.

The product is computed transposed, ``outᵀ = weight @ xᵀ``: output channels take the large
dimension of the tensor-core instruction, so that decoding with a handful of rows wastes little.

Unpacking follows from the layout: 32 values are exactly ``bits`` words. The kernel loads the words
of a chunk one by one, each spread over the 32 values of its chunk, and every value shifts what it
needs out of the one or two words that hold it. All 32 values of a chunk lie in one thread, so that
the compiler knows every shift and drops the words that do not matter to a value.

Imported only when a product is asked for, since Triton does not run everywhere.
"""
# Triton's decorators and kernel arguments carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows of x, output channels, inputs) and how a program is laid out."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Every configuration that ships, by the largest number of rows of x that it is meant for. The tests
# compile each one ahead of time for sm_80 and sm_90: no spills, shared memory, tensor cores.
CONFIGS: dict[int | None, Config] = {
    16: Config(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4),
    64: Config(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    None: Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
}


def config_for(rows: int) -> Config:
    """The configuration for ``rows`` rows of x."""
    fits = (config for limit, config in CONFIGS.items() if limit is not None and rows <= limit)
    return next(fits, CONFIGS[None])


def launch(x: Tensor, weight: CompressedTensor, out: Tensor) -> None:
    """Writes ``x @ weightᵀ`` into ``out``.

    Args:
        x: float16 or bfloat16 ``[M, K]``, contiguous.
        weight: ``[N, K]`` in the format ``int_group``, on the device of ``x``.
        out: ``[M, N]``, contiguous, in the dtype of ``x``.
    """
    outputs, inputs = weight.shape
    config = config_for(len(x))
    packed = weight.parts["weight_packed"].contiguous()
    scale = weight.parts["weight_scale"].contiguous()
    symmetric = bool(weight.params["symmetric"])
    grid = (triton.cdiv(len(x), config.block_m), triton.cdiv(outputs, config.block_n))
    int_group_matmul[grid](
        x,
        packed,
        scale,
        packed if symmetric else weight.parts["weight_zero_point"].contiguous(),
        out,
        len(x),
        outputs,
        inputs,
        packed.shape[1],
        scale.shape[1],
        BITS=int(weight.params["bits"]),
        GROUP_SIZE=max(0, int(weight.params["group_size"])),
        SYMMETRIC=symmetric,
        UPCAST=INTERPRETED,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def _chunks(packed, row, chunk, outputs, words, BITS: tl.constexpr):
    """Biased values uint32 [N, C, 32] of chunks ``chunk`` [C] of rows ``row`` [N]; 0 outside."""
    first_bit = tl.arange(0, 32)[None, None, :] * BITS  # where value i of a chunk begins
    value = tl.zeros([row.shape[0], chunk.shape[0], 32], dtype=tl.uint32)
    for index in tl.static_range(BITS):
        word = chunk * BITS + index
        inside = (row < outputs)[:, None] & (word < words)[None, :]
        bits = tl.load(packed + row[:, None] * words + word[None, :], mask=inside, other=0)
        bits = bits.to(tl.uint32, bitcast=True)[:, :, None]
        at = first_bit - 32 * index  # negative where the value began in the word before
        begins = tl.where((at >= 0) & (at < 32), bits >> (at & 31), 0)
        ends = tl.where((at < 0) & (at > -BITS), bits << (-at & 31), 0)
        value |= begins | ends
    return value & ((1 << BITS) - 1)


@triton.jit
def _zero_points(zero, row, group, inside, groups, BITS: tl.constexpr):
    """Biased zero points int32 of ``row`` and ``group``, which broadcast to ``inside``."""
    bit = row * BITS
    shift = (bit % 32).to(tl.uint32)
    at = zero + (bit // 32) * groups + group
    value = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = inside & (shift + BITS > 32)
        rest = tl.load(at + groups, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        value |= (rest << 1) << (31 - shift)  # in two steps: a shift by 32 is undefined
    return (value & ((1 << BITS) - 1)).to(tl.int32)


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
    SYMMETRIC: tl.constexpr,
    UPCAST: tl.constexpr,  # float32 products, for the interpreter: its bfloat16 is wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: a row number times a row length passes 2^31 for long prompts and large vocabularies.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    compute: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        chunk = start // 32 + tl.arange(0, BLOCK_K // 32)
        code = _chunks(packed, n, chunk, outputs, words, BITS).to(tl.int32)  # [N, C, 32]

        if GROUP_SIZE % 32 == 0:  # one group per chunk, or one group at all
            first = (chunk * 32)[None, :, None]
        else:
            first = (chunk * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
        group = first // GROUP_SIZE if GROUP_SIZE > 0 else first * 0
        row = n[:, None, None]
        inside = (row < outputs) & (group < groups)
        if SYMMETRIC:
            code -= 1 << (BITS - 1)
        else:
            code -= _zero_points(zero, row, group, inside, groups, BITS)
        step = tl.load(scale + row * groups + group, mask=inside, other=0).to(tl.float32)
        weight = (code.to(tl.float32) * step).to(compute).reshape(BLOCK_N, BLOCK_K)

        # Inputs beyond the last are zeros, whatever the weight there.
        inside = (m < rows)[None, :] & (k < inputs)[:, None]
        xt = tl.load(x + m[None, :] * inputs + k[:, None], mask=inside, other=0)
        total = tl.dot(weight, xt.to(compute), total, input_precision="ieee")
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    target = out + m[None, :] * outputs + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
