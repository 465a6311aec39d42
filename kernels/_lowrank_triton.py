"""A low-rank product in one Triton kernel: ``(x [M, K] @ rightᵀ) @ leftᵀ -> [M, N]``.

A program owns a block of rows. It sums ``t = x @ rightᵀ [BLOCK_M, RANK]`` over all inputs in
float32 registers, rounds it to the dtype of ``x`` (as two library products would), and streams
over the outputs: ``t`` is never written. FlashSVD, arXiv 2508.01506, section 3.

With few rows there are few programs. They may then share a row block by sections of the outputs,
each summing ``t`` anew. Whether that, one section or two library products is fastest is measured
by ``plan``, once per shape: plain products are also what FlashSVD itself falls back to.

Imported only when a product is asked for, since Triton does not run everywhere.
"""
# Triton's decorators and kernel arguments, and torch.cuda.device_of, carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels import _plan
from moesaic.kernels._tiles_triton import INTERPRETED as INTERPRETED
from moesaic.kernels._tiles_triton import Config, processors

DTYPES = (torch.float16, torch.bfloat16)
# Largest rank whose tile fits the registers; above, two products. The second is for inputs or ranks
# that are no multiple of 16: loads of single values want registers too.
MAX_RANK, MAX_ODD_RANK = 512, 256
Path = Literal["fused", "products"]

