"""Failed trials of a study: counted by their reasons; several of a kind in a row end it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.loop import WORKER_DIED
from moesaic.orchestrator.study import Told

NO_PLAN, NOT_FINITE = "no plan", "not finite"
# Failures of one kind, one after another, that end a study.
_STREAK = 3
_ADVICE = {
    WORKER_DIED: "it probably ran out of memory: fewer workers (compute.workers), or fewer"
    " sequences (calibration.length, tune.sequences)",
    "MemoryError": "fewer workers (compute.workers), or fewer sequences (tune.sequences)",
    "OutOfMemoryError": "fewer workers per GPU, or fewer sequences (tune.sequences)",
    "FileNotFoundError": "a piece is gone: run the same command again, it is made anew",
    NO_PLAN: "allow more values of the knobs (tune.knobs), or give a larger budget",
    NOT_FINITE: "the budget ruins the model: give more, or fix a knob (tune.knobs)",
}


def advice(reasons: Iterable[str], otherwise: str) -> str:
    """What to do where all trials failed for these reasons."""
    kinds = {reason.split(":")[0] for reason in reasons}
    return _ADVICE.get(kinds.pop(), otherwise) if len(kinds) == 1 else otherwise


def why_none(told: Sequence[Told], limits: Limits, timeout: float | None) -> str:
    """Why none of the finished trials can be taken, and what to do.

    Args:
        told: none of them counts and keeps to the limits.
        timeout: seconds after which none was begun.
    """
    if not told and timeout is not None:
        return f"none was begun in the {timeout:g} s that --timeout gives: give more"
    near = limits.nearest(told)
    if near:
        return f"{near}: allow more, or ask for more trials (--trials)"
    complete = sum(trial.state == "complete" for trial in told)
    if complete:
        return (
            f"all {complete} that are complete are larger than the budget: let the knobs reach"
            " smaller plans (tune.knobs), or give a larger budget"
        )
    reasons = dict.fromkeys(str(t.attributes.get("reason", t.state)) for t in told)
    why = "; ".join(list(reasons)[:3]) or "none was made"
    return f"{why}: {advice(reasons, 'ask for more (--trials)')}"


class Failures:
    """What went wrong so far.

    That values lead to no plan within the budget costs no time, and with some values it may be so
    while others do well. It ends a study only if values that the sampler drew lead to none three
    times in a row, and no trial before had one.

    Attributes:
        reasons: reason → how many trials failed for it.
        planned: whether any trial of the study had a plan.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.planned = False
        self._streak: list[str] = []
        self._unplanned = 0

    @property
    def count(self) -> int:
        """Failed trials."""
        return self.reasons.total()

    def succeeded(self) -> None:
        """A trial went well."""
        self._streak = []

    def happened(self, kind: str, reason: str, drawn: bool = True) -> None:
        """Some trials of one plan failed.

        Args:
            drawn: whether the sampler drew their values, which were not among those tried first.

        Raises:
            RunError: that was several times of the same kind one after another.
        """
        if kind == NO_PLAN:
            self._unplanned += drawn and not self.planned
            ended = self._unplanned >= _STREAK
        else:
            self._streak = [*(k for k in self._streak if k == kind), kind]
            ended = len(self._streak) >= _STREAK
        if ended:
            todo = advice([kind], "--debug shows more; finished trials are kept")
            raise RunError(f"{_STREAK} trials in a row failed: {reason}: {todo}")
