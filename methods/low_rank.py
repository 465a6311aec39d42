"""What methods of low rank share: ranks, the whitened SVD, the error of every rank at once.

For inputs with H = Σ x xᵀ = T Tᵀ, the product of rank r that is nearest to a weight W in the norm
tr(E H Eᵀ), E = W - L·R, comes from the SVD of W·T (SVD-LLM, 2403.07378, section 3.1): truncate it
and undo T. With U_r the first r left singular vectors of W·T that is

    (W T)_r T⁻¹ = U_r U_rᵀ W T T⁻¹ = U_r U_rᵀ W

so that nothing needs to be inverted: U_r are eigenvectors of W H Wᵀ, L = U_r and R = U_rᵀ W, up to
the scale of each column and row. However ill-conditioned H is, at full rank this is W to the
precision of float64; where H is singular, it is W itself that is projected. Where there are more
outputs than inputs, W = Q W' (QR) leads to the smaller eigenproblem of W' H W'ᵀ.

Columns come by falling share in the norm, and none depends on how many there are: factors of a
larger rank, cut, are those of the smaller rank, bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator, StrictFloat, StrictInt
from torch import Tensor

from moesaic.kernels import dense, lowrank
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Event, MethodOptions, Result, Stats, option
from moesaic.methods.grid import check_finite
from moesaic.methods.hessian import check_hessian


def _share_of_the_whole(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"rank is {value}: a share is above 0 and at most 1.0")
    return value


# A number of columns, or the share of a dense weight that both factors together have.
Rank = Annotated[StrictInt | StrictFloat, AfterValidator(_share_of_the_whole)]

# Shares that a search may try.
SHARES = tuple(step / 20 for step in range(2, 20))

ABOVE_BREAK_EVEN = "above_break_even"

# A rank that comes from a share is a multiple of this where it is not smaller.
RANK_MULTIPLE = 8
# Roots of a site are kept for its next member or unit up to this size, in float64.
KEEP_BYTES = 256 << 20


def rank_option(default: Rank, candidates: Sequence[Rank]) -> Any:
    """The option of every method of low rank."""
    return option(
        default,
        "rank of the factors (a whole number), or the share of the dense weights that both factors"
        " together have (0.5, at most 1.0), rounded down",
        candidates,
        ge=0,
    )


class LowRankOptions(MethodOptions):
    """What every method that leaves members in the format ``lowrank`` must be told."""

    SHOWN = ("rank",)

    rank: Rank = rank_option(0.8, SHARES)


def resolved_rank(shape: tuple[int, ...], rank: Rank) -> int:
    """Rank of the factors of a weight ``[*batch, out, in]``, at least 1.

    A share is rounded down, and further to a multiple of :data:`RANK_MULTIPLE` where that much is
    left.
    """
    if isinstance(rank, int):
        return rank
    out, inputs = shape[-2:]
    # A share like 0.3 lies just under what was meant.
    columns = math.floor(rank * out * inputs / (out + inputs) * (1 + 1e-12))
    if columns >= RANK_MULTIPLE:
        columns -= columns % RANK_MULTIPLE
    return max(1, columns)


def rank_problem(shapes: Mapping[str, tuple[int, ...]], rank: Rank) -> str | None:
    """Why the members cannot have factors of this rank, in one line; None if they can."""
    for name, shape in shapes.items():
        columns, most = resolved_rank(shape, rank), min(shape[-2:])
        if columns < 1:
            return f"{name}: rank {columns} leaves nothing"
        if columns > most:
            return f"{name}: rank {columns} is above {most}, the full rank of {shape[-2:]}"
    return None


def above_dense(members: Mapping[str, CompressedTensor]) -> list[Event]:
    """An event for every member that takes more bytes than its dense weight."""
    events = []
    for name, tensor in members.items():
        most = math.prod(tensor.shape) * tensor.dtype.itemsize
        if tensor.nbytes > most:
            text = f"{name}: {tensor.nbytes} bytes, the dense weight has {most}"
            events.append(Event(ABOVE_BREAK_EVEN, text, value=tensor.nbytes))
    return events


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of both factors of a weight ``[*batch, out, in]``."""
    *batch, out, inputs = shape
    columns = resolved_rank(shape, rank)
    return (*batch, out, columns), (*batch, columns, inputs)


class WithRank(Protocol):
    """Options that have a rank."""

    @property
    def rank(self) -> Rank: ...


def factored_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: WithRank
) -> int:
    """Bytes of both factors of every member, dense, exactly."""
    found = (factor for shape in shapes.values() for factor in factor_shapes(shape, options.rank))
    return dtype.itemsize * sum(math.prod(factor) for factor in found)


def factored_problem(shapes: Mapping[str, tuple[int, ...]], options: WithRank) -> str | None:
    """The rank must be one that a member can have."""
    return rank_problem(shapes, options.rank)


@dataclass(frozen=True)
class Root:
    """How much errors at an expert's inputs count: T of H = T Tᵀ.

    Attributes:
        transform: float64 ``[in, in]``; ``[in]`` where T is diagonal; None: all inputs alike.
        note: kind of an event and what it has to tell, where there is something to tell.
    """

    transform: Tensor | None
    note: tuple[str, str] | None = None


