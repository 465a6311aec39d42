"""Ray actors that do the work, and the loop that keeps them busy.

A :class:`Task` names a function of this package and its arguments; workers call it with their
:class:`~moesaic.orchestrator.worker.WorkerState` first. Tasks are idempotent: they read files and
write files, so a task whose worker died is simply given to another one. One task is in flight per
worker, which bounds memory; the rest waits in the driver, ordered by priority. A finished task may
bring new ones, so that one loop runs a whole stage, or several that overlap.
"""

import heapq
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.recipe import Compute

_ATTEMPTS = 4
_START_SECONDS = 300.0
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
# Threads that sleep instead of spinning: with another process busy, spinning threads make a
# worker several times slower. oneDNN remembers matrix shapes, at up to 0.7 MB each: routed experts
# bring a new one with almost every batch.
_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass
class Task:
    """One call on a worker.

    Attributes:
        function: ``module:name`` of a function; a module without a dot is one of
            ``moesaic.orchestrator``.
        arguments: its keyword arguments, plain data and paths.
        label: what a person would call it, for progress and errors.
        priority: smaller runs first.
        affinity: worker that holds what the task needs in memory, if it matters.
        done: called in the driver with the result; returns the tasks that can start now.
    """

    function: str
    arguments: Mapping[str, Any]
    label: str
    priority: tuple[int, ...] = (0,)
    affinity: int | None = None
    done: Callable[[Any], Iterable["Task"]] = lambda result: ()
    attempts: int = field(default=0, compare=False)


def connect(compute: Compute) -> bool:
    """Joins the cluster the recipe or RAY_ADDRESS names, or starts Ray on this machine.

    Returns:
        whether a local Ray was started (and should be stopped at the end).

    Raises:
        RunError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    address = compute.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            _try_address(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            return False
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        return True
    except (OSError, RayError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{where} cannot be reached or started: {reason}") from error


def _try_address(address: str) -> None:
    """Raises OSError if nobody listens there; Ray itself would try for minutes and print its own.

    Other addresses than ``HOST:PORT`` and ``ray://HOST:PORT`` (``auto``) are left to Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def _shares(gpus: float, each: float) -> int:
    """Workers that a node's accelerators carry; Ray does not spread a fraction over two of them."""
    return int(gpus) * int(1 / each) if each < 1 else int(gpus / each)


class Pool:
    """Long-lived workers of equal size on whatever the cluster has; a context manager.

    Ray and the workers are started when the first task comes: a run whose work was all done before
    needs neither.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.workers: list[Any] = []
        self.replaced = 0
        self._local = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *failure: object) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._local:
            ray.shutdown()

    @property
    def size(self) -> int:
        """Number of workers; starts them."""
        if not self.workers:
            self._open()
        return len(self.workers)

    def _open(self) -> None:
        self._local = connect(self.compute)
        compute = self.compute
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        total_cpus = int(sum(node.get("CPU", 0) for node in nodes))
        total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
        self.cpus = compute.cpus_per_worker
        self.gpus = compute.gpus_per_worker
        if self.gpus is None:
            self.gpus = 1.0 if total_gpus >= 1 else 0.0
        # Node by node: a worker cannot be spread over two of them.
        fitting = sum(self._fitting(node) for node in nodes)
        count = compute.workers or max(fitting, 1)
        if count > fitting:
            raise RecipeError(
                f"compute: {count} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU do not"
                f" fit the cluster ({len(nodes)} node(s), {total_cpus} CPU, {total_gpus:g} GPU:"
                f" at most {fitting})"
            )
        self.workers = [self._start() for _ in range(count)]
        self._await_ready(self.workers)

    def _fitting(self, node: Mapping[str, float]) -> int:
        """Number of workers that an empty node has room for."""
        count = int(node.get("CPU", 0)) // self.cpus
        return min(count, _shares(node.get("GPU", 0.0), self.gpus)) if self.gpus else count

    def _start(self) -> Any:
        from moesaic.orchestrator.worker import Worker

        environment = {**_WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(self.cpus)}
        options = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
        }
        return ray.remote(Worker).options(**options).remote(self.cpus)

    def _await_ready(self, workers: list[Any]) -> None:
        try:
            ray.get([worker.ready.remote() for worker in workers], timeout=_START_SECONDS)
        except GetTimeoutError:
            raise RunError(
                f"{len(workers)} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU did not start"
                f" within {_START_SECONDS:.0f} s: is the cluster busy?"
            ) from None
        except RayError as error:
            reason = " ".join(str(error).split())[-300:]
            raise RunError(f"a worker failed to start: {reason}") from error

    def run(self, tasks: Iterable[Task], tick: Callable[[list[str]], None] | None = None) -> None:
        """Runs tasks, and those that finished tasks bring, until none is left.

        Args:
            tasks: what can start now.
            tick: called about once a second with the labels of what is running.

        Raises:
            UserError, RunError: as raised by a task, or when a task killed its worker repeatedly.
        """
        order = itertools.count()
        waiting: list[tuple[tuple[int, ...], int, Task]] = []
        for task in tasks:
            heapq.heappush(waiting, (task.priority, next(order), task))
        if not waiting:
            return
        running: dict[Any, tuple[int, Task]] = {}
        idle = set(range(self.size))
        last_tick = 0.0
        try:
            while waiting or running:
                self._dispatch(waiting, idle, running)
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
                for reference in ready:
                    worker, task = running.pop(reference)
                    idle.add(worker)
                    for new in self._finish(reference, worker, task):
                        heapq.heappush(waiting, (new.priority, next(order), new))
                if tick is not None and time.monotonic() - last_tick > _POLL_SECONDS:
                    last_tick = time.monotonic()
                    tick([task.label for _, task in running.values()])
        finally:
            for reference in running:
                ray.cancel(reference, force=False)

    def _dispatch(
        self,
        waiting: list[tuple[tuple[int, ...], int, Task]],
        idle: set[int],
        running: dict[Any, tuple[int, Task]],
    ) -> None:
        """Gives every idle worker the first waiting task, its own first where that is as urgent."""
        passed = []
        while waiting and idle:
            item = heapq.heappop(waiting)
            task = item[2]
            wanted = task.affinity
            if wanted is not None and wanted not in idle:
                passed.append(item)  # what it needs lies in the memory of a busy worker
                continue
            worker = min(idle) if wanted is None else wanted
            idle.discard(worker)
            reference = self.workers[worker].call.remote(task.function, dict(task.arguments))
            running[reference] = (worker, task)
        for item in passed:
            heapq.heappush(waiting, item)

    def _finish(self, reference: Any, worker: int, task: Task) -> Iterable[Task]:
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError | RunError):
                raise cause from error
            raise RunError(f"{task.label}: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            task.attempts += 1
            if task.attempts >= _ATTEMPTS:
                raise RunError(
                    f"{task.label}: its worker died {task.attempts} times (out of memory?);"
                    " finished work is kept, run the same command again"
                ) from error
            self._replace(worker)
            return [task]
        return task.done(result)

    def _replace(self, worker: int) -> None:
        ray.kill(self.workers[worker])
        self.workers[worker] = self._start()
        self._await_ready([self.workers[worker]])
        self.replaced += 1
