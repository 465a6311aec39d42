"""Sparse and low rank at once, W ≈ S + L·R, both chosen for the inputs that calibration saw.

What is to be small is tr(E H Eᵀ), E = W - S - L·R. Alternating is that of OATS (Zhang and Papyan,
2409.13652, section 2); there only the diagonal of H counts, and S holds what W - L·R has. Here, as
in HASSLE-free (Makni et al., 2502.00899), it is all of H:

- Given S, L·R is the whitened SVD of W - S, truncated: the best there is.
- Given L·R, the rows of S are independent, and choosing a row's support is a hard problem. From a
  row s of S, with D = W - L·R, a step along the gradient in the metric of H's diagonal,
  z = s + η (d - s) H diag(H)⁻¹, is cut to the largest |z_j|·√H_jj (with s = 0 and H diagonal that
  is Wanda's choice); the weights on the new support are then fitted by least squares, a few steps
  of preconditioned conjugate gradients for all rows at once (hard thresholding pursuit: Foucart,
  2011). A row takes its new support only where that lowers its error; else its η is halved.

So the error never rises. Least squares is not solved to the end, which would cost a factorisation
per row. Where tokens are few, S would fit what these tokens happen to be: H is damped by how many
inputs there are to a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import dense, lowrank, residual, sparse
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Result, Stats, option
from moesaic.methods.grid import check_finite
from moesaic.methods.low_rank import (
    Rank,
    above_dense,
    eigen_root,
    factored_bytes,
    factored_problem,
    rank_option,
    resolved_rank,
    root_events,
    whitened_svd,
)
from moesaic.methods.sparsity import (
    SparseOptions,
    largest,
    sparse_bytes,
    sparse_problem,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = False
NEEDS = frozenset({"hessian", "tokens"})

# Steps of conjugate gradients per support.
_FIT_STEPS = 2
# A row's η: at first, and what it is multiplied by after a support that was taken or was not.
_FIRST_PACE, _FASTER, _SLOWER = 1.0, 1.5, 0.5
# Alternating ends where a step lowers the error by less than this share.
_LEAST_GAIN = 1e-3


class Options(SparseOptions):
    """Options of sparse plus low rank."""

    SHOWN = ("density", "rank")

    density: float = option(
        0.2,
        "share of the weights that S keeps, rounded down, at least one per block",
        [0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
        gt=0,
        le=1,
    )
    rank: Rank = rank_option(0.2, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
    steps: int = option(10, "alternations at most", ge=1)
    damp: float = option(
        0.3,
        "added to the Hessian's diagonal, relative to its mean, where there are as many tokens as"
        " inputs; twice the tokens, half of it",
        ge=0,
    )


@dataclass
class Split:
    """A matrix ``[out, in]`` as the sum of a sparse one and a product.

    Attributes:
        sparse: S, ``[out, in]``, zero outside of ``mask``, in the matrix's type.
        mask: bool, like S.
        left, right: ``[out, rank]`` and ``[rank, in]``, float64.
        errors: tr(E H Eᵀ) after the first product, and after each choice of S and of L·R.
    """

    sparse: Tensor
    mask: Tensor
    left: Tensor
    right: Tensor
    errors: list[float]


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Splits members ``[*batch, out, in]``, expert by expert; the format is ``residual``.

    Events: ``no_tokens`` (without inputs all errors count alike), ``few_tokens`` and
    ``rank_deficient`` (the inputs span less than the whole space), ``above_break_even``.

    Raises:
        ValueError: a weight or the Hessian is NaN or infinite, a member has no such rank, or the
            block does not divide the inputs.
    """
    reason = problem({name: tuple(weight.shape) for name, weight in weights.items()}, options)
    if reason:
        raise ValueError(reason)
    result = Result({})
    for name, weight in weights.items():
        check_finite(name, weight)
        *batch, out, inputs = weight.shape
        flat = weight.reshape(-1, out, inputs)
        rank = resolved_rank(tuple(weight.shape), options.rank)
        values, mask = torch.empty_like(flat), torch.empty_like(flat, dtype=torch.bool)
        left, right = flat.new_empty(len(flat), out, rank), flat.new_empty(len(flat), rank, inputs)
        roots = []
        for expert, matrix in enumerate(flat):
            try:
                roots.append(eigen_root(stats[name], expert))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            tokens = int(stats[name]["tokens"].reshape(-1)[expert])
            transform = _damped(roots[-1].transform, options.damp * inputs / max(tokens, 1))
            wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            parts = split(wide, transform, rank, options)
            left[expert], right[expert] = parts.left, parts.right
            # S once more, for the factors as they are stored.
            rest = wide - left[expert].double() @ right[expert].double()
            rows = _Rows(rest, _gram(wide, transform)[0], parts.sparse, parts.mask)
            rows.choose(options)
            rows.improve(options)
            values[expert], mask[expert] = rows.sparse, rows.mask
        tensor = _packed(
            values.view(weight.shape),
            mask.view(weight.shape),
            left.view(*batch, out, rank),
            right.view(*batch, rank, inputs),
            options,
        )
        result.members[name] = tensor
        result.events += root_events(name, roots, stats[name].first) + above_dense({name: tensor})
    return result


def _packed(
    values: Tensor, mask: Tensor, left: Tensor, right: Tensor, options: Options
) -> CompressedTensor:
    base = sparse.pack(values, mask, block=options.block)
    return residual.pack(base, lowrank.pack(dense.pack(left), dense.pack(right)))


