"""What came out of measuring: the table that searches read, expert loads, events."""

import math
from dataclasses import dataclass

from moesaic.methods.base import Event, Unit
from moesaic.orchestrator.calibrate import Walk
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.measure import to_measurements
from moesaic.orchestrator.stages import finished_entries
from moesaic.orchestrator.statistics import load_stats
from moesaic.search.base import Budget, Measurement, Problem


@dataclass(frozen=True)
class Table:
    """All measurements of an experiment, and what happened while they were made."""

    measurements: list[Measurement]
    load: dict[int, list[int]]
    events: list[Event]


def measurements(experiment: Experiment) -> Table:
    """Reads what was measured: per unit its offers, and the unit left as it is."""
    walk = experiment.walk
    keys = {
        (unit.name, chain): experiment.key(unit.name, chain, walk)
        for unit in experiment.units
        for chain in experiment.offers[unit.name]
    }
    pieces = finished_entries(experiment, "pieces", keys.values())
    errors = finished_entries(experiment, "errors", keys.values())
    tokens = experiment.gradient_tokens()
    found: list[Measurement] = []
    for block in range(experiment.model.blocks):
        gradients = None
        if walk.gradients:
            path = experiment.store.path("gradients", walk.gradients_key(block))
            gradients = load_stats(path)
        for unit in (u for u in experiment.units if u.block == block):
            for chain in experiment.offers[unit.name]:
                key = keys[unit.name, chain]
                found += to_measurements(unit, chain, pieces[key], errors[key], gradients, tokens)
            found += _dense(experiment, unit, None if gradients is None else 0.0)
    load, events = expert_load(experiment, walk)
    return Table(found, load, events)


def _dense(experiment: Experiment, unit: Unit, score: float | None) -> list[Measurement]:
    """The choice to leave a unit as it is.

    A bank can only be left as a whole; where nothing ties its experts, that is not offered.
    """
    if unit.kind == "bank" and experiment.mixed_banks:
        return []
    size = {m: math.prod(shape) * experiment.dtype.itemsize for m, shape in unit.shapes.items()}
    return [
        Measurement(
            choice.name,
            (),
            size[choice.member] // (unit.shapes[choice.member][0] if unit.kind == "bank" else 1),
            0.0,
            score,
            0.0,
        )
        for choice in choices(unit)
    ]


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
        load[unit.block] = entry.metadata["routed"][unit.sites["gate"]]
        for member in ("gate", "down"):
            counts = entry.metadata["tokens"][unit.sites[member]]
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
    allowed = {*experiment.recipe.candidates, ()} if candidates_only else None
    offers: dict[str, list[Measurement]] = {
        choice.name: [] for unit in experiment.units for choice in choices(unit)
    }
    for measurement in table.measurements:
        if allowed is None or measurement.chain in allowed:
            offers[measurement.unit].append(measurement)
    return Problem(offers, experiment.ties(), budget or experiment.budget)
