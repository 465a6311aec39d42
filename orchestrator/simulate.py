"""A run's scheduling on a clock that is only calculated.

The loop of :class:`~moesaic.orchestrator.pool.Pool` and the tasks of
:class:`~moesaic.orchestrator.stages.Calibration` are the real ones; what Ray, the clock and the
workers would do is replaced. A task reads, computes, writes, one after the other. What reads or
writes at the same time shares the store's and its node's bandwidth in equal parts; what one of them
does not use is not given to the others. The driver does one thing at a time.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.orchestrator.costs import Cost, File
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute

_IDLE, _READ, _CACHED, _COMPUTE, _WRITE = -1, 0, 1, 2, 3
# Remaining seconds or bytes below which a phase is over.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Links:
    """What tasks have in common; bytes and seconds.

    Attributes:
        store: bytes per second of the store, for all together.
        networks: bytes per second of each node.
        read, write: bytes per second of one worker that is alone.
        call: seconds of the driver per task.
        caches: bytes of each node that keep what its workers read last; none where it is empty.
        cached: bytes per second of one worker that reads what is there.
    """

    store: float
    networks: Sequence[float]
    read: float
    write: float
    call: float
    caches: Sequence[float] = ()
    cached: float = np.inf


class _PageCache:
    """What a node keeps of the files that its workers read.

    Args:
        size: bytes; what was read longest ago leaves.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self._kept: OrderedDict[File, tuple[float, int]] = OrderedDict()

    def read(self, file: File, count: float, reader: int) -> int | None:
        """Who brought, or brings, these bytes; None where the reader has to."""
        if file in self._kept:
            self._kept.move_to_end(file)
            return self._kept[file][1]
        if count <= self.size:
            self._kept[file] = count, reader
        while sum(own for own, _ in self._kept.values()) > self.size:
            self._kept.popitem(last=False)
        return None


@dataclass
class Outcome:
    """What a simulated run came to.

    Attributes:
        workers, tasks: how many.
        makespan: seconds until all was done.
        work: seconds of all tasks where nobody else reads or writes.
        critical: seconds of the longest chain of tasks that wait for one another, likewise.
        busy: seconds of all workers that had a task.
        driver: seconds in which the driver was busy.
        store_full, network_full: seconds in which the store's bandwidth, or that of some node,
            held up who read or wrote.
        read, written: bytes, over the network.
        cached: bytes that were read and lay in the node's page cache.
        stages: function → seconds of its tasks together, and → from its first to its last.
    """

    workers: int
    tasks: int = 0
    makespan: float = 0.0
    work: float = 0.0
    critical: float = 0.0
    busy: float = 0.0
    driver: float = 0.0
    store_full: float = 0.0
    network_full: float = 0.0
    read: float = 0.0
    written: float = 0.0
    cached: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def limit(self) -> str:
        """What holds the run up most, in words: the resource that is in use for longest."""
        shares = {
            "slots": self.busy / (self.workers * self.makespan),
            "driver": self.driver / self.makespan,
            "store bandwidth": self.store_full / self.makespan,
            "network": self.network_full / self.makespan,
            "critical path": self.critical / self.makespan,
        }
        # Workers that wait for the store have a task, too.
        if max(shares["store bandwidth"], shares["network"]) >= 0.3:
            shares.pop("slots")
        return max(shares, key=lambda name: shares[name])


