"""Whole runs as a user starts them: real processes, real Ray, killed on the way."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.projects import make_model_folder, make_recipe

MOESAIC = [sys.executable, "-m", "moesaic.orchestrator.cli"]
TIMEOUT = 280


def start(recipe: Path, output: Path) -> subprocess.Popen[str]:
    command = [*MOESAIC, "run", str(recipe), "--output", str(output), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=output.parent
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, stderr
    assert stdout.count("\n") == 1, stdout
    result: dict[str, object] = json.loads(stdout)
    return result


def contents(output: Path) -> dict[str, str]:
    """Digest of every file of plan and checkpoint."""
    files = [output / "plan.json", *sorted((output / "model").iterdir())]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_for(folder: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    """Until the store holds ``count`` files of a kind, so that the kill comes in mid-work."""
    deadline = time.monotonic() + TIMEOUT
    while len(list(folder.rglob(pattern))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_workers(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not children(process, "ray::Worker"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe")


def project(folder: Path, model: Path) -> Path:
    # One source of text keeps the model card free of the folder's name; two workers, one thread.
    return make_recipe(folder / "recipe", model, compute={"workers": 2})


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = finish(start(project(folder, model), folder / "run"))
    scores = result["scores"]
    assert isinstance(scores, dict)
    assert {"dense", "plan", "rtn 4"} == set(scores)
    return folder / "run"


def test_run_leaves_the_files_of_the_contract(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    wanted = {"recipe.yaml", "measurements.parquet", "plan.json", "scores.json", "report.html"}
    assert wanted | {"model"} <= names
    plan = json.loads((undisturbed / "plan.json").read_text())
    weights = sum(file.stat().st_size for file in (undisturbed / "model").glob("*.safetensors"))
    assert plan["bytes"] == weights <= plan["budget_bytes"]
    scores = json.loads((undisturbed / "scores.json").read_text())
    assert scores["plan"]["bytes"] == weights
    assert {"bytes", "bits_per_weight", "perplexity", "kl"} <= scores["dense"].keys()
    assert (undisturbed.parent / "mlflow.db").exists()


def kill(victim: str, process: subprocess.Popen[str]) -> None:
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
    else:
        name = {"worker": "ray::Worker", "raylet": "raylet/raylet "}[victim]
        found = children(process, name)
        assert found, f"no {victim} to kill"
        found[0].send_signal(signal.SIGKILL)


def test_runs_killed_again_and_again_end_byte_identical(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    recipe = project(tmp_path, model)
    store = recipe.parent / "store"
    for victims in (("worker", "driver"), ("raylet",)):
        process = start(recipe, tmp_path / "run")
        wait_for_workers(process)  # and so until those of a killed driver are gone
        for victim in victims:
            before = len(list(store.rglob("*.seal.json")))
            wait_for(store, "*.seal.json", before + 3, process)
            kill(victim, process)
        stderr = process.communicate(timeout=TIMEOUT)[1]
        assert "Traceback" not in stderr
        time.sleep(5)  # workers that lost their raylet may still end what they were at
    finished = {
        seal: seal.stat().st_mtime_ns
        for kind in ("stats", "gradients", "pieces", "errors")
        for seal in (store / kind).rglob("*.seal.json")
    }
    assert len(finished) > 8
    finish(start(recipe, tmp_path / "run"))
    assert all(seal.stat().st_mtime_ns == when for seal, when in finished.items())
    theirs, ours = contents(undisturbed), contents(tmp_path / "run")
    # The card holds the recipe, and the recipe the folder that the test happens to lie in.
    assert theirs.pop("README.md") and ours.pop("README.md")
    assert theirs == ours


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie below it, and a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def test_job_submitted_to_a_local_head_runs_the_recipe(
    model: Path, tmp_path: Path, short_folder: Path
) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(short_folder),
    }
    port, dashboard = 6390, 8275  # Ray gives workers ports from 10002 on
    head = [ray, "start", "--head", "--port", str(port), "--num-cpus", "2", "--block"]
    head += ["--dashboard-port", str(dashboard), "--disable-usage-stats"]
    recipe = project(tmp_path, model)
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(head, env=environment, stdout=log, stderr=log)
    try:
        command = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--"]
        command += [*MOESAIC, "run", str(recipe), "--output", str(tmp_path / "run"), "--json"]
        deadline = time.monotonic() + TIMEOUT
        while True:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            # The head listens before it can take jobs.
            answer = done.stdout + done.stderr
            early = "Failed to connect" in answer or "No available agent" in answer
            if not early or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "run" / "model" / "config.json").exists()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()
