"""Chains of compressions: what may follow what, what it takes, and how one link is applied.

Without the reducers that change its layer a chain is a compression and what comes after it:

- a method with ``compress``, which takes dense weights;
- after one that leaves factors of low rank, a quantizer, which rounds the factors, and the base
  that a bank's experts may share;
- last, a method with ``repair``, which adds a correction of low rank to whatever is there.

A repair straight after a reducer that merges is such a chain, too: what it corrects are the merged
experts, towards each of the old ones (:mod:`moesaic.methods.stand_ins`).

Each link takes what the chain before it left, which is a result of its own and made once. Chains
that differ only in the rank of a last link that can be cut are made at once, at the largest rank.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import delta, dense, lowrank, residual
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import (
    Chain,
    Event,
    Result,
    Spec,
    Stats,
    compressing,
    is_ranked,
    is_reducer,
    is_repair,
    is_whole,
    link_module,
    merge_of,
    method_module,
    options_of,
    reducers_of,
    reducing,
    repair_module,
)
from moesaic.methods.factors import (
    factor_bytes,
    factor_problem,
    is_quantizer,
    leaves_factors,
    quantize_factors,
    quantize_shared,
)
from moesaic.methods.low_rank import (
    ABOVE_BREAK_EVEN,
    Rank,
    above_dense,
    rank_errors,
    resolved_rank,
)
from moesaic.methods.stand_ins import is_merger, mergers, stand_in_bytes

Shapes = Mapping[str, tuple[int, ...]]


def order_problem(chain: Chain) -> str | None:
    """Why these methods cannot follow one another, in one line; None if they can."""
    first, rest = reducers_of(chain), compressing(chain)
    if any(is_reducer(spec.method) for spec in rest):
        return "methods that reduce experts come first in a chain"
    if len(first) > 1:
        return "a chain reduces experts once, not twice"
    for index, spec in enumerate(rest):
        if is_repair(spec.method):
            if index == 0 and not first:
                return (
                    f"{spec.method} corrects what a compression or a merger left: put it after one"
                )
            if index == 0 and not is_merger(first[0].method):
                return (
                    f"{spec.method} cannot follow {first[0].method}, which leaves no stand-in for"
                    f" every expert to be corrected from: merge ({', '.join(mergers())}), or put a"
                    " compression between the two"
                )
            if index + 1 < len(rest):
                return f"{spec.method} comes last in a chain"
        elif index > 0 and not _rounds_factors(rest[: index + 1]):
            return (
                f"{spec.method} cannot follow {rest[index - 1].method}: one compression per chain,"
                " unless a quantizer rounds factors of low rank"
            )
    return None


def _rounds_factors(chain: Chain) -> bool:
    """Whether the last link of a chain is a quantizer of the factors that the one before left."""
    if len(chain) < 2 or not is_quantizer(chain[-1].method):
        return False
    return leaves_factors(chain[-2].method)


def rowwise(chain: Chain) -> bool:
    """Whether the units of one site may take the last link together."""
    return not chain or link_module(chain[-1].method).ROWWISE


def needs(chain: Chain) -> frozenset[str]:
    """Statistics of inputs and outputs that the links want."""
    return frozenset().union(*(link_module(spec.method).NEEDS for spec in compressing(chain)))


def refits(chain: Chain) -> bool:
    """Whether a link wants to know what the dense model's inputs are, beside those that it gets
    from compressed predecessors."""
    return any(getattr(spec.parsed(), "refit", False) for spec in chain)


def for_banks(chain: Chain) -> list[str]:
    """The methods of a chain that reduces nothing which work on banks alone."""
    if reducing(chain)[0]:
        return []
    return [spec.method for spec in chain if _scope(spec) == {"bank"}]


def _scope(spec: Spec) -> frozenset[str]:
    return frozenset({"bank"}) if is_reducer(spec.method) else link_module(spec.method).SCOPE


def ties_experts(chain: Chain) -> bool:
    """Whether the experts of a bank share parts of what is stored: all take the chain or none."""
    return bool(merge_of(chain)) or any(is_whole(spec.method) for spec in chain)


def misfit(kind: str, shapes: Shapes, chain: Chain) -> str | None:
    """Why a unit of this kind and shape cannot be compressed so, in one line; None if it can."""
    for index, spec in enumerate(chain):
        if kind not in _scope(spec):
            return f"{spec.method} does not work on a {kind}"
        if is_reducer(spec.method):
            continue
        module = link_module(spec.method)
        if _rounds_factors(chain[: index + 1]):
            before = chain[index - 1]
            reason = factor_problem(
                shapes, _rank(before), is_whole(before.method), spec.method, spec.parsed()
            )
        else:
            reason = module.problem(shapes, spec.parsed())
        if reason is not None:
            return reason
    return None


def has_rank(spec: Spec) -> bool:
    """Whether the result of a link is, or holds, factors of low rank."""
    return "rank" in options_of(spec.method).model_fields


def predict_bytes(shapes: Shapes, dtype: torch.dtype, chain: Chain, stand_ins: int = 0) -> int:
    """Bytes of members of these shapes after a chain of at least one link, exactly.

    Args:
        stand_ins: experts that a merger leaves to be corrected, where the chain begins so.
    """
    size = 0
    for index, spec in enumerate(chain):
        if is_reducer(spec.method):
            size += stand_in_bytes(shapes, dtype, spec, stand_ins)
        elif _rounds_factors(chain[: index + 1]):
            before = chain[index - 1]
            size = factor_bytes(
                shapes, _rank(before), is_whole(before.method), dtype, spec.method, spec.parsed()
            )
        else:
            size += link_module(spec.method).predict_bytes(shapes, dtype, spec.parsed())
    return size


def _rank(spec: Spec) -> Rank:
    rank: Rank = dict(spec.parsed())["rank"]
    return rank


def apply_link(
    chain: Chain,
    weights: Mapping[str, Tensor],
    before: Mapping[str, CompressedTensor],
    stats: Mapping[str, Stats],
) -> Result:
    """The members as a chain leaves them; the empty one leaves them as they are.

    Args:
        weights: the dense members.
        before: what the chain without its last link left; not looked at if that is empty. Of a
            merger alone these are its experts in the places of the old ones.
        stats: of the members' inputs.

    Raises:
        ValueError: a weight or a statistic is NaN or infinite.
    """
    if not chain:
        return Result({name: dense.pack(weight) for name, weight in weights.items()})
    spec = chain[-1]
    options = spec.parsed()
    if is_repair(spec.method):
        return repair_module(spec.method).repair(weights, before, stats, options)
    if _rounds_factors(chain):
        if is_whole(chain[-2].method):
            return quantize_shared(spec.method, weights, before, stats, options)
        return quantize_factors(spec.method, before, stats, options)
    return method_module(spec.method).compress(weights, stats, options)


def can_be_cut(chain: Chain) -> bool:
    """Whether the result of a chain is that of a larger rank, cut."""
    return bool(chain) and is_ranked(chain[-1].method)


def but_for_rank(chain: Chain) -> Hashable:
    """What chains that differ in the rank of a last link that can be cut have in common."""
    options = json.loads(chain[-1].options)
    del options["rank"]
    return chain[:-1], chain[-1].method, json.dumps(options, sort_keys=True)


@dataclass(frozen=True)
class Family:
    """Chains of one unit that are cuts of the largest.

    Attributes:
        largest: the chain to be made.
        ranks: every chain, the largest among them → member → rank.
    """

    largest: Chain
    ranks: Mapping[Chain, Mapping[str, int]]


def families(chains: Iterable[Chain], shapes: Shapes) -> list[Family]:
    """Chains that can be cut, by what they are cut from.

    They differ in the rank of the last link alone, and no member has a larger rank than in the
    largest.
    """
    alike: dict[Hashable, dict[Chain, dict[str, int]]] = {}
    for chain in chains:
        rank = _rank(chain[-1])
        ranks = {member: resolved_rank(shape, rank) for member, shape in shapes.items()}
        alike.setdefault(but_for_rank(chain), {})[chain] = ranks
    found: list[Family] = []
    for left in alike.values():
        while left:
            largest = max(left, key=lambda chain: sum(left[chain].values()))
            most = left[largest]
            own = {c: r for c, r in left.items() if all(r[m] <= most[m] for m in most)}
            found.append(Family(largest, own))
            left = {c: r for c, r in left.items() if c not in own}
    return found


def cut_events(events: Iterable[Event], cut: Mapping[str, CompressedTensor]) -> list[Event]:
    """What there is to tell of the members of a chain, given what was told of the largest of its
    family: they may be smaller than the dense weights where that is not."""
    return [event for event in events if event.kind != ABOVE_BREAK_EVEN] + above_dense(cut)


def cut_errors(
    weight: Tensor, made: CompressedTensor, hessian: Tensor, ranks: Sequence[int]
) -> Tensor:
    """Squared output error of every row for several ranks of one tensor, at once.

    Args:
        weight: ``[*batch, out, in]``.
        made: factors of low rank, or corrections of low rank on a base.
        hessian: Σ x xᵀ ``[*batch, in, in]``.

    Returns:
        float64 ``[len(ranks), *batch, out]``.
    """
    base = None
    if made.format in ("residual", "delta"):
        inner, made = (residual if made.format == "residual" else delta).members(made)
        base = inner.effective().expand(weight.shape)
    left, right = (factor.dense() for factor in lowrank.factors(made))
    return rank_errors(weight, left, right, hessian, ranks, base)
