"""SVD-LLM: the product of low rank whose outputs are nearest to the layer's on calibration text.

The whitened SVD is in :mod:`moesaic.methods.low_rank`. The papers differ in the root T of
the Hessian: ``eigen`` takes eigenvalues and eigenvectors (v2: Wang et al., 2503.12340, section
3.1), ``cholesky`` the Cholesky factor, for which the Hessian is damped (v1: 2403.07378, 3.1).

A refit of one factor to the other by least squares, L = W H Rᵀ (R H Rᵀ)⁺, gives the same L again:
L·R = U_r U_rᵀ W is an optimum over both. It is another L where R comes from the dense model's
inputs and H from those that compressed predecessors leave: ``refit``, the sequential update of v1
(section 3.2). Without it both factors are made for the latter, which loses least of these outputs.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from moesaic.methods.base import Result, Stats, of_dense_model, option
from moesaic.methods.hessian import damped_cholesky
from moesaic.methods.low_rank import (
    LowRankOptions,
    Root,
    eigen_root,
    factored_bytes,
    factored_problem,
    kept_root,
    low_rank,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
RANKED = True
NEEDS = frozenset({"hessian", "tokens"})


class Options(LowRankOptions):
    """Options of SVD-LLM."""

    variant: Literal["eigen", "cholesky"] = option(
        "eigen", "how the inputs are whitened: version 2 or version 1", ["eigen", "cholesky"]
    )
    damp: float = option(
        0.01,
        "added to the Hessian's diagonal under cholesky, relative to its mean",
        gt=0,
        le=1,
    )
    refit: bool = option(
        False,
        "with propagate: right factors for the dense model's inputs, and only the left ones fitted"
        " to what compressed predecessors leave; otherwise both are made for the latter",
    )


predict_bytes = factored_bytes
problem = factored_problem


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Factors members ``[*batch, out, in]``, expert by expert.

    Events: ``no_tokens`` (without inputs it is plain SVD), ``few_tokens`` and ``rank_deficient``
    (the inputs span less than the whole space; under cholesky only the former is known),
    ``damping_grew``, ``above_break_even``. With ``refit`` those of the inputs that are fitted to,
    too; without any, nothing is fitted.

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, or a member has no such rank.
    """

    def root(name: str, expert: int) -> Root:
        seen = of_dense(stats[name]) if options.refit else stats[name]
        if options.variant == "eigen":
            return eigen_root(seen, expert)
        return cholesky_root(seen, expert, options.damp)

    def refit(name: str, expert: int) -> Root | None:
        # Where nothing before is compressed there are no other inputs.
        known = of_dense_model("hessian") in stats[name]
        return eigen_root(stats[name], expert) if options.refit and known else None

    first = next(iter(stats.values())).first
    return low_rank(weights, options.rank, root, first=first, refit=refit)


def of_dense(stats: Stats) -> Stats:
    """Statistics of the dense model's inputs; the same ones where no others are known."""
    if of_dense_model("hessian") not in stats:
        return stats
    return stats.derived(
        "of the dense model",
        lambda: Stats({name: stats[of_dense_model(name)] for name in NEEDS}, stats.first),
    )


def cholesky_root(stats: Stats, expert: int, damp: float) -> Root:
    """T lower triangular; H is damped, more than asked for where it is not positive definite."""
    tokens = int(stats["tokens"].reshape(-1)[expert])

    def compute(hessian: Tensor) -> Root:
        diagonal = hessian.diagonal().double()
        mean = diagonal.mean()
        system = (hessian / mean)[None].double()
        lower, damps = damped_cholesky(system, (diagonal / mean)[None], damp)
        final = float(damps[0])
        if final > damp:
            text = f"damping grew from {damp:g} to {final:g} of the mean diagonal"
            return Root(lower[0], ("damping_grew", text))
        if tokens < len(hessian):
            text = f"{tokens} tokens for {len(hessian)} inputs: only damping tells some apart"
            return Root(lower[0], ("few_tokens", text))
        return Root(lower[0])

    return kept_root(stats, f"cholesky_root {damp}", expert, compute)
