"""What the Triton kernels share that read packed weights: tiles, sections, unpacking.

Unpacking follows from the layout of ``int_group``: 32 values are exactly ``bits`` words. A kernel
loads the words of a chunk one by one, each spread over the 32 values of its chunk, and every value
shifts what it needs out of the one or two words that hold it. Everything is loaded as ``[N, C, 1]``
and spread from there: so the compiler puts all values of a chunk into one thread, knows every
shift, and drops the words that do not matter to a value. (Loaded as ``[N, C]``, the values end up
across threads, and the loop has ten times the shifts and shared-memory reads.)

With few rows there are few programs. They then share the inputs of a block of outputs by sections:
each writes its partial sums, float32, and these are added in their order.
"""
# Triton's decorators and kernel arguments carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor

INTERPRETED: bool = triton.knobs.runtime.interpret
# Rows of the smallest tile that tensor cores take.
SMALLEST_TILE = 16
# With few rows: how many programs keep a multiprocessor busy, and how many may share a sum.
PROGRAMS_PER_PROCESSOR, MAX_SECTIONS = 2, 8


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows of x, output channels, inputs) and how a program is laid out."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def arguments(self) -> dict[str, int]:
        """As the launch of a kernel takes them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def group_span(group_size: int) -> int:
    """Largest power of two up to 32 that divides ``group_size`` (0: one group in all)."""
    return math.gcd(group_size, 32)


def operands(weight: CompressedTensor) -> tuple[list[Tensor], dict[str, int | bool]]:
    """What kernels that read a weight in the format ``int_group`` are launched with.

    Returns:
        ``packed``, ``scale`` and ``zero`` (``packed`` again where there are no zero points), each
        contiguous, and the constants ``BITS``, ``GROUP_SIZE``, ``SPAN``, ``SYMMETRIC``.
    """
    group_size = max(0, int(weight.params["group_size"]))
    symmetric = bool(weight.params["symmetric"])
    packed = weight.parts["weight_packed"].contiguous()
    scale = weight.parts["weight_scale"].contiguous()
    zero = packed if symmetric else weight.parts["weight_zero_point"].contiguous()
    constants = {
        "BITS": int(weight.params["bits"]),
        "GROUP_SIZE": group_size,
        "SPAN": group_span(group_size),
        "SYMMETRIC": symmetric,
    }
    return [packed, scale, zero], constants


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter a few, to share work as a GPU does."""
    if INTERPRETED:
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_blocks(rows: int, config: Config) -> int:
    """Programs that share the rows of x: one for each row where tensor cores take no part."""
    return rows if config.block_m < SMALLEST_TILE else int(triton.cdiv(rows, config.block_m))


def sections_for(rows: int, outputs: int, inputs: int, config: Config, device: torch.device) -> int:
    """Sections of the inputs: one, or so many that every multiprocessor has programs."""
    programs = row_blocks(rows, config) * triton.cdiv(outputs, config.block_n)
    wanted = PROGRAMS_PER_PROCESSOR * processors(device) // max(1, programs)
    return int(max(1, min(wanted, triton.cdiv(inputs, config.block_k), MAX_SECTIONS)))


def partial_sums(sections: int, out: Tensor) -> Tensor:
    """Room for the sums of every section, float32 ``[sections, *out.shape]``."""
    return torch.empty((sections, *out.shape), dtype=torch.float32, device=out.device)


def add_sections(partial: Tensor, out: Tensor) -> None:
    """Adds ``[sections, M, N]`` in the order of the sections, and rounds once into ``out``."""
    out.copy_(partial.sum(0))


@triton.jit
def section_of_inputs(inputs, BLOCK_K: tl.constexpr):
    """First and last input of this program's section: whole blocks, some sections empty."""
    blocks = tl.cdiv(tl.cdiv(inputs, BLOCK_K), tl.num_programs(2))
    begin = tl.program_id(2) * blocks * BLOCK_K
    return begin, tl.minimum(begin + blocks * BLOCK_K, inputs)


@triton.jit
def _chunks(packed, row, chunk, outputs, words, BITS: tl.constexpr):
    """Biased values uint32 [N, C, 32] of rows [N, 1, 1] and chunks [1, C, 1]; 0 outside."""
    first_bit = tl.arange(0, 32)[None, None, :] * BITS  # where value i of a chunk begins
    value = tl.zeros([row.shape[0], chunk.shape[1], 32], dtype=tl.uint32)
    for index in tl.static_range(BITS):
        word = chunk * BITS + index
        inside = (row < outputs) & (word < words)
        bits = tl.load(packed + row * words + word, mask=inside, other=0)
        bits = bits.to(tl.uint32, bitcast=True)
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
def values_tile(
    packed,
    zero,
    row,  # outputs [N, 1, 1]
    start,  # first input, a multiple of 32
    outputs,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # inputs that surely share a scale, 1 to 32
    SYMMETRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is multiplied by the scales, float32 [N, BLOCK_K / SPAN, SPAN], and their groups."""
    chunk = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :, None]
    code = _chunks(packed, row, chunk, outputs, words, BITS)  # [N, C, 32]
    code = code.reshape(row.shape[0], BLOCK_K // SPAN, SPAN)
    first = start + tl.arange(0, BLOCK_K // SPAN)[None, :, None] * SPAN
    group = first // GROUP_SIZE if GROUP_SIZE > 0 else first * 0
    inside = (row < outputs) & (group < groups)
    # As the last bits of a float at 2^23 an integer is its value: cheaper than converting it.
    value = (code | 0x4B000000).to(tl.float32, bitcast=True)
    if SYMMETRIC:
        value -= 8388608.0 + (1 << (BITS - 1))
    else:
        point = _zero_points(zero, row, group, inside, groups, BITS)
        value -= 8388608.0 + point.to(tl.float32)
    return value, group, inside


@triton.jit
def weight_tile(
    packed,
    scale,
    zero,
    row,  # outputs [N, 1, 1]
    start,  # first input, a multiple of 32
    outputs,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # inputs that surely share a scale, 1 to 32
    SYMMETRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights float32 [N, BLOCK_K]; zero beyond the last row, anything beyond the last input."""
    value, group, inside = values_tile(
        packed, zero, row, start, outputs, words, groups, BITS, GROUP_SIZE, SPAN, SYMMETRIC, BLOCK_K
    )
    step = tl.load(scale + row * groups + group, mask=inside, other=0)
    return (value * step.to(tl.float32)).reshape(row.shape[0], BLOCK_K)
