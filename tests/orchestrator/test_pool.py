"""The pool on a real Ray: order, memory, death, blame. One Ray for all of them."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import ray_constants

from moesaic.orchestrator import cluster as joining
from moesaic.orchestrator import loop, placing
from moesaic.orchestrator import pool as module
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.placing import Roster
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.runlog import run_log
from moesaic.orchestrator.worker import resolve

TASKS = "tests.orchestrator.pool_tasks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, raising=False)
    root = str(Path(__file__).parents[2])
    joining.start_local(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Pool]:
    with Pool(Compute(workers=2)) as opened:
        yield opened


def task(function: str, label: str = "", **changes: Any) -> Task:
    known = ("priority", "affinity", "done", "failed")
    options = {key: changes.pop(key) for key in known if key in changes}
    return Task(f"{TASKS}:{function}", changes, label or function, **options)


def test_finished_tasks_bring_new_ones(pool: Pool, tmp_path: Path) -> None:
    file = str(tmp_path / "notes")

    def following(number: int) -> list[Task]:
        if number == 3:
            return []
        done = lambda result, n=number: following(n + 1)  # noqa: E731
        return [task("note", file=file, text=f"step {number}", done=done)]

    labels: list[str] = []
    pool.run(following(0), labels.extend)
    assert (tmp_path / "notes").read_text().splitlines() == ["step 0", "step 1", "step 2"]
    assert set(labels) <= {"note"}


def test_what_workers_print_and_log_is_in_the_log_of_the_run_and_nowhere_else(
    pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ["printed", "warned", "logged"]
    with run_log(tmp_path, "run"):
        workers = pool.size
        pool.run(task("speak", affinity=worker) for worker in range(workers))
        deadline = time.monotonic() + 60
        while (tmp_path / "log.txt").read_text().count("logged") < workers:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    for text in texts:
        found = [line for line in lines if f"{text} by a worker" in line]
        sources = {re.search(r" \[(\S+) (\d+)\] ", line)[0] for line in found}  # type: ignore[index]
        assert len(sources) == workers, lines
    assert lines[-1].endswith(" done")
    assert "by a worker" not in "".join(capfd.readouterr())


def test_a_secret_that_only_a_node_has_does_not_leave_it(pool: Pool, tmp_path: Path) -> None:
    secret = "only a node knows"
    assert "NODE_PASSWORD" not in os.environ
    with pytest.raises(RunError) as error, run_log(tmp_path, "run"):
        try:
            pool.run([task("betray", name="NODE_PASSWORD", value=secret)])
        finally:
            deadline = time.monotonic() + 60
            while "known: " not in (tmp_path / "log.txt").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
    assert str(error.value) == "betray: ValueError: wrong: ***"
    log = (tmp_path / "log.txt").read_text()
    assert "] it is *** here\n" in log and "known: ***" in log and secret not in log


def test_urgent_tasks_run_first_when_workers_are_short(pool: Pool, tmp_path: Path) -> None:
    file = str(tmp_path / "notes")
    order = [(3, 0), (1, 5), (2,), (1, 4), (0,)]
    # All for one worker, so that only one runs at a time.
    pool.run(
        task("note", file=file, text=str(priority), priority=priority, affinity=1)
        for priority in order
    )
    assert (tmp_path / "notes").read_text().splitlines() == [str(p) for p in sorted(order)]


def test_tasks_that_fit_no_idle_worker_do_not_hold_up_others(pool: Pool, tmp_path: Path) -> None:
    """Worker 0 is busy; what wants it waits, what does not care goes to worker 1."""
    file = str(tmp_path / "notes")
    pool.run(
        [
            task("note", file=file, text="slow", seconds=1.0, affinity=0, priority=(0,)),
            task("note", file=file, text="waits", affinity=0, priority=(1,)),
            task("note", file=file, text="passes", priority=(2,)),
        ]
    )
    assert (tmp_path / "notes").read_text().splitlines() == ["passes", "slow", "waits"]


def test_memory_of_a_worker_is_met_again_by_affinity(pool: Pool) -> None:
    processes: dict[int, int] = {}
    pool.run(
        task(
            "remember",
            value=10 + w,
            affinity=w,
            done=lambda pid, w=w: processes.update({w: pid}) or (),
        )
        for w in (0, 1)
    )
    recalled: dict[int, int] = {}
    pool.run(
        task("recall", affinity=w, done=lambda value, w=w: recalled.update({w: value}) or ())
        for w in (1, 0)
    )
    assert recalled == {0: 10, 1: 11}
    assert len(set(processes.values())) == 2


def test_a_worker_that_is_killed_is_replaced_and_its_task_done(pool: Pool, tmp_path: Path) -> None:
    file, notes = str(tmp_path / "deaths"), str(tmp_path / "notes")
    before = pool.replaced
    results: list[int] = []
    tasks = [task("die", file=file, times=1, done=lambda died: results.append(died) or ())]
    tasks += [task("note", file=notes, text=str(n)) for n in range(4)]
    pool.run(tasks)
    assert results == [1]
    assert pool.replaced == before + 1
    assert sorted((tmp_path / "notes").read_text().split()) == ["0", "1", "2", "3"]
    assert pool.size == 2


def test_a_task_that_always_kills_its_worker_ends_the_run_by_name(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_ATTEMPTS", 2)
    with pytest.raises(RunError) as error:
        pool.run([task("die", "experts 7", file=str(tmp_path / "deaths"), times=99)])
    assert str(error.value).startswith("experts 7: its worker died 2 times")
    assert (tmp_path / "deaths").read_text() == "xx"


def test_a_task_that_may_fail_tells_why_and_the_others_go_on(pool: Pool, tmp_path: Path) -> None:
    notes, told = str(tmp_path / "notes"), []

    def failed(kind: str, reason: str) -> list[Task]:
        told.append((kind, reason))
        return [task("note", file=notes, text=kind.replace(" ", "-"))]

    deaths = str(tmp_path / "deaths")
    pool.run([task("fail", failed=failed), task("die", file=deaths, times=99, failed=failed)])
    assert sorted(told) == [
        ("ValueError", "shapes do not fit"),
        (loop.WORKER_DIED, "its worker died 2 times"),
    ]
    assert sorted(Path(notes).read_text().split()) == ["ValueError", "worker-died"]
    assert pool.size == 2


def test_the_pool_goes_on_after_a_run_that_failed(pool: Pool, tmp_path: Path) -> None:
    file = str(tmp_path / "notes")
    with pytest.raises(UserError, match=r"^recipe.yaml: model: tensor x has NaN values$"):
        pool.run([task("blame"), task("note", file=file, text="a", seconds=0.3)])
    with pytest.raises(RunError, match=r"^bank 3: ValueError: shapes do not fit$"):
        pool.run([task("fail", "bank 3")])
    pool.run([task("note", file=file, text="b", affinity=w) for w in (0, 1)])
    assert (tmp_path / "notes").read_text().splitlines()[-1] == "b"


def test_workers_have_as_many_threads_as_processors_and_no_gpu_unasked(pool: Pool) -> None:
    found: list[str] = []
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    pool.run(task("environment", name=n, done=lambda v: found.append(v) or ()) for n in names)
    assert sorted(found) == ["", "1", "PASSIVE"]


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (Compute(workers=3), ["3 worker(s) of 1 CPU", "at most 2"]),
        (Compute(cpus_per_worker=64), ["1 worker(s) of 64 CPU", "2 CPU", "at most 0"]),
        (Compute(workers=1, gpus_per_worker=1), ["1 GPU", "0 GPU", "at most 0"]),
    ],
)
def test_what_no_node_can_give_is_refused_at_once(
    cluster: None, compute: Compute, words: list[str]
) -> None:
    with pytest.raises(UserError) as error, Pool(compute) as small:
        _ = small.size
    for word in ("compute:", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "compute", "count"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}], Compute(cpus_per_worker=2), 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], Compute(cpus_per_worker=2), 2),
        ([{"CPU": 8.0, "GPU": 2.0}], Compute(gpus_per_worker=0.5), 4),
        ([{"CPU": 8.0, "GPU": 2.0}], Compute(gpus_per_worker=0.75), 2),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], Compute(gpus_per_worker=2), 0),
        ([{"CPU": 8.0}, {"CPU": 4.0, "GPU": 4.0}], Compute(), 4),
    ],
)
def test_workers_are_counted_node_by_node(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], compute: Compute, count: int
) -> None:
    """Two nodes of one processor have no room for a worker of two."""
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setattr(module, "connect", lambda compute: False)
    monkeypatch.setattr(module, "watch_head", lambda place: None)
    monkeypatch.setattr(placing.ray, "nodes", lambda: [*alive, dead])
    ready = placing.Slot(None, None, 0.0)
    monkeypatch.setattr(Roster, "_start", lambda self: ready)
    asked = Pool(compute)
    if count:
        assert asked.size == count
    else:
        with pytest.raises(UserError, match="at most 0"):
            _ = asked.size


@pytest.mark.parametrize(
    ("compute", "line"),
    [
        (
            Compute(),
            "compute: 2 node(s) take no part (10.0.0.2, 10.0.0.3): no worker of 1 CPU and 1 GPU"
            " fits them; see compute.cpus_per_worker, or compute.gpus_per_worker: 0 for the"
            " processors of all nodes and no GPU\n",
        ),
        (
            Compute(gpus_per_worker=0, cpus_per_worker=8),
            "compute: 1 node(s) take no part (10.0.0.3): no worker of 8 CPU fits them; see"
            " compute.cpus_per_worker\n",
        ),
        (Compute(gpus_per_worker=0), ""),
    ],
)
def test_nodes_that_take_no_part_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compute: Compute,
    line: str,
) -> None:
    """A mixed cluster; its head has no processor to give."""
    resources = [
        {"CPU": 8.0, "GPU": 2.0, "node:10.0.0.1": 1.0},
        {"CPU": 8.0, "node:10.0.0.2": 1.0},
        {"CPU": 4.0, "node:10.0.0.3": 1.0},
        {"CPU": 0.0, "node:__internal_head__": 1.0, "node:10.0.0.9": 1.0},
    ]
    nodes = [{"Alive": True, "Resources": node} for node in resources]
    monkeypatch.setattr(placing.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(Roster, "_start", lambda self: placing.Slot(None, None, 0.0))
    Roster(compute).ask()
    assert capsys.readouterr().err == line


def test_an_empty_run_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(module, "connect", never)
    with Pool(Compute()) as idle:
        idle.run([])
        idle.run(iter(()))
        assert idle.roster.slots == []


@pytest.mark.parametrize("key", ["compute.address", "RAY_ADDRESS"])
def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("could not\nconnect")

    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", refuse)
    monkeypatch.setattr(joining, "try_address", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(RunError) as error:
        joining.connect(Compute(address="auto") if key == "compute.address" else Compute())
    message = str(error.value)
    assert message.startswith(f"{key}: the Ray cluster at auto cannot be reached (could not con")
    assert f"correct {key}, or leave it out" in message
    assert "\n" not in message


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_found_out_before_ray_tries(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(RunError, match=f"the Ray cluster at {address} cannot be reached"):
        joining.connect(Compute(address=address))


def listeners() -> dict[str, set[str]]:
    """Addresses on which this process and those below it wait for others, by their names."""
    found: dict[str, set[str]] = {}
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            connections = process.net_connections("inet")
            name = process.name() if process.pid != here.pid else "driver"
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(name, set()).add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def test_a_ray_of_our_own_listens_to_this_machine_alone(pool: Pool) -> None:
    assert pool.size == 2
    found = listeners()
    assert {"gcs_server", "raylet", "driver"} <= found.keys()
    assert any(name.startswith("ray::Worker") for name in found)
    assert set().union(*found.values()) == {"127.0.0.1"}


def test_a_ray_of_our_own_looks_for_no_more_machines(pool: Pool) -> None:
    assert pool.size == 2
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert any("raylet/raylet" in command for command in commands)
    assert not any("autoscaler/_private/monitor.py" in command for command in commands)


def test_a_ray_of_our_own_leaves_no_trace_for_clusters_joined_later(pool: Pool) -> None:
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ
    assert ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize("switch", [None, "0", "1"])
def test_a_ray_of_our_own_is_started_for_this_machine_alone_whatever_the_user_set(
    monkeypatch: pytest.MonkeyPatch, switch: str | None
) -> None:
    """It asks nobody for a token."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    seen: list[Any] = []

    def init(**_: Any) -> None:
        seen.append((os.environ[name], ray_constants.ENABLE_RAY_CLUSTER))

    monkeypatch.setattr(joining.ray, "init", init)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.delenv(name, raising=False)
    if switch is not None:
        monkeypatch.setenv(name, switch)
    joining.start_local()
    assert seen == [("0", False)]
    assert os.environ.get(name) == switch and ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize("address", [None, "local"])
