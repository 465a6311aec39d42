"""EoRA: a correction of low rank for what another method did to a weight.

Liu et al., 2410.21271, section 3: with H = Q S Qᵀ, the SVD of (W - Ŵ)·Q√S, truncated, of which √S
and Q are undone. Ŵ may as well be what experts were merged into. Nothing is inverted here (see
:mod:`moesaic.methods.low_rank`): inputs that calibration never saw need not be left out.
"""

from collections.abc import Mapping

from torch import Tensor

from moesaic.kernels import residual
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import MethodOptions, Result, Stats
from moesaic.methods.low_rank import (
    Rank,
    above_dense,
    eigen_root,
    factored_bytes,
    factored_problem,
    low_rank,
    rank_option,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
RANKED = True
NEEDS = frozenset({"hessian", "tokens"})


class Options(MethodOptions):
    """Options of EoRA."""

    SHOWN = ("rank",)

    rank: Rank = rank_option(32, [8, 16, 32, 64, 128])


# What the correction adds: the bytes of what is corrected are not among them.
predict_bytes = factored_bytes
problem = factored_problem


def repair(
    weights: Mapping[str, Tensor],
    compressed: Mapping[str, CompressedTensor],
    stats: Mapping[str, Stats],
    options: Options,
) -> Result:
    """Adds factors to ``compressed`` members ``[*batch, out, in]``, in the format ``residual``.

    Events: ``no_tokens`` (without inputs it is plain SVD), ``few_tokens`` and ``rank_deficient``
    (the inputs span less than the whole space), ``above_break_even`` (with what it is added to).

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, or a member has no such rank.
    """
    result = low_rank(
        weights,
        options.rank,
        lambda name, expert: eigen_root(stats[name], expert),
        lambda name, expert: _matrix(compressed[name], expert).effective(),
        next(iter(stats.values())).first,
    )
    packed = {
        name: residual.pack(compressed[name], correction)
        for name, correction in result.members.items()
    }
    return Result(packed, result.events + above_dense(packed))


def _matrix(tensor: CompressedTensor, expert: int) -> CompressedTensor:
    return tensor[expert] if len(tensor.shape) > 2 else tensor
