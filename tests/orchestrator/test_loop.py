"""The pool's loop on a clock of its own: deaths, silence, stragglers, memory, trouble."""

import errno
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from moesaic.orchestrator import deadlines
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.loop import WORKER_DIED
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute

NEVER = float("inf")
START_SECONDS = 5.0


@dataclass
class Call:
    """What a worker was given: ``seconds`` until ``outcome``, a result or an exception."""

    worker: int
    label: str
    begun: float
    seconds: float
    outcome: Any
    killed: float | None = None

    @property
    def end(self) -> float:
        return self.begun + self.seconds


@dataclass
class Scripted(Pool):
    """A pool whose tasks take as long, and end, as ``script(label, worker, times)`` says.

    ``times`` is how often the task was begun before.
    """

    nodes: list[str]
    script: Callable[[str, int, int], tuple[float, Any]]
    clock: float = 0.0
    joins: dict[int, float] = field(default_factory=dict)
    dead_nodes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__(Compute())
        self.calls: list[Call] = []
        self.forgot: list[int] = []
        self.killed: list[tuple[float, int]] = []
        self.absent = dict(self.joins)  # worker → when it is there

    @property
    def size(self) -> int:
        return len(self.nodes)

    def _now(self) -> float:
        return self.clock

    def _submit(self, worker: int, task: Task) -> Any:
        times = sum(call.label == task.label for call in self.calls)
        assert worker in self._alive()
        assert not [
            c for c in self.calls if c.worker == worker and c.begun + c.seconds > self.clock
        ]
        seconds, outcome = self.script(task.label, worker, times)
        self.calls.append(Call(worker, task.label, self.clock, seconds, outcome))
        return len(self.calls) - 1

    def _wait(self, handles: Iterable[Any], seconds: float) -> list[Any]:
        ends = {handle: self.calls[handle].end for handle in handles}
        soonest = min(ends, key=lambda handle: ends[handle], default=None)
        if soonest is not None and ends[soonest] <= self.clock + seconds:
            self.clock = max(self.clock, ends[soonest])
            return [soonest]
        self.clock += seconds
        assert self.clock < 1e6, "a wait without an end"
        return []

    def _result(self, handle: Any) -> Any:
        outcome = self.calls[handle].outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _cancel(self, handle: Any) -> None:
        self.calls[handle].seconds = 0.0

    def _alive(self) -> set[int]:
        return {n for n in range(self.size) if self.absent.get(n, 0.0) <= self.clock}

    def _tend(self, work_waits: bool) -> None:
        pass

    def _replace(self, worker: int) -> None:
        self.killed.append((self.clock, worker))
        self.absent[worker] = self.clock + START_SECONDS
        for call in self.calls:
            if call.worker == worker and call.end > self.clock:
                call.seconds, call.killed = self.clock - call.begun, self.clock

    def _node(self, worker: int) -> str:
        return self.nodes[worker]

    def _died_with_its_node(self, worker: int) -> bool:
        return self.nodes[worker] in self.dead_nodes

    def _forget(self, worker: int) -> None:
        self.forgot.append(worker)


def tasks(labels: Iterable[str], told: list[Any], **options: Any) -> list[Task]:
    def done(label: str) -> Callable[[Any], tuple[()]]:
        return lambda result: told.append((label, result)) or ()

    return [Task("module:work", {}, label, done=done(label), **options) for label in labels]


@pytest.mark.parametrize("most", [1, 3])
def test_whoever_brings_work_for_each_worker_says_whether_there_is_more(most: int) -> None:
    """No task waits, and yet a worker that joined would get one."""

    class Growing(Scripted):
        _tend = Pool._tend

    def tend(work_waits: bool) -> None:
        asked.append((work_waits, more()))
        if more():
            pool.nodes.append("b")

    def more() -> bool:
        return len(pool.nodes) < most

    def begin(done: int | None = None) -> list[Task]:
        busy.discard(-1 if done is None else done)
        new = sorted(pool.workers - busy) if len(pool.calls) < 20 else []
        busy.update(new)
        return [Task("module:work", {}, "trial", affinity=n, done=begin) for n in new]

    asked: list[tuple[bool, bool]] = []
    busy: set[int] = set()
    pool = Growing(["a"], lambda label, worker, times: (10.0, worker))
    pool.roster = SimpleNamespace(tend=tend)  # type: ignore[assignment]
    pool.run(begin(), more=more)
    assert pool.workers == {call.worker for call in pool.calls} == set(range(most))
    assert [wanted for _, wanted in asked].count(True) == most - 1
    assert all(waits for waits, wanted in asked if wanted) and (False, False) in asked


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("work", "traceback", cause)


