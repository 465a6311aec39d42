"""Values that lead to a plan not known yet.

Many values of the knobs lead to one plan: around those of the uniform plan nothing changes until
sensitivities are far enough apart to pay for another level. Such a plateau is a trap for a sampler
that draws near what was good. Where it beats most of what was tried first, it is all that is drawn
from then on, and a trial that repeats a plan tells nothing. So draws are repeated until the plan is
a new one: by the sampler itself, then evenly over the ranges.
"""

from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from moesaic.search.knobs import Knob, Values

# Draws from the whole ranges, once the sampler has had its share.
_EVENLY = 8


class FreshSampler(BaseSampler):
    """Another sampler's values, drawn again while they lead to a plan that is known.

    Args:
        sampler: draws.
        draws: how often it is asked, at most.
        knobs: what is drawn.
        is_new: whether the plan of some values is not known yet.
        seed: of what is drawn evenly.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        draws: int,
        knobs: Sequence[Knob],
        is_new: Callable[[Values], bool],
        seed: int,
    ) -> None:
        self._sampler, self._draws = sampler, draws
        self._evenly = RandomSampler(seed=seed)
        self._fixed = {knob.name: knob.default for knob in knobs if knob.fixed}
        self._space = {knob.name: _distribution(knob) for knob in knobs if not knob.fixed}
        self._is_new = is_new

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        # A trial that was enqueued has its values.
        return {} if "fixed_params" in trial.system_attrs else self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        samplers = [self._sampler] * self._draws + [self._evenly] * _EVENLY
        found: dict[str, Any] = {}
        for sampler in samplers:
            found = self._drawn(sampler, study, trial)
            if self._is_new(self._fixed | found):
                break
        return found

    def _drawn(self, sampler: BaseSampler, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        together = sampler.sample_relative(study, trial, self._space)
        return together | {
            name: sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in self._space.items()
            if name not in together
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.choices:
        return CategoricalDistribution(knob.choices)
    return FloatDistribution(knob.low, knob.high, log=knob.log)
