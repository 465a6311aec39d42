"""The pool's own loop on a calculated clock, against schedules worked out by hand."""

from collections.abc import Iterable
from typing import Any

import pytest

from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.simulate import Links, Outcome, SimulatedPool
from moesaic.orchestrator.timing import Cost

FREE = Links(store=1e9, networks=[1e9, 1e9, 1e9, 1e9], read=1e9, write=1e9, call=0.0)


def task(name: str, cost: Cost, **more: Any) -> Task:
    return Task(name, {"cost": cost}, name, **more)


def run(tasks: Iterable[Task], places: list[int], links: Links = FREE) -> Outcome:
    pool = SimulatedPool(places, links, lambda task: task.arguments["cost"])
    pool.run(tasks)
    return pool.outcome


def test_equal_tasks_are_shared_out() -> None:
    found = run([task("work", Cost(2.0)) for _ in range(7)], [0, 1, 2])
    assert found.makespan == pytest.approx(6.0)  # three rounds, the last with one task
    assert found.work == found.busy == pytest.approx(14.0)
    assert found.tasks == 7 and found.critical == pytest.approx(2.0)


def test_urgent_tasks_go_first_and_long_ones_last_when_priorities_say_so() -> None:
    tasks = [task("long", Cost(10.0), priority=(1,))]
    tasks += [task("short", Cost(3.0), priority=(0,)) for _ in range(2)]
    # Both workers take short ones first; the long one runs from 3 to 13.
    assert run(tasks, [0, 0]).makespan == pytest.approx(13.0)


def test_tasks_with_affinity_wait_for_their_worker() -> None:
    tasks = [task("own", Cost(5.0), affinity=0) for _ in range(2)]
    tasks += [task("any", Cost(4.0))]
    found = run(tasks, [0, 0])
    assert found.makespan == pytest.approx(10.0)
    assert found.busy == pytest.approx(14.0)


def test_followers_start_when_what_they_wait_for_is_done() -> None:
    def chain(left: int) -> Task:
        done = lambda result: [chain(left - 1)] if left else []  # noqa: E731
        return task("link", Cost(1.5), done=done)

    found = run([chain(3), task("beside", Cost(1.0))], [0, 0])
    assert found.makespan == found.critical == pytest.approx(6.0)
    assert found.limit() == "critical path"


def test_phases_follow_one_another_at_the_speed_of_one_worker() -> None:
    links = Links(store=1e9, networks=[1e9], read=100.0, write=50.0, call=0.0)
    found = run([task("work", Cost(2.0, read=300.0, written=200.0))], [0], links)
    assert found.makespan == pytest.approx(3.0 + 2.0 + 4.0)
    assert found.work == pytest.approx(9.0)
    assert (found.read, found.written) == (300.0, 200.0)
    assert found.store_full == found.network_full == 0.0


def test_readers_share_the_store() -> None:
    """Two read 100 bytes each from a store of 100 bytes per second; a third one computes."""
    links = Links(store=100.0, networks=[1e9] * 3, read=100.0, write=100.0, call=0.0)
    tasks = [task("read", Cost(read=100.0)) for _ in range(2)] + [task("work", Cost(1.0))]
    found = run(tasks, [0, 1, 2], links)
    assert found.makespan == pytest.approx(2.0)
    assert found.store_full == pytest.approx(2.0)
    assert found.work == pytest.approx(3.0)
    assert found.limit() == "store bandwidth"


def test_workers_of_a_node_share_its_network() -> None:
    """Two on one node halve its 100 bytes per second; one on another node has its own."""
    links = Links(store=1e9, networks=[100.0, 100.0], read=100.0, write=100.0, call=0.0)
    tasks = [task("read", Cost(read=300.0)) for _ in range(3)]
    found = run(tasks, [0, 0, 1], links)
    # The one that is alone is done after 3 s, the others after 6.
    assert found.makespan == pytest.approx(6.0)
    assert found.busy == pytest.approx(3.0 + 6.0 + 6.0)
    assert found.network_full == pytest.approx(6.0)


def test_a_reader_is_faster_once_the_other_is_done() -> None:
    links = Links(store=100.0, networks=[1e9] * 2, read=100.0, write=100.0, call=0.0)
    tasks = [task("read", Cost(read=100.0)), task("read", Cost(read=300.0))]
    # Both at 50 until 2 s; then 200 bytes are left for one at 100.
    assert run(tasks, [0, 1], links).makespan == pytest.approx(4.0)


def test_the_driver_does_one_thing_at_a_time() -> None:
    links = Links(store=1e9, networks=[1e9], read=1e9, write=1e9, call=0.5)
    found = run([task("work", Cost(0.25)) for _ in range(10)], [0] * 4, links)
    # A task per half second, whoever is idle; the last takes a quarter more.
    assert found.makespan == pytest.approx(5.25)
    assert found.driver == pytest.approx(5.0)
    assert found.limit() == "driver"


def test_tasks_for_anybody_leave_those_that_keep_something_alone() -> None:
    """Worker 0 walks; the others take what comes beside, so that the walk is never held up."""

    def walk(left: int) -> Task:
        def done(result: Any) -> list[Task]:
            beside = task("sums", Cost(2.0), priority=(0,))
            return [beside, walk(left - 1)] if left else [beside]

        return task("walk", Cost(1.0), priority=(1,), affinity=0, done=done)

    found = run([walk(9)], [0, 0, 0, 0])
    assert found.makespan == pytest.approx(12.0)  # ten steps and the last sums
    assert found.critical == pytest.approx(12.0)


def test_a_loop_that_waits_for_nobody_is_a_mistake() -> None:
    pool = SimulatedPool([0], FREE, lambda task: Cost(1.0))
    with pytest.raises(RuntimeError, match="all workers are idle"):
        pool._wait([], 1.0)


@pytest.mark.parametrize(("kind", "begun_again"), [("bank", False), ("linear", True)])
def test_a_long_kind_is_not_taken_for_lost_among_short_ones(kind: str, begun_again: bool) -> None:
    tasks = [task("work", Cost(1.0), priority=(0,), kind="linear") for _ in range(20)]
    tasks += [task("work", Cost(2000.0), priority=(1,), kind=kind)]
    # Whoever is not at it goes on with short ones, and so there is something to look at.
    tasks += [task("work", Cost(1.0), priority=(2,), kind="linear") for _ in range(2100)]
    assert (run(tasks, [0, 0]).tasks > len(tasks)) == begun_again
