"""What is told of refining a plan: while it goes on, and afterwards."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.orchestrator.console import View
from moesaic.search.refining import SLOPE_PASSES, Answer, Batch, Text


@dataclass(frozen=True)
class Moment:
    """Where a refiner stood after some of its requests were answered.

    Attributes:
        step: generations or steps that were done.
        evaluations: plans run on a block of the text so far.
        tokens: that were predicted for that; one whose slopes were taken counts as four.
        kl: of the best plan that saw the whole text.
    """

    step: int
    evaluations: int
    tokens: int
    kl: float


@dataclass(frozen=True)
class Stage:
    """What one refiner did.

    Attributes:
        method: its name.
        start_kl: of the plan that it was given, on the whole text.
        kl: of the plan that it left.
        steps: generations or steps.
        evaluations, tokens: see :class:`Moment`.
        seconds: of this run; what an earlier one found out took it hardly any.
        trace: in order of time.
    """

    method: str
    start_kl: float
    kl: float
    steps: int
    evaluations: int
    tokens: int
    seconds: float
    trace: Sequence[Moment]

    @property
    def change(self) -> float:
        """Of the KL, relative to what it was; 0 where there was none."""
        return _change(self.start_kl, self.kl)

    def text(self) -> str:
        """For people, a line."""
        if self.start_kl <= 0:
            return f"{self.method}: the plan loses nothing on this text: nothing to refine"
        rate = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.method}: KL {self.start_kl:.4g} → {self.kl:.4g}"
            f" ({self.change:+.1%}) in {self.steps} steps,"
            f" {self.evaluations:,} evaluations, {self.tokens:,} tokens, {self.seconds:.1f} s"
            f" ({rate:,.0f} tokens/s)"
        )


@dataclass(frozen=True)
class Refinement:
    """How a plan was refined.

    Attributes:
        sequences: of calibration text that plans were compared on.
        length: tokens predicted in each.
        stages: refiner by refiner.
    """

    sequences: int
    length: int
    stages: Sequence[Stage]

    @property
    def start_kl(self) -> float:
        return self.stages[0].start_kl

    @property
    def kl(self) -> float:
        return self.stages[-1].kl

    @property
    def change(self) -> float:
        """As :attr:`Stage.change`, of all stages together."""
        return _change(self.start_kl, self.kl)

    def in_plan(self) -> dict[str, Any]:
        """For ``plan.json``: what is the same however often it was begun."""
        return {
            "sequences": self.sequences,
            "start_kl": self.start_kl,
            "stages": [
                {"method": s.method, "kl": s.kl, "steps": s.steps, "evaluations": s.evaluations}
                for s in self.stages
            ],
        }

    def to_json(self) -> dict[str, Any]:
        """For ``refine.json``: all of it."""
        stages = [
            {
                "method": s.method,
                "start_kl": s.start_kl,
                "kl": s.kl,
                "steps": s.steps,
                "evaluations": s.evaluations,
                "tokens": s.tokens,
                "seconds": round(s.seconds, 3),
                "trace": [[m.step, m.evaluations, m.tokens, m.kl] for m in s.trace],
            }
            for s in self.stages
        ]
        return {"sequences": self.sequences, "tokens_per_sequence": self.length, "stages": stages}

    def metrics(self) -> dict[str, float]:
        """For MLflow."""
        found = {"refine.start_kl": self.start_kl, "refine.kl": self.kl}
        for number, s in enumerate(self.stages, start=1):
            name = f"refine.{number}-{s.method}"
            found |= {f"{name}.kl": s.kl, f"{name}.seconds": s.seconds}
            found |= {f"{name}.evaluations": s.evaluations, f"{name}.tokens": s.tokens}
        return found


def _change(before: float, after: float) -> float:
    return after / before - 1 if before > 0 else 0.0


class Watch:
    """Follows a refiner, and shows it as a stage of the view.

    What is counted there are generations or steps; where the text that may be run is bounded, it is
    the sequences of it, because the generations are then as many as it is enough for.

    Args:
        tokens: predicted in each sequence.
        passes: times that the whole text may be run, if that is bounded.

    Attributes:
        start_kl: of the plan that it was given.
    """

    def __init__(
        self, method: str, view: View, text: Text, tokens: int, passes: float | None = None
    ) -> None:
        self.method = method
        self.view = view
        self.text = text
        self.tokens_each = tokens
        self.sequences = None if passes is None else int(passes * text.total)
        self.started = time.monotonic()
        self.start_kl = math.nan
        self.step = self.steps = self.evaluations = self.tokens = 0
        self.trace: list[Moment] = []
        self._opened = False

    def asked(self, batch: Batch) -> None:
        """What a refiner wants, and how far it has come."""
        if not self._opened:
            self._opened = True
            self.steps = batch.steps
            self.view.stage(self.method, self.sequences or batch.steps)
        self._reached(batch.step)
        if batch.best is not None:
            self._best(batch.best)

    def worked(self, peak_bytes: int) -> None:
        """A worker has answered."""
        self.view.advance(self.method, 0, peak_bytes)

    def told(self, batch: Batch, answers: Sequence[Answer]) -> None:
        """What it was told."""
        for request, answer in zip(batch.requests, answers, strict=True):
            self.evaluations += 1
            passes = SLOPE_PASSES if request.slopes else 1
            self.tokens += passes * len(answer.kl) * self.tokens_each
            if self.sequences is not None:
                self.view.advance(self.method, passes * len(answer.kl))
        if batch.best is None:  # the first batch is the start alone, on all of the text
            values = [value for answer in answers for value in answer.kl]
            self.start_kl = float(np.mean(values))
            self._best(self.start_kl)

    def stage(self, kl: float, begun: bool = True) -> Stage:
        """What there is to tell in the end.

        Args:
            begun: whether a generation or step was under way, which is done then.
        """
        if begun:
            self._reached(min(self.step + 1, self.steps))
        self._best(kl)
        self.view.finish(self.method)
        seconds = time.monotonic() - self.started
        return Stage(
            self.method,
            self.start_kl,
            kl,
            self.step,
            self.evaluations,
            self.tokens,
            seconds,
            tuple(self.trace),
        )

    def _reached(self, step: int) -> None:
        if step > self.step:
            if self.sequences is None:
                self.view.advance(self.method, step - self.step)
            self.step = step

    def _best(self, kl: float) -> None:
        better = not self.trace or kl < self.trace[-1].kl
        self.trace.append(Moment(self.step, self.evaluations, self.tokens, kl))
        if better:
            seconds = time.monotonic() - self.started
            self.view.line(
                f"{self.method} {self.step}: KL {kl:.4g}, {self.evaluations:,} evaluations,"
                f" {self.tokens:,} tokens, {seconds:.1f} s"
            )
