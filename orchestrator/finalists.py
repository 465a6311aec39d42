"""Plans that trust predictions more or less, measured on calibration text before one is taken.

What bits cost, what a reduction (fewer experts, narrower parts) costs and what a correction gains
are all predicted, but not equally well. A reduction changes a layer's output by more than a
second-order estimate is good for; a correction gains so little that it drowns in what the estimate
is wrong by. So the search is made several times: with reductions charged once, twice and four times
what was predicted for them, and not offered at all; and each of these without corrections as well.
The plans that come out are really run on some of the calibration text, and the one that is nearest
to the dense model is taken. Held-out text plays no part.

A plan with corrections is taken only where it is nearer by more than the sample could feign: by
twice the standard error of the difference, sequence by sequence. Otherwise the best plan without
them is, so that on other text, too, corrections hardly ever make a plan worse.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.methods.base import is_repair
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.worker import plain
from moesaic.search.base import Measurement, Plan, Problem

Choices = Mapping[str, Sequence[Measurement]]

# Factors on the predicted losses of reductions; None does without them.
CHARGES: tuple[float | None, ...] = (1.0, 2.0, 4.0, None)
# Finalists are run on so many parts of the calibration text, of so many sequences each.
_PARTS, _SEQUENCES = 4, 8
# Standard errors by which a plan with corrections must be better than one without.
_SURE = 2.0


def variants(problem: Problem) -> dict[str, Problem]:
    """The problem with some things dearer or not offered, by name; first as it was given."""
    reduces = any(a.prefix for alternatives in problem.banks.values() for a in alternatives)
    found = {}
    for offered, corrections in ((problem, []), (uncorrected(problem), ["without corrections"])):
        for charge in CHARGES if reduces else CHARGES[:1]:
            if offered is None:
                continue
            price = "without reductions" if charge is None else f"reductions × {charge:g}"
            name = ", ".join([price] * reduces + corrections)
            found[name or "as offered"] = charged(offered, charge)
    return found


def uncorrected(problem: Problem) -> Problem | None:
    """The problem without the chains that end in a correction.

    None where there are none, or where that leaves nothing for some choice.
    """
    dropped = 0

    def left(choices: Choices) -> Choices:
        nonlocal dropped
        found = {}
        for name, measured in choices.items():
            found[name] = [m for m in measured if not (m.chain and is_repair(m.chain[-1].method))]
            dropped += len(measured) - len(found[name])
        return found

    choices = left(problem.choices)
    banks = {
        bank: [replace(a, choices=left(a.choices)) for a in alternatives]
        for bank, alternatives in problem.banks.items()
    }
    every = [choices, *(a.choices for alternatives in banks.values() for a in alternatives)]
    if not dropped or not all(measured for each in every for measured in each.values()):
        return None
    return replace(problem, choices=choices, banks=banks)


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


def taken(plans: Mapping[str, Plan], losses: Mapping[str, Sequence[float]]) -> str:
    """Name of the plan that is taken.

    Args:
        plans: by name.
        losses: name → what :func:`divergences` found.
    """

    def best(names: Iterable[str]) -> str:
        return min(names, key=lambda name: (np.mean(losses[name]), plans[name].bytes))

    first = best(plans)
    plain = [name for name, plan in plans.items() if not corrects(plan)]
    if first in plain or not plain:
        return first
    other = best(plain)
    gained = np.subtract(losses[other], losses[first])
    error = gained.std(ddof=1) / np.sqrt(len(gained)) if len(gained) > 1 else np.inf
    return first if gained.mean() > _SURE * error else other


def corrects(plan: Plan) -> bool:
    """Whether some choice ends in a correction."""
    return any(chain and is_repair(chain[-1].method) for chain in plan.units.values())


def divergences(
    experiment: Experiment, pool: Pool, view: View, plans: Mapping[str, Mapping[str, str]]
) -> dict[str, list[float]]:
    """What a search makes small, for each of some sequences of the calibration text: KL to the
    dense model in nats per token, or an encoder's distance of embeddings. What was measured before
    is known.

    Args:
        plans: name → unit → file of its piece.
    """
    store, judge = experiment.store, experiment.calibration_judge
    count = len(experiment.calibration.ids)
    starts = [part * count // _PARTS for part in range(_PARTS)] + [count]
    bounds = zip(starts, starts[1:], strict=False)
    rows = [(low, min(low + _SEQUENCES, high)) for low, high in bounds if high > low]
    family = experiment.model.family
    each = 1 if family.is_encoder else experiment.calibration.ids.shape[1] - 1

    def key(pieces: Mapping[str, str]) -> str:
        made_of = judge.key({unit: Path(path).stem for unit, path in pieces.items()})
        return digest(["finalist by sequence", made_of, rows])

    known = {name: store.get_json("scores", key(pieces)) for name, pieces in plans.items()}
    missing = [name for name, value in known.items() if value is None]
    view.stage("finalists", len(plans), len(plans) - len(missing))
    sums: dict[str, dict[int, Sequence[float]]] = {name: {} for name in missing}

    def task(name: str, part: tuple[int, int]) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            sums[name][part[0]] = result[family.yardstick.loss.key]
            if len(sums[name]) == len(rows):
                known[name] = [value / each for row, _ in rows for value in sums[name][row]]
                store.put_json("scores", key(plans[name]), known[name])
                view.advance("finalists")
            return ()

        arguments = {"judge": plain(judge), "rows": part, "pieces": dict(plans[name])}
        return Task("evaluate:evaluate_rows", arguments, f"{name} {part[0]}", done=done)

    if missing:
        remember_dense(pool, view, judge, rows)
        pool.run([task(name, part) for name in missing for part in rows], view.tick)
    return {name: [float(v) for v in values] for name, values in known.items() if values}
