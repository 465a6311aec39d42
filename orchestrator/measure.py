"""Measuring: every unit compressed by every candidate, once, into the store.

A *job* is all units of one block that read the same site, with all chains that are still missing:
they share the statistics and their factorisation. A finished pair of unit and chain is an entry
``pieces`` (the compressed tensors) and an entry ``errors`` (the error of every output row); both
are named by the digest of what went into them, so that a search never waits for a compression that
was done before, by whatever run (:mod:`moesaic.orchestrator.compression` makes them). Chains that
begin with a reducer are jobs of their own, one per reduction, which is made once (see
:mod:`moesaic.orchestrator.reductions`); those that correct what a merger left work on the bank as
it is, and take from it what they correct.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from moesaic.methods import chains as links
from moesaic.methods.base import (
    OUTPUT_STATISTICS,
    Chain,
    Spec,
    Stats,
    Unit,
    compressing,
    merge_of,
    of_dense_model,
    reducers_of,
    reducing,
)
from moesaic.methods.reduction import reducer_module
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.compression import Bench, Members
from moesaic.orchestrator.expert_statistics import expert_site
from moesaic.orchestrator.narrowing import block_parts, narrowed_part
from moesaic.orchestrator.passes import solved_at_a_time
from moesaic.orchestrator.reductions import ReducedBank, reduced_bank
from moesaic.orchestrator.shared import fetched, open_store
from moesaic.orchestrator.source_statistics import loss_shares
from moesaic.orchestrator.statistics import SEPARATOR, SiteStats, load_stats
from moesaic.orchestrator.store import Entry, code_digest, digest
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes
from moesaic.search.base import Measurement

# Unit → (chain as (method, options) pairs, key of its entries).
Pairs = Mapping[str, Sequence[tuple[Sequence[tuple[str, str]], str]]]


@dataclass(frozen=True)
class Job:
    """Units of one site and the chains that each still needs; plain data for workers.

    A part has two sites; who comes first makes its reduction, and two that come at once both do, to
    the same bytes.

    Attributes:
        units: names, in model order.
        missing: unit → [(chain as (method, options) pairs, key of its entries)].
        stages: the same of shorter chains that the missing ones start from.
        stats: file of the block's statistics.
        gradients: file of what its reverse pass left, if the chains want some of it.
        reduction: key of the entry that all the chains begin with, if they reduce the one unit or
            correct what a merger leaves of it, or reduce the part that the units belong to.
        part: name of that part; empty for a bank.
        dense_stats: file of the block's statistics over the dense model, where ``stats`` are over
            compressed predecessors and the chains want both.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    block: int
    units: tuple[str, ...]
    missing: Pairs
    stages: Pairs
    stats: str
    store: str
    reduction: str | None = None
    part: str = ""
    gradients: str | None = None
    dense_stats: str | None = None


def needs(chains: Sequence[Chain]) -> tuple[str, ...]:
    """Statistics that the chains want, and those that every measurement wants.

    Where experts are reduced, how like they are is part of the report.
    """
    wanted = {"tokens", "hessian"}
    for chain in chains:
        for spec in reducers_of(chain):
            wanted |= reducer_module(spec.method).NEEDS | {"cosine", "all_tokens"}
        wanted |= links.needs(compressing(chain)) - OUTPUT_STATISTICS.keys()
    return tuple(sorted(wanted))


def piece_key(
    fingerprint: str, unit: str, chain: Chain, stats_key: str, gradients_key: str = ""
) -> str:
    """Digest of everything that a piece and its errors depend on.

    Args:
        gradients_key: of what the reverse pass left, if the chain wants some of it.
    """
    return digest(
        {
            "model": fingerprint,
            "unit": unit,
            "chain": [[spec.method, spec.options] for spec in chain],
            "stats": stats_key,
            **({"gradients": gradients_key} if gradients_key else {}),
            "code": code_digest(
                "kernels",
                "methods",
                "orchestrator/compression.py",
                "orchestrator/measure.py",
                "orchestrator/narrowing.py",
                "orchestrator/reduction_entries.py",
                "orchestrator/reductions.py",
            ),
        }
    )


