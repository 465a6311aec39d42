"""Runs the low-rank kernels on odd shapes and prints what came out, as JSON.

A program of its own because Triton reads TRITON_INTERPRET once, when it is imported:

    TRITON_INTERPRET=1 python tests/kernels/run_lowrank_triton.py cpu
    TRITON_INTERPRET=0 python tests/kernels/run_lowrank_triton.py cuda
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from run_triton import exact_weight
from torch import Tensor

from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _residual_triton as residual
from moesaic.kernels import dense, int_group, lowrank
from moesaic.kernels import residual as residual_format
from moesaic.kernels._lowrank_attention import Lifted, Options
from moesaic.kernels._tiles_triton import group_span
from moesaic.kernels.tensor import CompressedTensor

Found = dict[str, object]
GUARD = 512  # poisoned elements before and behind every operand and the output
# rows, inputs, outputs, rank, sections, activations
LOW_RANK = [
    (1, 48, 33, 16, 1, "float16"),
    (5, 272, 70, 48, 3, "bfloat16"),
    (16, 80, 65, 80, 2, "float16"),
    (17, 144, 130, 64, 1, "bfloat16"),
    (130, 80, 67, 112, 2, "float16"),
    (67, 96, 1, 144, 1, "bfloat16"),
    (3, 64, 129, 272, 2, "float16"),
    (35, 37, 41, 3, 2, "float16"),
    (2, 1, 5, 1, 1, "bfloat16"),
    (33, 65, 35, 131, 1, "bfloat16"),
]
# bits, group size, symmetric, (rows of x, outputs, inputs), rank, activations
RESIDUAL = [
    (2, -1, False, (3, 5, 31), 1, "bfloat16"),
    (3, 64, True, (17, 65, 320), 32, "bfloat16"),
    (3, 128, False, (5, 70, 384), 48, "float16"),
    (4, 16, False, (2, 37, 112), 16, "float16"),
    (4, 128, True, (70, 129, 128), 128, "float16"),
    (5, 11, False, (7, 39, 77), 19, "bfloat16"),
    (6, 96, True, (1, 1, 96), 80, "float16"),
    (6, 48, False, (66, 34, 144), 96, "bfloat16"),
    (7, 7, False, (35, 61, 35), 128, "float16"),
    (8, 64, False, (4, 45, 192), 127, "bfloat16"),
]
# rows, inputs, width, outputs, ranks of gate (0: none), up and down, activation, biases, dtype
MLP = [
    (5, 48, 80, 35, (16, 32, 48), "silu", False, "float16"),
    (130, 32, 144, 80, (0, 48, 64), "gelu", True, "bfloat16"),
    (67, 96, 112, 33, (80, 16, 112), "silu", False, "bfloat16"),
    (20, 32, 48, 37, (0, 144, 32), "gelu", True, "float16"),
    (21, 32, 48, 33, (144, 16, 32), "silu", False, "bfloat16"),
    (9, 64, 48, 65, (0, 272, 16), "gelu_tanh", True, "float16"),
    (17, 37, 65, 41, (7, 19, 3), "silu", False, "float16"),
    (18, 33, 35, 1, (0, 1, 131), "gelu", False, "bfloat16"),
    (1, 48, 37, 5, (0, 16, 16), "gelu_tanh", True, "bfloat16"),
]
# heads of queries, of keys and values; features of a head; sequences, queries, keys; ranks of
# queries, keys, values; causal, biases, rotary, lengths; dtype
ATTENTION = [
    (2, 2, 64, (2, 130, 130), (48, 80, 64), True, False, True, None, "float16"),
    (4, 2, 32, (2, 5, 70), (16, 48, 32), False, True, False, [70, 33], "bfloat16"),
    (2, 1, 96, (3, 67, 67), (32, 16, 112), True, True, True, [67, 0, 1], "bfloat16"),
    (1, 1, 160, (1, 33, 65), (16, 16, 32), True, False, False, None, "float16"),
    (3, 1, 6, (2, 17, 35), (7, 3, 19), True, True, True, [35, 20], "float16"),
    (2, 2, 34, (1, 1, 40), (16, 16, 16), False, False, True, None, "bfloat16"),
]


class Draw:
    """Random operands in the middle of poisoned memory."""

    def __init__(self, seed: int, dtype: str, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = getattr(torch, dtype), device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return guarded(values.to(self.dtype).to(self.device))

    def factors(self, outputs: int, inputs: int, rank: int) -> tuple[Tensor, Tensor]:
        """right ``[rank, inputs]`` and left ``[outputs, rank]``; the product keeps magnitudes."""
        right = self.normal(rank, inputs, scale=inputs**-0.5)
        return right, self.normal(outputs, rank, scale=rank**-0.5)


def guarded(values: Tensor) -> Tensor:
    """The same values, NaN before and behind them."""
    buffer = values.new_full((values.numel() + 2 * GUARD,), float("nan"))
    inner = buffer[GUARD:-GUARD].view(values.shape)
    return inner.copy_(values)


class Output:
    """Room for a result, full of NaN, and more NaN around it."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: str) -> None:
        kind = torch.float32 if device == "cpu" else dtype  # as the kernels' callers do
        self.value = guarded(torch.full(shape, float("nan"), dtype=kind, device=device))
        self.activations = str(dtype).removeprefix("torch.")

    def compared(self, exact: Tensor) -> dict[str, object]:
        """Largest error over largest output, and what became of the poison."""
        buffer = self.value.new_empty(0).set_(self.value.untyped_storage())
        return {
            "activations": self.activations,
            "finite": bool(self.value.isfinite().all()),
            "guard_intact": bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()),
            "error": float((self.value.double() - exact).abs().max() / exact.abs().max()),
        }


