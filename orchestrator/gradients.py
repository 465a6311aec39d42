"""The reverse pass: squared gradients of every member's outputs, one block in memory at a time.

The walk of :mod:`moesaic.orchestrator.calibrate` left the hidden states of a few sequences of every
shard at every boundary between blocks. From the loss backwards each block is computed again on
them, now with gradients. Labels are drawn from the model's own distribution, so that the sum is a
Fisher information and not an error of the model.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.orchestrator.calibrate import (
    Walk,
    block_units,
    boundary_path,
    load_tensor,
    node_path,
    opened,
    save_tensor,
    sum_nodes,
)
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experts import observing
from moesaic.orchestrator.statistics import GradientObserver, Node, SiteStats, covered
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes

# Rows of logits in float32 at a time.
LOGIT_ROWS = 512


def _loss_gradient(model: StreamedModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """d(−log p(label)) / d(hidden), summed over tokens, labels drawn from the model itself."""
    gradients = []
    for rows in hidden.reshape(-1, hidden.shape[-1]).split(LOGIT_ROWS):
        leaf = rows.detach().to(model.device).requires_grad_(True)
        with torch.enable_grad():
            logits = model.logits(model.final_norm(leaf[None]))[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
            loss = torch.nn.functional.cross_entropy(
                logits, labels[:, 0].to(logits.device), reduction="sum"
            )
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradients.append(gradient.cpu())
    return torch.cat(gradients).view_as(hidden)


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
    """Gradient at the output of ``block``: from the block after it, or from the loss."""
    if block + 1 < model.blocks:
        return _required(gradient_path(walk, block + 1, shard), "gradients", shard)
    hidden = _required(boundary_path(walk, model.blocks, shard), "last hidden states", shard)
    generator = torch.Generator().manual_seed(walk.seed * 1_000_003 + shard)
    return _loss_gradient(model, hidden, generator)


def reverse(state: WorkerState, walk: dict[str, Any], block: int, span: Node) -> dict[str, Any]:
    """Takes gradients of the shards of ``span`` back through ``block``.

    Returns:
        ``seconds`` and ``peak_bytes`` of the worker.
    """
    plan = Walk(**walk)
    started = time.monotonic()
    nodes = covered((0, plan.shards), span)
    returned = all(gradient_path(plan, block, s).exists() for s in range(*span))
    if not (returned and all(node_path(plan, "gradients", block, n).exists() for n in nodes)):
        model = opened(state, plan)
        module = model.load_block(block).requires_grad_(False)

        def shard_stats(shard: int) -> SiteStats:
            hidden = _required(boundary_path(plan, block, shard), "hidden states", shard)
            outer = _output_gradient(model, plan, block, shard)
            observer = GradientObserver(block_units(model, block), model.device)
            before = []
            with torch.enable_grad(), observing(model, block, module, observer):
                for x, gradient in zip(hidden.split(1), outer.split(1), strict=True):
                    x = x.to(model.device).requires_grad_(True)
                    y = model.run_block(block, module, x)
                    (inner,) = torch.autograd.grad(y, x, gradient.to(model.device))
                    before.append(inner.cpu())
            save_tensor(gradient_path(plan, block, shard), torch.cat(before))
            return observer.stats

        sum_nodes(plan, "gradients", block, nodes, shard_stats)
    for shard in range(*span):
        gradient_path(plan, block + 2, shard).unlink(missing_ok=True)
        boundary_path(plan, block + 2, shard).unlink(missing_ok=True)
    return {"seconds": time.monotonic() - started, "peak_bytes": peak_memory_bytes()}
