"""Nodes that no worker may work on, in a run that others go on with."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayError, RayTaskError, RuntimeEnvSetupError

from moesaic.orchestrator import bad_nodes, placing, store
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.placing import Roster, Slot
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute

TASKS = "tests.orchestrator.pool_tasks"
Told = dict[str, Any]


class Nodes:
    """A Ray of names: an actor is its number, and is where a test says.

    Attributes:
        cpus: of each node, by its id.
        at: actor → node.
        killed: actors.
        avoided: what was barred when each actor was asked for.
        answers: actor → what its first answer is, or raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **cpus: float) -> None:
        self.cpus = cpus
        self.at: dict[int, str] = {}
        self.killed: set[int] = set()
        self.avoided: list[set[str]] = []
        self.answers: dict[int, Told | Exception] = {}
        monkeypatch.setattr(placing.ray, "nodes", self.nodes)
        monkeypatch.setattr(placing.ray, "get", self.get)
        monkeypatch.setattr(placing.ray, "kill", self.killed.add)
        monkeypatch.setattr(placing, "node_of", lambda actor: self.at.get(actor, ""))
        monkeypatch.setattr(Roster, "_start", lambda roster: self.start(roster))

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "NodeManagerHostname": f"host-{name}",
                "Alive": True,
                "Resources": {"CPU": cpus},
            }
            for name, cpus in self.cpus.items()
        ]

    def start(self, roster: Roster) -> Slot:
        actor = len(self.avoided)
        self.avoided.append(set(roster.barred))
        return Slot(actor, f"answer {actor}", time.monotonic())

    def get(self, handle: str, timeout: float) -> Told:
        told = self.answers[int(handle.removeprefix("answer "))]
        if isinstance(told, Exception):
            raise told
        return told

    def answer(self, roster: Roster, slot: int, node: str, told: Told | Exception) -> None:
        """The worker in a slot is on a node, and answers."""
        actor = roster.slots[slot].actor
        self.at[actor], self.answers[actor] = node, told
        roster.arrived([roster.slots[slot].starting])


def good(node: str) -> Told:
    return {**bad_nodes.installed(), "node": node, "host": f"host-{node}", "fetches": False}


def other_torch(node: str) -> Told:
    return {**good(node), "torch": "9.9"}


def other_model(node: str) -> RunError:
    return RunError(f"/m/config.json: is another file on node host-{node}")


def not_made(node: str) -> RayError:
    raised = 'Traceback:\n  File "/x/worker.py", line 7, in __init__\nRuntimeError: no CUDA'
    task = RayTaskError("Worker.__init__", raised, RuntimeError("no CUDA"), "Worker", 1, "10.0.0.2")
    error: RayError = ActorDiedError(task)
    return error


def killed() -> RayError:
    says = "The actor died because it was killed. So."
    context = ActorDiedErrorContext(error_message=says, actor_id=b"\5" * 16)
    error: RayError = ActorDiedError(context)
    return error


def no_package(node: str) -> RayError:
    return RuntimeEnvSetupError("ModuleNotFoundError: No module named 'moesaic'")


CAUSES = [
    (other_torch, "node host-b has torch 9.9, this process has ", True),
    (other_model, "/m/config.json: is another file on node host-b", True),
    (not_made, "a worker failed to start: RuntimeError: no CUDA", False),
    (no_package, "a worker failed to start: moesaic is not installed on every node of the ", False),
]
causes = pytest.mark.parametrize(("bad", "reason", "all_there"), CAUSES)
Bad = Callable[[str], Told | Exception]


@causes
def test_a_bad_node_ends_a_run_that_has_no_worker_yet(
    monkeypatch: pytest.MonkeyPatch, bad: Bad, reason: str, all_there: bool
) -> None:
    nodes = Nodes(monkeypatch, a=1.0, b=1.0)
    roster = Roster(Compute())
    roster.ask()
    with pytest.raises(RunError) as error:
        nodes.answer(roster, 1, "b", bad("b"))
    assert str(error.value).startswith(reason) and not roster.barred


