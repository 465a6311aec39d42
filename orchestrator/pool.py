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
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.exceptions import RayError, RayTaskError

from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.recipe import Compute
from moesaic.orchestrator.runlog import from_worker

# Deaths of its worker that a task outlives, less one; one that may fail is tried once more.
_ATTEMPTS, _ATTEMPTS_IF_IT_MAY_FAIL = 4, 2
WORKER_DIED = "worker died"
_START_SECONDS = 300.0
_SILENT_SECONDS = 10.0
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
# Threads that sleep instead of spinning: with another process busy, spinning threads make a
# worker several times slower. oneDNN remembers matrix shapes, at up to 0.7 MB each: routed experts
# bring a new one with almost every batch.
WORKER_ENVIRONMENT = {
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
        failed: called instead of ending everything, with the kind of error and the reason, when the
            task failed or killed its worker repeatedly.
    """

    function: str
    arguments: Mapping[str, Any]
    label: str
    priority: tuple[int, ...] = (0,)
    affinity: int | None = None
    done: Callable[[Any], Iterable["Task"]] = lambda result: ()
    failed: Callable[[str, str], Iterable["Task"]] | None = None
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
    key, address = cluster_address(compute)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if not address:
            start_local()
            return True
        try_address(address)
        with _own_sigterm():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
        _collect_lines()
        return False
    except (OSError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        if not address:
            raise RunError(f"Ray could not be started on this machine: {reason}") from error
        raise RunError(
            f"{key}: the Ray cluster at {address} cannot be reached ({reason}): start it (ray start"
            f" --head), correct {key}, or leave it out to use this machine alone"
        ) from error


def cluster_address(compute: Compute) -> tuple[str, str | None]:
    """Where the address of a cluster was given, and the address; None for a Ray of our own."""
    key, address = "compute.address", compute.address
    if not address:
        key, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    return key, None if address in ("", "local") else address


def processor_only(compute: Compute) -> bool:
    """Whether all the work is done by the processor of this machine."""
    gpus = compute.gpus_per_worker != 0 and torch.cuda.device_count() > 0
    return not gpus and cluster_address(compute)[1] is None


def has_16_bit_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def start_local(**options: Any) -> None:
    """Starts Ray for this process alone; all of it listens on 127.0.0.1.

    Args:
        options: more of ``ray.init``.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": True}
    with _loopback_only(), _own_sigterm():
        ray.init(address="local", **quiet, **options)
    _collect_lines()


def _collect_lines() -> None:
    """What workers print goes into the run's log; Ray would print it between our lines."""
    for name in ("ray_print_logs", "moesaic"):
        global_worker_stdstream_dispatcher.remove_handler(name)
    global_worker_stdstream_dispatcher.add_handler("moesaic", from_worker)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's switch for machines without clusters, in this process and those it starts meanwhile.

    Ray reads it from the environment when it is imported, and somebody may have done that already.
    It is gone afterwards: who joins a cluster must not have it. One set by the user is obeyed.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if name in os.environ:
        yield
        return
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        del os.environ[name]


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM; Ray puts two of its own over it.

    The first exits as soon as it can, the second prints a stack of C++ and aborts.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def try_address(address: str) -> None:
    """Raises OSError if nobody listens there; Ray itself would try for minutes and print its own.

    Other addresses than ``HOST:PORT`` and ``ray://HOST:PORT`` (``auto``) are left to Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def shares(gpus: float, each: float) -> int:
    """Workers that a node's accelerators carry; Ray does not spread a fraction over two of them."""
    return int(gpus) * int(1 / each) if each < 1 else int(gpus / each)


def _place(compute: Compute) -> str:
    address = cluster_address(compute)[1]
    if address == "auto":
        return f"{ray.get_runtime_context().gcs_address} (auto)"
    return address or "this machine"


def _free() -> str:
    """What nobody uses at the moment."""
    free, total = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(n, 0):g} of {total.get(n, 0):g} {n}" for n in ("CPU", "GPU")]
    return f"free now: {', '.join(parts)}"


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
        self.close()

    def close(self) -> None:
        """Ends the workers, and Ray if it was started for them; later tasks start both anew."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._local:
            ray.shutdown()
            self._local = False

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
        return min(count, shares(node.get("GPU", 0.0), self.gpus)) if self.gpus else count

    def _start(self) -> Any:
        from moesaic.orchestrator.worker import Worker

        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(self.cpus)}
        options = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
        }
        return ray.remote(Worker).options(**options).remote(self.cpus)

    def _await_ready(self, workers: list[Any]) -> None:
        """Waits, and says so when it takes longer: other people may be using the cluster."""
        starting = [worker.ready.remote() for worker in workers]
        started = time.monotonic()
        told = False
        while starting:
            try:
                ready, starting = ray.wait(
                    starting, num_returns=len(starting), timeout=_POLL_SECONDS
                )
                ray.get(ready)
            except RayError as error:
                self._check_nodes()
                reason = " ".join(str(error).split())[-300:]
                raise RunError(f"a worker failed to start: {reason}") from error
            self._check_nodes()
            seconds = time.monotonic() - started
            if not starting or seconds < _SILENT_SECONDS:
                continue
            where = _place(self.compute)
            if seconds > _START_SECONDS:
                raise RunError(
                    f"compute: {len(starting)} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU"
                    f" did not start within {_START_SECONDS:.0f} s at {where} ({_free()}): wait"
                    " until others have finished, or ask for fewer (compute.workers)"
                )
            if not told:
                told = True
                stderr.print(
                    f"waiting for {len(starting)} worker(s) of {self.cpus} CPU and"
                    f" {self.gpus:g} GPU at {where} ({_free()})",
                    markup=False,
                )

    def _check_nodes(self) -> None:
        """A machine on which Ray itself died takes no worker, and Ray would not say so."""
        if not any(node["Alive"] for node in ray.nodes()):
            raise RunError(
                f"Ray at {_place(self.compute)} has lost all its nodes (out of memory, or killed?);"
                " finished work is kept, run the same command again"
            )

    def run(
        self,
        tasks: Iterable[Task],
        tick: Callable[[list[str]], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Runs tasks, and those that finished tasks bring, until none is left.

        Args:
            tasks: what can start now.
            tick: called about once a second with the labels of what is running.
            meanwhile: called whenever workers were given work: for what no worker should wait for.

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
                if meanwhile is not None:
                    meanwhile()
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
            if task.failed is not None:
                return task.failed(type(cause).__name__, " ".join(str(cause).split()))
            if isinstance(cause, UserError | RunError):
                raise cause from error
            raise RunError(f"{task.label}: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            task.attempts += 1
            if task.failed is not None and task.attempts >= _ATTEMPTS_IF_IT_MAY_FAIL:
                self._replace(worker)
                return task.failed(WORKER_DIED, f"its worker died {task.attempts} times")
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