def name_of(config: object, configs: dict[str, Any]) -> str:
    return next(name for name, known in configs.items() if known is config)


def run_low_rank(index: int, device: str) -> tuple[Found, Callable[[], Found]]:
    rows, inputs, outputs, rank, sections, dtype = LOW_RANK[index]
    draw = Draw(index, dtype, device)
    x = draw.normal(rows, inputs)
    right, left = draw.factors(outputs, inputs, rank)
    out = Output(rows, outputs, dtype=x.dtype, device=device)
    low_rank.launch(x, right, left, out.value, sections)
    exact = x.double() @ right.double().T @ left.double().T
    found: Found = {
        "kernel": "low_rank",
        "config": name_of(low_rank.config_for(rows, inputs, rank), low_rank.CONFIGS),
        **out.compared(exact),
    }

    def public() -> Found:
        fused = low_rank.matmul(x.view(1, rows, inputs), right, left, path="fused")
        plain = low_rank.matmul(x, right, left, path="products")
        weight = lowrank.pack(dense.pack(left), dense.pack(right))
        empty = low_rank.matmul(x[:0], right, left)
        return {
            "fused_differs": distance(fused[0], exact),
            "products_differ": distance(plain, exact),
            "format_differs": distance(lowrank.matmul(x, weight), exact),
            "shape_without_rows": list(empty.shape) == [0, outputs],
        }

    return found, public


def run_residual(index: int, device: str) -> tuple[Found, Callable[[], Found]]:
    bits, group_size, symmetric, (rows, outputs, inputs), rank, dtype = RESIDUAL[index]
    draw = Draw(index, dtype, device)
    base = quantized(draw, bits, group_size, symmetric, outputs, inputs)
    x = draw.normal(rows, inputs)
    right, left = draw.factors(outputs, inputs, rank)
    out = Output(rows, outputs, dtype=x.dtype, device=device)
    residual.launch(x, base, right, left, out.value)
    exact = x.double() @ (exact_weight(base) + left.double() @ right.double()).T
    span = group_span(max(0, group_size))
    found: Found = {
        "kernel": "residual",
        "config": name_of(residual.config_for(rows, inputs, span, rank), residual.CONFIGS),
        **out.compared(exact),
    }

    def public() -> Found:
        fused = residual.matmul(x.view(1, rows, inputs), base, right, left, path="fused")
        plain = residual.matmul(x, base, right, left, path="products")
        weight = residual_format.pack(base, lowrank.pack(dense.pack(left), dense.pack(right)))
        empty = residual.matmul(x[:0], base, right, left)
        return {
            "fused_differs": distance(fused[0], exact),
            "products_differ": distance(plain, exact),
            "format_differs": distance(residual_format.matmul(x, weight), exact),
            "shape_without_rows": list(empty.shape) == [0, outputs],
        }

    return found, public


