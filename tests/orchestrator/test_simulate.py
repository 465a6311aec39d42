"""The pool's own loop on a calculated clock, against schedules worked out by hand."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from moesaic.orchestrator.costs import Cost
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.simulate import Links, Outcome, SimulatedPool

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


CACHED = Links(
    store=1e9, networks=[1e9] * 2, read=100.0, write=100.0, call=0.0, caches=[500.0] * 2, cached=400
)


def reading(name: str, size: float = 400.0, **more: Any) -> Task:
    return task("read", Cost(read=size, files=(((name, ""), size),)), **more)


def test_what_a_worker_of_the_node_has_read_costs_no_traffic() -> None:
    found = run([reading("a") for _ in range(3)], [0], CACHED)
    assert found.makespan == pytest.approx(4.0 + 1.0 + 1.0)
    assert (found.read, found.cached) == (400.0, 800.0)
    apart = run([reading("a", affinity=worker) for worker in range(2)], [0, 1], CACHED)
    assert apart.makespan == pytest.approx(4.0) and apart.read == 800.0


def test_what_was_read_longest_ago_leaves_the_cache() -> None:
    names = ["a", "b", "a", "c", "a", "b"]
    found = run([reading(name, 250.0) for name in names], [0], CACHED)
    # "c" takes the place of "b", which was read longer ago than "a".
    assert (found.read, found.cached) == (4 * 250.0, 2 * 250.0)
    assert run([reading("large", 501.0) for _ in range(2)], [0], CACHED).cached == 0


def test_what_another_one_is_reading_comes_no_faster_than_it_does() -> None:
    found = run([reading("a") for _ in range(2)], [0, 0], CACHED)
    assert found.makespan == pytest.approx(4.0) and found.read == 400.0


def test_readers_who_begin_apart_bring_a_file_together() -> None:
    halves = [(("a", "0"), 200.0), (("a", "1"), 200.0)]
    costs = [Cost(read=400.0, files=tuple(own)) for own in (halves, halves[::-1])]
    found = run([task("read", cost) for cost in costs], [0, 0], CACHED)
    assert found.makespan == pytest.approx(2.0 + 0.5) and found.read == 400.0


def test_bytes_read_ahead_take_no_time_of_their_own() -> None:
    links = Links(store=1e9, networks=[1e9], read=100.0, write=100.0, call=0.0)
    costs = [Cost(5.0, read=300.0, ahead=size) for size in (0.0, 300.0, 200.0)]
    times = [run([task("work", cost)], [0], links).makespan for cost in costs]
    assert times == pytest.approx([8.0, 5.0, 6.0])
    longer = Cost(1.0, read=300.0, ahead=300.0)
    assert run([task("work", longer)], [0], links).makespan == pytest.approx(3.0)


def large(parts: int, more: bool = False, **options: Any) -> Task:
    def divide(count: int) -> list[Task]:
        spans = [parts * k // count for k in range(count + 1)]
        return [large(high - low, more, **options) for low, high in itertools.pairwise(spans)]

    cost = Cost(10.0 * parts)
    return task("large", cost, parts=parts, divide=divide, more=lambda: more, **options)


def test_large_tasks_are_divided_among_those_who_would_be_idle() -> None:
    alone = run([large(8)], [0] * 4)
    assert alone.makespan == pytest.approx(20.0) and 4 <= alone.tasks <= 8
    # As large as they are while there is enough of them: 12 of 8 parts for two.
    many = run([large(8) for _ in range(12)], [0] * 2)
    assert many.makespan == pytest.approx(12 * 80 / 2) and many.tasks < 24
    assert run([large(8)], [0]).tasks == 1


def test_while_more_is_to_come_only_the_idle_divide() -> None:
    beside = [task("beside", Cost(1000.0), priority=(-1,)) for _ in range(3)]
    assert run([*beside, large(8, more=True)], [0] * 5).tasks == 3 + 2
    assert run([*beside, large(8)], [0] * 5).tasks > 3 + 2
