"""What came out of measuring: the table that searches read, expert loads, events."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moesaic.methods.base import Chain, Event, Unit, reducing
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.entry_metadata import expert_counts, told_by
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.measure import to_measurements
from moesaic.orchestrator.narrowing import read_narrowed
from moesaic.orchestrator.reduction_entries import Reduced
from moesaic.orchestrator.reductions import read_reduction
from moesaic.orchestrator.stages import finished_entries, finished_pieces
from moesaic.orchestrator.statistics import BLOCK, load_stats
from moesaic.orchestrator.walk import Walk
from moesaic.search.base import Alternative, Budget, Layer, Measurement, Problem


@dataclass(frozen=True)
class Table:
    """All measurements of an experiment, and what happened while they were made.

    Attributes:
        measurements: of every choice under every chain.
        reductions: (bank or part, reducers) → what the reduction by itself takes and loses: bytes
            of what it holds besides its members, against the bank as it is.
        load: block → tokens routed to each expert.
        events: in order of time.
        influence: block → mean of 1 − cos between hidden states before and after it.
    """

    measurements: list[Measurement]
    reductions: dict[tuple[str, Chain], Measurement]
    load: dict[int, list[int]]
    events: list[Event]
    influence: dict[int, float]


def measurements(experiment: Experiment) -> Table:
    """Reads what was measured: per unit its offers, and the unit left as it is."""
    walk = experiment.walk
    keys = {
        (unit.name, chain): experiment.key(unit.name, chain, walk)
        for unit in experiment.units
        for chain in experiment.offers[unit.name]
    }
    pieces = finished_pieces(experiment, keys.values())
    errors = finished_entries(experiment, "errors", keys.values())
    tokens = experiment.gradient_samples()
    found: list[Measurement] = []
    reductions: dict[tuple[str, Chain], Measurement] = {}
    for block in range(experiment.model.blocks):
        gradients = None
        if walk.gradients and experiment.recipe.chains():
            path = experiment.store.path("gradients", walk.gradients_key(block))
            gradients = load_stats(path)
        reduced: dict[tuple[str, Chain], Reduced] = {}
        for unit in (u for u in experiment.units if u.block == block):
            owner = experiment.shaping.owners.get(unit.name, unit.name)
            for chain in experiment.offers[unit.name]:
                key, prefix = keys[unit.name, chain], reducing(chain)[0]
                own, slopes = unit, gradients
                if prefix:
                    if (owner, prefix) not in reduced:
                        reduced[owner, prefix] = _reduced(experiment, unit, prefix, walk)
                    left = reduced[owner, prefix]
                    own = left.shaped(unit.name)
                    slopes = None if gradients is None else left.gradients(gradients, unit.name)
                with told_by(pieces[key]) as told:
                    _ = [told["bytes"][member] for member in own.shapes]
                found += to_measurements(own, chain, pieces[key], errors[key], slopes, tokens)
            found += _dense(experiment, unit, None if gradients is None else 0.0)
        for (owner, prefix), left in reduced.items():
            loss = None if gradients is None else left.loss(gradients, tokens)
            reductions[owner, prefix] = _reduction(experiment, owner, prefix, left, loss)
    load, events = expert_load(experiment, walk)
    return Table(found, reductions, load, events, _influence(experiment, walk))


def _influence(experiment: Experiment, walk: Walk) -> dict[int, float]:
    found = {}
    if not experiment.recipe.chains():  # the text did not pass: there is nothing to choose
        return dict.fromkeys(range(experiment.model.blocks), 0.0)
    for block in range(experiment.model.blocks):
        path = experiment.store.path("stats", walk.stats_key(block))
        sums = load_stats(path, BLOCK.__eq__)[BLOCK]
        found[block] = float(sums["turn"] / sums["tokens"])
    return found


def _reduced(experiment: Experiment, unit: Unit, prefix: Chain, walk: Walk) -> Reduced:
    """What reducers left of a bank, or of a linear's part."""
    key = experiment.reduction_key(unit.name, prefix, walk)
    part, store = experiment.shaping.part(unit.name), experiment.store
    found: Reduced | None = (
        read_reduction(store, key, unit) if part is None else read_narrowed(store, key, part)
    )
    if found is None:
        raise RunError(f"{unit.name}: its reduction is gone; run the same command again")
    if part is not None:
        with told_by(found.entry) as told:
            _ = told["tokens"]
    return found


