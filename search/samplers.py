"""Optuna's samplers by name, over knobs.

| name | | objectives | constraints |
|---|---|---|---|
| tpe | tree-structured Parzen estimators; the default: fast, good from ten trials on | any | yes |
| gp | a Gaussian process; fewer trials, seconds each | any | yes |
| nsga2 | a genetic algorithm; for several objectives and hundreds of trials | any | yes |
| random | what the others must beat | any | no |
| cmaes | evolves a normal distribution; for numbers, others are drawn at random | one | no |

With ``tpe``, ``gp`` and ``random`` values that lead to a plan known already are drawn again
(:mod:`moesaic.search._fresh`); the others breed from a whole population, which that would disturb.

Optuna takes a moment to import, so that happens where it is used.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moesaic.search.knobs import Knob, Values

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

SAMPLERS = ("tpe", "gp", "nsga2", "random", "cmaes")
# Trials that are drawn at random before a model is trusted; those tried first count.
_STARTUP = 10
_POPULATION = 20
# Draws of a sampler until a plan is new, at most; a Gaussian process would say the same again.
_DRAWS = {"tpe": 8, "gp": 1, "random": 8}


def refusal(name: str, objectives: int, constraints: int = 0) -> str | None:
    """Why a sampler cannot be used for so many objectives and constraints, or None."""
    if name == "cmaes" and objectives > 1:
        others = ", ".join(other for other in SAMPLERS if other != name)
        return f"cmaes cannot do {objectives} objectives: take {others}, or one objective"
    if name in ("cmaes", "random") and constraints:
        heeding = ", ".join(other for other in SAMPLERS if other not in ("cmaes", "random"))
        return f"{name} heeds no constraints: take {heeding}"
    return None


def make_sampler(
    name: str, seed: int, knobs: Sequence[Knob], is_new: Callable[[Values], bool]
) -> "BaseSampler":
    """The sampler.

    Args:
        knobs: what it draws.
        is_new: whether the plan of some values is not known yet.

    Raises:
        ValueError: no such sampler.
    """
    sampler = _plain_sampler(name, seed)
    if name not in _DRAWS:
        return sampler
    from moesaic.search._fresh import FreshSampler

    return FreshSampler(sampler, _DRAWS[name], knobs, is_new, seed + 1)


def _plain_sampler(name: str, seed: int) -> "BaseSampler":
    from optuna import samplers

    if name == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP, multivariate=True)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    raise ValueError(f"unknown sampler {name!r}: known are {', '.join(SAMPLERS)}")


def suggest(trial: "Trial", knobs: Sequence[Knob]) -> dict[str, float | str]:
    """Values of all knobs, those that are fixed included."""
    return {knob.name: knob.default if knob.fixed else _suggest(trial, knob) for knob in knobs}


def _suggest(trial: "Trial", knob: Knob) -> float | str:
    if knob.choices:
        return str(trial.suggest_categorical(knob.name, knob.choices))
    return float(trial.suggest_float(knob.name, knob.low, knob.high, log=knob.log))


def start_params(knobs: Sequence[Knob], start: Values) -> dict[str, Any]:
    """Some values as params of a trial: the others at their defaults, all within their ranges."""
    return {
        knob.name: knob.nearest(start.get(knob.name, knob.default))
        for knob in knobs
        if not knob.fixed
    }
