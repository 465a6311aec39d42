"""The plans of trials: made of the values of knobs, named by what they choose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.study import Asked, Told
from moesaic.orchestrator.study_terms import BITS
from moesaic.search._starts import is_greedy
from moesaic.search.base import Budget, Infeasible, Plan
from moesaic.search.knobs import GREEDY, Allocator, Value

if TYPE_CHECKING:
    from moesaic.orchestrator.pipeline import Pipeline

# What keys of plans begin with. Earlier versions named plans by files instead, which are others
# once the code that makes them is.
_CHOICES = "choices:"


def plan_key(plan: Plan) -> str:
    """Names a plan by what it chooses: the same under whatever code made its pieces."""
    chosen = {name: [[s.method, s.options] for s in chain] for name, chain in plan.units.items()}
    return _CHOICES + digest(chosen)


def is_plan_of(told: Told, plan: Plan) -> bool:
    """Whether a finished trial was judged with this plan."""
    judged = str(told.attributes["plan"])
    if judged.startswith(_CHOICES):
        return judged == plan_key(plan)
    return plan.loss == float(told.attributes["predicted_loss"])


class TrialPlans:
    """Makes the plans of a study.

    Attributes:
        known: keys of all plans that were ever asked for.
    """

    def __init__(self, pipeline: "Pipeline", allocator: Allocator) -> None:
        self.pipeline = pipeline
        self.allocator = allocator
        self.known: set[str] = set()
        # Of the values that were looked at last.
        self._drawn: tuple[Mapping[str, Value], Plan] | None = None

    def of(self, values: Mapping[str, Value], start: str | None) -> Plan:
        """The plan of some values, by the recipe's strategy unless the trial is the greedy start.

        Raises:
            RecipeError, Infeasible, ValueError: there is none.
        """
        experiment = self.pipeline.experiment
        given = self.allocator.reweighted({k: v for k, v in values.items() if k != BITS})
        search = GREEDY if is_greedy(start) else experiment.recipe.search
        if BITS in values:
            size = experiment.sizes.size
            # Rounded: the recipe's own budget in bits per weight must come to its bytes again.
            total = size.fixed_bytes + round(float(values[BITS]) * size.weights / 8)
            given = replace(given, budget=Budget(total, size.fixed_bytes))
        return self.allocator.problem.plan(self.pipeline.fitted(given, search).units)

    def of_told(self, told: Told) -> Plan:
        """The plan of a finished trial, made again."""
        return self.of(told.values, told.attributes.get("start"))

    def of_asked(self, asked: Asked) -> Plan:
        """The plan of a trial, which is there already where its values were drawn.

        Raises:
            RecipeError, Infeasible, ValueError: there is none.
        """
        if asked.start is None and self._drawn is not None and self._drawn[0] == asked.values:
            return self._drawn[1]
        return self.of(asked.values, asked.start)

    def is_new(self, values: Mapping[str, Value]) -> bool:
        """Whether no trial has the plan of these values; where there is none, the trial will say
        why."""
        self._drawn = None
        try:
            plan = self.of(values, None)
        except (RecipeError, Infeasible, ValueError):
            return True
        self._drawn = values, plan
        return plan_key(plan) not in self.known