PLAIN = Root(None)
NO_TOKENS = Root(None, ("no_tokens", "no tokens with inputs, plain SVD"))


def low_rank(
    weights: Mapping[str, Tensor],
    rank: Rank,
    root: Callable[[str, int], Root],
    base: Callable[[str, int], Tensor] | None = None,
    first: int = 0,
    refit: Callable[[str, int], Root | None] | None = None,
) -> Result:
    """Factors of members ``[*batch, out, in]`` in the format ``lowrank``, expert by expert.

    Args:
        root: of a member and one of its experts (0 for a linear).
        base: ``[out, in]`` likewise: what the factors will be added to; None if nothing. Then
            there is an event ``above_break_even`` where they are larger than the weight.
        first: number of the first expert, for events.
        refit: of other inputs, likewise, to which the left factors are fitted (:func:`refitted`).

    Raises:
        ValueError: a weight or a statistic is NaN or infinite, or there is no such rank.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    reason = rank_problem(shapes, rank)
    if reason:
        raise ValueError(reason)
    result = Result({})
    for name, weight in weights.items():
        check_finite(name, weight)
        *batch, out, inputs = weight.shape
        flat = weight.reshape(-1, out, inputs)
        columns = resolved_rank(shapes[name], rank)
        left = weight.new_empty(len(flat), out, columns)
        right = weight.new_empty(len(flat), columns, inputs)
        roots, others = [], []
        for expert, matrix in enumerate(flat):
            try:
                roots.append(root(name, expert))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            wide = matrix.double()
            if base is not None:
                wide = wide - base(name, expert).double()
            a, b = whitened_svd(wide, roots[-1].transform)
            other = None if refit is None else refit(name, expert)
            if other is not None:
                others.append(other)
                if other.transform is not None:
                    a, b = refitted(wide, b, other.transform)
            left[expert], right[expert] = a[:, :columns], b[:columns]
        result.members[name] = lowrank.pack(
            dense.pack(left.view(*batch, out, columns)),
            dense.pack(right.view(*batch, columns, inputs)),
        )
        if base is None:
            result.events += above_dense({name: result.members[name]})
        result.events += root_events(name, roots, first)
        result.events += root_events(f"{name}, inputs that it is fitted to", others, first)
    return result


def root_events(name: str, roots: Sequence[Root], first: int) -> list[Event]:
    """One event per kind of note, with the text of the first expert that has it.

    Args:
        first: number of the first expert.
    """
    found: dict[str, list[int]] = {}
    for expert, root in enumerate(roots):
        if root.note is not None:
            found.setdefault(root.note[0], []).append(expert)
    events = []
    for kind, experts in found.items():
        note = roots[experts[0]].note
        assert note is not None
        text = f"{name}: {note[1]}"
        if len(roots) > 1:
            text += f" (expert {first + experts[0]}; {len(experts)} of {len(roots)} in all)"
        events.append(Event(kind, text, value=len(experts)))
    return events


def whitened_svd(weight: Tensor, transform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of full rank of a float64 matrix ``[out, in]``, columns by falling share.

    The share of a column is what it adds to ‖W T‖². Column j of the left factor is as long as row j
    of the right one; the sign is such that the largest magnitude of the row is positive.

    Args:
        transform: T, float64 ``[in, in]``, ``[in]`` if diagonal, None for the identity.

    Returns:
        float64 ``[out, min(out, in)]`` and ``[min(out, in), in]``.
    """
    basis = None
    if weight.shape[0] > weight.shape[1]:
        basis, weight = torch.linalg.qr(weight)
    if transform is None:
        whitened = weight
    else:
        whitened = weight * transform if transform.dim() == 1 else weight @ transform
    _, vectors = torch.linalg.eigh(whitened @ whitened.mT)
    left = vectors.flip(-1)
    right = left.mT @ weight
    if basis is not None:
        left = basis @ left
    length = right.norm(dim=1)
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(largest < 0, -1.0, 1.0)
    scale = sign * length.sqrt()
    return left * scale, torch.where(length > 0, scale / length, 0.0)[:, None] * right


