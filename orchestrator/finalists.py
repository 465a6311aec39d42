"""Plans that trust reductions more or less, measured on calibration text before one is taken.

What bits cost and what a reduction costs are both predicted, but not equally well: a reduction
changes a layer's output by more than a second-order estimate is good for. So a search over both
is made several times, with the reductions charged once, twice and four times what was predicted
for them, and not offered at all; the plans that come out are really run on some of the calibration
text, and the one with the least KL to the dense model is taken. Held-out text plays no part.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment, plain
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import digest
from moesaic.search.base import Problem

# Factors on the predicted losses of reductions; None does without them.
CHARGES: tuple[float | None, ...] = (1.0, 2.0, 4.0, None)
# Finalists are run on so many parts of the calibration text, of so many sequences each.
_PARTS, _SEQUENCES = 4, 8


def charged(problem: Problem, charge: float | None) -> Problem:
    """The problem with reductions at another price. A bank that cannot do without keeps them."""
    banks = {}
    for bank, alternatives in problem.banks.items():
        whole = [a for a in alternatives if not a.prefix]
        factor = 1.0 if charge is None else charge
        banks[bank] = (
            whole
            if charge is None and whole
            else [replace(a, loss=a.loss * factor) for a in alternatives]
        )
    return replace(problem, banks=banks)


def divergences(
    experiment: Experiment, pool: Pool, view: View, plans: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    """KL to the dense model on calibration text, nats per token; what was measured before is known.

    Args:
        plans: name → unit → file of its piece.
    """
    store, judge = experiment.store, experiment.calibration_judge
    count = len(experiment.calibration.ids)
    starts = [part * count // _PARTS for part in range(_PARTS)] + [count]
    bounds = zip(starts, starts[1:], strict=False)
    rows = [(low, min(low + _SEQUENCES, high)) for low, high in bounds if high > low]
    length = experiment.calibration.ids.shape[1] - 1
    tokens = length * sum(high - low for low, high in rows)

    def key(pieces: Mapping[str, str]) -> str:
        made_of = judge.key({unit: Path(path).stem for unit, path in pieces.items()})
        return digest(["finalist", made_of, rows])

    known = {name: store.get_json("scores", key(pieces)) for name, pieces in plans.items()}
    missing = [name for name, value in known.items() if value is None]
    view.stage("finalists", len(plans), len(plans) - len(missing))
    sums: dict[str, dict[int, float]] = {name: {} for name in missing}

    def task(name: str, part: tuple[int, int]) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            sums[name][part[0]] = sum(result["kl"])
            if len(sums[name]) == len(rows):
                known[name] = sum(sums[name][row] for row, _ in rows) / tokens
                store.put_json("scores", key(plans[name]), known[name])
                view.advance("finalists")
            return ()

        arguments = {"judge": plain(judge), "rows": part, "pieces": dict(plans[name])}
        return Task("evaluate:evaluate_rows", arguments, f"{name} {part[0]}", done=done)

    if missing:
        remember_dense(pool, view, judge, rows)
        pool.run([task(name, part) for name in missing for part in rows], view.tick)
    return {name: float(value) for name, value in known.items() if value is not None}
