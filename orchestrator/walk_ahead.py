"""The walk that goes ahead of the statistics, for many workers.

In the joint walk a worker takes its shards through a block and sums their statistics at once, so
that the blocks' statistics follow one another, and every walker leaves sums of every block to be
added. Here the walk is a plain forward pass: each block's hidden states are left as files, and the
statistics of a block are a task of its own, for whatever worker is free:

    pass 0 → pass 1 → pass 2 → …          the walkers, one range of shards each
       ↘        ↘        ↘
    collect 0  collect 1  collect 2 …     anybody; all shards of a block
       ↓        ↓        ↓
     sum 0     sum 1     sum 2 …          measuring, as in the joint walk

The bytes are those of the joint walk: the block, its inputs and the order of the sums are the same.
What it costs is that every block is read and run once more, and the hidden states of blocks that
wait for their statistics; the walk stops while there are more than :data:`BEHIND` per worker.
"""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from moesaic.orchestrator.calibrate import pass_shards
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.shared import remove
from moesaic.orchestrator.statistics import Node
from moesaic.orchestrator.walk import Walk, hidden_path, opened
from moesaic.orchestrator.worker import WorkerState, peak_memory_bytes, plain

if TYPE_CHECKING:
    from moesaic.orchestrator.stages import Calibration

# Blocks per worker whose hidden states may wait for their statistics.
BEHIND = 1


@torch.no_grad()
def pass_block(state: WorkerState, walk: dict[str, Any], block: int, span: Node) -> dict[str, Any]:
    """Takes the shards of ``span`` through a dense block; hidden states before it stay.

    Returns:
        ``seconds`` and ``peak_bytes`` of the worker.
    """
    plan = Walk(**walk)
    started = time.monotonic()
    model = opened(state, plan)
    pass_shards(state, plan, model, block, span)
    return {"seconds": time.monotonic() - started, "peak_bytes": peak_memory_bytes()}


class Ahead:
    """The tasks of such a walk.

    Args:
        calibration: whose walk it is; it knows what is finished, and adds and measures.
    """

    def __init__(self, calibration: "Calibration", priorities: tuple[int, int]) -> None:
        self.calibration = calibration
        self.priorities = priorities
        self.passed = [0] * calibration.blocks
        self.floor = 0  # blocks before it were passed by all
        self.collecting: set[int] = set()
        self.held: list[Task] = []

    def start(self, block: int) -> list[Task]:
        """What to begin with, the walk starting before ``block``."""
        self.floor = block
        spans = self.calibration.ranges
        passes = [self._pass(block, worker, span) for worker, span in enumerate(spans)]
        return [*passes, *self._collect(block)]

    def _pass(self, block: int, worker: int, span: Node) -> Task:
        calibration = self.calibration

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.passed[block] += 1
            new: list[Task] = []
            if block + 1 < calibration.blocks:
                self.held.append(self._pass(block + 1, worker, span))
            else:  # at once: a walker that is given something else meanwhile comes back late
                new += calibration.after_walk(worker, span)
            if self.passed[block] == len(calibration.ranges):
                self.floor = block + 1
                self._drop(block)
                new += self._collect(block + 1)
            return [*new, *self._ready()]

        arguments = {"walk": plain(self.calibration.walk), "block": block, "span": span}
        priority = (self.priorities[0], block)
        label = f"forward {block}"
        return Task("walk_ahead:pass_block", arguments, label, priority, worker, done)

    def _ready(self) -> list[Task]:
        """Passes that need not wait for those who collect."""
        if len(self.collecting) > BEHIND * self.calibration.pool.size:
            return []
        ready, self.held = self.held, []
        return ready

    def _collect(self, block: int) -> list[Task]:
        """Statistics of a block, where they lack."""
        calibration = self.calibration
        if block == calibration.blocks or block in calibration.stats:
            return []
        self.collecting.add(block)

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.collecting.discard(block)
            calibration.tell(block, result)
            self._drop(block)
            return [*calibration.summed("stats", block, [span], result), *self._ready()]

        span = (0, calibration.walk.shards)
        arguments = {"walk": plain(self.calibration.walk), "block": block, "span": span}
        priority = (self.priorities[1], block)
        return [Task("calibrate:collect", arguments, f"collect {block}", priority, None, done)]

    def _drop(self, block: int) -> None:
        """Hidden states that nobody needs: passed, and collected."""
        if block < self.floor and block not in self.collecting:
            for shard in range(self.calibration.walk.shards):
                remove(hidden_path(self.calibration.walk, block, shard))