def test_a_straggler_gets_a_second_copy_and_the_first_result_wins() -> None:
    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return (500.0 if label == "f" and times == 0 else 10.0), f"{label} {times}"

    pool, told = Scripted(["a", "b"], script), []
    pool.run(tasks("abcdef", told))
    assert [result for label, result in told if label == "f"] == ["f 1"]
    assert len(told) == 6
    first, second = (call for call in pool.calls if call.label == "f")
    assert second.worker != first.worker
    # Three times as long as its like, which took 10 seconds, is less than the floor.
    wait = second.begun - first.begun
    assert deadlines.STRAGGLER_SECONDS <= wait <= deadlines.STRAGGLER_SECONDS + 2.5
    # It must not go on writing into folders that the next stage removes.
    assert first.killed == pool.clock == second.end
    assert pool.killed == [(pool.clock, first.worker)]


def test_tasks_as_long_as_the_longest_of_their_like_get_no_second_copy() -> None:
    """Seven of ten take a second, three take a hundred: a bank among linears."""
    seconds = dict(zip("abcdefghij", [1, 1, 100, 1, 1, 100, 1, 1, 1, 100], strict=True))
    pool, told = Scripted(["a", "b"], lambda label, *_: (seconds[label], label)), []
    pool.run(tasks("abcdefghij", told))
    assert len(pool.calls) == len(told) == 10
    pool.run(tasks("f", told))  # what was measured stays known
    assert len(pool.calls) == 11


def test_a_straggler_that_comes_back_is_idle_again() -> None:
    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return {"slow": 60.0 if times == 0 else 10.0, "later": 25.0}.get(label, 10.0), label

    pool, told = Scripted(["a", "b"], script), []
    more = tasks(["later"], told)
    start = tasks(["a", "b", "c", "slow"], told)
    start[3].done = lambda result: (told.append(("slow", result)), more)[1]
    pool.run(start)
    assert [label for label, _ in told].count("slow") == 1 and told[-1][0] == "later"
    assert pool.killed == []


def test_what_missed_its_deadline_is_given_to_another_and_its_worker_killed() -> None:
    """Other work waits all the while, so nobody is idle."""

    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return (NEVER if label == "000" and times == 0 else 10.0), label

    pool, told = Scripted(["a", "b"], script), []
    labels = [f"{n:03d}" for n in range(200)]
    pool.run(tasks(labels, told))
    assert sorted(label for label, _ in told) == labels
    first, second = (call for call in pool.calls if call.label == "000")
    assert (
        deadlines.DEADLINE_SECONDS < second.begun - first.begun < 1.1 * deadlines.DEADLINE_SECONDS
    )
    # Its worker was silent for a while after the other copy's result.
    (killed,) = pool.killed
    assert killed[1] == first.worker
    patience = deadlines.STRAGGLER_SECONDS
    assert second.end + patience < killed[0] < second.end + patience + 12
    assert any(call.begun > killed[0] and call.worker == first.worker for call in pool.calls)


def test_a_task_nobody_finishes_ends_the_run_in_bounded_time() -> None:
    pool = Scripted(["a", "b"], lambda *_: (NEVER, None))
    with pytest.raises(RunError, match=r"^x: its worker did not answer in time 4 times"):
        pool.run(tasks(["x"], []))
    assert pool.clock < 10 * deadlines.FIRST_SECONDS


def test_the_last_attempt_has_its_node_for_itself() -> None:
    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        if label == "big" and times < 3:
            return 10.0, OutOfMemoryError("killed")
        return 10.0, label

    pool, told = Scripted(["a", "a", "b"], script), []
    others = [f"{n}" for n in range(60)]
    pool.run([*tasks(["big"], told, priority=(0,)), *tasks(others, told, priority=(1,))])
    assert sorted(label for label, _ in told) == sorted(["big", *others])
    last = [call for call in pool.calls if call.label == "big"][-1]
    beside = [
        call
        for call in pool.calls
        if call is not last
        and pool.nodes[call.worker] == pool.nodes[last.worker]
        and call.begun < last.end
        and call.end > last.begun
    ]
    assert beside == []
    assert {pool.nodes[n] for n in pool.forgot} <= {pool.nodes[last.worker]}


def test_a_task_that_always_lacks_memory_ends_the_run_by_name() -> None:
    pool = Scripted(["a", "b"], lambda *_: (1.0, OutOfMemoryError("killed")))
    with pytest.raises(
        RunError, match=r"^experts 7: its worker ran out of memory 4 times.*workers"
    ):
        pool.run(tasks(["experts 7"], []))
    assert len(pool.calls) == 4