def split(weight: Tensor, transform: Tensor | None, rank: int, options: Options) -> Split:
    """Alternates from S = 0 until the error hardly falls, or ``options.steps`` are done.

    Args:
        weight: ``[out, in]``, float32 or float64; so precisely S is fitted.
        transform: T of H = T Tᵀ, float64 ``[in, in]``; None for the identity.
        rank: of the product.
    """
    gram, unit = _gram(weight, transform)
    left, right = _product(weight.double(), transform, rank)
    rest = weight - left @ right
    rows = _Rows(rest, gram, torch.zeros_like(weight), largest(rest.abs(), options))
    errors = [unit * rows.error]
    rows.choose(options)
    for _ in range(options.steps):
        before = errors[-1]
        rows.improve(options)
        errors.append(unit * rows.error)
        left, right = _product(weight.double() - rows.sparse, transform, rank)
        rows.aim(weight - left @ right)
        errors.append(unit * rows.error)
        if before - errors[-1] <= _LEAST_GAIN * before:
            break
    return Split(rows.sparse, rows.mask, left, right, errors)


def _damped(transform: Tensor | None, damp: float) -> Tensor | None:
    """The root Q√(S + δ) of a root Q√S; δ is ``damp`` times the mean of S."""
    if transform is None:
        return None
    values = transform.square().sum(0)
    return transform * (1 + damp * values.mean() / values).sqrt()


def _gram(weight: Tensor, transform: Tensor | None) -> tuple[Tensor, float]:
    """H as the root has it, ``[in, in]``, in the weight's type, over the mean of its diagonal;
    and this mean, which float32 might not hold."""
    if transform is None:
        return torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device), 1.0
    gram = transform @ transform.mT
    mean = float(gram.diagonal().mean())
    return (gram / mean).to(weight.dtype), mean


def _product(weight: Tensor, transform: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    left, right = whitened_svd(weight, transform)
    return left[:, :rank], right[:rank]


class _Rows:
    """The rows of S on their way towards ``rest`` D = W - L·R, each with its own support.

    All is computed in the type of H and S; D may come in a wider one. What H is multiplied by
    changes nothing but the errors.

    Attributes:
        sparse, mask: S and where it may be other than zero, ``[out, in]``.
        pace: η of every row, ``[out, 1]``.
    """

    def __init__(self, rest: Tensor, gram: Tensor, sparse: Tensor, mask: Tensor) -> None:
        self._gram, self._diagonal = gram, gram.diagonal()
        self.sparse, self.mask = sparse, mask
        self.pace = torch.full_like(sparse[:, :1], _FIRST_PACE)
        self.aim(rest)

    def aim(self, rest: Tensor) -> None:
        """Another D; S stays as it is."""
        self._rest = rest.to(self.sparse.dtype)
        self._slope = (self._rest - self.sparse) @ self._gram  # (D - S) H

    @property
    def error(self) -> float:
        """tr((D - S) H (D - S)ᵀ)."""
        return float(self._errors().sum())

    def _errors(self) -> Tensor:
        return ((self._rest - self.sparse) * self._slope).sum(-1, keepdim=True)  # [out, 1]

    def fit(self) -> None:
        """A few steps of conjugate gradients on the supports; each lowers every row's error."""
        gradient = self._slope * self.mask
        scaled = gradient / self._diagonal
        direction = scaled
        size = (gradient * scaled).sum(-1, keepdim=True)
        for _ in range(_FIT_STEPS):
            change = direction @ self._gram
            curvature = (direction * change).sum(-1, keepdim=True)
            length = torch.where(curvature > 0, size / curvature, 0.0)
            self.sparse = torch.addcmul(self.sparse, length, direction)
            self._slope = torch.addcmul(self._slope, length, change, value=-1)
            gradient = self._slope * self.mask
            scaled = gradient / self._diagonal
            before, size = size, (gradient * scaled).sum(-1, keepdim=True)
            share = torch.where(before > 0, size / before, 0.0)
            direction = torch.addcmul(scaled, share, direction)

    def choose(self, options: Options) -> None:
        """Wanda's choice of D, fitted, where it is better."""
        mask = largest(self._rest.abs() * self._diagonal.sqrt(), options)
        self._offer(self._rest * mask, mask)

    def improve(self, options: Options) -> None:
        """Fits the rows as they are, then tries new supports, kept where they are better."""
        self.fit()
        moved = torch.addcmul(self.sparse, self.pace, self._slope / self._diagonal)
        mask = largest(moved.abs() * self._diagonal.sqrt(), options)
        taken = self._offer(moved * mask, mask)
        self.pace = self.pace * torch.where(taken, _FASTER, _SLOWER)

    def _offer(self, sparse: Tensor, mask: Tensor) -> Tensor:
        """Fits other rows and takes those that are better; which, bool ``[out, 1]``."""
        other = _Rows(self._rest, self._gram, sparse, mask)
        other.fit()
        better = other._errors() < self._errors()
        self.sparse = torch.where(better, other.sparse, self.sparse)
        self.mask = torch.where(better, mask, self.mask)
        self._slope = torch.where(better, other._slope, self._slope)
        return better


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of S, its masks and both factors."""
    return sparse_bytes(shapes, dtype, options) + factored_bytes(shapes, dtype, options)


def problem(shapes: Mapping[str, tuple[int, ...]], options: Options) -> str | None:
    """The block must divide the inputs, and the rank must be one that a member can have."""
    return sparse_problem(shapes, options) or factored_problem(shapes, options)
