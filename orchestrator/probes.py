"""How fast the parts of calibration and solving are: each is called as a run calls it.

What a run meets once per batch lies in memory, not in a core's cache: every probe goes round as
many matrices as do not fit there. On a processor times are those of its cores, so that other
processes do not count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods.base import Unit
from moesaic.methods.hessian import factorise
from moesaic.orchestrator import experts
from moesaic.orchestrator.statistics import GradientObserver, add_gram, mirror

# Bytes of the matrices that a probe goes round: more than a core's own cache holds; and how many
# they are at most.
_COLD_BYTES, _COLD_MATRICES = 48 << 20, 64
# Operations of one call at most, and widths beyond which nothing changes.
_OPERATIONS = {"cpu": 4e9, "cuda": 4e13}
WIDTH = {"cpu": 2048, "cuda": 8192}
_SECONDS, _REPEATS = 0.1, 5
_SUM_BYTES, _WIDE_VALUES = 16 << 20, 1 << 20
_FACTORED = 768
DAMP = 0.01


def shortest(call: Callable[[], object], device: str) -> float:
    """Shortest time of a few calls, in seconds: the first sets things up.

    Args:
        device: ``cpu``, ``cuda``, or another word for what is timed by the clock.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _REPEATS):
        started = _now(device)
        call()
        times.append(_now(device) - started)
    return max(min(times), 1e-9)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time() / torch.get_num_threads()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _cut(inputs: int, out: int, device: str) -> tuple[int, int]:
    return min(inputs, WIDTH[device]), min(out, WIDTH[device])


def _round(each_bytes: int, each_operations: float, device: str) -> int:
    """How many matrices a probe goes round."""
    count = min(_COLD_BYTES // each_bytes, int(_OPERATIONS[device] / each_operations))
    return max(1, min(count, _COLD_MATRICES))


def probe_matmul(rows: int, inputs: int, out: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of linears, one after the other."""
    inputs, out = _cut(inputs, out, device)
    operations = 2.0 * rows * inputs * out
    count = _round(inputs * out * dtype.itemsize, operations, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weights = torch.randn(count, out, inputs, device=device).to(dtype)
    return count * operations / shortest(lambda: [F.linear(x, w) for w in weights], device)


def _bank(rows: int, inputs: int, width: int, dtype: torch.dtype, device: str) -> tuple[int, ...]:
    inputs, width = _cut(inputs, width, device)
    each = 3 * inputs * width * dtype.itemsize
    return _round(each, 6.0 * rows * inputs * width, device), inputs, width


@dataclass(frozen=True)
class _Visit:
    """Some experts, and as many tokens for each.

    Attributes:
        operations: of all of them.
        bank: as transformers' experts modules are.
        unit: the bank's.
        call: what it is called with.
    """

    operations: float
    bank: SimpleNamespace
    unit: Unit
    call: experts.Routed


def _visit(rows: int, inputs: int, width: int, dtype: torch.dtype, device: str) -> _Visit:
    count, inputs, width = _bank(rows, inputs, width, dtype, device)

    def gate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.silu(first) * second

    bank = SimpleNamespace(
        gate_up_proj=torch.randn(count, 2 * width, inputs, device=device).to(dtype),
        down_proj=torch.randn(count, inputs, width, device=device).to(dtype),
        num_experts=count,
        is_transposed=False,
        has_bias=False,
        is_concatenated=True,
        _apply_gate=gate,
    )
    index = (torch.arange(count * rows, device=device) % count)[:, None]
    weights = torch.ones(count * rows, 1, device=device).to(dtype)
    x = torch.randn(count * rows, inputs, device=device).to(dtype)
    shapes = {"gate": (count, width, inputs), "up": (count, width, inputs)}
    shapes["down"] = (count, inputs, width)
    unit = Unit("probe", "bank", 0, "experts", shapes, {"gate": "in", "up": "in", "down": "mid"})
    operations = 6.0 * count * rows * inputs * width
    return _Visit(operations, bank, unit, experts.Routed(x, index, weights))


def probe_experts(rows: int, inputs: int, width: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of experts that some tokens each are gathered for and given back."""
    visit = _visit(rows, inputs, width, dtype, device)
    call = (visit.call.hidden, visit.call.index, visit.call.weights)
    with torch.no_grad():
        return visit.operations / shortest(lambda: experts.forward(visit.bank, *call), device)


def probe_reverse(rows: int, inputs: int, width: int, dtype: torch.dtype, device: str) -> float:
    """The same of experts that run forward and back, and tell gradients: twice the operations."""
    visit = _visit(rows, inputs, width, dtype, device)
    observer = GradientObserver([visit.unit], torch.device(device))
    span, x = range(visit.bank.num_experts), visit.call.hidden.requires_grad_(True)

    def back() -> None:
        with torch.enable_grad():
            y = torch.zeros_like(x)
            experts.visit(visit.bank, visit.unit, observer, "routed", None, visit.call, span, y)
            torch.autograd.grad(y, x, torch.ones_like(y))

    return 2 * visit.operations / shortest(back, device)


def probe_gram(rows: int, inputs: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of adding x xᵀ to sums of several sites."""
    inputs, _ = _cut(inputs, inputs, device)
    operations = 2.0 * rows * inputs * inputs
    count = _round(4 * inputs * inputs, operations, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    totals = torch.zeros(count, inputs, inputs, device=device)

    def add() -> None:
        for total in totals:
            add_gram(total, x.float())

    return count * operations / shortest(add, device)


def probe_sums(inputs: int, device: str) -> float:
    """Bytes per second of a shard's Hessians: made, filled, made symmetric, added to others."""
    inputs, _ = _cut(inputs, inputs, device)
    count = max(1, _SUM_BYTES // (4 * inputs * inputs))
    before = torch.zeros(count, inputs, inputs, device=device)

    def add() -> None:
        total = torch.zeros_like(before)
        total.add_(1.0)
        mirror(total)
        before.add_(total)

    return before.nbytes / shortest(add, device)


def probe_attention(
    length: int, heads: int, channels: int, dtype: torch.dtype, device: str
) -> float:
    """Seconds per token, token that it looks at, and channel of all heads."""
    operations = 4.0 * length * length * heads * channels
    heads = max(1, min(heads, int(heads * _OPERATIONS[device] / operations)))
    x = torch.randn(1, heads, length, channels, device=device).to(dtype)
    look = lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
    return shortest(look, device) / (length * length * heads * channels)


def probe_wide(device: str) -> float:
    """Seconds per value of an operation on every value, with a result of its own."""
    x = torch.ones(_WIDE_VALUES, device=device)
    return shortest(lambda: [x * x for _ in range(4)], device) / (4 * _WIDE_VALUES)


def probe_product(inputs: int, device: str) -> float:
    """Operations per second of products with Hessians, in float32, as errors take them."""
    inputs, _ = _cut(inputs, inputs, device)
    operations = 2.0 * inputs**3
    count = _round(8 * inputs * inputs, operations, device)
    weights = torch.ones(count, inputs, inputs, device=device)
    hessians = torch.ones(count, inputs, inputs, device=device)
    judge = lambda: (((weights - weights) @ hessians) * weights).sum(-1)  # noqa: E731
    return count * operations / shortest(judge, device)


def probe_factor(inputs: int, device: str) -> float:
    """Cubes of its inputs per second of a Hessian that is factorised."""
    inputs = min(inputs, _FACTORED)
    x = torch.randn(2 * inputs, inputs, device=device)
    hessian = (x.T @ x)[None]
    return float(inputs**3) / shortest(lambda: factorise(hessian, DAMP, True), device)
