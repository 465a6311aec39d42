"""Compressed layers on a GPU: the fused kernels, library products, and the dense layer.

    python tests/benchmarks/gpu_kernels.py [--models bert llama] [--parts 8 4 2] [--write FILE]

Latency is the median with a cold L2 cache; activation memory is what the call allocates at its
peak, its result included. Products of integers are those of a weight that is dequantized first,
every time. Weights are products of random factors, and the ways are compared with one another
before they are timed. A dash: the kernel does not take this rank. Exits with 2 where there is no
GPU.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import arguments_parser, progress, report, table
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _plan, int_group
from moesaic.kernels import _residual_triton as residual
from moesaic.kernels._lowrank_attention import Lifted, rotated
from moesaic.kernels.tensor import CompressedTensor

Way = Callable[[], Tensor]
Ways = dict[str, Way | None]  # None: not for this rank
WAYS = ("dense", "products", "fused")
TOLERANCE = 2**-5  # largest difference over largest output
CORRECTION_RANK, GROUP_SIZE = 64, 128
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Model:
    """Shapes of a layer, and the batches (sequences, tokens in each) that it is measured with."""

    name: str
    hidden: int
    width: int
    heads: int
    gated: bool  # SwiGLU, causal and rotary; otherwise GELU, biased and bidirectional
    batches: tuple[tuple[int, int], ...]


MODELS = {
    "bert": Model(
        "BERT-base",
        768,
        3072,
        12,
        False,
        tuple((batch, length) for batch in (8, 16, 32, 64) for length in (128, 256, 512)),
    ),
    "llama": Model(
        "Llama-7B", 4096, 11008, 32, True, ((1, 1), (8, 1), (1, 512), (1, 2048), (8, 512))
    ),
}


class Draw:
    """Random operands that keep magnitudes near one."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values * scale).to(self.dtype)

    def factors(self, outputs: int, inputs: int, rank: int) -> mlp.Factors:
        right = self.normal(rank, inputs, scale=inputs**-0.5)
        return mlp.Factors(right, self.normal(outputs, rank, scale=rank**-0.5))


def product(factors: mlp.Factors) -> Tensor:
    """The dense weight."""
    return factors.left @ factors.right


def linear(model: Model, batch: int, length: int, rank: int, draw: Draw) -> Ways:
    """``hidden → width``, without a bias."""
    x = draw.normal(batch, length, model.hidden)
    factors = draw.factors(model.width, model.hidden, rank)
    weight = product(factors)
    fits = rank <= low_rank.max_rank(model.hidden, rank)
    return {
        "dense": lambda: F.linear(x, weight),
        "products": lambda: low_rank.matmul(x, *factors, path="products"),
        "fused": (lambda: low_rank.matmul(x, *factors, path="fused")) if fits else None,
    }


def feed_forward(model: Model, batch: int, length: int, rank: int, draw: Draw) -> Ways:
    """The whole feed-forward layer."""
    x = draw.normal(batch, length, model.hidden)
    up, gate = (draw.factors(model.width, model.hidden, rank) for _ in range(2))
    down = draw.factors(model.hidden, model.width, rank)
    dense_up, dense_gate, dense_down = product(up), product(gate), product(down)
    biases = draw.normal(model.width), draw.normal(model.hidden)

    def dense() -> Tensor:
        if model.gated:
            hidden = F.silu(F.linear(x, dense_gate)) * F.linear(x, dense_up)
            return F.linear(hidden, dense_down)
        return F.linear(F.gelu(F.linear(x, dense_up, biases[0])), dense_down, biases[1])

    def factored(path: low_rank.Path) -> Tensor:
        if model.gated:
            return mlp.swiglu(x, gate, up, down, path)
        return mlp.gelu(x, up, biases[0], down, biases[1], path=path)

    layer = mlp.Layer(up, down, gate if model.gated else None)
    fits = rank <= mlp.max_rank(model.hidden, layer)
    return {
        "dense": dense,
        "products": lambda: factored("products"),
        "fused": (lambda: factored("fused")) if fits else None,
    }


def attend(model: Model, batch: int, length: int, rank: int, draw: Draw) -> Ways:
    """Projections to queries, keys, values, and attention."""
    x = draw.normal(batch, length, model.hidden)
    factors = [draw.factors(model.hidden, model.hidden, rank) for _ in range(3)]
    weights = [product(each) for each in factors]
    size = model.hidden // model.heads
    angle = torch.arange(length, device=draw.device)[:, None] * 10000 ** (
        -torch.arange(0, size, 2, device=draw.device) / size
    )
    rotary = (angle.cos(), angle.sin()) if model.gated else None

    def dense() -> Tensor:
        parts = [F.linear(x, weight).unflatten(-1, (-1, size)) for weight in weights]
        if rotary is not None:
            parts[:2] = (rotated(part, *rotary) for part in parts[:2])
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, is_causal=model.gated).transpose(1, 2)

    def factored(path: low_rank.Path) -> Tensor:
        q, k, v = (Lifted(F.linear(x, each.right), each.left) for each in factors)
        return attention.attention(q, k, v, size, causal=model.gated, rotary=rotary, path=path)

    return {
        "dense": dense,
        "products": lambda: factored("products"),
        "fused": lambda: factored("fused"),
    }