def run_mlp(index: int, device: str) -> tuple[Found, Callable[[], Found]]:
    rows, inputs, width, outputs, ranks, activation, biased, dtype = MLP[index]
    gate_rank, up_rank, down_rank = ranks
    draw = Draw(index, dtype, device)
    x = draw.normal(rows, inputs)
    layer = mlp.Layer(
        mlp.Factors(*draw.factors(width, inputs, up_rank)),
        mlp.Factors(*draw.factors(outputs, width, down_rank)),
        mlp.Factors(*draw.factors(width, inputs, gate_rank)) if gate_rank else None,
        draw.normal(width) if biased else None,
        draw.normal(outputs) if biased else None,
        activation,
    )
    out = Output(rows, outputs, dtype=x.dtype, device=device)
    mlp.launch(x, layer, out.value)
    exact = exact_mlp(x, layer)

    def called(x: Tensor, path: Any) -> Tensor:
        if layer.gate:
            return mlp.swiglu(x, layer.gate, layer.up, layer.down, path)
        tanh = "tanh" if activation == "gelu_tanh" else "none"
        return mlp.gelu(x, layer.up, layer.up_bias, layer.down, layer.down_bias, tanh, path)

    def public() -> Found:
        mlp.MIN_PRODUCT_ROWS = 16  # so that there are several blocks
        return {
            "fused_differs": distance(called(x.view(1, rows, inputs), "fused")[0], exact),
            "products_differ": distance(called(x, "products"), exact),
            "shape_without_rows": list(called(x[:0], None).shape) == [0, outputs],
        }

    found: Found = {
        "kernel": "mlp",
        "config": name_of(mlp.config_for(inputs, layer), mlp.CONFIGS),
        **out.compared(exact),
    }
    return found, public


def exact_mlp(x: Tensor, layer: mlp.Layer) -> Tensor:
    """The layer in float64, of dense weights."""

    def apply(values: Tensor, factors: mlp.Factors, bias: Tensor | None = None) -> Tensor:
        product = values @ (factors.left.double() @ factors.right.double()).T
        return product if bias is None else product + bias.double()

    hidden = apply(x.double(), layer.up, layer.up_bias)
    gate = apply(x.double(), layer.gate) if layer.gate else hidden
    if layer.activation == "silu":
        active = gate / (1 + (-gate).exp())
    elif layer.activation == "gelu":
        active = gate * (1 + torch.special.erf(gate / 2**0.5)) / 2
    else:
        active = gate * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) / 2
    return apply(active * hidden if layer.gate else active, layer.down, layer.down_bias)


