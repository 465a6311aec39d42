"""Factorised Hessians: what error feedback needs to know about a site's inputs.

For the layer error tr(E H Eᵀ), E = W - Ŵ and H = sum x xᵀ, write H = M D Mᵀ with M *upper*
unit-triangular and D diagonal. Then tr(E H Eᵀ) = sum_j D_j ‖(E M)_j‖², and (E M)_j = e_j + c_j with
c_j = sum_{k<j} e_k M_kj: once the inputs before j are fixed, the best value of column j, the ones
after it being free, is w_j + c_j. This is GPTQ's update: M is the inverse of the unit-scaled upper
Cholesky factor of H⁻¹ (QuIP, 2307.13304, theorem 6). In this form nothing is inverted, one
Cholesky is enough, and rounding errors do not build up, since e_k is always taken from W itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Float64 matrices that are factorised at a time, by kind of device. On a processor their copies
# stay in its cache so: 64 matrices of 256 x 256 take half the time that they take in one go.
_SLICE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Factor:
    """Factorised Hessians of ``E`` experts (a linear is one expert).

    Attributes:
        feedback: float32 ``[E, in, in]``, strictly lower: row j holds M_kj for k < j, inputs in
            processing order.
        order: int64 ``[E, in]``, input processed at each position; None where as they stand.
        weight: float32 ``[E, in]``, diagonal of H over the mean of its live entries, dead ones 1.
        dead: bool ``[E, in]``, inputs that were always zero.
        blind: bool ``[E]``, experts whose inputs are all dead: nothing is known, H = I.
        damp: float64 ``[E]``, what was added to the diagonal, relative to the mean live entry.
    """

    feedback: Tensor
    order: Tensor | None
    weight: Tensor
    dead: Tensor
    blind: Tensor
    damp: Tensor


def check_hessian(hessian: Tensor) -> None:
    """Raises ValueError where ``hessian`` ``[*, in, in]`` cannot be a sum of x xᵀ."""
    if not all(torch.isfinite(end) for end in hessian.aminmax()):
        raise ValueError("the Hessian has NaN or infinite entries")
    if (hessian.diagonal(dim1=-2, dim2=-1) < 0).any():
        raise ValueError("the Hessian has negative diagonal entries: it is no sum of x xᵀ")


def factorise(hessian: Tensor, damp: float, descending: bool) -> Factor:
    """Factorises ``hessian`` ``[E, in, in]`` in float64, all experts at once.

    The mean over live inputs scales the damping, so that neither the number of tokens nor the
    number of dead inputs changes it. Where a Hessian is not positive definite with ``damp``, the
    damping of that expert grows tenfold until it is: look at ``Factor.damp``.

    Args:
        damp: what to add to the diagonal, relative to its mean.
        descending: process inputs by falling diagonal (act-order) instead of as they stand.

    Raises:
        ValueError: the Hessian has NaN, infinite or negative diagonal entries.
    """
    check_hessian(hessian)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).double()
    dead = diagonal == 0
    blind = dead.all(-1)
    mean = torch.where(blind, 1.0, diagonal.sum(-1) / (~dead).sum(-1).clamp(min=1))
    weight = torch.where(dead, 1.0, diagonal / mean[:, None])

    order = diagonal.argsort(dim=-1, descending=True, stable=True) if descending else None
    feedback = torch.empty_like(hessian, dtype=torch.float32)
    damps = torch.empty_like(mean)
    width = max(1, _SLICE_BYTES[hessian.device.type] // (8 * hessian.shape[-1] ** 2))
    for start in range(0, len(hessian), width):
        part = slice(start, start + width)
        index = None if order is None else order[part]
        normal = hessian[part], weight[part], mean[part, None, None]
        damps[part] = _feedback(*normal, index, damp, feedback[part])
    return Factor(feedback, order, weight.float(), dead, blind, damps)


def _feedback(
    hessian: Tensor,
    weight: Tensor,
    mean: Tensor,
    order: Tensor | None,
    damp: float,
    out: Tensor,
) -> Tensor:
    """Writes ``Factor.feedback`` of these experts to ``out`` and returns their damping."""
    # Torch factorises into lower · upper; the reversed matrix gives upper · lower.
    if order is None:
        system, diagonal = hessian.flip(-1, -2), weight.flip(-1)
    else:
        index = order.flip(-1)
        system = hessian.gather(1, index[:, :, None].expand(hessian.shape))
        system = system.gather(2, index[:, None, :].expand(hessian.shape))
        diagonal = weight.gather(1, index)
    lower, damps = damped_cholesky(system / mean, diagonal, damp)  # float64 from here
    upper = lower.mT.flip(-1, -2)  # lower triangular: rows of Mᵀ, unscaled
    torch.div(upper, upper.diagonal(dim1=-2, dim2=-1)[..., None].clone(), out=out)
    out.diagonal(dim1=-2, dim2=-1).zero_()
    return damps


def damped_cholesky(system: Tensor, diagonal: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Lower factors of ``system`` ``[E, n, n]`` with ``diagonal + damping``, and the damping."""
    damps = diagonal.new_full((len(system),), damp)
    system.diagonal(dim1=-2, dim2=-1).copy_(diagonal + damp)
    lower, info = torch.linalg.cholesky_ex(system)
    while (failed := info.nonzero().flatten()).numel():
        damps[failed] *= 10
        if not math.isfinite(float(damps.max())):
            raise ValueError("the Hessian stays indefinite whatever is added to its diagonal")
        again = system[failed]
        again.diagonal(dim1=-2, dim2=-1).copy_(diagonal[failed] + damps[failed, None])
        lower[failed], info[failed] = torch.linalg.cholesky_ex(again)
    return lower, damps
