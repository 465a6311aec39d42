"""Sums of statistics over shards: of nodes of the tree, and of a whole block.

A block's sums are an entry of the store; those of a node are files until the block's are summed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moesaic.orchestrator.adding import OpenSums, found_nodes, open_sums
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.shared import exists, open_store, remove, write_shared
from moesaic.orchestrator.statistics import (
    BLOCK,
    SEPARATOR,
    Node,
    SiteStats,
    save_stats,
    tree_sum,
)
from moesaic.orchestrator.walk import Walk, node_path
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes


def sum_nodes(
    walk: Walk,
    what: str,
    block: int,
    nodes: list[Node],
    shard_stats: Callable[[int], SiteStats],
) -> None:
    """Sums every node from its shards, in order, and writes it."""

    def leaf(node: Node) -> SiteStats | None:
        return None if node[1] - node[0] > 1 else shard_stats(node[0])

    for node in nodes:
        sums = tree_sum(node, leaf)
        leave_sums(walk, what, block, node, lambda p, sums=sums: save_stats(p, sums))  # type: ignore[misc]


def entry_key(walk: Walk, what: str, block: int) -> str:
    """Of a block's sums in the store."""
    return walk.stats_key(block) if what == "stats" else walk.gradients_key(block)


def sums_left(walk: Walk, what: str, block: int, nodes: list[Node]) -> bool:
    """Whether :func:`leave_sums` was here for all these nodes."""
    if nodes == [(0, walk.shards)]:
        return open_store(walk.store).get(what, entry_key(walk, what, block)) is not None
    return all(exists(node_path(walk, what, block, node)) for node in nodes)


def leave_sums(walk: Walk, what: str, block: int, node: Node, fill: Callable[[Path], None]) -> None:
    """Writes the sums of a node: a file that is to be added to others, or, where the node is all
    shards and there is nothing to add, the block's entry.

    Args:
        fill: writes them to a path.
    """
    if node != (0, walk.shards):
        write_shared(node_path(walk, what, block, node), fill)
        return
    told: dict[str, Any] = {}

    def write(path: Path) -> None:
        fill(path)
        with safe_open(path, framework="pt") as file:
            sums = OpenSums(node, {node: file})
            sums.look(partial(_finite, walk, what, block))
            told.update(_counts(sums, block))

    open_store(walk.store).put(what, entry_key(walk, what, block), write, told)


def reduce(state: WorkerState, walk: dict[str, Any], what: str, block: int) -> dict[str, Any]:
    """Sums the nodes of a block into its entry of the store, and removes them.

    Args:
        what: ``stats`` or ``gradients``.
    """
    plan = Walk(**walk)
    store = open_store(plan.store)
    key = entry_key(plan, what, block)
    root: Node = (0, plan.shards)

    def known() -> bool:
        """Whether another worker was here, and has removed some nodes or all."""
        return store.get(what, key) is not None

    if known():
        return {"peak_bytes": peak_memory_bytes()}
    paths, missing = found_nodes(root, lambda node: node_path(plan, what, block, node), exists)
    try:
        if missing:
            raise RunError(
                f"block {block}: the {what} of shard {missing[0]} are missing; run the same command"
                " again"
            )
        with open_sums(root, paths) as sums:
            finite = partial(_finite, plan, what, block)
            store.put(what, key, lambda path: sums.write(path, finite), _counts(sums, block))
    except (RunError, FileNotFoundError):
        if known():
            return {"peak_bytes": peak_memory_bytes()}
        raise
    for path in paths.values():
        remove(path)
    return {"peak_bytes": peak_memory_bytes()}


def _finite(walk: Walk, what: str, block: int, name: str, value: Tensor) -> None:
    """Raises RunError where a sum is not."""
    if not torch.isfinite(value).all():
        site, _, statistic = name.rpartition(SEPARATOR)
        raise RunError(_overflow(walk, what, block, site, statistic))


def _overflow(walk: Walk, what: str, block: int, site: str, statistic: str) -> str:
    """What to say of sums that are not finite."""
    where = "its hidden states" if site == BLOCK else f"{statistic} of {site}"
    # Gradients come from where the model ends.
    side = "before" if what == "stats" else "behind"
    advice = f"look at the weights {side} it for values that are far too large"
    if walk.dtype != "float32":
        advice = "try compute.dtype: float32"
    return f"{walk.model}: block {block}: {where} overflow: {advice}"


def _counts(sums: OpenSums, block: int) -> dict[str, Any]:
    """What is told with the sums of a block: the tokens that each site saw."""
    counts = {
        name: {
            site: sums.total(full).tolist()
            for full in sums.layout
            for site, _, statistic in [full.rpartition(SEPARATOR)]
            if statistic == name
        }
        for name in ("tokens", "routed")
    }
    return {"block": block, **counts}
