"""The reverse pass: squared gradients of every member's outputs, one block in memory at a time.

The walk of :mod:`moesaic.orchestrator.calibrate` left the hidden states of a few sequences of every
shard at every boundary between blocks. From the loss backwards each block is computed again on
them, now with gradients. Labels are drawn from the model's own distribution, so that the sum is a
Fisher information and not an error of the model. An encoder has no labels: noise on its embeddings
takes their place (see :mod:`moesaic.orchestrator.embeddings`).

Where a method wants the empirical Fisher information, whose labels are the next tokens of the text,
a second gradient goes back beside the first through the same computation of each block. Measured on
one core, that takes 1.7 times as long for a dense model, 1.5 times for a Mixture of Experts. For an
encoder the second gradient is that of noise drawn anew: its sequences have no next token, and the
Fisher information of its embeddings needs none.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.orchestrator.bank_slices import slices_kept_out_of_graphs
from moesaic.orchestrator.calibrate import reversed_experts
from moesaic.orchestrator.embeddings import noise_gradients
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experts import observing
from moesaic.orchestrator.readahead import own_share, read_ahead
from moesaic.orchestrator.shared import exists, remove
from moesaic.orchestrator.statistics import GradientObserver, Node, SiteStats, covered
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.sums import sum_nodes, sums_left
from moesaic.orchestrator.walk import (
    Walk,
    block_units,
    boundary_path,
    load_tensor,
    opened,
    save_tensor,
    token_ids,
)
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Rows of logits in float32 at a time.
LOGIT_ROWS = 512
# Label of a token whose next one is not known: it takes no part in the loss.
_NONE = -100


def _loss_gradients(
    model: StreamedModel, hidden: Tensor, generator: torch.Generator, following: Tensor | None
) -> Tensor:
    """d(−log p(label)) / d(hidden), summed over tokens, labels drawn from the model itself.

    Args:
        hidden: ``[sequences, length, hidden]``.
        following: ``[sequences, length]``, labels of a second loss; or None.

    Returns:
        ``[losses, sequences, length, hidden]``.
    """
    gradients = []
    known = None if following is None else following.flatten().split(LOGIT_ROWS)
    for part, rows in enumerate(hidden.reshape(-1, hidden.shape[-1]).split(LOGIT_ROWS)):
        leaf = rows.detach().to(model.device).requires_grad_(True)
        with torch.enable_grad():
            logits = model.logits(model.final_norm(leaf[None]))[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
            losses = [
                torch.nn.functional.cross_entropy(
                    logits, labels.to(logits.device), ignore_index=_NONE, reduction="sum"
                )
                for labels in [drawn[:, 0], *([] if known is None else [known[part]])]
            ]
        each = [
            torch.autograd.grad(loss, leaf, retain_graph=loss is not losses[-1])[0]
            for loss in losses
        ]
        gradients.append(torch.stack(each).cpu())
    return torch.cat(gradients, dim=1).view(-1, *hidden.shape)


def _following(walk: Walk, shard: int) -> Tensor:
    """The next token of each in the sequences of the reverse pass ``[sequences, length]``."""
    ids = token_ids(walk, shard)[: walk.gradients]
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=_NONE)


def gradient_path(walk: Walk, block: int, shard: int) -> Path:
    return walk.scratch / f"gradient-{block:04d}-{shard:04d}.safetensors"


def _required(path: Path, what: str, shard: int) -> Tensor:
    found = load_tensor(path)
    if found is None:
        raise RunError(
            f"{path}: the {what} of shard {shard} are missing; run the same command again"
        )
    return found


def _output_gradient(model: StreamedModel, walk: Walk, block: int, shard: int) -> Tensor:
    """Gradients at the output of ``block``: from the block after it, or from the losses.

    Returns:
        ``[losses, sequences, length, hidden]``.
    """
    if block + 1 < model.blocks:
        return _required(gradient_path(walk, block + 1, shard), "gradients", shard)
    hidden = _required(boundary_path(walk, model.blocks, shard), "last hidden states", shard)
    generator = torch.Generator().manual_seed(walk.seed * 1_000_003 + shard)
    if walk.pooling:
        return noise_gradients(hidden, walk.pooling, generator, draws=1 + walk.fisher)
    following = _following(walk, shard) if walk.fisher else None
    return _loss_gradients(model, hidden, generator, following)


def reverse(
    state: WorkerState, walk: dict[str, Any], block: int, span: Node, sums: bool = True
) -> dict[str, Any]:
    """Takes gradients of the shards of ``span`` back through ``block``.

    Args:
        sums: whether their squares are wanted; not where the block's are there.

    Returns:
        ``seconds`` and ``peak_bytes`` of the worker.
    """
    plan = Walk(**walk)
    started = time.monotonic()
    nodes = covered((0, plan.shards), span)
    returned = all(exists(gradient_path(plan, block, s)) for s in range(*span))
    if not (returned and (not sums or sums_left(plan, "gradients", block, nodes))):
        model = opened(state, plan)
        experts = reversed_experts(state, plan, model, block, span)
        module = model.load_block(block, experts=experts).requires_grad_(False)
        read_ahead(model, block - 1, own_share(span))

        def shard_stats(shard: int) -> SiteStats:
            hidden = _required(boundary_path(plan, block, shard), "hidden states", shard)
            outer = _output_gradient(model, plan, block, shard)
            units, pooled = block_units(model, block), bool(plan.pooling)
            observer = GradientObserver(units, model.device, plan.fisher, pooled)
            before = []
            watched = observing(model, block, module, observer) if sums else nullcontext()
            with torch.enable_grad(), watched, slices_kept_out_of_graphs(module):
                for x, behind in zip(hidden.split(1), outer.split(1, dim=1), strict=True):
                    x = x.to(model.device).requires_grad_(True)
                    y = model.run_block(block, module, x)
                    inner = []
                    for number, gradient in enumerate(behind):
                        observer.following = number > 0
                        again = number + 1 < len(behind)
                        gradient = gradient.to(model.device)
                        inner += torch.autograd.grad(y, x, gradient, retain_graph=again)
                    before.append(torch.stack(inner).cpu())
            save_tensor(gradient_path(plan, block, shard), torch.cat(before, dim=1))
            return observer.stats

        if sums:
            sum_nodes(plan, "gradients", block, nodes, shard_stats)
        else:
            for shard in range(*span):
                shard_stats(shard)
    for shard in range(*span):
        remove(gradient_path(plan, block + 2, shard))
        remove(boundary_path(plan, block + 2, shard))
    return {"seconds": time.monotonic() - started, "peak_bytes": peak_memory_bytes()}
