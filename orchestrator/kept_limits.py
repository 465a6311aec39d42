"""What refining may make of a study's plan: nothing that the study ruled out.

A refiner makes the KL smaller within a number of bytes and knows of nothing else. A study may have
chosen its plan for more: ``tune.constraints`` say what a plan may have at most, and where the KL is
among them the study made something else as small as it could (:class:`Limits`), which refining must
not undo. So a refiner gets no more bytes than that leaves, and of the plans that it found one is
only taken if the figures that are limited were looked at again: bytes of the files, the KL on the
text that trials were judged on, the time of a token, measured as a trial's is.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moesaic.methods.base import Event
from moesaic.orchestrator.limits import UNITS, Limits
from moesaic.orchestrator.plan_losses import PlanRuns
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.study_terms import rungs
from moesaic.search.base import Plan

if TYPE_CHECKING:
    from moesaic.orchestrator.pipeline import Pipeline


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
    """

    def __init__(self, pipeline: "Pipeline", limits: Limits, best: Told) -> None:
        self.pipeline = pipeline
        self.most = dict(limits.limits)
        if limits.first != "kl":
            self.most[limits.first] = best.figures[limits.first]
        self.most_bytes = int(self.most["bytes"]) if "bytes" in self.most else None
        self._runs = PlanRuns(pipeline.experiment, pipeline.pool, pipeline.view)
        self._left_out: list[str] = []

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan's files fit the recipe's budget, and nothing is beyond its limit."""
        pieces, mixtures = self.pipeline.planned.of(plan.units)
        size = self.pipeline.piece_bytes(pieces, mixtures)
        if not self.pipeline.fits(plan, size):
            return False
        for name, value in self._figures(size, plan):
            if not value <= self.most[name]:  # one that is no number is beyond any limit
                self._left_out.append(f"{name} {value:.6g} of {self.most[name]:.6g} {UNITS[name]}")
                return False
        return True

    def release(self) -> None:
        """Has workers let go of what they hold for that."""
        self._runs.release()

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

    def _figures(self, size: int, plan: Plan) -> Iterator[tuple[str, float]]:
        """The figures that have a limit, the cheapest to know first."""
        stage, plans = "refined plan", {"": plan.units}
        if "bytes" in self.most:
            yield "bytes", float(size)
        if "kl" in self.most:
            # In the parts that trials see, whose results are known of the trial's own plan.
            parts = rungs(self.pipeline.experiment)
            yield "kl", self._runs.losses(stage, plans, parts)[""]
        if "latency" in self.most:
            # By one worker, as a study alone on a machine is timed.
            yield "latency", self._runs.latencies(stage, plans)[""]
