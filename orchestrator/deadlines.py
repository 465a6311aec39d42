"""How long a task may take, from how long tasks like it took: of the same function and kind.

Three bounds, each a multiple of the upper quantile of the measured seconds and never below a floor:
what takes longer than the first is a *straggler*, of which an idle worker runs a second copy (Dean
& Ghemawat, MapReduce, 2004, section 3.6, "backup tasks"); what takes longer than the second has
missed its *deadline* and is given to another worker whatever else waits; at twice the deadline its
worker is taken for lost and killed. The upper quantile, not the median, because even those differ:
a linear of the MLP takes longer than one of the attention.

Of a function that too few tasks are finished of, the first bound is a larger multiple of the
longest task so far, of that function if there was one, else of any. It may be far too short for a
task that is large; but only a worker that nothing waits for runs a second copy, which costs nothing
then, and the first result is taken.
"""

import bisect
import math
from itertools import chain

# Of the tasks of a function this share was done within the time that bounds are multiples of.
_QUANTILE = 0.9
# Before so many are finished, nothing is known of a function.
_ENOUGH = 3
STRAGGLER_FACTOR, STRAGGLER_SECONDS = 3.0, 30.0
DEADLINE_FACTOR, DEADLINE_SECONDS = 20.0, 600.0
# For a function of which too few are finished. Its deadline is that of a bank of a very large model
# on a processor.
UNKNOWN_FACTOR, UNKNOWN_SECONDS = 5.0, 300.0
FIRST_SECONDS = 6 * 3600.0


class Durations:
    """Seconds that finished tasks took, by function."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, function: str, seconds: float) -> None:
        """A task of a function is finished."""
        bisect.insort(self._seconds.setdefault(function, []), seconds)

    def straggles_after(self, function: str) -> float:
        """Seconds after which a task has fallen behind its like, or behind all others."""
        upper = self._upper(function)
        if upper is not None:
            return max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * upper)
        known = self._seconds.get(function) or chain(*self._seconds.values())
        return max(UNKNOWN_SECONDS, UNKNOWN_FACTOR * max(known, default=0.0))

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