def test_a_local_ray_is_started_without_an_address(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", lambda **options: asked.append(options))
    monkeypatch.setenv("RAY_ADDRESS", "local" if address is None else "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert joining.connect(Compute(address=address))
    assert asked[0]["address"] == "local"


def test_a_busy_cluster_is_waited_for_aloud_and_not_for_ever(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pool.size == 2  # which takes both processors
    monkeypatch.setattr(placing, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(placing, "_START_SECONDS", 3.0)
    started = time.monotonic()
    busy = Compute(workers=1, address="auto")
    with pytest.raises(RunError) as error, Pool(busy) as second:
        _ = second.size
    assert time.monotonic() - started < 30
    free = "free now: 0 of 2 CPU, 0 of 0 GPU"
    where = f"{ray.get_runtime_context().gcs_address} (auto)"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"waiting for 1 worker(s) of 1 CPU and 0 GPU at {where} ({free})"
    message = str(error.value)
    assert message.startswith("compute: 1 worker(s) of 1 CPU and 0 GPU did not start within 3 s")
    assert f"at {where} ({free})" in message and "compute.workers" in message
    pool.run([task("remember", value=1)])  # and nothing of the first pool is lost


def test_a_ray_that_lost_its_nodes_is_not_waited_for(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.size == 2  # so that there is no room for a third
    started = time.monotonic()
    real, looks = ray.nodes, []

    def nodes() -> list[dict[str, Any]]:
        looks.append(1)  # the first look is before workers are asked for
        return [{**node, "Alive": len(looks) == 1} for node in real()]

    monkeypatch.setattr(placing.ray, "nodes", nodes)
    lost = pytest.raises(RunError, match="has lost all its nodes .* run the same command again")
    with Pool(Compute(workers=1)) as third, lost:
        _ = third.size
    assert time.monotonic() - started < 30


def test_the_handler_of_sigterm_survives_the_start_of_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    joining.connect(Compute())
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_ray_starts_is_like_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise SystemExit(1)  # what Ray's own handler does

    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        joining.connect(Compute())


def test_functions_are_found_by_name() -> None:
    assert resolve("sums:reduce").__module__ == "moesaic.orchestrator.sums"
    assert resolve(f"{TASKS}:note").__name__ == "note"
