"""KL of plans to the dense model on calibration text, by workers that keep the model.

What was measured is in the store under what it consists of, so that nobody measures it again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moesaic.methods.base import Chain
from moesaic.orchestrator.choices import Chosen, choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment, plain
from moesaic.orchestrator.plan_pieces import PlanPieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Tune
from moesaic.orchestrator.resident import trial_key
from moesaic.orchestrator.stages import remember_dense

# Unit and chain.
Swap = tuple[str, Chain]


def swap_losses(
    experiment: Experiment, pool: Pool, view: View, swaps: Sequence[Swap]
) -> dict[Swap, float]:
    """KL with one unit under one chain and all others dense."""
    # Later units first: what comes before them is computed once and kept.
    order = sorted(swaps, key=lambda swap: -experiment.by_name[swap[0]].block)
    plans: dict[Swap, Chosen] = {
        (unit, chain): {choice.name: chain for choice in choices(experiment.by_name[unit])}
        for unit, chain in order
    }
    return plan_losses(experiment, pool, view, "swaps", plans)


def judged_rows(experiment: Experiment) -> tuple[int, int]:
    """The sequences of the calibration text that plans are run on: as many as ``tune`` takes."""
    section = experiment.recipe.tune or Tune()
    return 0, min(section.sequences, len(experiment.calibration.ids))


def plan_losses(
    experiment: Experiment,
    pool: Pool,
    view: View,
    stage: str,
    plans: Mapping[Any, Chosen],
) -> dict[Any, float]:
    """KL of plans to the dense model on calibration text, in nats per token.

    Each plan is run by whatever worker is free, and remembered when it is done.

    Args:
        stage: name of the progress bar.
        plans: name → its choices; units without one stay dense.
    """
    store, judge, rows = experiment.store, experiment.calibration_judge, judged_rows(experiment)
    finder = PlanPieces(experiment, experiment.walk)
    made = {name: finder.of(chosen) for name, chosen in plans.items()}
    keys = {name: trial_key(judge, rows, pieces) for name, (pieces, _) in made.items()}
    known: dict[str, list[float]] = {}
    for key in dict.fromkeys(keys.values()):
        found = store.get_json("scores", key)
        if found is not None:
            known[key] = found
    todo = {key: name for name, key in keys.items() if key not in known}
    view.stage(stage, len(known) + len(todo), len(known))

    def task(key: str, name: Any) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            known[key] = result["kl"]
            store.put_json("scores", key, result["kl"])
            view.advance(stage, 1, result["peak_bytes"])
            return ()

        pieces, mixtures = made[name]
        arguments = {
            "judge": plain(judge),
            "rows": rows,
            "pieces": pieces,
            "mixtures": mixtures,
            "total": rows[1],
        }
        return Task("resident:evaluate_plan", arguments, stage, done=done)

    if todo:
        remember_dense(pool, view, judge, [rows])
        pool.run([task(key, name) for key, name in todo.items()], view.tick)
        pool.run(
            [Task("resident:release", {}, "release", affinity=n) for n in range(pool.size)],
            view.tick,
        )
    tokens = (rows[1] - rows[0]) * (experiment.calibration.ids.shape[1] - 1)
    return {name: math.fsum(known[key]) / tokens for name, key in keys.items()}
