"""Router calibration: after experts were reduced, only the routers learn, from the dense model.

Everything but the routers is frozen; they follow the gradient of the KL divergence from the dense
model's next-token distribution, KL(dense ‖ reduced), on the calibration text (knowledge
distillation as in Hinton et al., 1503.02531, section 2, at temperature 1). Which experts a token
takes has no gradient; how much each counts has one, and moves the choice with it. A correction that
only chooses (DeepSeek-V3) is left as it is.

This module holds the mathematics; :mod:`moesaic.orchestrator.router_training` runs it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.methods.base import MethodOptions, option

# Roles of a router's tensors that learn.
TRAINED = ("weight", "bias")
# Rows of logits in float32 at a time.
_ROWS = 512


class Options(MethodOptions):
    """Options of router calibration."""

    learning_rate: float = option(
        2e-3,
        "of Adam, relative to the root mean square of each router's weight",
        [5e-4, 2e-3, 1e-2],
        gt=0,
    )
    epochs: int = option(1, "passes over the calibration text", [1, 2, 4], ge=1)
    batch: int = option(16, "sequences per step", [8, 16, 32], ge=1)
    held_back: float = option(
        0.125, "share of the sequences that judge whether the routers got better", ge=0, lt=1
    )


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Σ over rows of KL(dense ‖ logits) in nats, both ``[rows, vocabulary]``."""
    target, own = dense.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (target.exp() * (target - own)).sum()


def divergence_gradient(
    hidden: Tensor,
    dense: Tensor,
    logits: Callable[[Tensor], Tensor],
    dense_logits: Callable[[Tensor], Tensor],
) -> tuple[float, Tensor]:
    """Σ KL over tokens, and its gradient at the last hidden state.

    Args:
        hidden, dense: ``[tokens, H]``, last hidden states of the reduced and the dense model.
        logits, dense_logits: ``[rows, H] -> [rows, vocabulary]``, norm and head of each.

    Returns:
        the sum in nats, and the gradient ``[tokens, H]``.
    """
    total, gradients = 0.0, []
    for rows, wanted in zip(hidden.split(_ROWS), dense.split(_ROWS), strict=True):
        leaf = rows.detach().requires_grad_(True)
        with torch.no_grad():
            target = dense_logits(wanted)
        with torch.enable_grad():
            loss = divergence(logits(leaf), target)
        (gradient,) = torch.autograd.grad(loss, leaf)
        total += float(loss.detach())
        gradients.append(gradient)
    return total, torch.cat(gradients)
