"""Attention over queries, keys and values of low rank, which are never written either.

What it is given and what it is are in ``_lowrank_attention``. A program owns a block of queries of
one head and lifts them once; then it lifts a tile of keys and values at a time, rotates it, and
takes it into the online softmax of FlashAttention-2 (arXiv 2307.08691). FlashSVD, arXiv 2508.01506,
section 3.2.

The price: every block of queries of every head lifts all keys and values anew, r / BLOCK_M times
the work of the attention itself. ``plan`` measures whether it pays.

Imported only when a product is asked for, since Triton does not run everywhere.
"""
# Triton's decorators and kernel arguments, and torch.cuda.device_of, carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _plan
from moesaic.kernels._lowrank_attention import Lifted, Options, check_shapes, reference
from moesaic.kernels._lowrank_triton import Path


@dataclass(frozen=True)
class Config:
    """Tile sizes (queries, keys, part of a rank) and how a program is laid out."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


# Every configuration that ships, by the largest head it takes.
CONFIGS = {
    "head_64": Config(block_m=128, block_n=64, block_r=64, num_warps=8, num_stages=3),
    "head_128": Config(block_m=64, block_n=32, block_r=32, num_warps=8, num_stages=2),
    "head_256": Config(block_m=32, block_n=32, block_r=32, num_warps=8, num_stages=2),
    # For sizes that are no multiple of 16: loads of single values want many registers. On sm_80,
    # heads of 64 with nothing but scores and softmax spill 8 bytes, to run more programs at once.
    "odd": Config(block_m=16, block_n=16, block_r=16, num_warps=8, num_stages=2),
}


def attention(
    q: Lifted,
    k: Lifted,
    v: Lifted,
    head_dim: int,
    *,
    causal: bool,
    rotary: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    path: Path | None = None,
) -> Tensor:
    """Attention, ``[B, Sq, heads, head_dim]``, the fastest way that was measured.

    Args:
        q: queries, states ``[B, Sq, r]`` with Sq at most Sk. float16 or bfloat16 like all, on a
            GPU (or on the CPU when Triton was imported under ``TRITON_INTERPRET=1``).
        k: keys, states ``[B, Sk, r]``; as many heads as values, a divisor of those of queries.
        v: values, likewise; the three ranks may differ.
        head_dim: even, at most ``MAX_HEAD_DIM``.
        causal: query i stands at position Sk - Sq + i, as with a cache, and sees no later key.
        rotary: cosines and sines, float32 ``[at least Sk, head_dim / 2]`` by position.
        lengths: int32 or int64 ``[B]``, keys that exist; what lies behind them is not looked at.
            A query that sees no key gives zeros.
        scale: factor of the scores; 1 / sqrt(head_dim) if not given.
        path: ``fused`` or ``products`` instead of measuring.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: no GPU.
    """
    cos, sin = rotary or (None, None)
    scale = head_dim**-0.5 if scale is None else scale
    options = Options(head_dim, causal, scale, cos, sin, lengths)
    check(q, k, v, options)
    if plan(q, k, v, options, path) == "products":
        return reference(q, k, v, options)
    shape = (*q.states.shape[:2], len(q.left) // head_dim, head_dim)
    out = low_rank.empty_output(q.states, shape)
    if out.numel():
        launch(q, k, v, options, out)
    return out.to(q.states.dtype)


def config_for(head_dim: int, ranks: tuple[int, ...]) -> Config:
    """The configuration for heads of so many features and the ranks of queries, keys, values."""
    if any(size % 16 for size in (head_dim, *ranks)):
        return CONFIGS["odd"]
    return CONFIGS[f"head_{max(64, half_tile(head_dim) * 2)}"]


def half_tile(head_dim: int) -> int:
    """The tile that holds half a head: a power of two, at least 16 as tensor cores need."""
    return max(16, 1 << (head_dim // 2 - 1).bit_length())


def plan(q: Lifted, k: Lifted, v: Lifted, options: Options, path: Path | None = None) -> Path:
    """The fastest way, measured the first time that shapes are met.

    Batch and lengths are rounded up to powers of two. Time decides; who wants the least memory
    says ``fused``. ``path`` decides instead; so does the interpreter, which has nothing to measure,
    for ``fused``.

    Raises:
        ValueError: ``path`` is unknown.
    """
    low_rank.check_path(path, 0, 0)
    if path is not None or low_rank.INTERPRETED:
        return path or "fused"
    if q.states.numel() == 0:
        return "products"
    states = q.states
    batch, queries, keys = (_plan.row_bucket(n) for n in (*states.shape[:2], k.states.shape[1]))

    def ways() -> _plan.Ways:
        def random(like: Lifted, tokens: int) -> Lifted:
            return like._replace(states=states.new_empty((batch, tokens, like.rank)).normal_())

        operands = random(q, queries), random(k, keys), random(v, keys)
        tables, lengths = options.cos, options.lengths
        if tables is not None:
            tables = tables.new_ones((keys, options.head_dim // 2))
        if lengths is not None:
            lengths = lengths.new_full((batch,), keys)
        bucket = options._replace(cos=tables, sin=tables, lengths=lengths)
        heads = len(q.left) // options.head_dim
        out = states.new_empty((batch, queries, heads, options.head_dim))
        return {
            "products": lambda: reference(*operands, bucket),
            "fused": lambda: launch(*operands, bucket, out),
        }

    shapes = tuple((tuple(each.left.shape), each.bias is not None) for each in (q, k, v))
    kind = (options.head_dim, options.causal, options.cos is None, options.lengths is None)
    key = ("attention", batch, queries, keys, shapes, kind, states.dtype, states.device)
    best = _plan.fastest(key, ways, "products", states.device)
    return "fused" if best == "fused" else "products"


def check(q: Lifted, k: Lifted, v: Lifted, options: Options) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit, RuntimeError without a GPU."""
    parts = {"q": q, "k": k, "v": v}
    flat = {f"{name}.{what}": getattr(p, what) for name, p in parts.items() for what in p._fields}
    low_rank.check(q.states, **flat)
    check_shapes(q, k, v, options)