def test_a_gpu_out_of_memory_is_tried_once_more_alone() -> None:
    outcomes = [failed(MemoryError("no room")), "done"]
    pool, told = Scripted(["a", "a"], lambda label, worker, times: (1.0, outcomes[times])), []
    pool.run(tasks(["x"], told))
    assert told == [("x", "done")] and pool.forgot == [1]
    pool = Scripted(["a", "a"], lambda *_: (1.0, failed(MemoryError("no room"))))
    with pytest.raises(RunError, match="^x: MemoryError: no room"):
        pool.run(tasks(["x"], []))
    assert len(pool.calls) == 2


def test_deaths_with_the_whole_node_are_not_the_tasks_fault() -> None:
    dead = RayActorError()

    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return (1.0, dead) if times < 9 else (1.0, "done")

    pool, told = Scripted(["a"], script, dead_nodes={"a"}), []
    pool.run(tasks(["x"], told))
    assert told == [("x", "done")] and len(pool.killed) == 9
    pool = Scripted(["a"], script)
    with pytest.raises(RunError, match="^x: its worker died 4 times"):
        pool.run(tasks(["x"], []))


def test_a_task_that_may_fail_is_told_after_two_deaths() -> None:
    told: list[Any] = []
    given_up = tasks(["x"], told, failed=lambda *why: told.append(why) or ())
    Scripted(["a"], lambda *_: (1.0, RayActorError())).run(given_up)
    assert told == [(WORKER_DIED, "its worker died 2 times")]


def test_an_error_decides_nothing_while_another_copy_runs() -> None:
    """The first copy removes what the second one reads, and only then returns."""

    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        if label != "x":
            return 10.0, label
        return (60.0, "good") if times == 0 else (5.0, failed(RunError("files are missing")))

    pool, told = Scripted(["a", "b"], script), []
    pool.run(tasks(["a", "b", "c", "x"], told))
    assert told[-1] == ("x", "good")
    assert [call.label for call in pool.calls].count("x") == 2


def test_trouble_of_the_file_system_that_passes_is_waited_for() -> None:
    trouble = failed(OSError(errno.EIO, "Input/output error"))
    pool, told = (
        Scripted(["a"], lambda label, worker, times: (1.0, trouble if times < 3 else "good")),
        [],
    )
    pool.run(tasks(["x"], told))
    assert told == [("x", "good")]
    assert pool.clock == pytest.approx(4 * 1.0 + 1 + 2 + 5)
    with pytest.raises(RunError, match="^x: OSError: .*Input/output error"):
        Scripted(["a"], lambda *_: (1.0, trouble)).run(tasks(["x"], []))
    full = failed(OSError(errno.ENAMETOOLONG, "File name too long"))
    pool = Scripted(["a"], lambda *_: (1.0, full))
    with pytest.raises(RunError, match="File name too long"):
        pool.run(tasks(["x"], []))
    assert len(pool.calls) == 1


def test_what_a_dead_worker_held_is_made_again_by_another() -> None:
    pool, told = Scripted(["a", "b"], lambda label, *_: (1.0, label), joins={0: NEVER}), []
    pool.run(tasks("abc", told, affinity=0))
    assert [call.worker for call in pool.calls] == [1, 1, 1] and len(told) == 3


def test_workers_that_come_later_get_work() -> None:
    pool, told = Scripted(["a", "b"], lambda label, *_: (10.0, label), joins={1: 45.0}), []
    pool.run(tasks("abcdefgh", told))
    assert len(told) == 8
    assert min(call.begun for call in pool.calls if call.worker == 1) == pytest.approx(45, abs=6)
    assert pool.clock <= 65


def test_a_worker_that_hangs_at_the_first_task_of_its_kind_is_not_waited_for() -> None:
    """Its node lives, so nothing but the time tells."""

    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return (NEVER if label == "x" and times == 0 else 20.0), f"{label} {times}"

    pool, told = Scripted(["a", "a", "b"], script), []
    pool.run(tasks("x", told))
    first, second = pool.calls
    assert told == [("x", "x 1")]
    wait = second.begun - first.begun
    assert deadlines.UNKNOWN_SECONDS < wait < deadlines.UNKNOWN_SECONDS + 2.5
    assert pool.nodes[first.worker] != pool.nodes[second.worker]
    assert pool.killed == [(second.end, first.worker)] and pool.clock == second.end


def test_a_task_of_an_unknown_kind_may_take_longer_where_others_took_long() -> None:
    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return {"long": 400.0, "new": 1900.0}[label], label

    pool, told = Scripted(["a", "b"], script), []
    pool.run(tasks(["long"], told))
    again = [Task("module:other", {}, "new", done=lambda result: told.append(result) or ())]
    pool.run(again)
    assert told == [("long", "long"), "new"]
    # 400 s on an idle machine got a second copy, 1900 s none: less than five times the longest.
    assert [call.label for call in pool.calls] == ["long", "long", "new"]