def _reduction(
    experiment: Experiment, owner: str, prefix: Chain, reduced: Reduced, loss: float | None
) -> Measurement:
    shaping = experiment.shaping
    return Measurement(
        unit=owner,
        chain=prefix,
        bytes=sum(shaping.side_bytes(unit, prefix) for unit in shaping.units_of(owner)),
        error=reduced.relative_error,
        score=loss,
        seconds=reduced.seconds,
        events=dict(Counter(event.kind for event in reduced.events)),
    )


def _dense(experiment: Experiment, unit: Unit, score: float | None) -> list[Measurement]:
    """The choice to leave a unit as it is, where there is that choice."""
    if not experiment.space.may_stay_dense(unit):
        return []
    return [
        Measurement(name, (), size, 0.0, score, 0.0)
        for name, size in _dense_bytes(experiment, unit).items()
    ]


def _dense_bytes(experiment: Experiment, unit: Unit) -> dict[str, int]:
    """Choice of a unit → what it holds as it is."""
    size = {m: math.prod(shape) * experiment.dtype.itemsize for m, shape in unit.shapes.items()}
    return {
        choice.name: size[choice.member]
        // (unit.shapes[choice.member][0] if unit.kind == "bank" else 1)
        for choice in choices(unit)
    }


def expert_load(experiment: Experiment, walk: Walk) -> tuple[dict[int, list[int]], list[Event]]:
    """Block → tokens routed to each expert, and an event for every site with starved experts."""
    load: dict[int, list[int]] = {}
    events: list[Event] = []
    for unit in experiment.units:
        if unit.kind != "bank":
            continue
        entry = experiment.store.get("stats", walk.stats_key(unit.block))
        if entry is None:
            continue
        experts = unit.shapes["gate"][0]
        with told_by(entry) as told:
            load[unit.block] = expert_counts(told, "routed", unit.sites["gate"], experts)
            seen = {
                member: expert_counts(told, "tokens", unit.sites[member], experts)
                for member in ("gate", "down")
            }
        for member, counts in seen.items():
            width = unit.shapes[member][-1]
            starved = [index for index, count in enumerate(counts) if count < width]
            if starved:
                least = min(starved, key=lambda index: counts[index])
                events.append(
                    Event(
                        "few_tokens",
                        f"{len(starved)} of {len(counts)} experts saw fewer tokens than the"
                        f" {width} inputs of {member}_proj (expert {least}: {counts[least]})",
                        unit.name,
                        float(len(starved)),
                    )
                )
    return load, events


def problem(
    experiment: Experiment,
    table: Table,
    candidates_only: bool = True,
    budget: Budget | None = None,
) -> Problem:
    """The measurements as a search wants them.

    Args:
        candidates_only: leave out chains that only baselines use.
        budget: another one than the recipe's.
    """
    candidates = {chain for unit in experiment.units for chain in experiment.space.candidates(unit)}
    allowed = {*candidates, ()} if candidates_only else None
    offers: dict[str, list[Measurement]] = {}
    reduced: dict[Chain, dict[str, list[Measurement]]] = {}
    for measurement in table.measurements:
        if allowed is None or measurement.chain in allowed:
            prefix, rest = reducing(measurement.chain)
            own = reduced.setdefault(prefix, {}) if prefix else offers
            found = replace(measurement, chain=rest)
            own.setdefault(measurement.unit, []).append(found)
    banks: dict[str, list[Alternative]] = {}
    for owner, units in experiment.space.owners(candidates_only).items() if reduced else ():
        banks[owner] = [
            _alternative(experiment, table, owner, units, prefix, reduced.get(prefix, offers))
            for prefix in experiment.space.prefixes(units, candidates_only)
        ]
        for choice in (choice for unit in units for choice in choices(unit)):
            offers.pop(choice.name, None)
    return Problem(
        offers,
        experiment.space.ties(),
        budget or experiment.budget,
        banks,
        one_form=not experiment.space.mixed_banks,
        layers={
            name: Layer(size, table.influence[unit.block])
            for unit in experiment.units
            for name, size in _dense_bytes(experiment, unit).items()
        },
    )


def _alternative(
    experiment: Experiment,
    table: Table,
    owner: str,
    units: Sequence[Unit],
    prefix: Chain,
    offers: Mapping[str, list[Measurement]],
) -> Alternative:
    shaped = [experiment.shaping.reduced(unit, prefix) for unit in units]
    names = [choice.name for unit in shaped for choice in choices(unit)]
    own = table.reductions.get((owner, prefix))
    return Alternative(
        prefix=prefix,
        form=experiment.shaping.form(units[0], prefix),
        bytes=0 if own is None else own.bytes,
        loss=0.0 if own is None else own.loss,
        choices={name: offers[name] for name in names},
    )
