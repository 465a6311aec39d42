"""What refining may make of a study's plan: nothing that the study ruled out.

A refiner makes the KL smaller within a number of bytes and knows of nothing else. A study may have
chosen its plan for more: ``tune.constraints`` say what a plan may have at most, and where the KL is
among them the study made something else as small as it could (:class:`Limits`), which refining must
not undo. So a refiner gets no more bytes than that leaves, and of the plans that it found one is
only taken if the figures that are limited were looked at again: bytes of the files, the KL on the
text that trials were judged on, the time of a token, measured as a trial's is.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moesaic.methods.base import Event
from moesaic.orchestrator.experiment import plain
from moesaic.orchestrator.limits import UNITS, Limits
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.mixtures import Mixtures
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.resident import trial_key
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.study_terms import rungs
from moesaic.search.base import Plan

if TYPE_CHECKING:
    from moesaic.orchestrator.pipeline import Pipeline

Pieces = Mapping[str, str]


class KeptLimits:
    """Tells which plans keep to what a study kept to.

    Args:
        pipeline: whose plans they are.
        limits: of the study.
        best: the trial whose plan is refined.

    Attributes:
        most: figure → the most that a plan may have.
        most_bytes: that a refiner may give a plan, or as many as the trial's plan has: it counts
            headers of files at their bound. None where the recipe's budget alone limits it.
        working: whether a worker was asked for anything.
    """

    def __init__(self, pipeline: "Pipeline", limits: Limits, best: Told) -> None:
        self.pipeline = pipeline
        self.most = dict(limits.limits)
        if limits.first != "kl":
            self.most[limits.first] = best.figures[limits.first]
        self.most_bytes = int(self.most["bytes"]) if "bytes" in self.most else None
        self.working = False
        self._left_out: list[str] = []

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan's files fit the recipe's budget, and nothing is beyond its limit."""
        pieces, mixtures = self.pipeline.planned.of(plan.units)
        size = self.pipeline.piece_bytes(pieces, mixtures)
        if not self.pipeline.fits(plan, size):
            return False
        for name, value in self._figures(size, pieces, mixtures):
            if value > self.most[name]:
                self._left_out.append(f"{name} {value:.6g} of {self.most[name]:.6g} {UNITS[name]}")
                return False
        return True

    def events(self, kept: bool) -> list[Event]:
        """What there is to tell when refining is done.

        Args:
            kept: whether the study's plan is left as it was.
        """
        if not self._left_out:
            return []
        count = len(self._left_out)
        end = ": the study's plan is kept" if kept else ""
        message = (
            f"{count} plan(s) of less KL are beyond what the study keeps to, the best of them with"
            f" {self._left_out[0]}{end}"
        )
        return [Event("refined_beyond_limits", message, "plan", float(count))]

    def _figures(
        self, size: int, pieces: Pieces, mixtures: Mixtures
    ) -> Iterator[tuple[str, float]]:
        """The figures that have a limit, the cheapest to know first."""
        if "bytes" in self.most:
            yield "bytes", float(size)
        if "kl" in self.most:
            yield "kl", self._kl(pieces, mixtures)
        if "latency" in self.most:
            yield "latency", self._latency(pieces, mixtures)

    def _kl(self, pieces: Pieces, mixtures: Mixtures) -> float:
        """Nats per token on the text of the trials, found out as theirs is."""
        experiment = self.pipeline.experiment
        judge, parts = experiment.calibration_judge, rungs(experiment)
        found: list[float] = []
        for rows in parts:
            key = trial_key(judge, rows, pieces)
            known = experiment.store.get_json("scores", key)
            if known is None:
                remember_dense(self.pipeline.pool, self.pipeline.view, judge, [rows])
                arguments = {"rows": rows, "total": parts[-1][1], "sparing": True}
                known = self._ask("resident:evaluate_plan", pieces, mixtures, arguments)["kl"]
                experiment.store.put_json("scores", key, known)
            found += known
        tokens = int(experiment.calibration.ids.shape[1]) - 1
        return math.fsum(found) / (len(found) * tokens)

    def _latency(self, pieces: Pieces, mixtures: Mixtures) -> float:
        """Milliseconds per token. Kept, so that who was killed goes on with the same."""
        experiment = self.pipeline.experiment
        plan = trial_key(experiment.calibration_judge, (0, 0), pieces)
        key = digest(["latency", plan, describe_machine(), code_digest("orchestrator/latency.py")])
        known = experiment.store.get_json("scores", key)
        if known is None:
            told = self._ask("latency:measure_plan", pieces, mixtures, {})
            known = told["milliseconds"]
            experiment.store.put_json("scores", key, known)
        return float(known)

    def _ask(
        self, function: str, pieces: Pieces, mixtures: Mixtures, more: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """What a worker answers; the first one, which a study alone on a machine is timed by."""
        answers: list[Mapping[str, Any]] = []

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            answers.append(result)
            return ()

        arguments = {
            "judge": plain(self.pipeline.experiment.calibration_judge),
            "pieces": dict(pieces),
            "mixtures": dict(mixtures),
            **more,
        }
        self.working = True
        task = Task(function, arguments, "refined plan", affinity=0, done=done)
        self.pipeline.pool.run([task], self.pipeline.view.tick)
        return answers[0]