def test_what_waits_for_a_worker_that_hangs_goes_elsewhere() -> None:
    """The others are idle: what they could do waits for what the worker holds in memory."""

    def script(label: str, worker: int, times: int) -> tuple[float, Any]:
        return (NEVER if worker == 0 else 10.0), label

    pool, told = Scripted(["a", "b"], script), []
    pool.run(tasks("abcd", told, affinity=0))
    assert sorted(label for label, _ in told) == list("abcd")
    assert [call.worker for call in pool.calls[1:]] == [1] * 4
    assert pool.clock < deadlines.UNKNOWN_SECONDS + 50


def test_deadlines_are_multiples_of_the_upper_quantile_above_a_floor() -> None:
    known = deadlines.Durations()
    assert known.straggles_after("f") == known.patience("f") == deadlines.UNKNOWN_SECONDS
    assert known.deadline("f") == deadlines.FIRST_SECONDS
    known.add("g", 100.0)
    assert known.straggles_after("f") == known.straggles_after("g") == 500.0
    known = deadlines.Durations()
    for seconds in (100.0, 1.0, 50.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0):
        known.add("f", seconds)
    assert known.straggles_after("f") == known.patience("f") == 150.0
    assert known.deadline("f") == 1000.0
    for _ in range(3):
        known.add("g", 0.1)
    assert known.straggles_after("g") == deadlines.STRAGGLER_SECONDS
    assert known.deadline("g") == deadlines.DEADLINE_SECONDS


def test_results_go_before_what_there_is_to_do_meanwhile() -> None:
    """Steps of 2 s are done as long as there are some, and no worker waits for more than one."""
    pool = Scripted(["a", "a"], lambda label, worker, times: (5.0 if worker else 3.0, label))
    told: list[tuple[str, float]] = []
    left = 6

    def done(result: str) -> Iterable[Task]:
        told.append((result, pool.clock))
        return ()

    def meanwhile() -> bool:
        nonlocal left
        if left:
            left -= 1
            pool.clock += 2.0
            told.append(("step", pool.clock))
        return left > 0

    tasks = [Task("f", {}, name, affinity=worker, done=done) for worker, name in enumerate("abcd")]
    pool.run([*tasks[:2], *(Task("f", {}, t.label, done=done) for t in tasks[2:])], None, meanwhile)
    assert told == [
        ("step", 2.0),
        ("step", 4.0),
        ("a", 4.0),
        ("step", 6.0),
        ("b", 6.0),
        ("step", 8.0),
        ("c", 8.0),
        ("step", 10.0),
        ("step", 12.0),
        ("d", 12.0),
    ]
    assert [(call.label, call.begun) for call in pool.calls][2:] == [("c", 4.0), ("d", 6.0)]


def near_tasks(blocks: int, each: int, told: list[Any]) -> list[Task]:
    return [
        task
        for block in range(blocks)
        for task in tasks(
            [f"{block} {n}" for n in range(each)], told, priority=(1, block), near=f"block {block}"
        )
    ]


@pytest.mark.parametrize(("nodes", "blocks"), [("ab", 4), ("aabb", 4), ("abc", 7), ("ab", 1)])
def test_nodes_keep_to_the_blocks_that_they_have_copies_of(nodes: str, blocks: int) -> None:
    each = 6
    pool = Scripted(list(nodes), lambda label, worker, times: (10.0, label))
    told: list[Any] = []
    late = tasks(["late"], told, priority=(2, 0), near="block 0")
    pool.run([*late, *near_tasks(blocks, each, told), *tasks(["urgent"], told, priority=(0, 9))])
    assert len(told) == blocks * each + 2
    began = [call.label for call in pool.calls]
    assert "urgent" in began[: len(nodes)] and began[-1] == "late"
    # Nobody waits for what is near.
    assert pool.clock == 10.0 * math.ceil((blocks * each + 2) / len(nodes))
    readers = {
        block: {nodes[c.worker] for c in pool.calls if c.label.startswith(f"{block} ")}
        for block in range(blocks)
    }
    # Without the preference every node reads every block.
    reads, kinds = sum(map(len, readers.values())), len(set(nodes))
    assert blocks <= reads <= blocks + kinds - 1


def test_of_free_workers_one_that_is_near_gets_the_task() -> None:
    pool = Scripted(["a", "b", "c"], lambda label, worker, times: (10.0, label))
    told: list[Any] = []
    second = near_tasks(1, 1, told)
    first = tasks(["walk"], told, affinity=1, near="block 0")
    first[0].done = lambda result: second
    pool.run(first)
    assert [call.worker for call in pool.calls[-2:]] == [1, 1]
