"""Ray actors that do the work.

A :class:`Task` names a function of this package and its arguments; workers call it with their
:class:`~moesaic.orchestrator.worker.WorkerState` first. Tasks are idempotent: they read files and
write files. :mod:`moesaic.orchestrator.loop` decides which worker gets which task, and what becomes
of it when the worker dies; :mod:`moesaic.orchestrator.placing` has the workers.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.cluster import connect, end_local, place
from moesaic.orchestrator.deadlines import Durations
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.head import Watch, watch_head
from moesaic.orchestrator.loop import Loop
from moesaic.orchestrator.model_source import ModelPlace
from moesaic.orchestrator.placing import Roster
from moesaic.orchestrator.recipe_sections import Compute

_ANSWER_SECONDS = 60.0


@dataclass
class Task:
    """One call on a worker.

    Attributes:
        function: ``module:name`` of a function; a module without a dot is one of
            ``moesaic.orchestrator``.
        arguments: its keyword arguments, plain data and paths.
        label: what a person would call it, for progress and errors.
        priority: smaller runs first.
        affinity: worker that holds what the task needs in memory, if it matters. Where that worker
            is gone or does not answer, another one gets the task, and makes again what it lacks.
        near: names files that a node keeps once it has read them, if that matters. Of the tasks
            that wait and are as urgent, but for the last number of their priority, a free worker
            gets one whose files its node has, else one whose files no node has; it never waits.
        done: called in the driver with the result; returns the tasks that can start now.
        kind: tells tasks apart whose function is the same and whose times are not: how long one may
            take follows from those of its kind.
        failed: called instead of ending everything, with the kind of error and the reason, when the
            task failed or killed its worker repeatedly.
        parts: as how many tasks, about equally long, the same work could be done.
        divide: the same work as at most so many tasks.
        more: whether tasks of its kind are still to come.
    """

    function: str
    arguments: Mapping[str, Any]
    label: str
    priority: tuple[int, ...] = (0,)
    affinity: int | None = None
    done: Callable[[Any], Iterable["Task"]] = lambda result: ()
    failed: Callable[[str, str], Iterable["Task"]] | None = None
    kind: str = ""
    near: str = ""
    parts: int = 1
    divide: Callable[[int], list["Task"]] | None = None
    more: Callable[[], bool] = lambda: False

    @property
    def like(self) -> str:
        """What it has in common with those that take about as long."""
        return f"{self.function} {self.kind}"


class Pool:
    """Long-lived workers of equal size on whatever the cluster has; a context manager.

    Ray and the workers are started when the first task comes, if not before: a run whose work was
    all done needs neither.

    Args:
        model: the folder that tasks read weights from, where nodes may lack it.
        per_gpu: workers that a GPU has work for.
    """

    def __init__(self, compute: Compute, model: ModelPlace | None = None, per_gpu: int = 1) -> None:
        self.compute = compute
        self.roster = Roster(compute, model, per_gpu)
        self.durations = Durations()
        self._local = self._awaited = False
        self._head: Watch | None = None
        self._more: Callable[[], bool] = lambda: False  # of what is being run

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        head = self._head
        try:
            self.close()
        except KeyboardInterrupt as interrupt:
            error = interrupt
            raise
        finally:
            if head is not None and head.lost and error is not None:
                raise RunError(head.line) from None

    def close(self) -> None:
        """Ends the workers, and Ray if it was started for them; later tasks start both anew."""
        head, self._head = self._head, None
        if head is not None:
            head.stop()
            if head.lost:  # there is nobody to ask for the end of anything
                if self._local:
                    end_local()
                return
        self.roster.close()
        if self._local:
            ray.shutdown()
            self._local = False

    def begin(self) -> None:
        """Starts Ray and asks for the workers, which start while the driver does something else.

        Raises:
            RecipeError, RunError: as :meth:`run`.
        """
        if not self.roster.slots:
            self._local = connect(self.compute)
            if self._head is None:
                self._head = watch_head(place(self.compute))
            self.roster.ask()
            self._awaited = True

    @property
    def size(self) -> int:
        """Number of workers that there are, or should be; starts them."""
        self.begin()
        if self._awaited:
            self.roster.wait()
            self._awaited = False
        return len(self.roster.slots)

    @property
    def workers(self) -> set[int]:
        """Numbers of the workers that can be given tasks now, those that have joined included;
        starts them."""
        _ = self.size
        return self._alive()

    @property
    def replaced(self) -> int:
        """How many workers were replaced."""
        return self.roster.replaced

    def run(
        self,
        tasks: Iterable[Task],
        tick: Callable[[list[str]], None] | None = None,
        meanwhile: Callable[[], bool] | None = None,
        more: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs tasks, and those that finished tasks bring, until none is left.

        Args:
            tasks: what can start now.
            tick: called about once a second with the labels of what is running.
            meanwhile: called whenever workers were given work: for what no worker should wait for.
                It does a step of that and says whether there may be more.
            more: whether there is work for more workers than there are although no task waits for
                one: whoever brings as many tasks as there are :attr:`workers` knows.

        Raises:
            UserError, RunError: as raised by a task, when a task killed its worker repeatedly, or
                when no worker can be had.
        """
        release_pins()  # what the driver has read for them; workers fetch their own
        loop = Loop(self, tasks)
        self._more = more
        if loop.left:
            _ = self.size
            loop.run(tick, meanwhile)

    # All that the loop asks of Ray and of the clock: a simulation puts its own in their places.

    def _now(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    def _submit(self, worker: int, task: Task) -> Any:
        """Starts a task on a worker; the handle names it in the other calls."""
        actor = self.roster.slots[worker].actor
        return actor.call.remote(task.function, dict(task.arguments))

    def _wait(self, handles: Iterable[Any], seconds: float) -> list[Any]:
        """The next handle that is done, or none of them after so many seconds.

        It also takes in the workers that have started meanwhile.
        """
        starting = self.roster.starting()
        watched = [*handles, *starting]
        if not watched:
            time.sleep(seconds)  # only tasks that pause
            return []
        ready, _ = ray.wait(watched, num_returns=1, timeout=seconds)
        new = [handle for handle in ready if handle in starting]
        self.roster.arrived(new)
        return [handle for handle in ready if handle not in new]

    def _result(self, handle: Any) -> Any:
        """What a task that is done returned; raises what it raised, or RayError."""
        return ray.get(handle, timeout=_ANSWER_SECONDS)

    def _cancel(self, handle: Any) -> None:
        ray.cancel(handle, force=False)

    def _alive(self) -> set[int]:
        """Workers that can be given tasks."""
        return self.roster.alive()

    def _tend(self, work_waits: bool) -> None:
        """Has more workers started where there is room; raises RunError where there are none."""
        self.roster.tend(work_waits or self._more())

    def _replace(self, worker: int) -> None:
        """Kills a worker; it is not alive until another one has started in its place."""
        self.roster.replace(worker)

    def _node(self, worker: int) -> str:
        """Where a worker is."""
        return self.roster.slots[worker].node

    def _died_with_its_node(self, worker: int) -> bool:
        return self.roster.died_with_its_node(worker)

    def _forget(self, worker: int) -> None:
        """Makes a worker let go of what it holds in memory."""
        self.roster.slots[worker].actor.forget.remote()
