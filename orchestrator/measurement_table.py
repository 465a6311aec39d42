"""``measurements.parquet``: every unit under every candidate, as data."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moesaic.methods.base import Unit, chain_text, reducing
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.files import write_atomically
from moesaic.orchestrator.results import Table
from moesaic.search.base import Measurement


def write_measurements(experiment: Experiment, table: Table, file: Path) -> None:
    """Writes what was measured, a row for each choice and candidate, reductions first."""
    owners = {c.name: (unit, c) for unit in experiment.units for c in choices(unit)}
    predicted = experiment.model.family.yardstick.predicted
    rows = []
    shaping = experiment.shaping
    for (owner, prefix), m in table.reductions.items():
        units = shaping.units_of(owner)
        weights = sum(shaping.reduced(unit, prefix).parameters for unit in units)
        rows.append(_row(m, units[0], weights, predicted))
    for m in table.measurements:
        unit, choice = owners[m.unit]
        shaped = shaping.reduced(unit, reducing(m.chain)[0])
        out, inputs = shaped.shapes[choice.member][-2:]
        rows.append(_row(m, unit, out * inputs, predicted))
    written = pa.Table.from_pylist(rows)
    write_atomically(file, lambda p: pq.write_table(written, p))


def _row(found: Measurement, unit: Unit, weights: int, predicted: str) -> dict[str, Any]:
    """A row; ``weights`` is how many the bytes stand for, ``predicted`` the name of the loss's
    column."""
    return {
        "unit": found.unit,
        "block": unit.block,
        "part": unit.part,
        "chain": chain_text(found.chain),
        "specs": json.dumps([spec.to_json() for spec in found.chain]),
        "bytes": found.bytes,
        "bits_per_weight": found.bytes * 8 / weights,
        "error": found.error,
        predicted: found.score,
        "seconds": found.seconds,
        "events": json.dumps(dict(found.events)),
    }