class SimulatedPool(Pool):
    """The pool, without Ray.

    Args:
        places: node of every worker.
        links: what they share.
        cost: what a task takes.
    """

    def __init__(self, places: Sequence[int], links: Links, cost: Callable[[Task], Cost]) -> None:
        super().__init__(Compute())
        self.links = links
        self.cost = cost
        self.clock = 0.0
        self.outcome = Outcome(len(places))
        self._places = np.array(places)
        self._networks = np.array([links.networks[place] for place in places], float)
        self._phase = np.full(len(places), _IDLE)
        self._left = np.zeros(len(places))
        self._costs: list[Cost] = [Cost()] * len(places)
        self._caches = [_PageCache(size) for size in links.caches]
        self._began = np.zeros(len(places))
        # What is still to be read, what is being read, and who brings that.
        self._ahead: list[list[tuple[File | None, float]]] = [[] for _ in places]
        self._file: list[File | None] = [None] * len(places)
        self._from: dict[int, int] = {}
        self._tasks: dict[int, Task] = {}
        self._paths: dict[int, float] = {}
        self._finished: list[int] = []

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._places)

    def close(self) -> None:
        """There is nothing to end."""

    def run(
        self,
        tasks: Iterable[Task],
        tick: Callable[[list[str]], None] | None = None,
        meanwhile: Callable[[], bool] | None = None,
        more: Callable[[], bool] = lambda: False,
    ) -> None:
        """As the pool's, with a record of which task brought which."""
        super().run([self._traced(task, 0.0) for task in tasks], tick, meanwhile, more)
        self.outcome.makespan = self.clock

    def _traced(self, task: Task, before: float) -> Task:
        """The task, whose chain of causes took ``before`` seconds until it could start."""
        cost, done, divide = self.cost(task), task.done, task.divide
        path = before + self.alone(cost)

        def traced(result: Any) -> Iterable[Task]:
            self.outcome.critical = max(self.outcome.critical, path)
            return [self._traced(new, path) for new in done(result)]

        def parts(count: int) -> list[Task]:
            assert divide is not None
            return [self._traced(part, before) for part in divide(count)]

        return replace(task, done=traced, divide=None if divide is None else parts)

    def alone(self, cost: Cost) -> float:
        """Seconds of a task where nobody else reads or writes."""
        read = min(self.links.read, self.links.store)
        write = min(self.links.write, self.links.store)
        return cost.read / read + cost.computing(cost.read / read) + cost.written / write

    # What the loop asks for

    def _now(self) -> float:
        return self.clock

    def _submit(self, worker: int, task: Task) -> int:
        self._pass(self.clock + self.links.call)
        self.outcome.driver += self.links.call
        cost = self.cost(task)
        self._costs[worker], self._tasks[worker] = cost, task
        self._began[worker] = self.clock
        rest = cost.read - sum(size for _, size in cost.files)
        self._ahead[worker] = [*cost.files, (None, max(0.0, rest))]
        self._read_on(worker)
        self._count(task, cost)
        self._settle()
        return worker

    def _read_on(self, worker: int) -> None:
        """Begins to read what is next: over the network, where nobody of the node has lately."""
        file, count = self._ahead[worker].pop(0)
        self._file[worker] = file
        by = None
        if file is not None and self._caches:
            by = self._caches[self._places[worker]].read(file, count, worker)
        if by is None:
            self._phase[worker] = _READ
            self.outcome.read += count
        else:
            self._phase[worker], self._from[worker] = _CACHED, by
            self.outcome.cached += count
        self._left[worker] = count

    def _wait(self, handles: Iterable[Any], seconds: float) -> list[Any]:
        """The next one that is done: until then, nothing happens on this clock."""
        while not self._finished:
            self._pass(np.inf)
        return [self._finished.pop(0)]

    def _result(self, handle: Any) -> dict[str, Any]:
        return {"peak_bytes": 0, "seconds": 0.0, "measured": []}

    def _cancel(self, handle: Any) -> None:
        self._phase[handle] = _IDLE

    # Nothing dies here: a worker whose task is given up is idle at once.

    def _alive(self) -> set[int]:
        return set(range(self.size))

    def _tend(self, work_waits: bool) -> None:
        """No worker joins."""

    def _replace(self, worker: int) -> None:
        self._cancel(worker)
        self._finished = [handle for handle in self._finished if handle != worker]

    def _node(self, worker: int) -> str:
        return str(self._places[worker])

    def _died_with_its_node(self, worker: int) -> bool:
        return False

    def _forget(self, worker: int) -> None:
        """Nothing is held in memory."""

    # The clock

    def _count(self, task: Task, cost: Cost) -> None:
        outcome, alone = self.outcome, self.alone(cost)
        outcome.tasks += 1
        outcome.work += alone
        outcome.written += cost.written
        none = {"tasks": 0.0, "seconds": 0.0, "first": self.clock, "last": self.clock}
        stage = outcome.stages.setdefault(task.function, none)
        stage["tasks"] += 1
        stage["seconds"] += alone

    def _settle(self) -> None:
        """Goes on to the next phase wherever nothing of the present one is left."""
        while True:
            over = np.flatnonzero((self._phase != _IDLE) & (self._left <= _NOTHING))
            if not len(over):
                return
            for worker in map(int, over):
                cost = self._costs[worker]
                if self._phase[worker] in (_READ, _CACHED):
                    if self._ahead[worker]:
                        self._read_on(worker)
                    else:
                        self._phase[worker] = _COMPUTE
                        reading = self.clock - self._began[worker]
                        self._left[worker] = cost.computing(reading)
                elif self._phase[worker] == _COMPUTE:
                    self._phase[worker], self._left[worker] = _WRITE, cost.written
                else:
                    self._phase[worker] = _IDLE
                    self.outcome.stages[self._tasks[worker].function]["last"] = self.clock
                    self._finished.append(worker)

    def _rates(self) -> tuple[NDArray[np.float64], bool, bool]:
        """What of each worker's phase is done per second; whether store or network hold it up."""
        moving = (self._phase == _READ) | (self._phase == _WRITE)
        rates = np.where(self._phase == _READ, self.links.read, self.links.write)
        rates = np.where(self._phase == _CACHED, self.links.cached, rates)
        rates = np.where(self._phase == _COMPUTE, 1.0, rates)
        if not moving.any():
            return rates, False, False
        store = self.links.store / moving.sum()
        beside = np.bincount(self._places[moving], minlength=self._places.max() + 1)
        network = self._networks / np.maximum(1, beside[self._places])
        full = bool((store < np.minimum(rates, network))[moving].any())
        crowded = bool((network < np.minimum(rates, store))[moving].any())
        shared = np.minimum(rates, np.minimum(network, store))
        rates = np.where(moving, shared, rates)
        for worker in map(int, np.flatnonzero(self._phase == _CACHED)):
            by = self._from[worker]
            if self._phase[by] == _READ and self._file[by] == self._file[worker]:
                rates[worker] = min(rates[worker], rates[by])  # it is only just coming
        return rates, full, crowded

    def _pass(self, until: float) -> None:
        """Lets time pass until then, or, without an end, until the next phase is over."""
        while self.clock < until:
            busy = self._phase != _IDLE
            if not busy.any():
                if np.isinf(until):
                    raise RuntimeError("all workers are idle and the loop waits")
                self.clock = until
                return
            rates, full, crowded = self._rates()
            step = float((self._left[busy] / rates[busy]).min())
            ended = self.clock + step <= until
            step = step if ended else until - self.clock
            self._left[busy] -= rates[busy] * step
            if ended:  # exactly, whatever rounding leaves
                soonest = busy & (self._left <= 1e-6 * rates * max(step, _NOTHING))
                self._left[soonest] = 0.0
            self.clock += step
            self.outcome.busy += step * int(busy.sum())
            self.outcome.store_full += step * full
            self.outcome.network_full += step * crowded
            self._settle()
            if np.isinf(until) and self._finished:
                return
