"""Wanda: of every output channel, the weights that move its output most are kept as they are.

Sun et al., 2306.11695, section 3: a weight's score is |w_ij|·‖x_j‖, compared within its row (or
within blocks of it, section 4.1: n:m sparsity).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels import sparse
from moesaic.methods.base import Result, Stats
from moesaic.methods.grid import check_finite
from moesaic.methods.low_rank import Root, above_dense, diagonal_root, experts_hessian, root_events
from moesaic.methods.sparsity import (
    SparseOptions,
    largest,
    sparse_bytes,
    sparse_problem,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = True
NEEDS = frozenset({"hessian", "tokens"})

_BY_MAGNITUDE = Root(None, ("no_tokens", "no tokens with inputs, weights kept by magnitude"))


class Options(SparseOptions):
    """Options of Wanda."""


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Drops weights of members ``[*batch, out, in]``; only the Hessian's diagonal counts.

    Events: ``no_tokens`` (without inputs magnitudes are compared), ``above_break_even``.

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, or the block does not divide the
            inputs.
    """
    reason = problem({name: tuple(weight.shape) for name, weight in weights.items()}, options)
    if reason:
        raise ValueError(reason)
    result = Result({})
    for name, weight in weights.items():
        check_finite(name, weight)
        flat = weight.reshape(-1, *weight.shape[-2:])
        mask = torch.empty_like(flat, dtype=torch.bool)
        roots = []
        for expert, matrix in enumerate(flat):
            try:
                roots.append(_scales(stats[name], expert))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            scale = roots[-1].transform
            score = matrix.double().abs()
            mask[expert] = largest(score if scale is None else score * scale, options)
        tensor = sparse.pack(weight, mask.view(weight.shape), block=options.block)
        result.members[name] = tensor
        result.events += root_events(name, roots, stats[name].first) + above_dense({name: tensor})
    return result


def _scales(stats: Stats, expert: int) -> Root:
    """Norms of an expert's inputs; those never seen count a little."""
    root = diagonal_root(experts_hessian(stats, expert).diagonal().double().sqrt())
    return _BY_MAGNITUDE if root.transform is None else root


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of what is kept and of the masks."""
    return sparse_bytes(shapes, dtype, options)


def problem(shapes: Mapping[str, tuple[int, ...]], options: Options) -> str | None:
    """The block must divide the inputs."""
    return sparse_problem(shapes, options)
