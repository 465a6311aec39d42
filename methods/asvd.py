"""ASVD: the SVD of a weight whose inputs are scaled by how large they are.

Yuan et al., 2312.05821, section 3.2: T = diag((mean |x|)^α), not a root of the whole Hessian.
"""

from collections.abc import Mapping

from torch import Tensor

from moesaic.methods.base import Result, Stats, option
from moesaic.methods.low_rank import (
    NO_TOKENS,
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
NEEDS = frozenset({"abs", "tokens"})


class Options(LowRankOptions):
    """Options of ASVD."""

    alpha: float = option(
        0.5, "power of an input's mean magnitude; 0 is plain SVD", [0.5, 1.0], ge=0, le=2
    )


predict_bytes = factored_bytes
problem = factored_problem


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Factors members ``[*batch, out, in]``, expert by expert.

    Events: ``no_tokens`` (without inputs it is plain SVD), ``rank_deficient`` (inputs that were
    next to nothing), ``above_break_even``.

    Raises:
        ValueError: a weight or a statistic is NaN or infinite, or a member has no such rank.
    """

    def root(name: str, expert: int) -> Root:
        total = stats[name]["abs"]
        size = total.reshape(-1, total.shape[-1])[expert].double()  # [in]
        tokens = int(stats[name]["tokens"].reshape(-1)[expert])
        return diagonal_root((size / tokens) ** options.alpha) if tokens else NO_TOKENS

    first = next(iter(stats.values())).first
    return low_rank(weights, options.rank, root, first=first)