@causes
def test_a_bad_node_is_barred_once_there_is_a_worker(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: Bad,
    reason: str,
    all_there: bool,
) -> None:
    """Slot 0 is on the good node, 1 and 2 on the bad one, where 1 has worked already."""
    nodes = Nodes(monkeypatch, a=1.0, b=2.0)
    roster = Roster(Compute())
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    nodes.answer(roster, 1, "b", good("b"))
    nodes.answer(roster, 2, "b", bad("b"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"compute: node host-b gets no more workers: {reason}")
    assert set(roster.barred) == {"b"} and roster.alive() == {0, 1} and not roster.starting()
    assert nodes.killed == ({1, 2} if all_there else {2})
    assert roster.died_with_its_node(1) is all_there and not roster.died_with_its_node(0)
    roster.replace(1)  # as the loop does when it finds the worker dead
    roster.tend(work_waits=True)
    assert roster.alive() == {0} and len(roster.slots) == 1 and len(nodes.avoided) == 3
    # Workers of the good node start anew there, and the bad one is none to wait for.
    roster.replace(0)
    assert nodes.avoided[3] == {"b"} and len(roster.starting()) == 1
    nodes.answer(roster, 0, "a", good("a"))
    assert roster.alive() == {0} and capsys.readouterr().err == ""


def test_a_worker_that_a_bad_node_had_goes_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = Nodes(monkeypatch, a=2.0)
    roster = Roster(Compute(workers=2))
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    nodes.cpus["b"] = 1.0
    nodes.answer(roster, 1, "b", other_torch("b"))
    assert nodes.killed == {1} and nodes.avoided[2] == {"b"}
    nodes.answer(roster, 1, "a", good("a"))
    assert roster.alive() == {0, 1}
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("workers", [None, 3])
def test_nodes_that_join_later_bring_workers_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int | None
) -> None:
    """Slot 1 is closed: what the loop knows by the number 2 keeps it."""
    monkeypatch.setattr(placing, "_GROW_SECONDS", 0.0)
    nodes = Nodes(monkeypatch, a=1.0, b=1.0, c=1.0)
    roster = Roster(Compute(workers=workers, address="10.0.0.1:6379"))
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    nodes.answer(roster, 2, "c", good("c"))
    nodes.answer(roster, 1, "b", not_made("b"))
    roster.tend(work_waits=True)
    assert roster.alive() == {0, 2} and not roster.starting()
    nodes.cpus["d"] = 1.0
    roster.tend(work_waits=True)
    assert roster.slots[1].starting == "answer 3" and nodes.avoided[3] == {"b"}
    assert "nodes have joined: 1 more worker(s)" in capsys.readouterr().err
    nodes.cpus["e"] = 1.0
    roster.tend(work_waits=True)
    assert len(roster.slots) == (3 if workers else 4)