def launch(q: Lifted, k: Lifted, v: Lifted, options: Options, out: Tensor) -> None:
    """Writes the attention into contiguous ``out [B, Sq, heads, d]``, which is not empty."""
    parts = (q, k, v)
    config = config_for(options.head_dim, tuple(part.rank for part in parts))
    states = [part.states.contiguous() for part in parts]
    unused = states[0]
    tables = [
        unused if each is None else each.contiguous()
        for each in (options.cos, options.sin, options.lengths)
    ]
    batch, queries, heads, _ = out.shape
    grid = (triton.cdiv(queries, config.block_m), heads, batch)
    with torch.cuda.device_of(unused):  # Triton launches on the current device
        low_rank_attention[grid](
            *states,
            *(part.left.contiguous() for part in parts),
            *(unused if part.bias is None else part.bias.contiguous() for part in parts),
            *tables,
            out,
            queries,
            k.states.shape[1],
            len(q.left) // len(k.left),
            *(part.rank for part in parts),
            options.scale * math.log2(math.e),
            HEAD_DIM=options.head_dim,
            CAUSAL=options.causal,
            Q_BIAS=q.bias is not None,
            K_BIAS=k.bias is not None,
            V_BIAS=v.bias is not None,
            ROTARY=options.cos is not None,
            LENGTHS=options.lengths is not None,
            UPCAST=low_rank.INTERPRETED and unused.dtype == torch.bfloat16,
            HALF=half_tile(options.head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@triton.jit
def _lift(
    states,  # of one sequence
    left,
    bias,
    token,  # [N]
    exists,  # [N]
    first,  # feature of the head
    rank,
    compute: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Both halves of a head's features, float32 [N, HALF] each; zero outside the head."""
    feature = tl.arange(0, HALF)
    inside = feature < HEAD_DIM // 2
    low = first + feature
    high = low + HEAD_DIM // 2
    a = tl.zeros([token.shape[0], HALF], dtype=tl.float32)
    b = tl.zeros([token.shape[0], HALF], dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = exists[:, None] & (r < rank)[None, :]
        tile = tl.load(states + token[:, None] * rank + r[None, :], mask=mask, other=0)
        mask = inside[None, :] & (r < rank)[:, None]
        factor = tl.load(left + low[None, :] * rank + r[:, None], mask=mask, other=0)
        a = tl.dot(tile.to(compute), factor.to(compute), a, input_precision="ieee")
        factor = tl.load(left + high[None, :] * rank + r[:, None], mask=mask, other=0)
        b = tl.dot(tile.to(compute), factor.to(compute), b, input_precision="ieee")
    if BIAS:
        a += tl.load(bias + low, mask=inside, other=0).to(tl.float32)[None, :]
        b += tl.load(bias + high, mask=inside, other=0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def _rotate(a, b, cos, sin, position, exists, half: tl.constexpr, HALF: tl.constexpr):
    """Both halves turned by the angles of their positions."""
    feature = tl.arange(0, HALF)
    inside = exists[:, None] & (feature < half)[None, :]
    at = position[:, None] * half + feature[None, :]
    c = tl.load(cos + at, mask=inside, other=0)
    s = tl.load(sin + at, mask=inside, other=0)
    return a * c - b * s, b * c + a * s


@triton.jit
def low_rank_attention(
    q_states,
    k_states,
    v_states,
    q_left,
    k_left,
    v_left,
    q_bias,
    k_bias,
    v_bias,
    cos,
    sin,
    lengths,
    out,
    queries,
    keys,
    group,  # heads of queries that share one of keys and values
    q_rank,
    k_rank,
    v_rank,
    scale,  # of the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    Q_BIAS: tl.constexpr,
    K_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr,
    ROTARY: tl.constexpr,
    LENGTHS: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 is wrong
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    # int64: a sequence number times its size passes 2^31 for large batches of long prompts.
    sequence = tl.program_id(2).to(tl.int64)
    compute: tl.constexpr = tl.float32 if UPCAST else q_states.dtype.element_ty
    half: tl.constexpr = HEAD_DIM // 2
    position = m + keys - queries
    q_states += sequence * queries * q_rank
    k_states += sequence * keys * k_rank
    v_states += sequence * keys * v_rank

    real = m < queries
    first = head * HEAD_DIM
    q1, q2 = _lift(
        q_states, q_left, q_bias, m, real, first, q_rank, compute, HEAD_DIM, Q_BIAS, HALF, BLOCK_R
    )
    if ROTARY:
        q1, q2 = _rotate(q1, q2, cos, sin, position, real, half, HALF)
    q1, q2 = q1.to(compute), q2.to(compute)

    length = keys
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + sequence).to(tl.int32), keys)
    end = length
    if CAUSAL:  # no key behind the last query
        end = tl.minimum(end, (tl.program_id(0) + 1) * BLOCK_M + keys - queries)
    first = (head // group) * HEAD_DIM
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    weights = tl.zeros([BLOCK_M], dtype=tl.float32)
    total1 = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
    total2 = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        exists = n < length
        k1, k2 = _lift(
            k_states,
            k_left,
            k_bias,
            n,
            exists,
            first,
            k_rank,
            compute,
            HEAD_DIM,
            K_BIAS,
            HALF,
            BLOCK_R,
        )
        if ROTARY:
            k1, k2 = _rotate(k1, k2, cos, sin, n, exists, half, HALF)
        scores = tl.dot(q1, tl.trans(k1.to(compute)), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2.to(compute)), scores, input_precision="ieee")
        shown = exists[None, :]
        if CAUSAL:
            shown = shown & (n[None, :] <= position[:, None])
        scores = tl.where(shown, scores * scale, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0, larger)  # nothing was shown yet
        weight = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(largest - shift)
        weights = weights * fade + tl.sum(weight, 1)
        largest = larger

        v1, v2 = _lift(
            v_states,
            v_left,
            v_bias,
            n,
            exists,
            first,
            v_rank,
            compute,
            HEAD_DIM,
            V_BIAS,
            HALF,
            BLOCK_R,
        )
        weight = weight.to(compute)
        total1 = tl.dot(weight, v1.to(compute), total1 * fade[:, None], input_precision="ieee")
        total2 = tl.dot(weight, v2.to(compute), total2 * fade[:, None], input_precision="ieee")

    weights = tl.where(weights > 0, weights, 1)  # no key was shown: the totals are zero
    feature = tl.arange(0, HALF)
    inside = real[:, None] & (feature < half)[None, :]
    row = (sequence * queries + m) * tl.num_programs(1) + head
    at = out + row[:, None] * HEAD_DIM + feature[None, :]
    tl.store(at, (total1 / weights[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(at + half, (total2 / weights[:, None]).to(out.dtype.element_ty), mask=inside)
