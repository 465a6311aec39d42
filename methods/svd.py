"""Plain SVD: the product of low rank that is nearest to the weight, whatever its inputs are.

Eckart and Young, 1936. It looks at no text; methods that do are better, and this is what they are
compared with.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.methods.base import Result, Stats
from moesaic.methods.low_rank import PLAIN, LowRankOptions, low_rank, predicted_bytes, rank_problem

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
RANKED = True
NEEDS: frozenset[str] = frozenset()


class Options(LowRankOptions):
    """Options of plain SVD."""


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Factors members ``[*batch, out, in]``; ``stats`` is not used.

    Raises:
        ValueError: a weight is NaN or infinite, or has no such rank.
    """
    return low_rank(weights, options.rank, lambda name, expert: PLAIN)


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of both factors."""
    return predicted_bytes(shapes, dtype, options.rank)


def problem(shapes: Mapping[str, tuple[int, ...]], options: Options) -> str | None:
    """The rank must be one that a member can have."""
    return rank_problem(shapes, options.rank)
