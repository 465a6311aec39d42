"""D²-MoE: what the experts of a bank have in common, once, and the rest of each in low rank.

Gu et al., 2502.17298, section 3: the base is the mean of the experts, W_e - base gets the whitened,
truncated SVD of :mod:`moesaic.methods.low_rank` under the expert's own Hessian. The paper weights
the mean by the experts' Fisher information and prunes the base afterwards; here experts weigh what
they saw of the text, in tokens, and the base is left whole.

The base is stored once per bank. Experts that take something else would not make it smaller, so
that a bank is compressed as a whole.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels import delta, dense
from moesaic.methods.base import MethodOptions, Result, Stats
from moesaic.methods.grid import check_finite
from moesaic.methods.low_rank import (
    SHARES,
    Rank,
    above_dense,
    eigen_root,
    factored_bytes,
    factored_problem,
    low_rank,
    rank_option,
)

SCOPE = frozenset({"bank"})
ROWWISE = False
RANKED = True
WHOLE = True
NEEDS = frozenset({"hessian", "tokens"})


class Options(MethodOptions):
    """Options of D²-MoE; the rank is that of the deltas, to which the base comes."""

    SHOWN = ("rank",)

    rank: Rank = rank_option(0.5, SHARES)


problem = factored_problem


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Members ``[experts, out, in]`` in the format ``delta``.

    Events: ``no_tokens`` (an expert without inputs gets plain SVD), ``few_tokens`` and
    ``rank_deficient`` (the inputs span less than the whole space), ``above_break_even`` (base and
    differences together).

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, or a member has no such rank.
    """
    for name, weight in weights.items():
        check_finite(name, weight)
    bases = {name: _mean(weight, stats[name]["tokens"]) for name, weight in weights.items()}
    result = low_rank(
        weights,
        options.rank,
        lambda name, expert: eigen_root(stats[name], expert),
        lambda name, expert: bases[name],
    )
    packed = {
        name: delta.pack(dense.pack(bases[name]), deltas) for name, deltas in result.members.items()
    }
    return Result(packed, result.events + above_dense(packed))


def _mean(weight: Tensor, tokens: Tensor) -> Tensor:
    """Mean of experts ``[experts, out, in]``, weighted by ``tokens`` ``[experts]``, in their dtype.

    Summed in float64; all count alike where there are no tokens.
    """
    counts = tokens.double() if tokens.any() else torch.ones_like(tokens, dtype=torch.float64)
    total = torch.zeros_like(weight[0], dtype=torch.float64)
    for matrix, share in zip(weight, (counts / counts.sum()).tolist(), strict=True):
        total.add_(matrix.double(), alpha=share)
    return total.to(weight.dtype)


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of the bases and of all factors."""
    bases = dtype.itemsize * sum(math.prod(shape[-2:]) for shape in shapes.values())
    return bases + factored_bytes(shapes, dtype, options)