def refitted(weight: Tensor, right: Tensor, transform: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose right rows span what the first rows of ``right`` do, the left ones fitted.

    For every rank r, L_r = argmin ‖(W - L·R_r) T‖ with R_r the first r rows. They are turned so
    that R·T has orthonormal rows, in their order: then L = W T (R T)ᵀ, column by column, and
    smaller ranks are cuts of larger ones here, too.

    Args:
        weight: W, float64 ``[out, in]``.
        right: float64 ``[rank, in]``; rows that depend on the ones before add nothing.
        transform: T, float64 ``[in, in]``, of the inputs that are fitted to.

    Returns:
        float64 ``[out, rank]`` and ``[rank, in]``.
    """
    seen = right @ transform  # [rank, in]
    basis, mix = torch.linalg.qr(seen.mT)  # (R T)ᵀ = basis · mix
    diagonal = mix.diagonal().abs()
    kept = diagonal > diagonal.max() * len(right) * torch.finfo(right.dtype).eps
    if not kept.all():
        basis, mix = torch.linalg.qr(seen[kept].mT)
    left, turned = weight.new_zeros(len(weight), len(right)), torch.zeros_like(right)
    left[:, kept] = weight @ transform @ basis
    turned[kept] = torch.linalg.solve_triangular(mix.mT, right[kept], upper=False)
    return left, turned


def experts_hessian(stats: Stats, expert: int) -> Tensor:
    """One expert's H ``[in, in]`` (a linear's for expert 0).

    Raises:
        ValueError: it has NaN, infinite or negative diagonal entries.
    """
    whole = stats["hessian"]
    hessian = whole.view(-1, *whole.shape[-2:])[expert]
    check_hessian(hessian)
    return hessian


def kept_root(stats: Stats, key: str, expert: int, compute: Callable[[Tensor], Root]) -> Root:
    """``compute(H)`` of an expert, once per key and site where the site's roots are small.

    An expert without inputs has :data:`NO_TOKENS`.
    """

    def root() -> Root:
        hessian = experts_hessian(stats, expert)
        return compute(hessian) if hessian.diagonal().any() else NO_TOKENS

    if 8 * stats["hessian"].numel() > KEEP_BYTES:
        return root()
    return stats.derived((key, expert), root)


def eigen_root(stats: Stats, expert: int) -> Root:
    """T = Q√S of H = Q S Qᵀ (SVD-LLM v2, 2503.12340).

    Eigenvalues below the largest one times the precision of H are noise, of either sign; they are
    raised to that. So inputs that calibration never saw count a little, all alike.
    """
    tokens = int(stats["tokens"].reshape(-1)[expert])

    def compute(hessian: Tensor) -> Root:
        values, vectors = torch.linalg.eigh(hessian.double())
        floor = values[-1] * torch.finfo(hessian.dtype).eps
        raised = int((values < floor).sum())
        root = vectors * values.clamp(min=floor).sqrt()
        if not raised:
            return Root(root)
        size = len(values)
        kind = "few_tokens" if tokens < size else "rank_deficient"
        text = f"{tokens} tokens, {raised} of {size} eigenvalues of the Hessian were raised"
        return Root(root, (kind, text))

    return kept_root(stats, "eigen_root", expert, compute)


def diagonal_root(scale: Tensor) -> Root:
    """The diagonal T of one expert's ``scale`` ``[in]``, not negative.

    Inputs of scale 0 count a little, so that the order of columns is never arbitrary; a note tells
    of how many.

    Raises:
        ValueError: a scale is NaN or infinite.
    """
    if not scale.isfinite().all():
        raise ValueError("the scales of the inputs are NaN or infinite")
    largest = scale.max()
    if largest <= 0:
        return NO_TOKENS
    floor = float(largest) * torch.finfo(torch.float32).eps
    raised = int((scale < floor).sum())
    note = ("rank_deficient", f"{raised} of {len(scale)} inputs count next to nothing")
    return Root(scale.double().clamp(min=floor), note if raised else None)


def rank_errors(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    hessian: Tensor,
    ranks: Sequence[int],
    base: Tensor | None = None,
) -> Tensor:
    """Squared output error of every row, for all ranks from one product.

    With D = W - base, P = D H Rᵀ and G = R H Rᵀ, column j of L and row j of R add

        L_ij (2 Σ_{k<j} G_jk L_ik + G_jj L_ij) - 2 L_ij P_ij

    to the error of row i. Products are not rounded, as they are not where factors are multiplied.

    Args:
        weight: ``[*batch, out, in]``.
        left, right: factors ``[*batch, out, rank]`` and ``[*batch, rank, in]``.
        hessian: Σ x xᵀ ``[*batch, in, in]``.
        ranks: how many columns are kept, from 0 to the rank of the factors.
        base: what the factors are added to, like ``weight``; None if nothing.

    Returns:
        diag((D - L_r R_r) H (D - L_r R_r)ᵀ), float64 ``[len(ranks), *batch, out]``.
    """
    *batch, out, inputs = weight.shape
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (weight, left, right, hessian)]
    bases = None if base is None else base.reshape(-1, out, inputs)
    errors = flat[0].new_empty(len(ranks), len(flat[0]), out, dtype=torch.float64)
    for expert in range(len(flat[0])):
        delta, a, b, h = (part[expert].double() for part in flat)
        if bases is not None:
            delta = delta - bases[expert].double()
        seen = delta @ h  # [out, in]
        gram = b @ h @ b.mT  # [rank, rank]
        before = a @ gram.tril(-1).mT  # [out, rank]
        added = a * (2 * before + gram.diagonal() * a - 2 * seen @ b.mT)
        whole = (seen * delta).sum(-1, keepdim=True)  # [out, 1]
        total = torch.cat([whole, whole + added.cumsum(-1)], dim=-1)
        errors[:, expert] = total[:, list(ranks)].mT.clamp_min(0)
    return errors.view(len(ranks), *batch, out)
