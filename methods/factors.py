"""Rounding factors: a quantizer as the link that follows a method of low rank.

A weight L·R gets codes for both factors. R ``[rank, in]`` reads the inputs of the layer and is
quantized with their statistics. L ``[out, rank]`` reads R̂x, of which H becomes R̂ H R̂ᵀ. Before that,
L is refitted to the rounded R̂ by least squares, L' = L R H R̂ᵀ (R̂ H R̂ᵀ)⁺, so that it makes up for
what can be made up for.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels import lowrank
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import MethodOptions, Result, Stats, method_module, methods
from moesaic.methods.low_rank import LowRankOptions, Rank, experts_hessian, factor_shapes
from moesaic.methods.sparsity import SparseOptions

# Statistics that can be told of R̂x.
_NEEDS = frozenset({"tokens", "hessian"})

Shapes = Mapping[str, tuple[int, ...]]


def is_factoring(name: str) -> bool:
    """Whether the method called ``name`` leaves members in the format ``lowrank``."""
    return name in methods() and issubclass(method_module(name).Options, LowRankOptions)


def is_quantizer(name: str) -> bool:
    """Whether the method called ``name`` can round factors: it needs no more than H and tokens,
    and leaves neither factors nor gaps."""
    if name not in methods():
        return False
    module = method_module(name)
    others = "rank" in module.Options.model_fields or issubclass(module.Options, SparseOptions)
    return not others and module.NEEDS <= _NEEDS


def quantize_factors(
    method: str,
    members: Mapping[str, CompressedTensor],
    stats: Mapping[str, Stats],
    options: MethodOptions,
) -> Result:
    """Quantizes the factors of ``members``, ``[*batch, out, in]`` in the format ``lowrank``.

    Args:
        method: name of a quantizer.
        stats: of the layers' inputs; without ``hessian`` the left factors are not refitted.

    Raises:
        ValueError: a member is in another format, or its factors cannot be quantized so.
    """
    for name, tensor in members.items():
        if tensor.format != "lowrank":
            raise ValueError(f"{name}: the format is {tensor.format}, only lowrank has factors")
    compress = method_module(method).compress
    factors = {name: lowrank.factors(tensor) for name, tensor in members.items()}
    rights = {_right(name): right.dense() for name, (_, right) in factors.items()}
    first = compress(rights, {_right(name): stats[name] for name in members}, options)
    lefts, inner = {}, {}
    for name, (left, right) in factors.items():
        rounded = first.members[_right(name)].dense()
        fitted, inner[_left(name)] = _seen_by_left(
            name, left.dense(), right.dense(), rounded, stats[name]
        )
        lefts[_left(name)] = fitted
    second = compress(lefts, inner, options)
    packed = {
        name: lowrank.pack(second.members[_left(name)], first.members[_right(name)])
        for name in members
    }
    return Result(packed, first.events + second.events)


def _left(name: str) -> str:
    return f"{name} (left factor)"


def _right(name: str) -> str:
    return f"{name} (right factor)"


def _seen_by_left(
    name: str, left: Tensor, right: Tensor, rounded: Tensor, stats: Stats
) -> tuple[Tensor, Stats]:
    """The left factor refitted, and the statistics of its inputs, expert by expert."""
    sums = {"tokens": stats["tokens"]} if "tokens" in stats else {}
    if "hessian" not in stats:
        return left, Stats(sums)
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (left, right, rounded)]
    fitted = torch.empty_like(flat[0])
    rank = left.shape[-1]
    inner = stats["hessian"].new_empty(len(fitted), rank, rank)
    for expert in range(len(fitted)):
        try:
            hessian = experts_hessian(stats, expert).double()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        a, b, c = (part[expert].double() for part in flat)
        gram = c @ hessian @ c.mT  # R̂ H R̂ᵀ
        inner[expert] = (gram + gram.mT) / 2
        fitted[expert] = a + a @ (b - c) @ hessian @ c.mT @ torch.linalg.pinv(gram, hermitian=True)
    sums["hessian"] = inner.view(*stats["hessian"].shape[:-2], rank, rank)
    return fitted.view(left.shape), Stats(sums)


def factor_problem(shapes: Shapes, rank: Rank, method: str, options: MethodOptions) -> str | None:
    """Why the factors of members of these shapes cannot be quantized so; None if they can."""
    return method_module(method).problem(_factor_shapes(shapes, rank), options)


def factor_bytes(
    shapes: Shapes, rank: Rank, dtype: torch.dtype, method: str, options: MethodOptions
) -> int:
    """Bytes of the quantized factors, exactly."""
    return method_module(method).predict_bytes(_factor_shapes(shapes, rank), dtype, options)


def _factor_shapes(shapes: Shapes, rank: Rank) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in shapes.items():
        found[_left(name)], found[_right(name)] = factor_shapes(shape, rank)
    return found
