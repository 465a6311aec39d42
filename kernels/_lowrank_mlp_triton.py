"""A feed-forward layer of low-rank factors in one Triton kernel; its width is never written.

``y = down(act(gate(x)) * up(x))``, or ``down(act(up(x) + bias)) + bias`` without a gate, where each
of the three is ``left @ right``. A program owns a block of rows: it sums ``t = x @ rightᵀ`` of gate
and up over the inputs, then streams over the intermediate width: a tile of the activations comes
from ``t``, goes into ``s += tile @ down.rightᵀ [BLOCK_M, rank]``, and is gone. At the end ``s`` is
streamed over the outputs. FlashSVD, arXiv 2508.01506, section 3.3 (its FFN v1).

What is rounded to the dtype of ``x``: ``t``, the tiles of activations, ``s``, ``y``. Without the
kernel the activations lie in memory, ``[rows, width]``: the path of plain products does a block of
rows at a time, so that they take no more than the result.

Imported only when a product is asked for, since Triton does not run everywhere.
"""
# Triton's decorators and kernel arguments, and torch.cuda.device_of, carry no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _plan
from moesaic.kernels._lowrank_triton import Path, factor_tile, project
from moesaic.kernels._tiles_triton import Config

# As in _lowrank_triton.
MAX_RANK, MAX_ODD_RANK = 512, 256
MIN_PRODUCT_ROWS = 512  # fewer at a time keep a card waiting for the next launch
Way = Literal["fused", "products", "linears"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

# Every configuration that ships, by the largest rank it takes; gated layers keep twice as much in
# registers. block_n: tiles of the width and of the outputs. The fastest on an H200 of those that
# do not spill, on sm_80 either (tests/benchmarks/kernel_configs.py).
CONFIGS = {
    "plain_128": Config(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    "plain_256": Config(block_m=64, block_n=32, block_k=64, num_warps=8, num_stages=3),
    "gated_64": Config(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=2),
    "gated_128": Config(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=3),
    "gated_256": Config(block_m=64, block_n=32, block_k=32, num_warps=8, num_stages=2),
    "wide_512": Config(block_m=32, block_n=32, block_k=32, num_warps=8, num_stages=2),
    # For sizes that are no multiple of 16: loads of single values want many registers.
    "odd": Config(block_m=16, block_n=32, block_k=32, num_warps=8, num_stages=2),
}


class Factors(NamedTuple):
    """A weight ``left [out, r] @ right [r, in]``."""

    right: Tensor
    left: Tensor


# x, factors and bias of a linear → its outputs
Linear = Callable[[Tensor, Factors, Tensor | None], Tensor]


def swiglu(
    x: Tensor, gate: Factors, up: Factors, down: Factors, path: Path | None = None
) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, x ``[*, in] -> [*, out]``, the fastest way measured.

    Args:
        x: float16 or bfloat16, on a GPU (or on the CPU when Triton was imported under
            ``TRITON_INTERPRET=1``).
        gate: factors of ``[width, in]``, like all of the dtype and on the device of ``x``.
        up: factors of ``[width, in]``.
        down: factors of ``[out, width]``.
        path: ``fused`` or ``products`` instead of measuring.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or ``fused`` beyond ``max_rank``.
        RuntimeError: no GPU.
    """
    return feed_forward(x, Layer(up, down, gate=gate), path)


def gelu(
    x: Tensor,
    up: Factors,
    up_bias: Tensor | None,
    down: Factors,
    down_bias: Tensor | None,
    approximate: Literal["none", "tanh"] = "none",
    path: Path | None = None,
) -> Tensor:
    """``down(gelu(up(x) + up_bias)) + down_bias``; for the rest see :func:`swiglu`.

    Args:
        up_bias: ``[width]``.
        down_bias: ``[out]``.
        approximate: as in :func:`torch.nn.functional.gelu`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}, known are 'none' and 'tanh'")
    activation: Activation = "gelu" if approximate == "none" else "gelu_tanh"
    layer = Layer(up, down, up_bias=up_bias, down_bias=down_bias, activation=activation)
    return feed_forward(x, layer, path)


class Layer(NamedTuple):
    """A whole feed-forward layer; without a gate the activation is that of ``up``."""

    up: Factors
    down: Factors
    gate: Factors | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = "silu"

    @property
    def ranks(self) -> tuple[int, int, int]:
        """Of gate (0: there is none), up and down."""
        gate = len(self.gate.right) if self.gate else 0
        return gate, len(self.up.right), len(self.down.right)

    @property
    def width(self) -> int:
        return len(self.up.left)


def product(x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
    """One of the three linears as two library products."""
    return F.linear(F.linear(x, factors.right), factors.left, bias)


def measured_product(x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
    """One of the three linears in the way that is the fastest for it alone."""
    y = low_rank.matmul(x, factors.right, factors.left)
    return y if bias is None else y + bias


def reference(x: Tensor, layer: Layer, linear: Linear = product) -> Tensor:
    """The layer linear by linear, in the dtype of ``x``: ``[*, in] -> [*, out]``."""
    up = linear(x, layer.up, layer.up_bias)
    gate = up if layer.gate is None else linear(x, layer.gate, None)
    if layer.activation == "silu":
        hidden = F.silu(gate)
    else:
        hidden = F.gelu(gate, approximate="none" if layer.activation == "gelu" else "tanh")
    if layer.gate is not None:
        hidden = hidden * up
    return linear(hidden, layer.down, layer.down_bias)


def max_rank(inputs: int, layer: Layer) -> int:
    """The largest rank that the fused kernel takes, with sizes as odd as these."""
    odd = any(size % 16 for size in (inputs, layer.width, *layer.ranks))
    return MAX_ODD_RANK if odd else MAX_RANK


def config_for(inputs: int, layer: Layer) -> Config:
    """The configuration for a layer whose ranks are not above ``max_rank``."""
    if max_rank(inputs, layer) == MAX_ODD_RANK:
        return CONFIGS["odd"]
    rank = max(layer.ranks)
    if rank > 256:
        return CONFIGS["wide_512"]
    if layer.gate is None:
        return CONFIGS["plain_128" if rank <= 128 else "plain_256"]
    return CONFIGS["gated_64" if rank <= 64 else "gated_128" if rank <= 128 else "gated_256"]


def plan(rows: int, inputs: int, layer: Layer, path: Path | None = None) -> Way:
    """The fastest way for x ``[rows, inputs]``, measured the first time that a shape is met.

    ``layer`` itself takes part in measuring, against the kernel and plain products: the three
    linears, each in the way that is the fastest for it. Time decides; who wants the least memory
    says ``fused``. ``path`` decides instead; so does the interpreter, which has nothing to
    measure, for ``fused``.

    Raises:
        ValueError: ``path`` is unknown, or ``fused`` and a rank exceeds ``max_rank``.
    """
    rank, largest = max(layer.ranks), max_rank(inputs, layer)
    low_rank.check_path(path, rank, largest)
    if path == "products" or rank > largest or rows == 0:
        return "products"
    if path == "fused" or low_rank.INTERPRETED:
        return "fused"
    bucket = _plan.row_bucket(rows)
    weight = layer.down.left

    def ways() -> _plan.Ways:
        x = torch.randn((bucket, inputs), dtype=weight.dtype, device=weight.device)
        out = x.new_empty((bucket, len(weight)))
        return {
            "products": lambda: _products(x, layer),
            "linears": lambda: reference(x, layer, measured_product),
            "fused": lambda: launch(x, layer, out),
        }

    biased = layer.up_bias is not None, layer.down_bias is not None
    shape = (bucket, inputs, layer.width, len(weight), layer.ranks)
    key = ("mlp", layer.activation, *biased, shape, weight.dtype, weight.device)
    best = _plan.fastest(key, ways, "products", weight.device)
    return "fused" if best == "fused" else "linears" if best == "linears" else "products"


def feed_forward(x: Tensor, layer: Layer, path: Path | None = None) -> Tensor:
    """The layer's outputs for x ``[*, in]``; see :func:`swiglu`."""
    check(x, layer)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    way = plan(len(rows), x.shape[-1], layer, path)
    if way == "linears":
        return reference(x, layer, measured_product)
    if way == "products":
        out = _products(rows, layer)
    else:
        out = low_rank.empty_output(x, (len(rows), len(layer.down.left)))
        launch(rows, layer, out)
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[1])


def product_rows(rows: int, layer: Layer) -> int:
    """Rows of a block of plain products: its activations take what the whole result takes."""
    activations = layer.width * (1 if layer.gate is None else 2)
    blocks = -(-activations // len(layer.down.left))
    return max(MIN_PRODUCT_ROWS, -(-rows // blocks))


@torch.no_grad()  # no backward pass here either
def _products(x: Tensor, layer: Layer) -> Tensor:
    """Plain products for a block of rows at a time, activations in place."""
    out = x.new_empty((len(x), len(layer.down.left)))
    size = product_rows(len(x), layer)
    for source, target in zip(x.split(size), out.split(size), strict=True):
        hidden = product(source, layer.gate or layer.up, layer.up_bias)
        if layer.activation == "silu":
            F.silu(hidden, inplace=True)
        else:
            approximate = "none" if layer.activation == "gelu" else "tanh"
            torch.ops.aten.gelu_(hidden, approximate=approximate)
        if layer.gate is not None:
            hidden *= product(source, layer.up, None)
        right, left = F.linear(hidden, layer.down.right), layer.down.left.T
        if layer.down_bias is None:
            torch.mm(right, left, out=target)
        else:
            torch.addmm(layer.down_bias, right, left, out=target)
    return out


def check(x: Tensor, layer: Layer) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit, RuntimeError without a GPU."""
    named = {"gate": layer.gate, "up": layer.up, "down": layer.down}
    factors = {name: pair for name, pair in named.items() if pair is not None}
    flat = {f"{n}.{side}": getattr(p, side) for n, p in factors.items() for side in p._fields}
    low_rank.check(x, **flat, up_bias=layer.up_bias, down_bias=layer.down_bias)
    for name, pair in factors.items():
        low_rank.check_factors(name, layer.width if name == "down" else x.shape[-1], *pair)
    if layer.gate is not None and len(layer.gate.left) != layer.width:
        raise ValueError(f"gate has {len(layer.gate.left)} outputs, up has {layer.width}")
    if layer.gate is not None and layer.up_bias is not None:
        raise ValueError("a gated layer has no bias of its width")
    for name, bias, size in (
        ("up_bias", layer.up_bias, layer.width),
        ("down_bias", layer.down_bias, len(layer.down.left)),
    ):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} is {tuple(bias.shape)}, not {(size,)}")


def launch(x: Tensor, layer: Layer, out: Tensor) -> None:
    """Writes the layer's outputs for contiguous x ``[M, in]`` into ``out [M, out]``."""
    config = config_for(x.shape[1], layer)
    gate = layer.gate or layer.up
    factors = [f.contiguous() for pair in (gate, layer.up, layer.down) for f in pair]
    biases = [x if b is None else b.contiguous() for b in (layer.up_bias, layer.down_bias)]
    gate_rank, up_rank, down_rank = layer.ranks
    with torch.cuda.device_of(x):  # Triton launches on the current device
        low_rank_mlp[(triton.cdiv(len(x), config.block_m),)](
            x,
            *factors,
            *biases,
            out,
            len(x),
            x.shape[1],
            layer.width,
            len(layer.down.left),
            gate_rank,
            up_rank,
            down_rank,
            ACTIVATION=layer.activation,
            GATED=layer.gate is not None,
            UP_BIAS=layer.up_bias is not None,
            DOWN_BIAS=layer.down_bias is not None,
            UPCAST=low_rank.INTERPRETED and x.dtype == torch.bfloat16,
            RANK=low_rank.padded_rank(max(gate_rank, up_rank)),
            DOWN_RANK=low_rank.padded_rank(down_rank),
            **config.arguments,
        )


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    """The activation of float32 values; that of 0 is 0, whichever it is."""
    if ACTIVATION == "silu":
        return value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    else:  # tanh(z) = 2 sigmoid(2z) - 1
        cubic = value + 0.044715 * value * value * value
        return value * tl.sigmoid(1.5957691216057308 * cubic)


@triton.jit
def low_rank_mlp(
    x,
    gate_right,
    gate_left,
    up_right,
    up_left,
    down_right,
    down_left,
    up_bias,
    down_bias,
    out,
    rows,
    inputs,
    width,
    outputs,
    gate_rank,
    up_rank,
    down_rank,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 is wrong
    RANK: tl.constexpr,  # of gate and up
    DOWN_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # int64: a row number times a row length passes 2^31 for long prompts.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    compute: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    up = project(x, up_right, m, rows, inputs, up_rank, compute, RANK, BLOCK_K)
    if GATED:
        gate = project(x, gate_right, m, rows, inputs, gate_rank, compute, RANK, BLOCK_K)

    r = tl.arange(0, DOWN_RANK)
    total = tl.zeros([BLOCK_M, DOWN_RANK], dtype=tl.float32)
    for start in range(0, width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tile = factor_tile(up_left, n, width, up_rank, compute, RANK)
        hidden = tl.dot(up, tile, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if UP_BIAS:
            bias = tl.load(up_bias + n, mask=n < width, other=0)
            hidden += bias.to(tl.float32)[None, :]
        if GATED:
            tile = factor_tile(gate_left, n, width, gate_rank, compute, RANK)
            hidden *= _activate(tl.dot(gate, tile, input_precision="ieee"), ACTIVATION)
        else:
            hidden = _activate(hidden, ACTIVATION)
        inside = (r < down_rank)[None, :] & (n < width)[:, None]
        factor = tl.load(down_right + r[None, :] * width + n[:, None], mask=inside, other=0)
        total = tl.dot(hidden.to(compute), factor.to(compute), total, input_precision="ieee")

    total = total.to(compute)
    for start in range(0, outputs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tile = factor_tile(down_left, n, outputs, down_rank, compute, DOWN_RANK)
        y = tl.dot(total, tile, input_precision="ieee")
        if DOWN_BIAS:
            bias = tl.load(down_bias + n, mask=n < outputs, other=0)
            y += bias.to(tl.float32)[None, :]
        inside = (m < rows)[:, None] & (n < outputs)[None, :]
        tl.store(out + m[:, None] * outputs + n[None, :], y.to(out.dtype.element_ty), mask=inside)
