"""What trials of a study must keep to, and which of them is the best.

A limit on an objective makes trials beyond it infeasible: Optuna's samplers are told by how much,
and none of them is taken. What a limit is set on need not be made any smaller: among the trials
within all limits the best one is the least in the first objective that has none, which is the KL
unless only the KL is limited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.orchestrator.study import Told

UNITS = {"kl": "nats per token", "bytes": "bytes", "latency": "ms per token"}


@dataclass(frozen=True)
class Limits:
    """Limits of a study.

    Attributes:
        objectives: what is to be small.
        limits: objective or figure → the most that is allowed.
    """

    objectives: Sequence[str]
    limits: Mapping[str, float]

    def excess(self, figures: Mapping[str, float]) -> dict[str, float]:
        """By how much each limit is exceeded; 0 or less where it is kept."""
        return {name: figures[name] - limit for name, limit in self.limits.items()}

    def best(self, told: Sequence[Told]) -> Told | None:
        """The best of the trials that count, which are within the budget and all limits."""
        return min((t for t in told if t.counts), key=self._rank, default=None)

    def better(self, one: Told, other: Told | None) -> bool:
        """Whether a trial that counts is better than another one, or the first."""
        return one.counts and (other is None or self._rank(one) < self._rank(other))

    def nearest(self, told: Sequence[Told]) -> str:
        """How near the trials came that keep to the budget but not to all limits; may be empty."""
        missed = [t for t in told if t.state == "complete" and t.attributes["fits"]]
        if not missed or not self.limits:
            return ""

        def distance(trial: Told) -> float:
            beyond = self.excess(trial.figures)
            return max(beyond[name] / limit for name, limit in self.limits.items())

        nearest = min(missed, key=distance)
        figures = ", ".join(
            f"{name} {nearest.figures[name]:.6g} of {limit:.6g} {UNITS[name]}"
            for name, limit in self.limits.items()
        )
        return (
            f"none of {len(missed)} keeps to tune.constraints; trial {nearest.number} came nearest:"
            f" {figures}"
        )

    @property
    def first(self) -> str:
        """The figure that the best trial is the least in."""
        free = [name for name in ("kl", *self.objectives) if name not in self.limits]
        return next((name for name in free if name in self.objectives), "kl")

    def _rank(self, trial: Told) -> tuple[float, ...]:
        figures = trial.figures
        return figures[self.first], figures["kl"], figures["bytes"], trial.number
