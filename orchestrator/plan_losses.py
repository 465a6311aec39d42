"""KL of plans to the dense model on calibration text, and their latency, by workers that keep the
model.

What was measured is in the store under what it consists of, so that nobody measures it again.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moesaic.methods.base import Chain
from moesaic.orchestrator.choices import Chosen, choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.mixtures import Mixtures
from moesaic.orchestrator.plan_pieces import PlanPieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Tune
from moesaic.orchestrator.refine import release
from moesaic.orchestrator.resident import Rows, trial_key
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.worker import plain

# Unit and chain.
Swap = tuple[str, Chain]


def swap_losses(
    experiment: Experiment, pool: Pool, view: View, swaps: Sequence[Swap]
) -> dict[Swap, float]:
    """KL with one unit under one chain and all others dense."""
    # Later units first: what comes before them is computed once and kept.
    order = sorted(swaps, key=lambda swap: -experiment.space.by_name[swap[0]].block)
    plans: dict[Swap, Chosen] = {
        (unit, chain): {choice.name: chain for choice in choices(experiment.space.by_name[unit])}
        for unit, chain in order
    }
    return plan_losses(experiment, pool, view, "swaps", plans)


def sliced_loss(
    experiment: Experiment, pool: Pool, view: View, parts: Sequence[Rows] | None = None
) -> float:
    """KL with nothing compressed: what making the whole model narrower loses; 0 where it is not.

    Args:
        parts: as :meth:`PlanRuns.losses`.
    """
    if experiment.cut is None:
        return 0.0
    return plan_losses(experiment, pool, view, "sliced", {"": {}}, parts)[""]


def judged_rows(experiment: Experiment) -> Rows:
    """The sequences of the calibration text that plans are run on: as many as ``tune`` takes."""
    section = experiment.recipe.tune or Tune()
    return 0, min(section.sequences, len(experiment.calibration.ids))


def plan_losses(
    experiment: Experiment,
    pool: Pool,
    view: View,
    stage: str,
    plans: Mapping[Any, Chosen],
    parts: Sequence[Rows] | None = None,
) -> dict[Any, float]:
    """As :meth:`PlanRuns.losses`; workers let go of the model when it is done."""
    runs = PlanRuns(experiment, pool, view)
    found = runs.losses(stage, plans, parts)
    runs.release()
    return found


class PlanRuns:
    """Has plans run by workers that keep the model from one to the next.

    Attributes:
        working: whether a worker was asked for anything and may hold the model.
    """

    def __init__(self, experiment: Experiment, pool: Pool, view: View) -> None:
        self.experiment = experiment
        self.pool = pool
        self.view = view
        self.working = False
        self._finder = PlanPieces(experiment, experiment.walk)

    def losses(
        self,
        stage: str,
        plans: Mapping[Any, Chosen],
        parts: Sequence[Rows] | None = None,
        failed: Callable[[Any, str], None] | None = None,
    ) -> dict[Any, float]:
        """KL of plans to the dense model on calibration text, in nats per token.

        Each plan is run by whatever worker is free, and remembered when it is done.

        Args:
            stage: name of the progress bar.
            plans: name → its choices; units without one stay dense.
            parts: of the text, that results are kept for one by one; by default there is one.
            failed: told the name of a plan that cannot be run, and why; it is left out then.
                Without it that ends all.
        """
        experiment, judge = self.experiment, self.experiment.calibration_judge
        store, spans = experiment.store, parts or [judged_rows(experiment)]
        made = {name: self._finder.of(chosen) for name, chosen in plans.items()}
        keys = {
            name: [trial_key(judge, rows, pieces) for rows in spans]
            for name, (pieces, _) in made.items()
        }
        known: dict[str, list[float]] = {}
        for key in dict.fromkeys(key for own in keys.values() for key in own):
            found = store.get_json("scores", key)
            if found is not None:
                known[key] = found
        todo = {
            key: (name, rows)
            for name, own in keys.items()
            for key, rows in zip(own, spans, strict=True)
            if key not in known
        }
        given_up: dict[str, str] = {}  # key → why
        self.view.stage(stage, len(known) + len(todo), len(known))

        def task(key: str, name: Any, rows: Rows) -> Task:
            def done(result: Mapping[str, Any]) -> Iterable[Task]:
                known[key] = result["kl"]
                store.put_json("scores", key, result["kl"])
                self.view.advance(stage, 1, result["peak_bytes"])
                return ()

            def give_up(kind: str, reason: str) -> Iterable[Task]:
                given_up[key] = f"{kind}: {reason}"
                self.view.advance(stage)
                return ()

            arguments = {"rows": rows, "total": spans[-1][1], **self._arguments(*made[name])}
            ended = None if failed is None else give_up
            return Task("resident:evaluate_plan", arguments, stage, done=done, failed=ended)

        if todo:
            remember_dense(self.pool, self.view, judge, spans)
            self._run([task(key, *about) for key, about in todo.items()])
        tokens = sum(high - low for low, high in spans) * (experiment.calibration.ids.shape[1] - 1)
        losses = {}
        for name, own in keys.items():
            why = next((given_up[key] for key in own if key in given_up), None)
            if why is None:
                losses[name] = math.fsum(kl for key in own for kl in known[key]) / tokens
            elif failed is not None:
                failed(name, why)
        return losses

    def latencies(
        self,
        stage: str,
        plans: Mapping[Any, Chosen],
        slots: int | None = 1,
        failed: Callable[[Any, str], None] | None = None,
    ) -> dict[Any, float]:
        """Milliseconds per token of plans, as those of trials are measured. Kept, so that who was
        killed goes on with the same.

        Args:
            slots: workers that time plans at the same time, which disturb each other; all, if None.
            failed: told the name of a plan that cannot be timed, and why; without it that ends all.
        """
        store, judge = self.experiment.store, self.experiment.calibration_judge
        made = {name: self._finder.of(chosen) for name, chosen in plans.items()}
        code = code_digest("orchestrator/latency.py")
        found: dict[Any, float] = {}

        def task(slot: int, name: Any, key: str) -> Task:
            def done(result: Mapping[str, Any]) -> Iterable[Task]:
                found[name] = result["milliseconds"]
                store.put_json("scores", key, found[name])
                return ()

            def given_up(kind: str, reason: str) -> Iterable[Task]:
                assert failed is not None, "given to the pool only then"
                failed(name, f"{kind}: {reason}")
                return ()

            return Task(
                "latency:measure_plan",
                self._arguments(*made[name]),
                stage,
                affinity=slot,
                done=done,
                failed=None if failed is None else given_up,
            )

        todo: dict[Any, str] = {}
        for name, (pieces, _) in made.items():
            plan = trial_key(judge, (0, 0), pieces)
            key = digest(["latency", plan, describe_machine(), code])
            known = store.get_json("scores", key)
            if known is None:
                todo[name] = key
            else:
                found[name] = float(known)
        if todo:
            most = min(slots or self.pool.size, self.pool.size)
            self._run([task(n % most, *about) for n, about in enumerate(todo.items())])
        return found

    def release(self) -> None:
        """Has workers let go of the model, where they hold it."""
        if self.working:
            release(self.pool)
            self.working = False

    def _arguments(self, pieces: Mapping[str, str], mixtures: Mixtures) -> dict[str, Any]:
        """What workers are told of a plan."""
        judge = plain(self.experiment.calibration_judge)
        return {"judge": judge, "pieces": dict(pieces), "mixtures": dict(mixtures)}

    def _run(self, tasks: Sequence[Task]) -> None:
        self.working = True
        self.pool.run(tasks, self.view.tick)
