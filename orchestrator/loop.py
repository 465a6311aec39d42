"""The loop that keeps workers busy: which task goes where, and what becomes of it when one dies.

One task is in flight per worker, which bounds memory; the rest waits here, ordered by priority. A
finished task may bring new ones, so that one loop runs a whole stage, or several that overlap.

Since tasks are idempotent, a task whose worker died is simply given to another one, and one that
takes much longer than its like (:mod:`moesaic.orchestrator.deadlines`) may run on two workers at
once: the first result is taken, the other ignored. A copy that fails while another one runs or
waits decides nothing: it may have failed because the other had finished and tidied up.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from moesaic.orchestrator.errors import RunError, UserError, denied, passes_by
from moesaic.orchestrator.shares import parts_now

if TYPE_CHECKING:
    from moesaic.orchestrator.pool import Pool, Task

# Deaths of its worker that a task outlives, less one; one that may fail is tried once more.
_ATTEMPTS, _ATTEMPTS_IF_IT_MAY_FAIL = 4, 2
WORKER_DIED = "worker died"
# Waiting tasks of a stage among which one is sought that is near its worker.
_LOOK = 256
_POLL_SECONDS = 1.0
# After each of these a task is tried again that met an error that passes by.
_PAUSE_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(eq=False)
class _Work:
    """A task until its result is there.

    Attributes:
        order: number of its coming, among tasks of the same priority.
        attempts: workers that died of it, or while they were at it.
        troubles: passing errors that it met.
        copies: workers that are at it now.
        begun: how often it was given to a worker.
        backed: whether a second copy was asked for since a worker was last lost.
        queued: whether it waits for a worker (also).
        alone: whether no other worker of the node may be at work meanwhile.
        over_since: when the first result came.
    """

    task: "Task"
    order: int
    attempts: int = 0
    troubles: int = 0
    copies: int = 0
    begun: int = 0
    backed: bool = False
    queued: bool = False
    alone: bool = False
    over_since: float | None = None

    @property
    def limit(self) -> int:
        """How many workers it may cost."""
        return _ATTEMPTS if self.task.failed is None else _ATTEMPTS_IF_IT_MAY_FAIL


@dataclass(eq=False)
class _Copy:
    """A work on a worker."""

    work: _Work
    worker: int
    started: float


class Loop:
    """One :meth:`Pool.run`.

    Attributes:
        left: works whose results are not there.
        waiting: (priority, order, work) of what waits for a worker, as a heap.
        paused: (time to go on, order, work) of what waits for trouble to pass, as a heap.
        running: what is in flight, by handle; at most one copy per worker.
        at: worker → what it is at.
        reserved: the node that a work is to have, or has, for itself.
        places: what tasks are near to → nodes that have been at tasks of it.
    """

    def __init__(self, pool: "Pool", tasks: Iterable["Task"]) -> None:
        self.pool = pool
        self.left = 0
        self.waiting: list[tuple[tuple[int, ...], int, _Work]] = []
        self.paused: list[tuple[float, int, _Work]] = []
        self.running: dict[Any, _Copy] = {}
        self.at: dict[int, _Copy] = {}
        self.reserved: tuple[str, _Work] | None = None
        self.places: dict[str, set[str]] = {}
        self._order = itertools.count()
        self._add(tasks)

    def run(
        self, tick: Callable[[list[str]], None] | None, meanwhile: Callable[[], bool] | None
    ) -> None:
        """Until nothing is left."""
        pool, looked = self.pool, self.pool._now()
        try:
            while self.left:
                self._dispatch()
                for handle in self._done(meanwhile):
                    self._finish(handle)
                if not pool._alive() or pool._now() - looked > _POLL_SECONDS:
                    looked = pool._now()
                    pool._tend(bool(self.waiting))
                    self._dispatch()  # who is idle after this can do nothing of what waits
                    self._watch(looked)
                    if tick is not None:
                        tick([c.work.task.label for c in self.at.values() if _open(c.work)])
        finally:
            self._end()

    def _add(self, tasks: Iterable["Task"]) -> None:
        for task in tasks:
            self.left += 1
            self._queue(_Work(task, next(self._order)))

    def _queue(self, work: _Work) -> None:
        work.queued = True
        heapq.heappush(self.waiting, (work.task.priority, work.order, work))

    def _done(self, meanwhile: Callable[[], bool] | None) -> list[Any]:
        """What is done; step by step what there is to do meanwhile, until then."""
        while meanwhile is not None and meanwhile():
            done = self.pool._wait(self.running, 0.0)
            if done:
                return done
        return self.pool._wait(self.running, self._pause())

    def _pause(self) -> float:
        """Seconds until there is something to look at."""
        if not self.paused:
            return _POLL_SECONDS
        return min(_POLL_SECONDS, max(0.0, self.paused[0][0] - self.pool._now()))

    # Which task goes where

    def _dispatch(self) -> None:
        """Gives every idle worker the first waiting task, its own first where that is as urgent."""
        while self.paused and self.paused[0][0] <= self.pool._now():
            self._queue(heapq.heappop(self.paused)[2])
        alive = self.pool._alive()
        idle = alive - self.at.keys()
        passed = []
        while self.waiting and idle:
            item = heapq.heappop(self.waiting)
            work = item[2]
            if not _open(work):
                continue  # its first copy came back after all
            worker = self._choose(work, idle, alive)
            if worker is None:
                passed.append(item)
                continue
            if _may_be_near(work):
                work = self._nearest(item, worker)
            work = self._divided(work, len(idle), len(alive))
            idle.discard(worker)
            work.queued = False
            self._start(work, worker)
        for item in passed:
            heapq.heappush(self.waiting, item)

    def _choose(self, work: _Work, idle: set[int], alive: set[int]) -> int | None:
        """The worker for a task; None where it should wait."""
        if work.alone:
            return self._choose_alone(work, idle, alive)
        open_to_all = self._not_reserved(idle)
        wanted = work.task.affinity
        if wanted in open_to_all:
            return wanted
        if wanted in alive and wanted in self.at and work.copies == 0:
            busy_with = self.at[wanted].work
            if _open(busy_with) and busy_with.copies == 1 and not busy_with.queued:
                return None  # what it needs lies in the memory of a worker that is busy
        places = self.places.get(work.task.near, ())
        near = {n for n in open_to_all if self.pool._node(n) in places} if places else None
        # Whoever keeps something in memory is among the first: free for what needs that.
        return max(near or open_to_all, default=None)

    def _nearest(self, item: tuple[tuple[int, ...], int, _Work], worker: int) -> _Work:
        """What a worker should have instead of a work of the same stage that is its turn.

        First comes what its node has been at, then what no node has been at; the others wait.
        """
        node = self.pool._node(worker)

        def rank(work: _Work) -> int:
            places = self.places.get(work.task.near, ())
            return 0 if node in places else 1 if not places else 2

        best, looked = item, [item]
        while rank(best[2]) and len(looked) < _LOOK and self.waiting:
            if self.waiting[0][0][:-1] != item[0][:-1]:
                break
            other = heapq.heappop(self.waiting)
            looked.append(other)
            if _may_be_near(other[2]) and rank(other[2]) < rank(best[2]):
                best = other
        for other in looked:
            if other is not best:
                heapq.heappush(self.waiting, other)
        return best[2]

    def _divided(self, work: _Work, idle: int, workers: int) -> _Work:
        """A work, or a part of it, where others would be idle otherwise; the rest waits on."""
        task = work.task
        if task.divide is None or work.begun:
            return work
        others = (other.task for *_, other in self.waiting if _open(other))
        count = parts_now(task, others, idle, workers)
        if count == 1:
            return work
        first, *rest = [_Work(part, next(self._order)) for part in task.divide(count)]
        self.left += len(rest)
        for other in rest:
            self._queue(other)
        return first

    def _not_reserved(self, idle: set[int]) -> set[int]:
        if self.reserved is None:
            return idle
        return {number for number in idle if self.pool._node(number) != self.reserved[0]}

    def _choose_alone(self, work: _Work, idle: set[int], alive: set[int]) -> int | None:
        """A worker on a node where nobody else is at work; else a node is kept free for it."""
        nodes: dict[str, list[int]] = {}
        for number in sorted(alive):
            nodes.setdefault(self.pool._node(number), []).append(number)
        if self.reserved is not None and self.reserved[1] is not work and _open(self.reserved[1]):
            return None  # one after the other
        if self.reserved is None or self.reserved[0] not in nodes:
            busy = {node: len(set(own) - idle) for node, own in nodes.items()}
            self.reserved = min(busy, key=lambda node: busy[node]), work
        own = nodes[self.reserved[0]]
        if not idle.issuperset(own):
            return None
        for other in own[1:]:
            self.pool._forget(other)
        return own[0]

    def _start(self, work: _Work, worker: int) -> None:
        work.copies += 1
        work.begun += 1
        if work.task.near:
            self.places.setdefault(work.task.near, set()).add(self.pool._node(worker))
        copy = _Copy(work, worker, self.pool._now())
        self.running[self.pool._submit(worker, work.task)] = self.at[worker] = copy

    # What comes back

    def _finish(self, handle: Any) -> None:
        copy = self.running.pop(handle)
        del self.at[copy.worker]
        copy.work.copies -= 1
        try:
            result = self.pool._result(handle)
        except RayTaskError as error:
            if _open(copy.work):
                self._task_failed(copy.work, error)
        except RayError as error:
            self._worker_died(copy, error)
        else:
            if _open(copy.work):
                seconds = self.pool._now() - copy.started
                self.pool.durations.add(copy.work.task.like, seconds)
                self._settle(copy.work, copy.work.task.done(result))

    def _settle(self, work: _Work, following: Iterable["Task"]) -> None:
        """The work is over; copies that still run no longer matter."""
        work.over_since = self.pool._now()
        self.left -= 1
        if self.reserved is not None and self.reserved[1] is work:
            self.reserved = None
        self._add(following)

    def _task_failed(self, work: _Work, error: RayTaskError) -> None:
        if work.copies or work.queued:
            return  # the other copy decides
        cause, task = error.cause, work.task
        if passes_by(cause):
            if work.troubles < len(_PAUSE_SECONDS):
                pause = _PAUSE_SECONDS[work.troubles]
                work.troubles += 1
                until = self.pool._now() + pause
                heapq.heappush(self.paused, (until, work.order, work))
                return
        elif _lacked_memory(cause) and not work.alone:
            work.alone = True
            self._queue(work)
            return
        reason = " ".join(str(cause).split())
        if _lacked_memory(cause):
            reason = (
                f"{reason or 'no memory was left'}, alone on its node; give workers more memory, or"
                " use fewer (compute.workers); finished work is kept, run the same command again"
            )
        if task.failed is not None:
            self._settle(work, task.failed(type(cause).__name__, reason))
            return
        if isinstance(cause, UserError | RunError):
            raise cause from error
        if (told := denied(cause)) is not None:
            raise UserError(f"{task.label}: {told}") from error
        if isinstance(cause, FileNotFoundError) or type(cause).__name__ == "SafetensorError":
            reason += " (a file is gone or damaged: run the same command again)"
        raise RunError(f"{task.label}: {type(cause).__name__}: {reason}") from error

    def _worker_died(self, copy: _Copy, error: RayError) -> None:
        work = copy.work
        blameless = self.pool._died_with_its_node(copy.worker)
        self.pool._replace(copy.worker)
        if _open(work):
            work.attempts += not blameless
            lacked = isinstance(error, OutOfMemoryError)
            self._try_again(work, "ran out of memory" if lacked else "died", error)

    def _try_again(self, work: _Work, what: str, error: Exception | None) -> None:
        """A worker was lost; the last attempt has a node for itself, in case memory was short."""
        work.backed = False
        if work.copies or work.queued:
            return
        task, attempts, limit = work.task, work.attempts, work.limit
        if attempts < limit:
            work.alone = attempts == limit - 1
            self._queue(work)
        elif task.failed is not None:
            self._settle(work, task.failed(WORKER_DIED, f"its worker {what} {attempts} times"))
        else:
            hint = " (out of memory?)" if what == "died" else ""
            raise RunError(
                f"{task.label}: its worker {what} {attempts} times{hint}, the last time alone on"
                " its node; give workers more memory, or use fewer (compute.workers); finished"
                " work is kept, run the same command again"
            ) from error

    # What does not come back

    def _watch(self, now: float) -> None:
        """Second copies for stragglers, other workers for what missed its deadline."""
        durations = self.pool.durations
        idle = self._not_reserved(self.pool._alive() - self.at.keys())
        for handle, copy in list(self.running.items()):
            work, function = copy.work, copy.work.task.like
            seconds, deadline = now - copy.started, durations.deadline(function)
            if work.over_since is not None:
                if now - work.over_since > durations.patience(function):
                    self._give_up(handle)
            elif seconds > 2 * deadline:
                self._give_up(handle)
                work.attempts += 1
                self._try_again(work, "did not answer in time", None)
            elif work.backed or work.queued or work.begun >= work.limit:
                continue
            elif seconds > deadline:
                work.backed = True
                self._queue(work)
            elif idle and not work.alone and seconds > durations.straggles_after(function):
                work.backed = True
                chosen = self._elsewhere(idle, copy.worker)
                idle.discard(chosen)
                self._start(work, chosen)

    def _elsewhere(self, idle: set[int], worker: int) -> int:
        """One of the idle workers, on another node than ``worker`` where there is one."""
        own = self.pool._node(worker)
        return max(idle, key=lambda number: (self.pool._node(number) != own, number))

    def _give_up(self, handle: Any) -> None:
        copy = self.running.pop(handle)
        del self.at[copy.worker]
        copy.work.copies -= 1
        self.pool._replace(copy.worker)

    def _end(self) -> None:
        """Nothing that is left behind may write into folders that others are about to remove."""
        for handle, copy in list(self.running.items()):
            if _open(copy.work):
                self.pool._cancel(handle)
            else:
                self._give_up(handle)


def _open(work: _Work) -> bool:
    return work.over_since is None


def _may_be_near(work: _Work) -> bool:
    """Whether a work may go before others of its stage, on a node that has what it reads."""
    task = work.task
    return bool(task.near) and task.affinity is None and _open(work) and not work.alone


def _lacked_memory(cause: BaseException) -> bool:
    """Whether a task could not get the memory it asked for, of the machine or of a GPU."""
    return isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
