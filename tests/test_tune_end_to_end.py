"""A study as a user starts it, on a cluster of two nodes: driver, worker and node are killed."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.cluster_utils import Cluster

from tests.drivers import TIMEOUT, doomed, forked, gone, logs, wait_until
from tests.local_cluster import local_cluster
from tests.orchestrator.projects import make_model_folder, make_recipe

pytestmark = pytest.mark.timeout(600)
TRIALS = 24
TUNE = ("tune", "--trials", str(TRIALS))


def trials(output: Path) -> list[FrozenTrial]:
    """All that the journal has, whoever is at work on it."""
    journal = output / "journal.log"
    if not journal.exists() or not journal.stat().st_size:
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    try:
        return load_study(study_name="small", storage=storage).get_trials(deepcopy=False)
    except KeyError:  # it has been made, and the study in it has not
        return []


def told(output: Path) -> list[FrozenTrial]:
    """Those that count: finished, and not because a driver died."""
    return [
        trial
        for trial in trials(output)
        if trial.state.is_finished() and trial.user_attrs.get("reason") != "interrupted"
    ]


def running(output: Path) -> list[FrozenTrial]:
    return [trial for trial in trials(output) if trial.state == TrialState.RUNNING]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes of one core."""
    with local_cluster() as made:
        made.add_node(num_cpus=1)
        yield made


def workers() -> list[psutil.Process]:
    """Those of all nodes."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.name().startswith("ray::Worker")
    ]


def test_a_study_of_which_driver_worker_and_node_are_killed_has_every_trial_once(
    tmp_path: Path, cluster: Cluster
) -> None:
    model = make_model_folder(tmp_path / "model", "qwen3_moe")
    # Text enough that a trial takes a moment, and one is always under way.
    recipe = make_recipe(
        tmp_path / "recipe",
        model,
        compute={"workers": 2, "address": cluster.address},
        calibration={"sequences": 96, "length": 48, "gradient_sequences": 0},
        evaluation={"sequences": 2},
        baselines={},
        tune={"sequences": 96, "prune": False},
    )
    output = tmp_path / "run"

    with doomed(recipe, output, TUNE) as process:
        wait_until(lambda: len(told(output)) >= 4 and running(output), process)
        first = workers()
        assert len(first) == 2
    assert gone(first)
    before, zombies = told(output), running(output)
    assert 4 <= len(before) < TRIALS - 10 and zombies

    with forked(recipe, output, TUNE) as process:
        wait_until(lambda: len(told(output)) >= len(before) + 2, process)
        victim = workers()[:1]
        victim[0].kill()
        assert gone(victim)
        wait_until(lambda: len(workers()) == 2, process)
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        lost = len(told(output))
        process.join(TIMEOUT)
        stdout, stderr = (log.read_text() for log in logs(output))
        assert process.exitcode == 0, stderr
    assert lost < TRIALS - 2  # there was work left when the node died
    result = json.loads(stdout)

    # Nothing that was told is told again, and nothing runs for ever.
    after = told(output)
    assert len(after) == TRIALS and not running(output)
    assert all(trial.state == TrialState.COMPLETE for trial in after)
    assert [t.number for t in after][: len(before)] == [t.number for t in before]
    # Starts may have the same values: of the greedy one it is the strategy that differs.
    assert len({(t.user_attrs.get("start"), *sorted(t.params.items())) for t in after}) == TRIALS

    # What was under way is told a failure, and came again with its values.
    everything = {trial.number: trial for trial in trials(output)}
    again = {t.user_attrs["again"]: t for t in after if "again" in t.user_attrs}
    assert again.keys() == {zombie.number for zombie in zombies}
    for zombie in zombies:
        assert everything[zombie.number].state == TrialState.FAIL
        assert zombie.params.items() <= again[zombie.number].params.items()
    assert {t.user_attrs["start"] for t in after if "start" in t.user_attrs} == {
        "as predicted",
        "even",
        "greedy",
    }

    study = json.loads((output / "study.json").read_text())
    assert result["study"] == study and study["trials"]["all"] == TRIALS
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    names = sorted(r.info.run_name for r in children if r.info.run_name.startswith("trial "))
    assert names == sorted(f"trial {trial.number}" for trial in after)
    assert {run.info.status for run in runs} == {"FINISHED"}
