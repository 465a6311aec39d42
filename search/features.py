"""What is known of one choice under one candidate, in a few numbers, and the scores made of them.

A *pair* is a choice (a linear, a member of an expert) with a chain that it was compressed by. Each
feature is one number per pair; expectations are over calibration tokens, those that reached the
member: x is its input, g the gradient of the negative log-likelihood with respect to its output,
W the dense weight and ΔW what compression changed. The orchestrator fills them in, as far as they
are wanted.

A *score* predicts from features what a pair loses. It is a module of ``search/scores``, found by
its file name, that defines

``NEEDS``  names of the features that it reads
``score``  ``(features) -> losses``: arrays over pairs, the larger the worse

or a formula that ``moesaic scores`` evolved and wrote into a file (:mod:`moesaic.search.formula`).
Losses of the pairs of a plan are added up. A unit that is left as it is loses nothing, whatever a
score would say of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moesaic.kernels.discovery import plugin, plugins
from moesaic.methods.base import Chain, chain_text
from moesaic.search.formula import load_formula

Floats = NDArray[np.float64]
Features = Mapping[str, Floats]

# Where a feature comes from: what measuring left; another look at finished pieces; a pass of the
# text through the dense model's routers; the model run with one unit swapped.
TABLE, PIECES, ROUTERS, SWAPS = "table", "pieces", "routers", "swaps"
_PACKAGE, _MARKERS = "moesaic.search.scores", ("score",)


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        meaning: for people.
        source: one of the four above.
        error: it is 0 where the weight did not change, and grows as ΔW does.
        gradients: it is known only where gradients were collected.
    """

    meaning: str
    source: str
    error: bool = False
    gradients: bool = False


FEATURES: Mapping[str, Feature] = {
    "gradient": Feature("½ Σ E[g²]·E[(ΔW x)²], nats per token", TABLE, True, True),
    "error": Feature("E‖ΔW x‖² / E‖W x‖²", TABLE, True),
    "parameters": Feature("number of weights", TABLE),
    "influence": Feature("1 − cos between hidden states before and after the block", TABLE),
    "output_error": Feature("E‖ΔW x‖²", PIECES, True),
    "output_norm": Feature("E‖W x‖²", PIECES),
    "weight_error": Feature("‖ΔW‖²", PIECES, True),
    "weight_norm": Feature("‖W‖²", PIECES),
    "diagonal_error": Feature("Σ E[x_j²]·ΔW_ij²", PIECES, True),
    "trace": Feature("E‖x‖², the trace of E[x xᵀ]", PIECES),
    "outlier": Feature("largest ratio of max |W| to mean |W| in a column", PIECES),
    "fisher_error": Feature("½ Σ E[g_i²]·E[x_j²]·ΔW_ij²", PIECES, True, True),
    "gradient_norm": Feature("E‖g‖²; for an expert over all tokens", PIECES, False, True),
    "frequency": Feature("share of tokens routed to the expert; 1 for others", ROUTERS),
    "gate": Feature("mean gate of the expert over all tokens; 1 for others", ROUTERS),
    "swap_kl": Feature("KL with this unit alone compressed, nats per token", SWAPS, True),
}


class Score(Protocol):
    """What a module of ``search/scores`` defines; see the docstring above."""

    NEEDS: frozenset[str]

    def score(self, features: Features) -> Floats:
        """Predicted loss of every pair."""


@dataclass(frozen=True)
class Rule:
    """A score by whatever way it is given.

    Attributes:
        name: of its file, without the ending.
        needs: features that it reads.
        compute: features → losses.
    """

    name: str
    needs: frozenset[str]
    compute: Callable[[Features], Floats]

    @property
    def wants_gradients(self) -> bool:
        return any(FEATURES[name].gradients for name in self.needs)

    @property
    def sources(self) -> set[str]:
        """What must be done for it."""
        return {FEATURES[name].source for name in self.needs}


@dataclass(frozen=True)
class Pairs:
    """Pairs and their features.

    Attributes:
        names: (choice, chain) of every pair.
        features: feature → one number per pair.
    """

    names: Sequence[tuple[str, Chain]]
    features: Features

    @property
    def changed(self) -> NDArray[np.bool_]:
        """Which pairs are compressed."""
        return np.array([bool(chain) for _, chain in self.names], dtype=bool)

    def losses(self, rule: Rule) -> Floats:
        """What a score predicts; 0 for what is left as it is, which takes no part in the units that
        a formula's inputs are in: it has none where formulas are evolved.

        Raises:
            ValueError: naming the first pair of which it predicts no finite loss, or one below 0.
        """
        changed, found = self.changed, np.zeros(len(self.names))
        with np.errstate(all="ignore"):
            found[changed] = rule.compute({n: v[changed] for n, v in self.features.items()})
        wrong = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
        if len(wrong):
            choice, chain = self.names[wrong[0]]
            raise ValueError(
                f"score {rule.name}: {choice} under {chain_text(chain)}: {found[wrong[0]]:.4g} is"
                f" no loss ({len(wrong)} of {len(found)} like it)"
            )
        return found


def scores() -> list[str]:
    """Names of all scores."""
    return list(plugins(_PACKAGE, _MARKERS))


def rule_of(name: str) -> Rule:
    """The score called ``name``, or the formula in the file of that name (``*.json``).

    Raises:
        UnknownName: no such score.
        ValueError: no such file, or it holds no formula.
    """
    if name.endswith(".json"):
        formula = load_formula(Path(name), FEATURES)
        return Rule(Path(name).stem, formula.inputs, formula.losses)
    module = cast(Score, plugin(_PACKAGE, _MARKERS, name))
    return Rule(name, module.NEEDS, module.score)
