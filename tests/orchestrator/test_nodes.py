"""A real cluster of several nodes: who joins, who lacks memory, who does not belong to it."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError

from moesaic.orchestrator import bad_nodes, placing, store
from moesaic.orchestrator import cluster as joining
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.store import Store

TASKS = "tests.orchestrator.pool_tasks"


def test_a_worker_without_memory_is_tried_alone_and_then_told_of(
    cluster: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "tries"
    task = Task(f"{TASKS}:gorge", {"file": str(file), "more_bytes": 1 << 30}, "experts 7")
    with Pool(Compute(address=cluster.address)) as pool, pytest.raises(RunError) as error:
        pool.run([task])
    text = str(error.value)
    assert text.startswith("experts 7: MemoryError: no memory was left, alone on its node")
    assert "compute.workers" in text and "run the same command again" in text and "\n" not in text
    assert len(file.read_text().split()) == 2  # beside others, and alone


def test_nodes_with_other_sources_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bad_nodes.installed()
    monkeypatch.setattr(bad_nodes, "installed", lambda: {**real, "code": "0" * 40})
    with Pool(Compute(address=cluster.address)) as pool, pytest.raises(RunError) as error:
        _ = pool.size
    text = str(error.value)
    assert f"(digest {real['code'][:8]}) than this process (00000000)" in text


@pytest.mark.parametrize("name", ["moesaic", "torch", "transformers"])
def test_nodes_with_another_version_are_refused(name: str) -> None:
    here = bad_nodes.installed()
    assert here[name] == version(name).partition("+")[0]
    bad_nodes.check_installed({**here, "host": "n7", "node": "5f"})
    with pytest.raises(RunError) as error:
        bad_nodes.check_installed({**here, "host": "n7", "node": "5f", name: "9.9"})
    assert str(error.value) == (
        f"node n7 has {name} 9.9, this process has {here[name]}: install the same version on all"
        " machines"
    )


@pytest.mark.parametrize("there", [("2.0.0", platform.python_version()), (ray.__version__, "3.8")])
def test_a_cluster_with_another_ray_or_python_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, str]
) -> None:
    """In the words of Ray, which finds it out."""

    def init(**_: Any) -> None:
        cluster = {"ray_version": there[0], "python_version": there[1]}
        check_version_info(cluster, "node 10.0.0.1")

    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", init)
    monkeypatch.setattr(joining, "try_address", lambda address: None)
    with pytest.raises(RunError) as error:
        joining.connect(Compute(address="10.0.0.1:6379"))
    assert str(error.value) == (
        f"compute.address: the Ray cluster at 10.0.0.1:6379 runs Ray {there[0]} on Python"
        f" {there[1]}, this process has Ray {ray.__version__} on Python"
        f" {platform.python_version()}: use the same versions on all machines"
    )


def test_a_node_that_joins_is_used(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placing, "_GROW_SECONDS", 0.5)
    hosts: set[str] = set()
    joined: list[Any] = []
    until = time.monotonic() + 90

    def done(node: str) -> list[Task]:
        hosts.add(node)
        if not joined:
            joined.append(cluster.add_node(num_cpus=1))
        assert time.monotonic() < until, "the new node got no work"
        return [] if len(hosts) == 2 else [task(), task()]

    def task() -> Task:
        return Task(f"{TASKS}:host", {"seconds": 0.2}, "host", done=done)

    with Pool(Compute(address=cluster.address)) as pool:
        assert pool.size == 1
        pool.run([task()])
        assert pool.size == 2
    assert joined[0].node_id in hosts
    assert "nodes have joined: 1 more worker(s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "The actor died unexpectedly before finishing this task. class_name: Worker actor_id:"
            " 5f ip: 10.0.0.2 The actor is dead because its node has died. Node Id: 7a the actor's"
            " node was terminated unexpectedly (its memory ran full: check dmesg). The actor never"
            " ran - it was cancelled before it started running.",
            "The actor is dead because its node has died",
        ),
        ("something that Ray says in other words", "something that Ray says in other words"),
        ("many words " * 100, "many words " * 27 + "…"),
    ],
)
def test_the_cause_of_a_death_is_a_sentence(text: str, told: str) -> None:
    assert bad_nodes.why_dead(text) == told


# What Ray 2.60 says of a node that is gone, and of a worker that was killed while it started.
_ADVICE = (
    " Some common causes include: (1) the process was killed by the OOM killer due to high memory"
    " usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV"
    " or another unexpected error. If the process was killed by the kernel OOM killer (verifiable"
    " by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation via"
    " --enable-resource-isolation to prevent node deaths by resource contention and significant"
    " loss of progress by uninformed kernel OOM killing."
)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (
            f"The actor died because its node has died. Node Id: {'7a' * 28}\n\tthe actor's node"
            f" was terminated unexpectedly: health check failed.{_ADVICE}",
            "The actor died because its node has died",
        ),
        (
            "Worker unexpectedly exits with a connection error code 2. End of file." + _ADVICE,
            "Worker unexpectedly exits with a connection error code 2. End of file; see to",
        ),
    ],
)
def test_workers_that_die_while_they_start_are_told_of_by_the_cause(
    monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    context = ActorDiedErrorContext(
        error_message=says,
        class_name="Worker",
        actor_id=b"\5" * 16,
        node_ip_address="10.0.0.2",
        never_started=True,
    )
    monkeypatch.setattr(placing.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(placing.ray, "get", raising(ActorDiedError(context)))
    monkeypatch.setattr(placing.ray, "kill", lambda actor: None)
    made = iter(range(99))

    def start(roster: placing.Roster) -> placing.Slot:
        return placing.Slot(None, next(made), 0.0)

    monkeypatch.setattr(placing.Roster, "_start", start)
    roster = placing.Roster(Compute())
    roster.ask()
    with pytest.raises(RunError) as error:
        for _ in range(9):
            roster.arrived(roster.starting())
    text = str(error.value)
    assert text.startswith(f"workers failed to start 5 times in turn, the last time: {told}")
    assert text.endswith("; see to the nodes and run the same command again, finished work is kept")
    assert "it was ca" not in text and len(text) < 500 and "class_name" not in text


def test_workers_of_a_node_get_neighbouring_numbers_the_fullest_node_first() -> None:
    roster = placing.Roster(Compute())
    for worker, node in enumerate(["b", "a", "", "c", "a", "b", "a"]):
        roster.slots.append(placing.Slot(worker, None, 0.0, node))
    roster.wait()
    assert [slot.node for slot in roster.slots] == ["a", "a", "a", "b", "b", "c", ""]
    assert [slot.actor for slot in roster.slots] == [1, 4, 6, 0, 5, 3, 2]  # as they were, else


def raising(error: Exception) -> Callable[..., Any]:
    def raised(*_: Any, **__: Any) -> Any:
        raise error

    return raised


_FRAMES = (
    "The actor died because of an error raised in its creation task, ray::Worker.__init__() (pid=1,"
    " ip=10.0.0.2, actor_id=5f, repr=<Worker object>)\n      ^^^^^^\n"
    '  File "/x/worker.py", line 77, in __init__\n    self.state = WorkerState(*given)\n'
    "      ^^^^^^^^^^^\n"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_FRAMES + "RuntimeError: no CUDA\n  device 3 is busy", "RuntimeError: no CUDA device 3"),
        (_FRAMES + f"ValueError: {'many words ' * 100}", "ValueError: many words many"),
        (
            "Failed to set up runtime environment.\n[Node 10.0.0.2] Traceback (most recent call"
            ' last):\n  File "/x/y.py", line 1, in get\n    raise A\nA: first\n\nDuring handling of'
            ' the above exception:\n\nTraceback:\n  File "/x/y.py", line 2, in get\n    raise B\n'
            "OSError: [Errno 28] No space left on device",
            "OSError: [Errno 28] No space left on device",
        ),
        ("Failed to set up runtime environment.\nIt is bad.", "Failed to set up runtime environ"),
        (
            "The actor died because of an error raised in its creation task, ray::Worker.__init__()"
            " (pid=1)\n     ^^^^\nRuntimeError: The actor with name Worker failed to import on the"
            " worker:\n\nTraceback (most recent call last):\n    pickle.loads(x)\n     ^^^^\n"
            "ModuleNotFoundError: No module named 'moesaic.orchestrator'",
            "ModuleNotFoundError: No module named 'moesaic.orchestrator'",
        ),
    ],
)
def test_a_worker_that_cannot_be_made_is_told_of_by_what_was_raised(text: str, told: str) -> None:
    found = bad_nodes.why_failed(text)
    assert found.startswith(told) and "\n" not in found and len(found) <= 302


def test_a_wrong_token_is_told_as_such() -> None:
    """A cluster with a token of its own, and a driver that has another one."""
    with tempfile.TemporaryDirectory(prefix="tk", dir="/tmp", ignore_cleanup_errors=True) as name:
        own = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 64,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": name,
            "RAY_NUM_REDIS_GET_RETRIES": "2",  # which would be twenty, a second each
        }
        head = subprocess.Popen(
            [sys.executable, "-c", _START],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert head.stdout is not None
            address = head.stdout.readline().strip()
            found = {
                token: subprocess.run(
                    [sys.executable, "-c", _JOIN, address],
                    env={**own, "RAY_AUTH_TOKEN": token},
                    capture_output=True,
                    text=True,
                    timeout=90,
                ).stdout
                for token in ("b" * 64, "a" * 64)
            }
        finally:
            head.communicate(timeout=60)  # the end of its input is its end
    assert found["a" * 64] == "joined\n"
    refused = found["b" * 64]
    assert refused.startswith(f"compute.address: the Ray cluster at {address} refuses the token")
    assert "RAY_AUTH_TOKEN" in refused and refused.count("\n") == 1


_START = """
import sys
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(made.address, flush=True)
sys.stdin.read()
made.shutdown()
"""
_JOIN = """
import sys
from moesaic.orchestrator.cluster import connect
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.recipe_sections import Compute
try:
    connect(Compute(address=sys.argv[1]))
    print("joined")
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize("hours", [-5, 5])
def test_garbage_is_told_by_the_clock_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """This node's clock is hours before or behind that of whoever keeps the files."""
    found = Store(tmp_path / "store")
    found.put_json("scores", "ab" * 20, {"new": 1})
    old = found.put_json("scores", "cd" * 20, {"old": 1}).path
    for path in old.parent.iterdir():
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    real = time.time
    monkeypatch.setattr(store.time, "time", lambda: real() + 3600 * hours)
    assert found.gc([])[0] == 2
    assert found.get_json("scores", "ab" * 20) == {"new": 1} and not old.exists()
