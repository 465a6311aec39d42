"""Slopes of a plan's KL towards all other choices, on the model that a worker keeps.

The model runs forward, and the inputs of its blocks are kept. From the KL backwards every block is
then run again, now with gradients of its weights G = ∂KL/∂W. Towards another candidate W' of a unit
the slope is ⟨G, W' − W⟩: what the KL would change by, to first order, if all of W' took the place
of W. Gradients of one block at a time are in memory, and the weights of one other candidate.

A router chooses experts, which has no derivative; what its logits do to how much the chosen experts
count has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.methods.base import Unit
from moesaic.orchestrator.bank import split
from moesaic.orchestrator.evaluate import Judge, dense_hidden, dense_model
from moesaic.orchestrator.gradients import LOGIT_ROWS
from moesaic.orchestrator.mixtures import Mixtures
from moesaic.orchestrator.resident import (
    HIDDEN_BYTES,
    WEIGHT_BYTES,
    Resident,
    Rows,
    keep,
    taken,
)
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import read_ids
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Stands for the original weights where a file is expected.
DENSE = ""


def plan_slopes(
    state: WorkerState,
    judge: dict[str, Any],
    rows: Rows,
    pieces: Mapping[str, str],
    candidates: Mapping[str, Sequence[str]],
    mixtures: Mixtures | None = None,
    weight_bytes: int = WEIGHT_BYTES,
    hidden_bytes: int = HIDDEN_BYTES,
) -> dict[str, Any]:
    """KL to the dense model of the sequences ``rows`` under a plan, and its slopes.

    As :func:`moesaic.orchestrator.resident.evaluate_plan`, whose model it shares.

    Args:
        candidates: unit → files of pieces, :data:`DENSE` for its original weights. A reduced bank's
            have the same reduction as the plan's.

    Returns:
        ``kl``: sum over each sequence in nats; ``slopes``: unit → member → of every candidate, of
        every expert (of a linear, one), the slope of the sum of them; ``peak_bytes``.
    """
    plan = Judge(**judge)
    held = taken(state, plan, weight_bytes, hidden_bytes)
    held.mixtures = mixtures or {}
    model, own = held.model, held.by_block(pieces)
    ids = read_ids(plan.ids, *rows)
    inputs: list[list[Tensor]] = []
    with torch.no_grad():
        hidden = [model.embed(part) for part in ids.split(plan.batch)]
        for index in range(model.blocks):
            block = held.block(index, own[index])
            inputs.append(hidden)
            hidden = [model.run_block(index, block, x) for x in hidden]
        dense = dense_hidden(plan, rows).to(model.device)
        reference = dense_model(state, plan)
    kl: list[float] = []
    behind = []
    for x, target in zip(hidden, dense.split(plan.batch), strict=True):
        sums, gradient = _from_the_loss(model, reference, x, target)
        kl += sums
        behind.append(gradient)
    slopes: dict[str, dict[str, list[list[float]]]] = {}
    for index in reversed(range(model.blocks)):
        behind, found = _through(held, index, own[index], inputs.pop(), behind, candidates)
        slopes |= found
    keep(state, held)
    return {"kl": kl, "slopes": slopes, "peak_bytes": peak_memory_bytes()}


def _from_the_loss(
    model: StreamedModel, reference: StreamedModel, hidden: Tensor, dense: Tensor
) -> tuple[list[float], Tensor]:
    """Σ KL(dense ‖ this) of every sequence, and d(their sum)/d(hidden) ``[B, T, H]``."""
    sums = []
    gradient = torch.zeros_like(hidden)
    for number, (own, other) in enumerate(zip(hidden, dense, strict=True)):
        total, last = 0.0, len(own) - 1  # nothing follows the last token
        for start in range(0, last, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, last)
            leaf = own[start:stop].detach().requires_grad_(True)
            with torch.no_grad():
                normed = reference.final_norm(other[None, start:stop])
                log_p = reference.logits(normed)[0].float().log_softmax(-1)
            with torch.enable_grad():
                log_q = model.logits(model.final_norm(leaf[None]))[0].float().log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).double().sum()
            gradient[number, start:stop] = torch.autograd.grad(kl, leaf)[0]
            total += float(kl.detach())
        sums.append(total)
    return sums, gradient


def _through(
    held: Resident,
    index: int,
    pieces: dict[str, str],
    inputs: Sequence[Tensor],
    behind: Sequence[Tensor],
    candidates: Mapping[str, Sequence[str]],
) -> tuple[list[Tensor], dict[str, dict[str, list[list[float]]]]]:
    """Takes gradients back through a block.

    Returns:
        gradients at its input, batch by batch, and slopes of its units.
    """
    model = held.model
    block = held.block(index, pieces)
    units = [unit for unit in model.layouts[index].units if unit.name in candidates]
    names = {unit.name: held.weight_names(unit) for unit in units}
    weights = {name: block.get_parameter(name) for unit in units for name in names[unit.name]}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    before = []
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for x, gradient in zip(inputs, behind, strict=True):
            leaf = x.detach().requires_grad_(True)
            with torch.enable_grad():
                y = model.run_block(index, block, leaf)
                found = torch.autograd.grad(
                    y, [leaf, *weights.values()], gradient, allow_unused=True
                )
            before.append(torch.zeros_like(x) if found[0] is None else found[0])
            for name, part in zip(weights, found[1:], strict=True):
                if part is not None:  # no token may have reached a bank's experts
                    sums[name] += part
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    with torch.no_grad():
        slopes = {
            unit.name: _slopes(
                held,
                unit,
                _members(model, unit, [weights[name].detach() for name in names[unit.name]]),
                _members(model, unit, [sums[name] for name in names[unit.name]]),
                candidates[unit.name],
            )
            for unit in units
        }
    return before, slopes


def _members(model: StreamedModel, unit: Unit, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Member → ``[experts, out, in]`` of what lies in a module as its parameters do."""
    if unit.kind == "bank":
        return split(tensors[0], tensors[1], model.bank)
    return {"weight": tensors[0][None]}


def _slopes(
    held: Resident,
    unit: Unit,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    candidates: Sequence[str],
) -> dict[str, list[list[float]]]:
    """Member → of every candidate, of every expert, ⟨G, W' − W⟩."""
    found: dict[str, list[list[float]]] = {member: [] for member in weights}
    for path in candidates:
        other = held.whole(path) if path != DENSE else held.model.read_unit(unit)
        for member, weight in weights.items():
            value = other[member].to(weight.device)
            change = value.view(weight.shape).float() - weight.float()
            product = (gradients[member].float() * change).flatten(1).sum(1, dtype=torch.float64)
            found[member].append(product.tolist())
    return found