def test_workers_that_were_asked_for_before_keep_off_a_bad_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray has no node yet for slot 2, and would now find room on the bad one."""
    nodes = Nodes(monkeypatch, a=1.0)
    roster = Roster(Compute(workers=4, address="10.0.0.1:6379"))
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    nodes.cpus |= {"b": 1.0, "c": 1.0}
    nodes.at[3] = "c"
    late = roster.slots[2].starting
    nodes.answer(roster, 1, "b", not_made("b"))
    assert nodes.killed == {1, 2} and nodes.avoided[4:] == [{"b"}]
    roster.arrived([late])  # of which Ray told in the same breath
    assert len(roster.starting()) == 2 and roster.slots[1].closed
    nodes.answer(roster, 3, "c", good("c"))
    assert roster.alive() == {0, 3}


def test_deaths_at_the_start_bar_a_node_after_some(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = Nodes(monkeypatch, a=1.0, b=1.0)
    roster = Roster(Compute())
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    for _ in range(5):
        assert not roster.barred
        nodes.answer(roster, 1, "b", killed())
    assert capsys.readouterr().err == (
        "compute: node host-b gets no more workers: workers failed to start 5 times in turn, the"
        " last time: The actor died because it was killed\n"
    )
    assert roster.alive() == {0} and not roster.starting()


def test_a_run_ends_where_its_last_worker_was_on_a_bad_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = Nodes(monkeypatch, a=2.0)
    roster = Roster(Compute())
    roster.ask()
    for slot in (0, 1):
        nodes.answer(roster, slot, "a", good("a"))
    roster.replace(1)
    nodes.answer(roster, 1, "a", other_torch("a"))
    assert roster.alive() == {0} and nodes.killed == {0, 1, 2}
    with pytest.raises(RunError, match="^node host-a has torch 9.9, this process has"):
        roster.replace(0)  # the loop has found it dead


def test_a_bad_node_whose_name_is_not_known_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind ``ray://`` nobody tells where an actor was that could not be made."""
    nodes = Nodes(monkeypatch, a=1.0, b=1.0)
    roster = Roster(Compute())
    roster.ask()
    nodes.answer(roster, 0, "a", good("a"))
    with pytest.raises(RunError, match="^a worker failed to start: RuntimeError: no CUDA$"):
        nodes.answer(roster, 1, "", not_made(""))


def test_a_run_goes_on_without_bad_nodes_that_join(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One has other sources, one only half of them; the third to join is as it should be."""
    monkeypatch.setattr(placing, "_GROW_SECONDS", 0.5)
    other, half = tmp_path / "other", tmp_path / "half"
    package = other / "moesaic"
    root = Path(store.__file__).parents[1]
    for name in ("kernels", "methods", "search", "orchestrator"):
        ignored = shutil.ignore_patterns("__pycache__", "data", "*.safetensors")
        shutil.copytree(root / name, package / name, ignore=ignored)
    shutil.copy(root / "orchestrator" / "package" / "__init__.py", package)
    with (package / "orchestrator" / "errors.py").open("a") as stream:
        stream.write("\n# changed\n")
    (half / "moesaic").mkdir(parents=True)
    (half / "moesaic" / "__init__.py").touch()
    hosts: set[str] = set()
    joined: list[Any] = []
    until = time.monotonic() + 300
    with Pool(Compute(address=cluster.address)) as pool:

        def node(path: Path | None) -> Any:
            own = {"PYTHONPATH": f"{path}:{root}"} if path else None
            return cluster.add_node(num_cpus=1, env_vars=own)

        def replace_dead() -> None:
            """A raylet may die on a busy machine before anybody barred its node."""
            alive = {told["NodeID"] for told in ray.nodes() if told["Alive"]}
            for place, path in enumerate((other, half)):
                if joined[place].node_id not in alive | pool.roster.barred.keys():
                    joined[place] = node(path)

        def done(host: str) -> list[Task]:
            hosts.add(host)
            assert time.monotonic() < until, "no node was barred, or the good one got no work"
            if not joined:
                joined.extend((node(other), node(half)))
            replace_dead()
            if len(joined) == 2 and len(pool.roster.barred) == 2:
                joined.append(node(None))
            return [] if len(hosts) == 2 else [task(), task()]

        def task() -> Task:
            return Task(f"{TASKS}:host", {"seconds": 0.2}, "host", done=done)

        assert pool.size == 1
        pool.run([task()])
        assert set(pool.roster.barred) == {joined[0].node_id, joined[1].node_id}
    assert joined[2].node_id in hosts
    told = [line for line in capfd.readouterr().err.splitlines() if "gets no more" in line]
    assert len(told) == 2
    assert any("has other sources of moesaic" in line for line in told)
    assert any(
        "a worker failed to start: ModuleNotFoundError: No module named" in line for line in told
    )