def compress_job(state: WorkerState, job: dict[str, Any]) -> dict[str, Any]:
    """Compresses what the job lacks, writes the entries.

    Returns:
        ``measured``: [(unit, key, seconds)] and ``peak_bytes``.
    """
    plan = Job(**job)
    model = state.model(plan.model, plan.dtype, plan.trust_remote_code)
    units = [unit for unit in model.units() if unit.name in plan.units]
    part = next((p for p in block_parts(model) if p.name == plan.part), None)
    used = [*units, *(part.units.values() if part is not None else ())]
    sites = {site for unit in used for site in unit.sites.values()}
    stats = load_stats(Path(plan.stats), lambda site: site in sites)
    if plan.dense_stats is not None:
        for site, dense in load_stats(Path(plan.dense_stats), lambda site: site in sites).items():
            stats[site].sums |= {
                of_dense_model(name): dense[name] for name in ("tokens", "hessian")
            }
    slopes: SiteStats = {}
    if plan.gradients is not None:
        own = {f"{unit.name}{SEPARATOR}{member}" for unit in units for member in unit.shapes}
        slopes = load_stats(Path(plan.gradients), lambda name: name in own)
    weights: dict[str, Mapping[str, Tensor]] = {}
    side: Mapping[str, Tensor] = {}
    merged: Members = {}
    if plan.reduction is None or merge_of(_first(plan)):
        weights = {unit.name: model.read_unit(unit) for unit in units}
        if plan.reduction is not None:
            (unit,) = units
            found = _reduced(plan, model, unit).stand_ins()
            merged = {f"{unit.name}{SEPARATOR}{member}": own for member, own in found.items()}
    elif part is not None:
        store, prefix = open_store(plan.store), reducers_of(_first(plan))
        narrowed = narrowed_part(store, plan.reduction, model, part, prefix, stats)
        units = [narrowed.shaped(unit.name) for unit in units]
        weights = {unit.name: {"weight": narrowed.linears[unit.name].weight} for unit in units}
        # Units of one site lose the same inputs.
        stats = {
            unit.sites["weight"]: narrowed.linears[unit.name].narrow_inputs(
                stats[unit.sites["weight"]]
            )
            for unit in units
        }
        slopes = {
            name: own
            for unit in (plan.units if slopes else ())
            for name, own in narrowed.gradients(slopes, unit).items()
        }
    else:
        (unit,) = units
        bank = _reduced(plan, model, unit)
        units, weights, side = [bank.unit], {unit.name: bank.members}, bank.side
        stats = bank.merged_inputs(stats)
        slopes = bank.gradients(slopes, unit.name) if slopes else {}
    experts = _experts_at_a_time(state, units, weights, stats)
    if not experts:
        weights = {
            name: {member: value.to(state.device) for member, value in members.items()}
            for name, members in weights.items()
        }
        _move(stats, state.device)
        _move(slopes, state.device)
    bench = Bench(
        store=open_store(plan.store),
        units=units,
        weights=weights,
        side=side,
        sites=stats,
        stats=_member_stats(units, stats, slopes),
        stages=_without_reducers(plan.stages),
        device=state.device,
        experts=experts,
        merged=merged,
    )
    measured = bench.run(_without_reducers(plan.missing))
    return {"measured": measured, "peak_bytes": peak_memory_bytes()}


def _experts_at_a_time(
    state: WorkerState,
    units: Sequence[Unit],
    weights: Mapping[str, Mapping[str, Tensor]],
    stats: Mapping[str, Stats],
) -> int:
    """How many experts of a bank are solved at a time; 0 where all that there is fits."""
    own = sum(stats[site].nbytes for site in {s for unit in units for s in unit.sites.values()})
    dense = sum(value.nbytes for members in weights.values() for value in members.values())
    return solved_at_a_time(units, dense, own, state.device, state.room)


def _chain(specs: Iterable[tuple[str, str]]) -> Chain:
    return tuple(Spec(method, options) for method, options in specs)


def _without_reducers(pairs: Pairs) -> dict[Chain, dict[str, str]]:
    """Chain after the links that reduce → unit → key."""
    found: dict[Chain, dict[str, str]] = {}
    for name, wanted in pairs.items():
        for specs, key in wanted:
            chain = reducing(_chain(specs))[1]
            found.setdefault(chain, {})[name] = key
    return found


def _member_stats(
    units: Sequence[Unit], stats: Mapping[str, Stats], slopes: Mapping[str, Stats]
) -> dict[str, Stats]:
    """``unit|member`` → what its methods get: the site's statistics, shared by its members.

    Where what the reverse pass left of a member is wanted too, it is an object of its own, which
    shares the sums but nothing that is derived from them.
    """
    found = {f"{u.name}{SEPARATOR}{m}": stats[site] for u in units for m, site in u.sites.items()}
    for name, own in slopes.items():
        found[name] = Stats({**found[name].sums, **own.sums})
    return found


