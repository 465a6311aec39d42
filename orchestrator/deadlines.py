"""How long a task may take, from how long tasks like it took: of the same function and kind.

Three bounds, each a multiple of the upper quantile of the measured seconds and never below a floor:
what takes longer than the first is a *straggler*, of which an idle worker runs a second copy (Dean
& Ghemawat, MapReduce, 2004, section 3.6, "backup tasks"); what takes longer than the second has
missed its *deadline* and is given to another worker whatever else waits; at twice the deadline its
worker is taken for lost and killed. The upper quantile, not the median, because even those differ:
a linear of the MLP takes longer than one of the attention.
"""

import bisect
import math

# Of the tasks of a function this share was done within the time that bounds are multiples of.
_QUANTILE = 0.9
# Before so many are finished, nothing is known of a function.
_ENOUGH = 3
STRAGGLER_FACTOR, STRAGGLER_SECONDS = 3.0, 30.0
DEADLINE_FACTOR, DEADLINE_SECONDS = 20.0, 600.0
# For a function of which too few are finished: a bank of a very large model on a processor.
FIRST_SECONDS = 6 * 3600.0


class Durations:
    """Seconds that finished tasks took, by function."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, function: str, seconds: float) -> None:
        """A task of a function is finished."""
        bisect.insort(self._seconds.setdefault(function, []), seconds)

    def straggles_after(self, function: str) -> float:
        """Seconds after which a task has fallen behind its like; infinite while none are known."""
        upper = self._upper(function)
        if upper is None:
            return math.inf
        return max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * upper)

    def deadline(self, function: str) -> float:
        """Seconds after which a task is given to another worker."""
        upper = self._upper(function)
        if upper is None:
            return FIRST_SECONDS
        return max(DEADLINE_SECONDS, DEADLINE_FACTOR * upper)

    def patience(self, function: str) -> float:
        """Seconds in which a worker whose task another one has finished should be free again."""
        return min(self.straggles_after(function), self.deadline(function))

    def _upper(self, function: str) -> float | None:
        known = self._seconds.get(function, ())
        if len(known) < _ENOUGH:
            return None
        return known[math.ceil(_QUANTILE * len(known)) - 1]
