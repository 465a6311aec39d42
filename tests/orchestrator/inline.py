"""A stand-in for the pool: the same tasks in this process, without Ray."""

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import pipeline, run
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.verify import verify
from moesaic.orchestrator.worker import WorkerState, resolve
from tests.orchestrator.projects import make_recipe

STAGES = ("evaluate", "assemble")


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

    def close(self) -> None:
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


class InlineVerifier:
    """As the process of its own, in this one."""

    verify = staticmethod(verify)

    def __enter__(self) -> "InlineVerifier":
        return self

    def __exit__(self, *failure: object) -> None:
        """There is nothing to end."""


class Project:
    """A folder with a recipe that is run in this process."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.patch = folder, model, patch
        self.output = folder / "runs" / "small"
        self.calls: Counter[str] = Counter()

    def write(self, **changes: Any) -> Path:
        return make_recipe(self.folder, self.model, **changes)

    def run(
        self, size: int = 1, kill_at: int | None = None, stages: tuple[str, ...] = STAGES
    ) -> tuple[dict[str, Any], Counter[str]]:
        """What the run returns, and how often each function was called on a worker."""
        pool = InlinePool(size, kill_at)
        self.calls = pool.calls
        self.patch.setattr(run, "Pool", lambda compute: pool)
        self.patch.setattr(pipeline, "VerifierProcess", InlineVerifier)
        result = run.run_recipe(self.folder / "recipe.yaml", self.output, stages)
        return dict(result), pool.calls

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text(encoding="utf-8"))

    def left(self) -> dict[str, bytes]:
        """Plan and checkpoint. The model card tells the scores, and these how fast it went."""
        files = [self.output / "plan.json", *(self.output / "model").iterdir()]
        return {path.name: path.read_bytes() for path in files}
