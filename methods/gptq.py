"""GPTQ: round columns one after another, each making up for the errors of those before it.

Frantar et al., 2210.17323. Column j is rounded to the grid after it has been moved to
w_j + c_j, the value that is best given the errors already made (see
:mod:`moesaic.methods.hessian` for c_j and for why no inverse is needed).

Layout: weights are held as ``[in, E, out]``, so that one column of all experts, and of all members
that read the same inputs, is one contiguous row: the loop over columns runs once per site, whatever
the number of experts. The sums c_j are gathered on three levels, from large to small: blocks of
``block_size`` and quantization groups by matrix products, then at most ``_LEAF`` columns one by one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from moesaic.methods.base import Event, Result, Stats, option
from moesaic.methods.grid import (
    Grid,
    GridOptions,
    check_finite,
    choose_grid,
    group_problem,
    make_grid,
    pack_codes,
    predicted_bytes,
)
from moesaic.methods.hessian import Factor, factorise

SCOPE = frozenset({"linear", "bank"})
ROWWISE = True
NEEDS = frozenset({"hessian", "tokens"})

# Columns whose mutual feedback is added one column at a time.
_LEAF = 16
# Working memory for one slice of a bank: float64 Hessians and float32 copies of the weights.
_WORK_BYTES = 256 << 20
# Factors of a site are kept for the next candidate up to this size; larger ones are made anew,
# which costs less than the column loop does at such widths.
_KEEP_BYTES = 512 << 20


class Options(GridOptions):
    """Options of GPTQ."""

    clip: Literal["none", "mse", "weighted"] = option(
        "none",
        "how a group's range is chosen: all of it, or where |w - ŵ|^2.4 is least, plainly or "
        "weighted by the mean square of the inputs",
        ["none", "mse", "weighted"],
    )
    damp: float = option(0.01, "added to the Hessian's diagonal, relative to its mean", gt=0)
    act_order: bool = option(
        False, "round inputs by falling mean square; implies static_groups", [False, True]
    )
    static_groups: bool = option(
        False, "choose scales from the original weights, not from the updated ones", [False, True]
    )
    block_size: int = option(128, "columns between two lazy updates of the rest", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _static_groups_under_act_order(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("act_order"):
            return {**data, "static_groups": True}
        return data


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Quantizes members ``[*batch, out, in]``; those that share a ``Stats`` are solved together.

    Events: ``no_tokens`` (per expert; without inputs GPTQ is round to nearest), ``dead_inputs``
    (per site; inputs that were always zero get zero weights), ``damping_grew`` (per expert).

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, or the group size does not divide
            the inputs.
    """
    reason = problem({name: tuple(weight.shape) for name, weight in weights.items()}, options)
    if reason:
        raise ValueError(reason)
    for name, weight in weights.items():
        check_finite(name, weight)
    result = Result({})
    for names in _sites(stats, weights):
        site = _Site([weights[name] for name in names], stats[names[0]], options)
        site.solve(", ".join(names), result.events)
        for name, (codes, scale, zero) in zip(names, site.split(), strict=True):
            dtype = weights[name].dtype
            result.members[name] = pack_codes(codes, scale, zero, dtype, options)
    result.members = {name: result.members[name] for name in weights}
    return result


def _sites(stats: Mapping[str, Stats], weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Members by the ``Stats`` that they read, in order of first appearance."""
    sites: dict[int, list[str]] = {}
    for name in weights:
        sites.setdefault(id(stats[name]), []).append(name)
    return list(sites.values())