def _move(stats: Mapping[str, Stats], device: str) -> None:
    for entry in stats.values():
        entry.sums = {name: value.to(device) for name, value in entry.sums.items()}


def _first(plan: Job) -> Chain:
    """One of the chains of a job, which all begin with the same reducers."""
    return _chain(next(iter(plan.missing.values()))[0][0])


def _reduced(plan: Job, model: StreamedModel, unit: Unit) -> ReducedBank:
    assert plan.reduction is not None, "the job is about a reduction"
    site = expert_site(unit.name)
    stats = load_stats(Path(plan.stats), lambda name: name == site)[site]
    store = open_store(plan.store)
    return reduced_bank(store, plan.reduction, model, unit, reducers_of(_first(plan)), stats)


def read_errors(path: Path) -> dict[str, Tensor]:
    """All tensors of an ``errors`` entry."""
    # A table reads thousands of these small files: to map each takes three times as long.
    found: dict[str, Tensor] = safetensors.torch.load(fetched(path).read_bytes())
    return found


def predicted_losses(
    errors: Mapping[str, Tensor],
    gradients: Mapping[str, Stats] | None,
    unit: Unit,
    all_tokens: int,
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Errors and predicted losses of a finished pair, member by member.

    The loss is the second-order estimate of the KL to the dense model, in nats per token:

        ½ · Σ_rows E[g²] · E[(Δw·x)²]

    with the output gradient g and the input x taken as independent (K-FAC, Martens & Grosse 2015,
    section 3, with the diagonal of the gradients' factor). Expectations are over the tokens that a
    member saw; for an expert the share of tokens routed to it is a further factor.

    Args:
        errors: of an ``errors`` entry, as :func:`read_errors` has them.
        gradients: ``unit|member`` → sums, or None where none were collected.
        unit: the unit.
        all_tokens: tokens of the reverse pass; a member that is not an expert saw them all.

    Returns:
        member → (Σ‖ΔW x‖², Σ‖W x‖², predicted loss or None), float64 ``[*batch]`` each.
    """
    found = {}
    for member in unit.shapes:
        error = errors[f"error|{member}"].double()  # [*batch, out]
        norm = errors[f"norm|{member}"].double()
        loss = None
        if gradients is not None:
            # Σg² over all tokens of the reverse pass: the share routed here is included.
            squares = gradients[f"{unit.name}|{member}"]["grad_sq"].double() / all_tokens
            tokens = errors[f"tokens|{member}"].double().clamp_min(1)
            loss = 0.5 * (squares * error / tokens[..., None]).sum(-1)
        found[member] = (error.sum(-1), norm.sum(-1), loss)
    return found


def to_measurements(
    unit: Unit,
    chain: Chain,
    piece: Entry,
    errors: Entry,
    gradients: Mapping[str, Stats] | None,
    all_tokens: int,
) -> list[Measurement]:
    """What a search needs to know of a finished pair: one measurement per choice of the unit.

    Events are told with the first choice, so that their sum is right.
    """
    rows = read_errors(errors.path)
    losses = predicted_losses(rows, gradients, unit, all_tokens)
    shares = loss_shares(rows, gradients, unit)
    counts: dict[str, int] = {}
    for event in piece.metadata["events"]:
        counts[event["kind"]] = counts.get(event["kind"], 0) + 1
    found: list[Measurement] = []
    wanted = choices(unit)
    for choice in wanted:
        index = () if choice.expert is None else choice.expert
        error, norm, loss = losses[choice.member]
        slices = 1 if choice.expert is None else unit.shapes[choice.member][0]
        share, over = divmod(int(piece.metadata["bytes"][choice.member]), slices)
        found.append(
            Measurement(
                unit=choice.name,
                chain=chain,
                # What the experts of a bank share is no multiple of them.
                bytes=share + ((choice.expert or 0) < over),
                error=float(error[index]) / max(float(norm[index]), 1e-30),
                score=None if loss is None else float(loss[index]),
                seconds=float(piece.metadata["seconds"]) / len(wanted),
                events={} if found else counts,
                norm=float(norm[index]),
                shares=tuple(shares[choice.member][index].tolist()) if shares else (),
            )
        )
    return found
