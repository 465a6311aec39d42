"""The head of a cluster that does not answer: before a run, and in the middle of one."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest

from moesaic.orchestrator import cluster as joining
from moesaic.orchestrator import head, reach
from moesaic.orchestrator import pool as pool_module
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.head import Watch, interruptible
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe_sections import Compute
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of somebody who takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_never_answers_is_given_up_aloud(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(head, "_SILENT_SECONDS", 0.1)
    monkeypatch.setattr(head, "_JOIN_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(RunError) as error:
        joining.connect(Compute(address=silent))
    with pytest.raises(RecipeError, match=f"no Ray cluster answers at {silent} .connected, but no"):
        reach.check_cluster(Compute(address=silent))
    assert time.monotonic() - started < 10
    text = str(error.value)
    assert text.startswith(
        f"compute.address: the Ray cluster at {silent} cannot be reached (connected, but no answer"
        " within 0.5 s): start it"
    )
    assert "\n" not in text
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"waiting for the Ray cluster at {silent} to answer"] * 2


def test_something_else_that_listens_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(RunError, match=f"the Ray cluster at {address} cannot be reached"):
            joining.connect(Compute(address=address))
        server.shutdown()


class Refusal(grpc.RpcError):
    """What gRPC raises."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = lambda: code


class Answers:
    """A head that answers or not, as it is told."""

    def __init__(self) -> None:
        self.there = True
        self.code = grpc.StatusCode.UNAVAILABLE

    def __call__(self, channel: object, seconds: float) -> "Answers":
        return self

    def result(self) -> None:
        if not self.there:
            raise Refusal(self.code)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(head, "_asked", made)
    monkeypatch.setattr(Watch, "_joined", lambda watch: True)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    monkeypatch.setattr(head, "_TELL_SECONDS", 0.2)
    return made


def test_a_head_that_comes_back_is_waited_for(
    answers: Answers, silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGURG)
    watch = Watch(silent, "there")
    time.sleep(0.3)
    answers.there = False
    time.sleep(0.4)
    answers.there = True
    time.sleep(0.8)
    watch.stop()
    assert not watch.lost and signal.getsignal(signal.SIGURG) is before
    assert capsys.readouterr().err.splitlines() == [
        "waiting for the head of Ray at there",
        "the head of Ray at there answers again",
    ]


def test_a_watch_ends_with_the_ray_that_it_is_for(silent: str) -> None:
    watch = Watch(silent, "there")
    watch._thread.join(timeout=10)
    assert not watch._thread.is_alive() and not watch.lost
    watch.stop()


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_a_head_that_is_gone_ends_whatever_the_run_waits_for(
    answers: Answers, silent: str, code: str
) -> None:
    """Also where Ray itself waits, in which no signal gets through."""
    answers.there, answers.code = False, grpc.StatusCode[code]
    never = threading.Event()
    watch = Watch(silent, "there")
    try:
        with pytest.raises(
            KeyboardInterrupt, match="^the head of Ray at there does not answer any more;"
        ):
            interruptible(lambda: never.wait(20))
    finally:
        never.set()
        watch.stop()
    assert watch.lost


@pytest.mark.parametrize("local", [False, True])
def test_a_pool_without_its_head_says_so_and_asks_it_nothing(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(pool_module, "end_local", lambda: ended.append("local"))
    monkeypatch.setattr(pool_module.Roster, "close", lambda roster: ended.append("roster"))
    monkeypatch.setattr(pool_module.ray, "shutdown", lambda: ended.append("Ray"))
    made: Any = Pool(Compute())
    made._head = SimpleNamespace(lost=True, line="gone", stop=lambda: ended.append("watch"))
    made._local = local
    with pytest.raises(RunError, match="^gone$"), made:
        raise KeyboardInterrupt
    assert ended == ["watch", *(["local"] if local else [])]


def test_what_an_interruptible_call_returns_and_raises_comes_through() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_a_call_that_ray_never_answers_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CALL_SECONDS", 0.1)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "0.05")
    with pytest.raises(RunError, match="^Ray gave no answer within 0 s; finished work is kept"):
        interruptible(lambda: threading.Event().wait(20))


_STUCK = """
import os, sys, time
from moesaic.orchestrator import head
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "1"
head.Watch._joined = lambda watch: True
watch = head.Watch("127.0.0.1:1", "there")
def stuck(*_):
    time.sleep(20)
head.signal.signal(head._SIGNAL, stuck)
stuck()
"""


def test_a_process_that_does_not_come_out_of_something_is_ended_with_the_line() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _STUCK], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("failed: the head of Ray at there does not")


# A run on a cluster whose head is killed.

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(made.address, flush=True)
sys.stdin.read()
"""


def _kill_head(process: psutil.Process) -> None:
    (gcs,) = (p for p in process.children(recursive=True) if p.name() == "gcs_server")
    gcs.kill()


@pytest.mark.timeout(120)
def test_a_run_whose_head_dies_says_so_everywhere_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "project", make_model_folder(tmp_path / "model"), monkeypatch)
    store = project.folder / "store"
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp", ignore_cleanup_errors=True) as name:
        own = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": name,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/faulty"), str(ROOT)]),
            "FAULTY_STORAGE": name,
            "FAULTY_SECONDS": "0.1",  # every write takes so long: there is time to break something
        }
        own.pop("RAY_ADDRESS", None)
        cluster = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        family = psutil.Process(cluster.pid)
        try:
            assert cluster.stdout is not None
            address = cluster.stdout.readline().strip()
            recipe = project.write(
                compute={"workers": None, "address": address}, tracking={"uri": None}
            )
            command = [sys.executable, "-m", "moesaic.orchestrator.cli", "run", str(recipe)]
            run = subprocess.Popen(
                [*command, "--output", str(project.output)],
                env=own,
                stderr=subprocess.PIPE,
                text=True,
            )
            until = time.monotonic() + 60
            while not any(store.glob("stats/*/*.safetensors")):
                assert time.monotonic() < until and run.poll() is None, run.communicate()
                time.sleep(0.05)
            _kill_head(family)
            said = run.communicate(timeout=30)[1]
        finally:
            for process in (*family.children(recursive=True), family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            cluster.communicate(timeout=30)
    line = (
        f"failed: the head of Ray at {address} does not answer any more; finished work is kept:"
        " run the same command again"
    )
    assert run.returncode == 1 and "Traceback" not in said
    assert [text for text in said.splitlines() if text.startswith("failed: ")] == [line], said
    log = (project.output / "log.txt").read_text(encoding="utf-8").splitlines()
    assert log[-1].endswith(line.removeprefix("failed: "))
    with contextlib.closing(sqlite3.connect(project.output.parent / "mlflow.db")) as connection:
        assert connection.execute("SELECT DISTINCT status FROM runs").fetchall() == [("FAILED",)]
    # And what was finished is not done again.
    project.write()
    _, calls = project.run(stages=("measure",))
    assert calls["measure:compress_job"] > 0
    whole = Project(tmp_path / "whole", project.model, monkeypatch)
    whole.write()
    assert calls.total() < whole.run(stages=("measure",))[1].total()
