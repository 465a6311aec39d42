"""Which knobs of a study have to do with a trial being good."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial

# Complete trials that importances are told from, at least.
TELLING = 10
# A KL below that is none, nats per token.
_LEAST = 1e-12


@dataclass(frozen=True)
class Importances:
    """What there is to tell of knobs.

    Attributes:
        shares: knob → its share in what makes trials good, the largest first.
        untold: why there are none; empty where there are.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    untold: str = ""


def importances(
    study: "OptunaStudy", knobs: Sequence[str], objectives: Sequence[str]
) -> Importances:
    """Shares of knobs in what makes trials good (PED-ANOVA).

    Watanabe et al., 2023, 2304.10255. A good trial has little KL: with several objectives, little
    for one that has as much of the others, which is one near the front. Where all are as good as
    one another nothing makes any good, and the shares, which would be equal, say nothing.

    Args:
        knobs: those that matter.
        objectives: in the order of a trial's values.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < TELLING:
        count = len(complete)
        return Importances(
            untold=f"it takes {TELLING} complete trials to tell, and there are {count}"
        )
    if not knobs:
        return Importances(untold="no knob but the budget's was left to vary")
    beyond = _beyond(complete, objectives.index("kl"))
    if len(set(beyond.values())) == 1:
        alike = "have the same KL" if len(objectives) == 1 else "are on the front"
        return Importances(untold=f"all {len(complete)} complete trials {alike}")
    with warnings.catch_warnings():
        # It reminds of what is so here: small values are good.
        warnings.simplefilter("ignore", UserWarning)
        found = get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(),
            params=list(knobs),
            target=lambda trial: beyond[trial.number],
        )
    return Importances({name: float(share) for name, share in found.items()})


def _beyond(complete: Sequence["FrozenTrial"], index: int) -> dict[int, float]:
    """Number of a trial → its KL over the least of those that have no more of anything else; with
    one objective the least of all.

    Args:
        index: of the KL among the values.
    """
    values = np.array([trial.values for trial in complete])
    others, kl = np.delete(values, index, axis=1), np.maximum(values[:, index], _LEAST)
    least = [kl[(others <= own).all(axis=1)].min() for own in others]
    return dict(zip((t.number for t in complete), (kl / least).tolist(), strict=True))
