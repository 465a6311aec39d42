"""Failed trials of a study: counted by their reasons; several of a kind in a row end it."""

from collections import Counter

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.loop import WORKER_DIED

NO_PLAN, NOT_FINITE = "no plan", "not finite"
# Failures of one kind, one after another, that end a study.
_STREAK = 3
_ADVICE = {
    WORKER_DIED: "it probably ran out of memory: fewer workers (compute.workers), or fewer"
    " sequences (calibration.length, tune.sequences)",
    "MemoryError": "fewer workers (compute.workers), or fewer sequences (tune.sequences)",
    "OutOfMemoryError": "fewer workers per GPU, or fewer sequences (tune.sequences)",
    "FileNotFoundError": "a piece is gone: run the same command again, it is made anew",
    NOT_FINITE: "the budget ruins the model: give more, or fix a knob (tune.knobs)",
}


class Failures:
    """What went wrong so far.

    Attributes:
        reasons: reason → how many trials failed for it.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._streak: list[str] = []

    @property
    def count(self) -> int:
        """Failed trials."""
        return self.reasons.total()

    def succeeded(self) -> None:
        """A trial went well."""
        self._streak = []

    def happened(self, kind: str, reason: str) -> None:
        """Some trials of one plan failed.

        Raises:
            RunError: that was several times of the same kind one after another.
        """
        if kind == NO_PLAN:
            return
        self._streak = [*(k for k in self._streak if k == kind), kind]
        if len(self._streak) >= _STREAK:
            advice = _ADVICE.get(kind, "--debug shows more; finished trials are kept")
            raise RunError(f"{_STREAK} trials in a row failed: {reason}: {advice}")
