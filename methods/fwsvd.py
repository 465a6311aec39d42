"""FWSVD: the SVD of a weight whose inputs are scaled by the Fisher information of their weights.

Hsu et al., 2207.00112: F is the mean over sequences of the squared gradients of the loss with
respect to the weight, labels being the next tokens of the text, and T = diag(√Î) with Î_i the sum
of F over the outputs of input i. Where Î_i is zero, no weight of that input changes the loss, and
whatever factors make of them will do: it counts very little.
"""

from collections.abc import Mapping

from torch import Tensor

from moesaic.methods.base import Result, Stats
from moesaic.methods.low_rank import (
    LowRankOptions,
    Root,
    diagonal_root,
    factored_bytes,
    factored_problem,
    low_rank,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
RANKED = True
NEEDS = frozenset({"fisher"})

NO_GRADIENTS = Root(None, ("no_gradients", "its Fisher information is zero, plain SVD"))


class Options(LowRankOptions):
    """Options of FWSVD."""


predict_bytes = factored_bytes
problem = factored_problem


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Factors members ``[*batch, out, in]``, expert by expert.

    Events: ``no_gradients`` (no sequence of the reverse pass reached it), ``rank_deficient``
    (inputs whose gradients were next to nothing), ``above_break_even``.

    Raises:
        ValueError: a weight or a statistic is NaN or infinite, or a member has no such rank.
    """

    def root(name: str, expert: int) -> Root:
        total = stats[name]["fisher"]
        importance = total.reshape(-1, total.shape[-1])[expert].double()  # [in]
        return diagonal_root(importance.sqrt()) if importance.any() else NO_GRADIENTS

    first = next(iter(stats.values())).first
    return low_rank(weights, options.rank, root, first=first)
