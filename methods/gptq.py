"""GPTQ: round inputs one after another, each making up for the errors of those before it.

Frantar et al., 2210.17323. The mathematics is in :mod:`moesaic.methods.hessian` (one Cholesky per
expert, all experts at once) and :mod:`moesaic.methods.column_loop` (one loop over columns per site,
for all experts and all members that read the site). Banks of large experts are solved in slices of
bounded memory; small ones in one go.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Event, Result, Stats, option
from moesaic.methods.column_loop import Codes, Rounding, round_columns
from moesaic.methods.grid import (
    GridOptions,
    check_finite,
    group_problem,
    pack_codes,
    predicted_bytes,
)
from moesaic.methods.hessian import Factor, factorise

SCOPE = frozenset({"linear", "bank"})
ROWWISE = True
NEEDS = frozenset({"hessian", "tokens"})

# Working memory of one slice of a bank, by kind of device: two float64 Hessians, factor and three
# float32 weights per expert. On a processor that should fit its cache; a slice has at least one
# expert.
WORK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Factors of a site are kept for its next candidate up to this size. Larger ones are made anew, at
# about twice the time per candidate: kept, they would need as much memory as the Hessians again.
KEEP_BYTES = 256 << 20


class Options(GridOptions):
    """Options of GPTQ."""

    clip: Literal["none", "mse", "weighted"] = option(
        "none",
        "how a group's range is chosen: all of it, or where |w - ŵ|^2.4 is least, plainly or "
        "weighted by the mean square of the inputs",
        ["none", "mse", "weighted"],
    )
    damp: float = option(
        0.01,
        "added to the Hessian's diagonal, relative to its mean",
        [0.005, 0.01, 0.05],
        gt=0,
        le=1,
    )
    act_order: bool = option(
        False, "round inputs by falling mean square; implies static_groups", [False, True]
    )
    static_groups: bool = option(
        False, "choose scales from the original weights, not from the updated ones", [False, True]
    )
    block_size: int = option(128, "columns between two updates of all the rest", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _static_groups_under_act_order(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("act_order"):
            return {**data, "static_groups": True}
        return data


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Quantizes members ``[*batch, out, in]``; those that share a ``Stats`` are solved together.

    Events: ``no_tokens`` (per expert: without inputs GPTQ is round to nearest), ``dead_inputs``
    (per site: inputs that were always zero get zero weights), ``damping_grew`` (per expert).

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
    for names in _sites(weights, stats):
        members = [weights[name] for name in names]
        solved, factors = _solve(", ".join(names), members, stats[names[0]], options)
        result.events += _events(", ".join(names), stats[names[0]], factors, options)
        first = 0
        for name, weight in zip(names, members, strict=True):
            rows = slice(first, first + weight.shape[-2])
            first = rows.stop
            result.members[name] = _member(solved, rows, weight, options)
    result.members = {name: result.members[name] for name in weights}
    return result


def _sites(weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> list[list[str]]:
    """Members by the ``Stats`` that they read, in order of first appearance."""
    sites: dict[int, list[str]] = {}
    for name in weights:
        sites.setdefault(id(stats[name]), []).append(name)
    return list(sites.values())


def _solve(
    label: str, members: Sequence[Tensor], stats: Stats, options: Options
) -> tuple[Codes, list[Factor]]:
    """Rounds the members of one site, ``[*batch, out, in]``, rows of all members together."""
    flat = [weight.flatten(0, -3) if weight.dim() > 2 else weight[None] for weight in members]
    experts, _, inputs = flat[0].shape
    hessian = stats["hessian"].view(-1, inputs, inputs)
    if len(hessian) != experts:
        raise ValueError(f"{label}: {experts} experts, but Hessians of {len(hessian)}")
    rounding = Rounding(
        grid=options,
        dtype=members[0].dtype,
        clip=options.clip != "none",
        weighted=options.clip == "weighted",
        static=options.static_groups,
        block=options.block_size,
    )
    rows = sum(weight.shape[1] for weight in flat)
    each = inputs * (20 * inputs + 12 * rows)  # bytes of working memory per expert
    width = max(1, WORK_BYTES[hessian.device.type] // each)
    solved, factors = [], []
    for start in range(0, experts, width):
        part = slice(start, start + width)
        factor = _factor(label, hessian, part, stats, options)
        columns = _columns([weight[part] for weight in flat])
        gone = factor.dead & ~factor.blind[:, None]  # [E, in]
        if gone.any():
            columns.masked_fill_(gone.t()[:, :, None], 0)
        solved.append(round_columns(columns, factor, rounding))
        factors.append(factor)
    return _joined(solved), factors


def _columns(members: Sequence[Tensor]) -> Tensor:
    """Members ``[E, out, in]`` as one float32 ``[in, E, rows]``.

    Matrix by matrix: a strided copy of a whole bank takes twice as long.
    """
    experts, _, inputs = members[0].shape
    rows = sum(weight.shape[1] for weight in members)
    columns = torch.empty(inputs, experts, rows, device=members[0].device)
    for expert in range(experts):
        start = 0
        for weight in members:
            stop = start + weight.shape[1]
            columns[:, expert, start:stop] = weight[expert].t().contiguous()
            start = stop
    return columns


def _factor(label: str, hessian: Tensor, part: slice, stats: Stats, options: Options) -> Factor:
    def compute() -> Factor:
        try:
            return factorise(hessian[part], options.damp, options.act_order)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error

    if 4 * hessian.numel() > KEEP_BYTES:
        return compute()
    key = ("factor", options.damp, options.act_order, part.start, part.stop)
    return stats.derived(key, compute)


def _joined(parts: Sequence[Codes]) -> Codes:
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _member(solved: Codes, rows: slice, weight: Tensor, options: Options) -> CompressedTensor:
    """One member of the site: its rows, in its own shape."""
    groups = (*weight.shape[:-1], -1)
    return pack_codes(
        solved.codes[:, rows].reshape(weight.shape),
        solved.scale[:, rows].reshape(groups),
        None if solved.zero is None else solved.zero[:, rows].reshape(groups),
        weight.dtype,
        options,
    )


def _events(label: str, stats: Stats, factors: Sequence[Factor], options: Options) -> list[Event]:
    """What the factors have to tell, in the order of the experts."""
    tokens = stats["tokens"].flatten().tolist()
    blind = torch.cat([factor.blind for factor in factors])
    dead = torch.cat([factor.dead for factor in factors]) & ~blind[:, None]
    damp = torch.cat([factor.damp for factor in factors]).tolist()
    names = (
        [label]
        if stats["hessian"].dim() == 2
        else [f"{label}: expert {stats.first + i}" for i in range(len(damp))]
    )
    events = [
        Event(
            "no_tokens",
            f"{names[i]}: {tokens[i]} tokens with inputs, rounded to nearest",
            value=stats.first + i,
        )
        for i in blind.nonzero().flatten().tolist()
    ]
    if count := int(dead.sum()):
        text = f"{label}: {count} of {dead.numel()} inputs were always zero, their weights are too"
        events.append(Event("dead_inputs", text, value=count))
    for name, final in zip(names, damp, strict=True):
        if final > options.damp:
            text = f"{name}: damping grew from {options.damp:g} to {final:g} of the mean diagonal"
            events.append(Event("damping_grew", text, value=final))
    return events


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of codes, scales, zero points and shapes."""
    return predicted_bytes(shapes, dtype, options)


def problem(shapes: Mapping[str, tuple[int, ...]], options: Options) -> str | None:
    """The group size must divide the inputs."""
    return group_problem(shapes, options)
