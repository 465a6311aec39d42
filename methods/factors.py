"""Rounding factors: a quantizer as the link that follows a method of low rank.

A weight L·R gets codes for both factors. R ``[rank, in]`` reads the inputs of the layer and is
quantized with their statistics. L ``[out, rank]`` reads R̂x, of which H becomes R̂ H R̂ᵀ. Before that,
L is refitted to the rounded R̂ by least squares, L' = L R H R̂ᵀ (R̂ H R̂ᵀ)⁺, so that it makes up for
what can be made up for.

Where the experts of a bank share a base, the base is rounded first, for the inputs of all of them,
and each expert's factors are made anew for what the rounded base leaves of its weight.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from moesaic.kernels import delta, lowrank
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import MethodOptions, Result, Stats, is_whole, method_module, methods
from moesaic.methods.low_rank import (
    LowRankOptions,
    Rank,
    eigen_root,
    experts_hessian,
    factor_shapes,
    low_rank,
)
from moesaic.methods.sparsity import SparseOptions

# Statistics that can be told of R̂x.
_NEEDS = frozenset({"tokens", "hessian"})

Shapes = Mapping[str, tuple[int, ...]]


def is_factoring(name: str) -> bool:
    """Whether the method called ``name`` leaves members in the format ``lowrank``."""
    return name in methods() and issubclass(method_module(name).Options, LowRankOptions)


def leaves_factors(name: str) -> bool:
    """Whether a quantizer may round what the method called ``name`` leaves: factors alone, or with
    a base that a bank's experts share."""
    return name in methods() and (is_factoring(name) or is_whole(name))


def is_quantizer(name: str) -> bool:
    """Whether the method called ``name`` can round factors: it needs no more than H and tokens,
    and leaves neither factors nor gaps."""
    if name not in methods():
        return False
    module = method_module(name)
    others = "rank" in module.Options.model_fields or issubclass(module.Options, SparseOptions)
    return not others and module.NEEDS <= _NEEDS


def quantize_shared(
    method: str,
    weights: Mapping[str, Tensor],
    members: Mapping[str, CompressedTensor],
    stats: Mapping[str, Stats],
    options: MethodOptions,
) -> Result:
    """Quantizes ``members``, ``[experts, out, in]`` in the format ``delta``: bases, then factors.

    Args:
        method: name of a quantizer.
        weights: the dense members, which the factors are fitted to.
        stats: of the experts' inputs, with ``hessian`` and ``tokens``.

    Raises:
        ValueError: a member cannot be quantized so.
    """
    bases, pooled, ranks = {}, {}, {}
    for name, tensor in members.items():
        base, deltas = delta.members(tensor)
        bases[_base(name)] = base.dense()
        # Members of one site share what is derived of it.
        pooled[_base(name)] = stats[name].derived("all experts", partial(_pooled, stats[name]))
        ranks[name] = lowrank.factors(deltas)[0].shape[-1]
    first = method_module(method).compress(bases, pooled, options)
    exact = Result({})
    for name, rank in ranks.items():
        rounded = first.members[_base(name)].effective()
        one = low_rank(
            {name: weights[name]},
            rank,
            lambda name, expert: eigen_root(stats[name], expert),
            lambda name, expert, base=rounded: base,  # type: ignore[misc]
        )
        exact.members.update(one.members)
        exact.events.extend(one.events)
    second = quantize_factors(method, exact.members, stats, options)
    packed = {
        name: delta.pack(first.members[_base(name)], deltas)
        for name, deltas in second.members.items()
    }
    return Result(packed, first.events + exact.events + second.events)


def _pooled(stats: Stats) -> Stats:
    """Statistics of the inputs of all experts together."""
    return Stats({key: stats[key].sum(0, dtype=stats[key].dtype) for key in _NEEDS})


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


def _base(name: str) -> str:
    return f"{name} (base)"


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


def factor_problem(
    shapes: Shapes, rank: Rank, based: bool, method: str, options: MethodOptions
) -> str | None:
    """Why the factors of members of these shapes cannot be quantized so; None if they can.

    Args:
        based: with a base that all experts share.
    """
    return method_module(method).problem(_factor_shapes(shapes, rank, based), options)


def factor_bytes(
    shapes: Shapes,
    rank: Rank,
    based: bool,
    dtype: torch.dtype,
    method: str,
    options: MethodOptions,
) -> int:
    """Bytes of the quantized factors, and bases, exactly."""
    return method_module(method).predict_bytes(_factor_shapes(shapes, rank, based), dtype, options)


def _factor_shapes(shapes: Shapes, rank: Rank, based: bool) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in shapes.items():
        found[_left(name)], found[_right(name)] = factor_shapes(shape, rank)
        if based:
            found[_base(name)] = shape[-2:]
    return found