def integers(outputs: int, inputs: int, bits: int, draw: Draw) -> CompressedTensor:
    """A weight of so many bits whose products with normal inputs are near one."""
    limit = 1 << (bits - 1)
    shape, groups = (outputs, inputs), inputs // GROUP_SIZE
    codes = torch.randint(-limit, limit, shape, generator=draw.generator, device=draw.device)
    scale = (draw.normal(outputs, groups).abs() + 0.1) * inputs**-0.5 / limit
    return int_group.pack(codes, scale, None, bits=bits, group_size=GROUP_SIZE, dtype=draw.dtype)


def rounded(model: Model, batch: int, length: int, bits: int, draw: Draw) -> Ways:
    """``width → hidden`` in integers."""
    x = draw.normal(batch, length, model.width)
    weight = integers(model.hidden, model.width, bits, draw)
    dense = weight.dense()
    return {
        "dense": lambda: F.linear(x, dense),
        "products": lambda: F.linear(x, weight.dense()),
        "fused": lambda: int_group.matmul(x, weight),
    }


def corrected(model: Model, batch: int, length: int, draw: Draw) -> Ways:
    """``hidden → width`` in 4 bits with a correction; products: a launch for each summand."""
    x = draw.normal(batch, length, model.hidden)
    shape = (model.width, model.hidden)
    base = integers(*shape, 4, draw)
    factors = draw.factors(*shape, CORRECTION_RANK)
    weight = base.dense() + product(factors)
    return {
        "dense": lambda: F.linear(x, weight),
        "products": lambda: residual.matmul(x, base, *factors, path="products"),
        "fused": lambda: residual.matmul(x, base, *factors, path="fused"),
    }


def cases(model: Model, parts: list[int], draw: Draw) -> Iterator[tuple[list[str], Ways]]:
    """What the rows of the table are called, and the ways, made when it is their turn."""
    for batch, length in model.batches:
        shape = f"{batch} × {length}"
        for bits in WIDTHS:
            yield [f"{bits} bits", shape, "–"], rounded(model, batch, length, bits, draw)
        yield (
            ["4 bits + correction", shape, str(CORRECTION_RANK)],
            corrected(model, batch, length, draw),
        )
        for part in parts:
            rank = model.hidden // part
            for name, make in (("linear", linear), ("feed-forward", feed_forward)):
                yield [name, shape, str(rank)], make(model, batch, length, rank, draw)
            if length > 1:
                ways = attend(model, batch, length, rank, draw)
                yield ["attention", shape, str(rank)], ways


def differences(ways: Ways) -> dict[str, float]:
    """Of every way from the dense one, over the largest output."""
    results = {name: way().float() for name, way in ways.items() if way is not None}
    dense = results.pop("dense")
    return {
        name: float((each - dense).abs().max() / dense.abs().max())
        for name, each in results.items()
    }


def activation_bytes(way: Way) -> int:
    """What a call allocates at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def figures(ways: Ways) -> list[str]:
    """Milliseconds of every way, then MB of every way."""
    chosen = [ways[name] for name in WAYS]
    times = ["–" if way is None else f"{_plan.milliseconds(way):.3f}" for way in chosen]
    memory = ["–" if way is None else f"{activation_bytes(way) / 1e6:.1f}" for way in chosen]
    return times + memory


def main() -> int:
    parser = arguments_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--parts", nargs="+", type=int, default=[8, 4, 2], help="ranks: the hidden size over these"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels.py needs a GPU that PyTorch can use, there is none", file=sys.stderr)
        return 2
    draw = Draw(getattr(torch, arguments.dtype), "cuda")
    sections = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}."]
    headers = ["layer", "batch", "rank"]
    headers += [f"{name}, ms" for name in WAYS] + [f"{name}, MB" for name in WAYS]
    for model in (MODELS[name] for name in arguments.models):
        rows = []
        for labels, ways in cases(model, arguments.parts, draw):
            progress(f"{model.name}: {', '.join(labels)}")
            found = differences(ways)
            if not all(difference <= TOLERANCE for difference in found.values()):  # NaN too
                raise SystemExit(f"{model.name}, {labels}: off the dense layer by {found}")
            rows.append([*labels, *figures(ways)])
        title = f"## {model.name}, {model.hidden} / {model.width}"
        sections.append(f"{title}\n\n{table(headers, rows)}")
    report("Compressed layers on a GPU", "\n\n".join(sections), arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