def run_attention(index: int, device: str) -> tuple[Found, Callable[[], Found]]:
    heads, kv_heads, size, (batch, queries, keys), ranks, *flags, dtype = ATTENTION[index]
    causal, biased, rotates, lengths = flags
    draw = Draw(index, dtype, device)
    counts, tokens = (heads, kv_heads, kv_heads), (queries, keys, keys)
    q, k, v = (
        Lifted(
            draw.normal(batch, token, rank),
            draw.normal(count * size, rank, scale=rank**-0.5),
            draw.normal(count * size) if biased else None,
        )
        for count, token, rank in zip(counts, tokens, ranks, strict=True)
    )
    angle = torch.arange(keys)[:, None] / 100 ** (torch.arange(size // 2) * 2 / size)
    cos, sin = (guarded(table.to(device)) for table in (angle.cos(), angle.sin()))
    if lengths is not None:
        lengths = torch.tensor(lengths, device=device)
        for part, sequence in itertools.product((k, v), range(batch)):
            part.states[sequence, int(lengths[sequence]) :] = float("nan")
    rotary = (cos, sin) if rotates else (None, None)
    options = Options(size, causal, 0.7 * size**-0.5, *rotary, lengths)
    out = Output(batch, queries, heads, size, dtype=q.states.dtype, device=device)
    attention.launch(q, k, v, options, out.value)
    exact = exact_attention(q, k, v, options)

    def called(path: Any) -> Tensor:
        return attention.attention(
            q,
            k,
            v,
            size,
            causal=causal,
            rotary=(cos, sin) if rotates else None,
            lengths=lengths,
            scale=options.scale,
            path=path,
        )

    def public() -> Found:
        return {
            "fused_differs": distance(called("fused"), exact),
            "products_differ": distance(called("products"), exact),
        }

    config = attention.config_for(size, ranks)
    found: Found = {
        "kernel": "attention",
        "config": name_of(config, attention.CONFIGS),
        **out.compared(exact),
    }
    return found, public


def exact_attention(
    q: Lifted,
    k: Lifted,
    v: Lifted,
    options: Options,
) -> Tensor:
    """One query after another in float64; rotation is by complex numbers."""
    size, half = options.head_dim, options.head_dim // 2

    def lifted(part: Lifted, first: int | None) -> Tensor:
        """[B, S, heads, d]; ``first``: position of the first token, None if nothing turns."""
        product = part.states.double() @ part.left.double().T
        product = product if part.bias is None else product + part.bias.double()
        product = product.unflatten(-1, (-1, size))
        if options.cos is None or first is None:
            return product
        turn = torch.complex(options.cos.double(), options.sin.double())[first:, None]
        turned = torch.complex(product[..., :half], product[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    (batch, queries, _), keys = q.states.shape, k.states.shape[1]
    all_q, all_k, all_v = lifted(q, keys - queries), lifted(k, 0), lifted(v, None)
    group = all_q.shape[2] // all_k.shape[2]
    out = torch.zeros_like(all_q)
    for b, i, head in itertools.product(range(batch), range(queries), range(all_q.shape[2])):
        last = keys if options.lengths is None else int(options.lengths[b])
        last = min(last, keys - queries + i + 1) if options.causal else last
        scores = all_k[b, :last, head // group] @ all_q[b, i, head] * options.scale
        out[b, i, head] = scores.softmax(0) @ all_v[b, :last, head // group]
    return out


def quantized(
    draw: Draw, bits: int, group_size: int, symmetric: bool, outputs: int, inputs: int
) -> CompressedTensor:
    """Random codes, scales and zero points, weights of about the size of the correction."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = int_group.group_count(inputs, group_size)

    def integers(*shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw.generator).to(draw.device)

    scale = torch.rand(outputs, groups, generator=draw.generator) * 2 / (high * inputs**0.5)
    tensor = int_group.pack(
        integers(outputs, inputs),
        scale.to(draw.dtype).to(draw.device),
        None if symmetric else integers(outputs, groups),
        bits=bits,
        group_size=group_size,
        dtype=draw.dtype,
    )
    parts = {**tensor.parts, "weight_scale": guarded(tensor.parts["weight_scale"])}
    return CompressedTensor(tensor.format, parts, tensor.shape, tensor.dtype, tensor.params)


def distance(found: Tensor, exact: Tensor) -> float:
    """Largest error over largest output."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def results(device: str) -> Iterator[Found]:
    """Launches of every case; in the interpreter, which is slow, the public functions that come to
    the same launches are called once for every configuration."""
    runs = {run_low_rank: LOW_RANK, run_residual: RESIDUAL, run_mlp: MLP, run_attention: ATTENTION}
    called = set()
    for run, cases in runs.items():
        for index in range(len(cases)):
            found, public = run(index, device)
            config = (found["kernel"], found["config"])
            if device != "cpu" or config not in called:
                found |= public()
            called.add(config)
            yield found


if __name__ == "__main__":
    print(json.dumps(list(results(sys.argv[1]))))
