"""A whole run as a user starts it: real processes, real Ray, killed on the way."""

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.drivers import (
    MOESAIC,
    TIMEOUT,
    children,
    doomed,
    finish,
    forked,
    gone,
    logs,
    start,
    wait_for_workers,
    wait_until,
)
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder, make_recipe

pytestmark = pytest.mark.timeout(900)


def contents(output: Path) -> dict[str, str]:
    """Digest of every file of plan and checkpoint."""
    files = [output / "plan.json", *sorted((output / "model").iterdir())]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_for_entries(store: Path, count: int, process: BaseProcess) -> None:
    """Until workers have put ``count`` more entries into the store; they take a moment each."""
    before = len(entries(store))
    wait_until(lambda: len(entries(store)) >= before + count, process)


def entries(store: Path) -> list[Path]:
    return list(store.rglob("*.seal.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe")


def changes() -> dict[str, Any]:
    """Of a recipe: many candidates, so that there is work left when a kill comes late on a busy
    machine."""
    candidates = [
        {"method": "rtn", "bits": [3, 8], "group_size": 16},
        {"method": "gptq", "bits": [2, 3, 4, 5, 6], "group_size": 16},
    ]
    four = {"method": "rtn", "bits": 4, "group_size": 16}
    return {
        "compute": {"workers": 2},
        "candidates": candidates,
        "baselines": {"rtn 4": four, "merged": [{"method": "hc_smoe", "keep": 0.5}, four]},
        "router_calibration": {"batch": 2},
    }


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves that nobody disturbs, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        whole = Project(tmp_path_factory.mktemp("undisturbed"), model, patch)
        whole.write(**changes())
        whole.run(size=2, stages=("evaluate", "assemble", "report"))
        return whole.output


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie below it, and a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def free_ports(count: int) -> list[int]:
    """Ports below those that Ray gives to workers (from 10002 on) and the system to clients."""
    free = []
    for port in range(6390, 10000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise AssertionError("no free ports")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def submit(recipe: Path, output: Path, short_folder: Path) -> None:
    """Runs the recipe as a job that is submitted to a local head."""
    folder = output.parent
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(short_folder),
    }
    # Where another Ray of this machine has the agent's usual port, this one's would take no jobs.
    port, dashboard, agent, grpc, client = free_ports(5)
    head = [ray, "start", "--head", "--port", str(port), "--num-cpus", "2", "--block"]
    head += ["--dashboard-port", str(dashboard), "--disable-usage-stats"]
    head += ["--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(grpc)]
    head += ["--ray-client-server-port", str(client)]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(head, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + TIMEOUT
        # An attempt to submit takes seconds, so it is not made before somebody listens.
        while not answers(f"{address}/api/version"):
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        command = [ray, "job", "submit", "--address", address, "--"]
        command += [*MOESAIC, "run", str(recipe), "--output", str(output), "--json"]
        while True:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
            assert process.poll() is None, (folder / "head.log").read_text()
            # The head listens before it can take jobs.
            early = "No available agent" in done.stdout + done.stderr
            if not early or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def check_contract(output: Path) -> None:
    """The files that every run leaves, and what they say."""
    names = {path.name for path in output.iterdir()}
    wanted = {"recipe.yaml", "measurements.parquet", "plan.json", "scores.json", "report.html"}
    assert wanted | {"model"} <= names
    assert not any(name.startswith(".") for name in names)
    plan = json.loads((output / "plan.json").read_text())
    weights = sum(file.stat().st_size for file in (output / "model").glob("*.safetensors"))
    assert plan["bytes"] == weights <= plan["budget_bytes"]
    scores = json.loads((output / "scores.json").read_text())
    assert {"dense", "plan", "rtn 4", "merged"} == set(scores)
    assert "before_router_calibration" in scores["merged"]
    assert scores["plan"]["bytes"] == weights
    assert {"bytes", "bits_per_weight", "perplexity", "kl"} <= scores["dense"].keys()


def check_same(output: Path, undisturbed: Path) -> None:
    """The same plan and checkpoint, byte for byte, and the same record in MLflow."""
    theirs, ours = contents(undisturbed), contents(output)
    # The card holds the recipe, and the recipe the folder that the test happens to lie in.
    assert theirs.pop("README.md") and ours.pop("README.md")
    assert theirs == ours
    kept = record(output.parent / "mlflow.db")
    assert (kept["status"], kept["failure"]) == ({"FINISHED"}, None)
    assert kept == record(undisturbed.parent / "mlflow.db")


def record(database: Path) -> dict[str, object]:
    """All that MLflow knows of the only run, but for times, places and values of metrics."""
    client = MlflowClient(f"sqlite:///{database}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    models = client.search_logged_models([experiment.experiment_id])
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1
    return {
        "status": {run.info.status for run in runs},
        "failure": parent.data.tags.get("failure"),
        "params": parent.data.params.keys(),
        "metrics": parent.data.metrics.keys(),
        "files": {file.path for file in client.list_artifacts(parent.info.run_id)},
        "pieces": {name: run.data.params for name, run in children.items()},
        "scores": {name: run.data.metrics.keys() for name, run in children.items()},
        "model": [[metric.key for metric in model.metrics] for model in models],
    }


def test_run_killed_in_every_phase_ends_byte_identical(
    undisturbed: Path, model: Path, tmp_path: Path, short_folder: Path
) -> None:
    """One run, killed in turn and started again; nothing finished is done twice.

    The undisturbed one had no Ray. This one starts a Ray of its own, and another, and is ended as a
    job on a cluster.
    """
    recipe = make_recipe(tmp_path / "recipe", model, **changes())
    output, store = tmp_path / "run", recipe.parent / "store"

    def kill_driver_at(output: Path, file: Path) -> None:
        with doomed(recipe, output) as process:
            wait_until(file.exists, process)

    kill_driver_at(output, tmp_path / "mlflow.db")

    # Workers go on for a while without their raylet.
    with doomed(recipe, output) as process:
        workers = wait_for_workers(process)
        (raylet,) = children(process, "raylet/raylet ")
        wait_for_entries(store, 6, process)
        raylet.kill()
        wait_for_entries(store, 6, process)
    assert gone(workers)  # until then they may still end what they were at
    finished = {
        seal: seal.stat().st_mtime_ns
        for kind in ("stats", "gradients", "reductions", "pieces", "errors")
        for seal in entries(store / kind)
    }
    assert len(finished) > 8
    assert not (output / "plan.json").exists()

    # SIGTERM, as schedulers send it, ends in order, also in the middle of training routers; and by
    # then a worker has been replaced.
    with forked(recipe, output) as process:
        workers = wait_for_workers(process)
        workers[0].kill()
        wait_until(lambda: list(store.glob("scratch/*/routers-0002.safetensors")), process)
        below = children(process)
        process.terminate()
        process.join(TIMEOUT)
    stdout, stderr = (log.read_text() for log in logs(output))
    assert process.exitcode == 1, stderr
    assert stdout.count("\n") == 1  # the JSON; Ray was there and printed nothing
    for said in (stdout, stderr):
        assert said.count("stopped; run the same command to go on from here") == 1
        assert "Traceback" not in said
        assert "SIGTERM" not in said  # Ray would print the stack of its C++
    assert gone(below)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("SELECT status FROM runs").fetchall() == [("KILLED",)]
    assert (output / "plan.json").exists() and not (output / "scores.json").exists()

    submit(recipe, output, short_folder)
    # When Ray died under them, both workers may have been given one task: of two that write an
    # entry at once, one may be killed between file and seal, and then the entry is made anew.
    again = [seal for seal, when in finished.items() if seal.stat().st_mtime_ns != when]
    assert len(again) <= 2, again
    check_contract(output)
    check_same(output, undisturbed)

    # Killed while the checkpoint is written. In another folder, to which all scores are known:
    # that takes no Ray. (Deaths right after a stage, before the next has begun: test_resume.py.)
    other = tmp_path / "other" / "run"
    other.parent.mkdir()
    kill_driver_at(other, other / ".model.partial")
    assert (other / "scores.json").exists() and not (other / "model").exists()
    result = finish(start(recipe, other))
    assert result["scores"] == json.loads((other / "scores.json").read_text())
    check_contract(other)
    check_same(other, undisturbed)