# Every configuration that ships, by the largest rank it takes. The tests compile each one ahead of
# time for sm_80 and sm_90. Those for prefill are the fastest on an H200 of those that do not spill
# (tests/benchmarks/kernel_configs.py).
CONFIGS = {
    "decode_256": Config(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=4),
    "prefill_128": Config(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    "prefill_256": Config(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    "wide_512": Config(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=2),
    "odd": Config(block_m=32, block_n=32, block_k=32, num_warps=8, num_stages=2),
}


@dataclass(frozen=True)
class Plan:
    """How to multiply: ``products``, or ``fused`` with as many sections of the outputs."""

    path: Path
    sections: int = 1


def padded_rank(rank: int) -> int:
    """The tile that holds ``rank``: a power of two, at least 16 as tensor cores need."""
    return max(16, 1 << (rank - 1).bit_length())


def max_rank(inputs: int, rank: int) -> int:
    """The largest rank that the fused kernel takes, with inputs and a rank as odd as these."""
    return MAX_ODD_RANK if inputs % 16 or rank % 16 else MAX_RANK


def config_for(rows: int, inputs: int, rank: int) -> Config:
    """The configuration for x ``[rows, inputs]`` and a rank that is not above ``max_rank``."""
    if inputs % 16 or rank % 16:
        return CONFIGS["odd"]
    tile = padded_rank(rank)
    if tile > 256:
        return CONFIGS["wide_512"]
    if rows <= CONFIGS["decode_256"].block_m:
        return CONFIGS["decode_256"]
    return CONFIGS["prefill_128" if tile <= 128 else "prefill_256"]


def matmul_reference(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """``(x [*, in] @ right [r, in]ᵀ) @ left [out, r]ᵀ -> [*, out]`` by two products."""
    return F.linear(F.linear(x, right), left)


def matmul(x: Tensor, right: Tensor, left: Tensor, path: Path | None = None) -> Tensor:
    """``(x [*, in] @ rightᵀ) @ leftᵀ -> [*, out]``, the fastest way that was measured.

    Args:
        x: float16 or bfloat16, on a GPU (or on the CPU when Triton was imported under
            ``TRITON_INTERPRET=1``).
        right: ``[r, in]`` of the dtype and on the device of ``x``.
        left: ``[out, r]``, likewise.
        path: goes this way instead of measuring.

    Products accumulate in float32; in between ``t`` is rounded. There is no backward pass.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or ``fused`` beyond ``max_rank``.
        RuntimeError: no GPU.
    """
    check(x, right=right, left=left)
    check_factors("weight", x.shape[-1], right, left)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    chosen = plan(len(rows), x.shape[-1], len(left), len(right), x.dtype, x.device, path)
    if chosen.path == "products":
        return matmul_reference(x, right, left)
    out = empty_output(x, (len(rows), len(left)))
    launch(rows, right.contiguous(), left.contiguous(), out, chosen.sections)
    return out.to(x.dtype).view(*x.shape[:-1], len(left))


def plan(
    rows: int,
    inputs: int,
    outputs: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    path: Path | None = None,
) -> Plan:
    """The fastest way for x ``[rows, inputs]``, measured the first time that a shape is met.

    Rows are rounded up to a power of two, so that few shapes are measured. ``path`` decides
    instead; so does the interpreter, which has nothing to measure, for ``fused``.

    Raises:
        ValueError: ``path`` is unknown, or ``fused`` and the rank exceeds ``max_rank``.
    """
    largest = max_rank(inputs, rank)
    check_path(path, rank, largest)
    if path == "products" or rank > largest or rows == 0:
        return Plan("products")
    spread = _sections_to_fill(rows, inputs, outputs, rank, device)
    if path == "fused" or INTERPRETED:
        return Plan("fused", spread)
    bucket = _plan.row_bucket(rows)

    def ways() -> _plan.Ways:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        x, right, left = random(bucket, inputs), random(rank, inputs), random(outputs, rank)
        out = random(bucket, outputs)
        several = _sections_to_fill(bucket, inputs, outputs, rank, device)
        found: dict[str, Callable[[], object]] = {
            "products": lambda: matmul_reference(x, right, left),
            "whole": lambda: launch(x, right, left, out, 1),
        }
        if several > 1:
            found["spread"] = lambda: launch(x, right, left, out, several)
        return found

    key = ("low_rank", bucket, inputs, outputs, rank, dtype, device)
    best = _plan.fastest(key, ways, "products", device)
    if best == "products":
        return Plan("products")
    return Plan("fused", spread if best == "spread" else 1)


def _sections_to_fill(rows: int, inputs: int, outputs: int, rank: int, device: torch.device) -> int:
    """Sections of the outputs that give every multiprocessor a program, where there are so many."""
    config = config_for(rows, inputs, rank)
    wanted = processors(device) // triton.cdiv(rows, config.block_m)
    return int(max(1, min(wanted, triton.cdiv(outputs, config.block_n))))


def launch(x: Tensor, right: Tensor, left: Tensor, out: Tensor, sections: int = 1) -> None:
    """Writes ``(x @ rightᵀ) @ leftᵀ`` into ``out``.

    Args:
        x: float16 or bfloat16 ``[M, K]``, contiguous like the others.
        right: ``[r, K]`` with r at most ``max_rank``.
        left: ``[N, r]``.
        out: ``[M, N]`` of any floating dtype.
        sections: programs that share the outputs of a block of rows.
    """
    config = config_for(len(x), x.shape[1], len(right))
    grid = (triton.cdiv(len(x), config.block_m), sections)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        low_rank_matmul[grid](
            x,
            right,
            left,
            out,
            len(x),
            len(left),
            x.shape[1],
            len(right),
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            RANK=padded_rank(len(right)),
            **config.arguments,
        )


def empty_output(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for a result; float32 under the interpreter, which cuts bfloat16 off, not rounds."""
    return torch.empty(shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)


def check(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where a dtype or device does not fit ``x``, RuntimeError without a GPU."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, low-rank kernels take {DTYPES}")
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"low-rank kernels need a GPU, x is on {x.device}: matmul_reference")
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"x is {x.dtype} on {x.device}, {name} is {tensor.dtype} on {tensor.device}"
            )


def check_factors(name: str, inputs: int, right: Tensor, left: Tensor) -> None:
    """Raises ValueError unless ``left @ right`` is a product that takes so many inputs."""
    shapes = f"{name} is {tuple(left.shape)} times {tuple(right.shape)}"
    if right.ndim != 2 or left.ndim != 2 or left.shape[1] != right.shape[0] or not len(right):
        raise ValueError(f"{shapes}: left [out, r] times right [r, in] is needed, r at least 1")
    if right.shape[1] != inputs:
        raise ValueError(f"{shapes}, x has {inputs} inputs")


def check_path(path: str | None, rank: int, largest: int) -> None:
    """Raises ValueError where a way is unknown or cannot be gone."""
    if path not in (None, "fused", "products"):
        raise ValueError(f"path is {path!r}, known are 'fused' and 'products'")
    if path == "fused" and rank > largest:
        raise ValueError(f"rank is {rank}, the fused kernel takes up to {largest}: 'products'")


@triton.jit
def project(
    x,
    right,
    m,  # rows of x, int64 [BLOCK_M]
    rows,
    inputs,
    rank,
    compute: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x @ rightᵀ`` rounded to ``compute``: [BLOCK_M, RANK], zero beyond ``rows`` and ``rank``."""
    r = tl.arange(0, RANK)
    total = tl.zeros([m.shape[0], RANK], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < rows)[:, None] & (k < inputs)[None, :]
        xs = tl.load(x + m[:, None] * inputs + k[None, :], mask=inside, other=0)
        inside = (r < rank)[None, :] & (k < inputs)[:, None]
        factor = tl.load(right + r[None, :] * inputs + k[:, None], mask=inside, other=0)
        total = tl.dot(xs.to(compute), factor.to(compute), total, input_precision="ieee")
    return total.to(compute)


@triton.jit
def factor_tile(
    left,
    n,  # outputs [BLOCK_N]
    outputs,
    rank,
    compute: tl.constexpr,
    RANK: tl.constexpr,
):
    """``leftᵀ`` for some outputs: [RANK, BLOCK_N], zero outside."""
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (n < outputs)[None, :]
    return tl.load(left + n[None, :] * rank + r[:, None], mask=inside, other=0).to(compute)


@triton.jit
def low_rank_matmul(
    x,
    right,
    left,
    out,
    rows,
    outputs,
    inputs,
    rank,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 is wrong
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: a row number times a row length passes 2^31 for long prompts and large vocabularies.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    compute: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    t = project(x, right, m, rows, inputs, rank, compute, RANK, BLOCK_K)
    blocks = tl.cdiv(tl.cdiv(outputs, BLOCK_N), tl.num_programs(1))  # in a section
    begin = tl.program_id(1) * blocks * BLOCK_N
    for start in range(begin, min(begin + blocks * BLOCK_N, outputs), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y = tl.dot(t, factor_tile(left, n, outputs, rank, compute, RANK), input_precision="ieee")
        inside = (m < rows)[:, None] & (n < outputs)[None, :]
        tl.store(out + m[:, None] * outputs + n[None, :], y.to(out.dtype.element_ty), mask=inside)
