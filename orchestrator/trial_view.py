"""What a person sees of a study while it goes on: the best trial, the front, pace, failures."""

import math
import time
from collections.abc import Sequence

from moesaic.orchestrator.console import View
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.trial_failures import Failures

_STAGE = "trials"
# Of a front, as many members are named; trials may be short, so it is told from time to time.
_NAMED = 4
_FRONT_SECONDS = 10.0


class TrialView:
    """Shows a study as a stage of the view.

    Args:
        limits: of the study, which say what is the best.
        failures: what went wrong so far.

    Attributes:
        finished: trials that were told since it was opened.
        best: the best trial so far, within the recipe's budget.
        front: what no trial beats, with several objectives.
    """

    def __init__(self, view: View, limits: Limits, failures: Failures) -> None:
        self.view = view
        self.limits = limits
        self.failures = failures
        self.finished = 0
        self.best: Told | None = None
        self.front: list[Told] = []
        self._front_is_new, self._front_told = False, -math.inf
        self._started = time.monotonic()
        # The figure that the KL is set against in a front.
        self._other = next((name for name in limits.objectives if name != "kl"), "")

    def open(self, wanted: int, known: Sequence[Told], front: Sequence[Told]) -> None:
        """Before the first trial.

        Args:
            wanted: trials that there are to be in the end.
            known: those of earlier runs, whose failures count among the wanted ones.
            front: of these.
        """
        for trial in known:
            self._ranks(trial)
            if trial.state == "failed":
                self.failures.reasons[str(trial.attributes.get("reason", "unknown"))] += 1
        self.front = self._sorted(front)
        self.view.stage(_STAGE, wanted, len(known))

    def begin(self, timeout: float | None) -> None:
        """The first trial may begin, and none that many seconds later."""
        self._started = time.monotonic()
        if timeout is not None:
            self.view.limit(_STAGE, timeout)

    def told(self, told: Told, front: Sequence[Told]) -> None:
        """One more was told.

        Args:
            front: with it.
        """
        self.finished += 1
        self.view.advance(_STAGE)
        if self._ranks(told):
            self.view.line(f"{_described(told)}, the best so far; {self._pace()}")
        before, self.front = self.front, self._sorted(front)
        self._front_is_new |= [t.number for t in before] != [t.number for t in self.front]
        if time.monotonic() - self._front_told >= _FRONT_SECONDS:
            self._tell_front()

    def worked(self, peak_bytes: int) -> None:
        """A worker has answered."""
        self.view.advance(_STAGE, 0, peak_bytes)

    def tick(self, running: list[str]) -> None:
        """From time to time."""
        self.view.tick([*self._state(), self._pace()])

    def close(self) -> None:
        """After the last one."""
        self._tell_front()
        self.view.finish(_STAGE, self._state())
        if self.finished:
            best = "" if self.best is None else f", best {_described(self.best)}"
            self.view.line(f"trials: {self._pace()}{best}")
        for reason, count in self.failures.reasons.most_common():
            self.view.line(f"failed ×{count}: {reason}")

    def _tell_front(self) -> None:
        """A line with some members, if it is another one than was told."""
        if not self._front_is_new:
            return
        picked = _spread(self.front, _NAMED)
        members = ", ".join([self._member(picked[0], True), *map(self._member, picked[1:])])
        self.view.line(f"front of {len(self.front)}: {members}")
        self._front_is_new, self._front_told = False, time.monotonic()

    def _ranks(self, told: Told) -> bool:
        """Whether a trial is the best so far."""
        if not self.limits.better(told, self.best):
            return False
        self.best = told
        return True

    def _pace(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        failed = f", {self.failures.count} failed" if self.failures.count else ""
        return f"{self.finished / max(minutes, 1e-9):.1f} trials/min{failed}"

    def _state(self) -> list[str]:
        """What was found so far."""
        told = [] if self.best is None else [f"best {self.best.kl:.4g} (trial {self.best.number})"]
        if self.front:
            ends = " … ".join(map(self._member, _spread(self.front, 2)))
            told.append(f"front {len(self.front)} ({ends})")
        return told

    def _sorted(self, front: Sequence[Told]) -> list[Told]:
        return sorted(front, key=lambda trial: trial.figures[self._other])

    def _member(self, trial: Told, first: bool = False) -> str:
        value, kl = trial.figures[self._other], trial.figures["kl"]
        text = f"{int(value):,}" if self._other == "bytes" else f"{value:.4g}"
        unit = "bytes" if self._other == "bytes" else "ms/token"
        return f"{text} {unit} → KL {kl:.4g}" if first else f"{text} → {kl:.4g}"


def _spread(members: Sequence[Told], most: int) -> list[Told]:
    """So many of them at most, both ends included."""
    last = len(members) - 1
    picked = {round(last * n / max(1, most - 1)) for n in range(most)}
    return [members[n] for n in sorted(picked)]


def _described(told: Told) -> str:
    """A complete trial in a few words."""
    start = told.attributes.get("start")
    figures = told.figures
    timed = f", {figures['latency']:.4g} ms/token" if "latency" in figures else ""
    name = f" ({start})" if start else ""
    size = int(figures["bytes"])
    return f"trial {told.number}{name}: KL {told.kl:.4g}, {size:,} bytes{timed}"
