"""Plain SVD: the product of low rank that is nearest to the weight, whatever its inputs are.

Eckart and Young, 1936. It looks at no text; methods that do are better, and this is what they are
compared with.
"""

from collections.abc import Mapping

from torch import Tensor

from moesaic.methods.base import Result, Stats
from moesaic.methods.low_rank import (
    PLAIN,
    LowRankOptions,
    factored_bytes,
    factored_problem,
    low_rank,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
RANKED = True
NEEDS: frozenset[str] = frozenset()


class Options(LowRankOptions):
    """Options of plain SVD."""


predict_bytes = factored_bytes
problem = factored_problem


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Factors members ``[*batch, out, in]``; ``stats`` is not used.

    Raises:
        ValueError: a weight is NaN or infinite, or has no such rank.
    """
    return low_rank(weights, options.rank, lambda name, expert: PLAIN)
