"""A stand-in for the pool: the same tasks in this process, without Ray."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.worker import WorkerState, resolve


class Killed(BaseException):
    """Stands for ``kill -9``: nothing of the package catches it."""


class InlinePool:
    """Runs tasks one after another, each with the state of one of ``size`` workers.

    Attributes:
        calls: how often each function was called.
        kill_at: number of the call that is not made, from 1; a driver dies there.
    """

    def __init__(self, size: int = 1, kill_at: int | None = None) -> None:
        self.size = size
        self.kill_at = kill_at
        self.states = [WorkerState(1) for _ in range(size)]
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *failure: object) -> None:
        """There is nothing to end."""

    def run(self, tasks: Iterable[Task], tick: Callable[[list[str]], None] | None = None) -> None:
        """As :meth:`Pool.run`; tasks without affinity go round."""
        order = itertools.count()
        waiting = [(task.priority, next(order), task) for task in tasks]
        heapq.heapify(waiting)
        while waiting:
            _, number, task = heapq.heappop(waiting)
            worker = number % self.size if task.affinity is None else task.affinity
            if self.calls.total() + 1 == self.kill_at:
                raise Killed
            self.calls[task.function] += 1
            if tick is not None:
                tick([task.label])
            result: Any = resolve(task.function)(self.states[worker], **dict(task.arguments))
            for new in task.done(result):
                heapq.heappush(waiting, (new.priority, next(order), new))
