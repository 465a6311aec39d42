"""Channels between two layers cut by Nyström's approximation, the rest refitted to what is left.

Of the activations a ``[T, I]`` between two linears only some channels S stay. Which ones is told by
their energy or by ridge leverage, as MoDeGPT does (Lin et al., 2408.09632, algorithm 1); the linear
W_D that reads them is refitted by least squares (section 3.2 there):

    min_Δ ‖A_R W_Rᵀ − A_S Δᵀ‖² + λ‖Δ‖²,   W_D' = W_S + Δ,   Δᵀ = (C_SS + λI)⁻¹ C_SR W_Rᵀ

with R the channels that go, C = AᵀA. At λ = 0 this is (SᵀCS)⁺SᵀC·W_Dᵀ. The ridge draws W_D' to
W_S, not to 0, so that the error on the sample is at most that of plain selection, whatever λ is,
and nothing moves where nothing is cut.
"""

import math

import torch
from torch import Tensor


def energy(covariance: Tensor, down: Tensor) -> Tensor:
    """What each channel adds to the output by itself, float64 ``[I]``.

    Args:
        covariance: C, float64 ``[I, I]``.
        down: W_D, float64 ``[H, I]``.
    """
    return covariance.diagonal() * down.square().sum(0)


def leverage(covariance: Tensor, down: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores diag(C(C + λI)⁻¹), float64 ``[I]``.

    Near 0 for a channel without activations or that others can stand in for, near 1 for one on its
    own. :func:`energy` where there are no activations at all.

    Args:
        ridge: λ relative to the mean of diag C.
    """
    damping = ridge * covariance.diagonal().mean()
    if damping <= 0:
        return energy(covariance, down)
    damped = covariance + damping * torch.eye(len(covariance)).to(covariance)
    return torch.cholesky_solve(covariance, torch.linalg.cholesky(damped)).diagonal()


def top_channels(importance: Tensor, count: int) -> Tensor:
    """The ``count`` most important channels, in their order, int64 ``[J]``."""
    order = importance.sort(descending=True, stable=True).indices
    return order[:count].sort().values


def refit(covariance: Tensor, down: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The refitted W_D', float64 ``[H, J]``.

    Args:
        covariance: C, float64 ``[I, I]``.
        down: W_D, float64 ``[H, I]``.
        kept: channels S, ``[J]``.
        ridge: λ relative to the mean of diag C_SS.
    """
    plain = down[:, kept]
    cut = torch.ones(down.shape[1], dtype=torch.bool, device=kept.device)
    cut[kept] = False
    block = covariance[kept][:, kept]
    damping = ridge * block.diagonal().mean()
    if not cut.any() or damping <= 0:  # nothing to make up for, or nothing to do it with
        return plain
    factor = torch.linalg.cholesky(block + damping * torch.eye(len(block)).to(block))
    target = covariance[kept][:, cut] @ down[:, cut].T  # [J, H]
    return plain + torch.cholesky_solve(target, factor).T


def kept_channels(channels: int, share: float, multiple: int, name: str) -> int:
    """A share of some channels in steps of ``multiple``, as far as their number is one.

    Raises:
        ValueError: in one line, where that is more than all or none of them.
    """
    if share > 1:
        raise ValueError(f"{name}: {share:g} is no share of the channels: at most 1.0")
    step = math.gcd(multiple, channels)
    count = step * int(share * channels / step + 0.5)
    if not count:
        raise ValueError(f"{name}: {share:g} of {channels} channels is none, in steps of {step}")
    return count
