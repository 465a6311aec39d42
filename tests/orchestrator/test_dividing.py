"""Jobs that are divided leave the entries of the job as it was, byte for byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import dividing
from moesaic.orchestrator.console import View
from moesaic.orchestrator.dividing import dividable, divided
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.measure import Job, compress_job
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.shares import parts_now
from moesaic.orchestrator.stages import Calibration, measuring_jobs, missing_pairs
from moesaic.orchestrator.worker import WorkerState, plain
from tests.orchestrator.inline import InlinePool, stored
from tests.orchestrator.projects import make_model_folder, make_recipe

# Quantizers, ranks that are cuts of one another, and corrections of what a quantizer left.
CANDIDATES: list[Any] = [
    {"method": "rtn", "bits": [3, 8], "group_size": 16},
    {"method": "svd_llm", "rank": [4, 8]},
    [{"method": "gptq", "bits": 4, "group_size": 16}, {"method": "eora", "rank": [2, 4]}],
    {"method": "gptq", "bits": 4, "group_size": 16},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe"), num_hidden_layers=1)


def bank_job(folder: Path, model: Path) -> tuple[Experiment, Job]:
    """The job of a bank whose statistics are there."""
    recipe = make_recipe(folder, model, candidates=CANDIDATES)
    experiment = Experiment(load_recipe(recipe), folder / "out")
    pool: Any = InlinePool()
    Calibration(experiment, pool, View(), {}).run()
    missing = missing_pairs(experiment, experiment.walk, experiment.offers)
    jobs = list(measuring_jobs(experiment, experiment.walk, missing))
    return experiment, next(job for job in jobs if "experts" in job.units[0])


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    experiment, job = bank_job(tmp_path_factory.mktemp("whole"), model)
    compress_job(WorkerState(1), plain(job))
    return stored(experiment, "pieces", "errors")


@pytest.mark.parametrize("count", [2, 3, 99])
def test_parts_leave_the_bytes_of_the_whole(
    model: Path, tmp_path: Path, whole: dict[str, bytes], count: int
) -> None:
    experiment, job = bank_job(tmp_path, model)
    parts = divided(job, count)
    # Three bit widths (one of the baseline), a family of ranks, a quantizer and its corrections.
    assert len(parts) == min(count, 5)
    assert parts[0].block == job.block and {part.units for part in parts} == {job.units}
    pairs = [pair for part in parts for own in part.missing.values() for pair in own]
    assert sorted(pairs, key=str) == sorted(
        (pair for own in job.missing.values() for pair in own), key=str
    )
    for part in reversed(parts):
        compress_job(WorkerState(1), plain(part))
    assert stored(experiment, "pieces", "errors") == whole and len(whole) == 2 * 8


def test_jobs_that_share_work_are_not_divided(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, job = bank_job(tmp_path, model)
    units = [experiment.space.by_name[name] for name in job.units]

    def task_of(job: Job) -> Task:
        return Task("measure:compress_job", {"job": job}, "bank", kind="bank")

    def asked(job: Job) -> Task:
        return dividable(task_of(job), job, units, task_of, lambda: False)

    assert asked(job).divide is None  # factors of small Hessians are kept for all candidates
    monkeypatch.setattr(dividing, "_KEPT_BYTES", 0)
    task = asked(job)
    assert task.parts == 5 and task.divide is not None and task.kind == "bank, 5"
    assert [part.arguments["job"] for part in task.divide(2)] == divided(job, 2)
    assert asked(replace(job, reduction="made once")).divide is None
    linear = [unit for unit in experiment.units if unit.kind == "linear"][:1]
    assert dividable(task_of(job), job, linear, task_of, lambda: False).divide is None


def test_a_run_divides_its_banks_and_leaves_the_same(
    model: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the tasks of a calibration, as the loop takes them apart."""
    monkeypatch.setattr(dividing, "_KEPT_BYTES", 0)
    experiment, _ = bank_job(tmp_path, model)
    pool: Any = InlinePool()
    measured: list[Task] = []

    def take_apart(tasks: Any, tick: Any = None) -> None:
        measured.extend(
            part
            for task in tasks
            for part in (task.divide(task.parts) if task.divide is not None else [task])
        )
        InlinePool.run(pool, measured)

    monkeypatch.setattr(pool, "run", take_apart)
    bank = {u.name: experiment.offers[u.name] for u in experiment.units if u.kind == "bank"}
    Calibration(experiment, pool, View(), bank).run()
    assert len(measured) == 5 and stored(experiment, "pieces", "errors") == whole


def test_shares_of_what_waits_become_smaller_towards_the_end() -> None:
    def task(parts: int, more: bool = False) -> Task:
        return Task("f", {}, "f", parts=parts, divide=lambda n: [], more=lambda: more)

    small = Task("f", {}, "small")
    asked = [
        parts_now(task(8), [*[task(8)] * waiting, *[small] * 99], 1, 16)
        for waiting in (40, 16, 8, 4, 2, 0)
    ]
    assert asked == [1, 1, 2, 3, 4, 8]
    assert [parts_now(task(8, more=True), [], idle, 16) for idle in (1, 3, 12)] == [1, 3, 8]
