"""moesaic tune: trials on resident models, what they find, what stops them, what they leave."""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml

from moesaic.methods.base import Chain, Spec
from moesaic.orchestrator import latency, measure, resident, study_terms
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.evaluate import evaluate_rows
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.mixtures import Mixtures, members_of
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.study import Study, Told
from moesaic.orchestrator.study_journal import (
    CALIBRATION,
    MADE_OF,
    MODEL_NAME,
    VERSION,
    locked,
    open_storage,
)
from moesaic.orchestrator.trial_failures import why_none
from moesaic.orchestrator.trial_plans import TrialPlans, is_plan_of, plan_key
from moesaic.orchestrator.trials import Trials
from moesaic.orchestrator.tune import StudyOptions, study_id
from moesaic.orchestrator.worker import WorkerState, plain
from moesaic.search.base import Infeasible, Plan
from moesaic.search.knobs import Allocator
from tests.orchestrator.inline import InlinePool, Killed, Project, measured_store
from tests.orchestrator.projects import make_model_folder

BITS = {"method": "rtn", "bits": [2, 4, 8], "group_size": -1}
GROUPS = {**BITS, "group_size": [-1, 16]}
GPTQ = {"method": "gptq", "bits": 4, "group_size": -1}
CHAINS: dict[str, Any] = {
    "candidates": [BITS, [{"method": "reap", "keep": [0.5, 0.75]}, {**BITS, "bits": [4, 8]}]],
    "baselines": {},
    "budget": {"bits_per_weight": 4.5},
    "evaluation": {"sequences": 2},
}
EVALUATE = "resident:evaluate_plan"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which everything is measured and no plan was judged yet."""
    return measured_store(tmp_path_factory.mktemp("measured"), model, **CHAINS)


Make = Callable[..., Project]


@pytest.fixture
def make(model: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(**changes)``: a project with experts that may be dropped."""

    def project(**changes: Any) -> Project:
        made = Project(tmp_path, model, monkeypatch)
        made.write(**{**CHAINS, **changes})
        if not (tmp_path / "store").exists():
            shutil.copytree(measured, tmp_path / "store")
        return made

    return project


@pytest.fixture(scope="module")
def known_study(model: Path, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of ``CHAINS`` with two trials."""
    folder = tmp_path_factory.mktemp("known")
    with pytest.MonkeyPatch.context() as patch:
        project = Project(folder, model, patch)
        project.write(**CHAINS)
        shutil.copytree(measured, folder / "store")
        project.tune(2)
    return project.output


def contents(folder: Path) -> dict[str, bytes]:
    """Name → content of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copied(folder: Path, output: Path) -> dict[str, bytes]:
    """Copies the folder of a run; what is in it."""
    shutil.copytree(folder, output)
    return contents(output)


def chains(units: dict[str, Any]) -> dict[str, Chain]:
    """The choices of a plan, from its JSON."""
    return {
        name: tuple(Spec.of(s["method"], s["options"]) for s in specs)
        for name, specs in units.items()
    }


def trials(project: Project) -> pd.DataFrame:
    return pd.read_parquet(project.output / "trials.parquet")


def test_a_study_leaves_all_that_a_run_does_and_its_best_plan(make: Make) -> None:
    project = make(tune={"prune": False})
    result, calls = project.tune(7, assemble=True)
    study, table = project.json("study.json"), trials(project)
    assert result["study"] == study
    assert list(table["trial"]) == list(range(7)) and set(table["state"]) == {"complete"}
    best = table.loc[table["kl"].idxmin()]
    assert study["best"]["kl"] == best["kl"]
    assert project.json("plan.json")["bytes"] == best["bytes"]
    scores = project.json("scores.json")
    assert scores["plan"]["bytes"] == best["bytes"] and scores["plan"]["kl"] > 0
    assert (project.output / "model" / "config.json").exists()
    assert calls[EVALUATE] == study["plans"] == table["plan"].nunique()
    # The first trials: what a run would take without finalists, and all weights alike.
    assert list(table["start"][:4]) == ["as predicted", "even", "greedy", "reductions × 4"]
    assert table["predicted_loss"][2] >= table["predicted_loss"][0]  # that one is exact

    # Mixtures of experts are files in the plan that was taken alone.
    mixed = [call["mixtures"] for call in project.judged]
    assert sum(map(len, mixed)) > len(mixed)
    written = {str(path) for path in (project.folder / "store" / "mosaics").rglob("*.safetensors")}
    assert written == set(mixed[best["trial"]])

    # A trial's KL is that of the same plan, streamed.
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    judge, rows = plain(experiment.calibration_judge), (0, 12)
    documents = [told[6]() for told in project.tracked]
    pieces = plan_pieces(experiment, experiment.walk, chains(documents[0]["units"]))
    kl = evaluate_rows(WorkerState(1), judge, rows, pieces)["kl"]
    assert math.fsum(kl) / (12 * 23) == pytest.approx(table["kl"][0], rel=1e-12)
    # Some reduced a bank, others did not: both ways of putting pieces into place were used.
    assert len({tuple(sorted(call["pieces"].values())) for call in project.judged}) > 2


def test_the_same_command_again_does_nothing_and_more_trials_go_on(
    make: Make, known_study: Path
) -> None:
    project = make()
    copied(known_study, project.output)
    first = trials(project)
    _, calls = project.tune(2)
    assert calls[EVALUATE] == 0
    pd.testing.assert_frame_equal(trials(project), first)
    project.tune(4, size=2)
    again = trials(project)
    assert len(again) == 4
    pd.testing.assert_series_equal(again["kl"][:2], first["kl"])
    assert [told[0] for told in project.tracked] == [f"trial {n}" for n in range(4)]


@pytest.mark.parametrize("call", [2, 7])
def test_a_killed_driver_loses_nothing_and_counts_nothing_twice(call: int, make: Make) -> None:
    project = make(tune={"seed": call})
    with pytest.raises(Killed):
        project.tune(6, size=2, kill_at=call)
    done = project.calls[EVALUATE]
    project.tune(6, size=2)
    table = trials(project)
    assert len(table) == 6 and set(table["state"]) <= {"complete", "pruned"}
    assert sorted(table["start"].dropna()) == ["as predicted", "even", "greedy", "reductions × 4"]
    assert not table.filter(regex="knob|start").duplicated().any()
    assert project.json("study.json")["trials"]["all"] == 6
    assert done == max(0, call - 1 - 4)  # four calls remember the dense model


def test_a_study_that_is_stopped_leaves_no_trial_that_seems_to_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tune={"sequences": 2, "prune": False})
    judged = resident.evaluate_plan
    count = 0

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return judged(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resident, "evaluate_plan", stopped)
        project.tune(6, size=2)
    study = optuna.load_study(
        study_name="small", storage=open_storage(project.output / "journal.log")
    )
    states = Counter(trial.state.name for trial in study.trials)
    assert states["RUNNING"] == 0 and 2 <= states["FAIL"] <= states["WAITING"]
    done = len(project.tracked)
    assert done == states["COMPLETE"] > 0
    project.tune(6, size=2)
    table = trials(project)
    assert len(table) == 6 and set(table["state"]) == {"complete"}
    assert not table.filter(regex="knob|start").duplicated().any()


def test_the_sampler_knows_all_trials_but_the_one_in_flight(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left for later is done before the next trial is asked for."""
    told: list[str] = []
    asks, tells, puts = Study.ask, Study.tell, Store.put_json
    judged = resident.evaluate_plan

    def ask(self: Study) -> Any:
        told.append("ask")
        return asks(self)

    def tell(self: Study, *arguments: Any) -> None:
        told.append("tell")
        tells(self, *arguments)

    def put(self: Store, kind: str, *arguments: Any) -> Any:
        told.append(f"put {kind}")
        return puts(self, kind, *arguments)

    def judge(*arguments: Any, **named: Any) -> Any:
        told.append("judge")
        return judged(*arguments, **named)

    project = make(tune={"prune": False, "sequences": 4})
    monkeypatch.setattr(Study, "ask", ask)
    monkeypatch.setattr(Study, "tell", tell)
    monkeypatch.setattr(Store, "put_json", put)
    monkeypatch.setattr(resident, "evaluate_plan", judge)
    project.tune(6)
    assert told.count("judge") == trials(project)["plan"].nunique() > 3
    for place, what in enumerate(told):
        asked, known, kept = (told[:place].count(name) for name in ("ask", "tell", "put scores"))
        if what == "ask":
            assert asked - known <= 1
        if what == "tell":
            assert kept == told[:place].count("judge")  # before it is told


def test_equal_plans_are_judged_once(make: Make) -> None:
    fixed = {"depth_slope": 0, "mix": 0, "weight.attention": 1, "charge.reductions": 1}
    project = make(tune={"prune": False, "knobs": {**fixed, "score_exponent": [1, 1.001]}})
    _, calls = project.tune(4, size=2)
    table = trials(project)
    assert calls[EVALUATE] == table["plan"].nunique() == 1
    assert len(table) == 4 and table["kl"].nunique() == 1
    assert table["same_as"].notna().sum() >= 1


@pytest.mark.parametrize(("jobs", "most"), [(None, 3), (2, 2)])
def test_workers_that_join_a_study_get_trials(
    jobs: int | None, most: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {0}
    monkeypatch.setattr(InlinePool, "workers", property(lambda pool: set(there)))
    asked: list[tuple[int, int]] = []  # worker, trials in flight
    more: list[bool] = []
    task = Trials._task

    def asking(self: Trials, job: Any, rows: Any, slot: int) -> Any:
        asked.append((slot, len(self.slots | {slot})))
        more.append(self._more())
        if len(asked) == 4:
            there.update((1, 2))
        if len(asked) == 12:
            there.discard(0)  # it died, and no other has come yet
        return task(self, job, rows, slot)

    monkeypatch.setattr(Trials, "_task", asking)
    project = make(tune={"prune": True})
    project.tune(7, size=3, jobs=jobs)
    assert len(trials(project)) == 7
    assert {worker for worker, _ in asked[:4]} == {0}
    assert {worker for worker, _ in asked} == {0, 1, 2}
    assert max(count for _, count in asked[:4]) == 1
    assert max(count for _, count in asked) == most
    assert more[0] and not more[-1]


def test_plans_that_are_known_are_not_proposed_again_nor_after_a_resume(make: Make) -> None:
    project = make(tune={"prune": False, "sequences": 2})
    project.tune(8)
    project.tune(12, size=2)
    table = trials(project)
    drawn = table["start"].isna()
    first, later = (set(table.loc[which, "plan"]) for which in (~drawn, drawn))
    assert len(later) == drawn.sum() == 8 and not first & later


def test_trials_that_fall_behind_stop_early(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make()
    project.tune(10)
    table = trials(project)
    pruned, complete = (table[table["state"] == state] for state in ("pruned", "complete"))
    assert len(pruned) and set(pruned["sequences"]) <= {2, 3, 6}
    assert set(complete["sequences"]) == {12}
    assert pruned["start"].isna().all()
    assert pruned["kl"].min() > complete["kl"].min()
    steps = project.tracked[0][3]
    assert list(steps) == [2, 3, 6, 12]
    for _, _, metrics, steps, outcome, *_ in project.tracked:  # whoever sorts by KL finds no parts
        assert ("kl" in metrics) == (outcome == "complete") == (12 in steps)


def test_two_objectives_give_a_front_and_the_plan_within_the_budget(make: Make) -> None:
    project = make(tune={"objectives": ["bytes", "kl"], "sampler": "nsga2"})
    project.tune(9)
    study, table = project.json("study.json"), trials(project)
    assert set(table["state"]) == {"complete"} and set(table["sequences"]) == {12}
    assert table["knob bits_per_weight"].nunique() > 3
    front = sorted((entry["bytes"], entry["kl"]) for entry in study["front"])
    assert len(front) > 1
    for (small, high), (large, low) in zip(front, front[1:], strict=False):
        assert small < large and high > low
    plan = project.json("plan.json")
    assert plan["bytes"] <= plan["budget_bytes"]
    fitting = table[table["bytes"] <= plan["budget_bytes"]]
    assert study["best"]["kl"] == fitting["kl"].min()


def test_with_bytes_among_the_objectives_the_first_plan_is_that_of_a_budget_in_bytes(
    make: Make,
) -> None:
    budget = {"bytes": 120_000, "bits_per_weight": None}
    found = []
    for number, objectives in enumerate((["kl"], ["kl", "bytes"])):
        project = make(tune={"objectives": objectives}, budget=budget)
        project.tune(1, storage=project.folder / f"{number}.log")
        found.append(trials(project).iloc[0])
    assert found[0]["plan"] == found[1]["plan"]
    assert found[0]["bytes"] > 0.99 * 120_000  # what headers did not need is spent


def test_baselines_are_judged_once_on_the_text_of_the_trials_and_are_no_trials(make: Make) -> None:
    project = make(
        baselines={"rtn 4": {**BITS, "bits": 4}},
        tune={"objectives": ["bytes", "kl"], "sequences": 8},
    )
    _, calls = project.tune(5)
    study, table = project.json("study.json"), trials(project)
    assert list(table["trial"]) == list(range(5))
    assert calls[EVALUATE] == table["plan"].nunique() + 1
    assert study["baselines"].keys() == {"rtn 4"} == project.summary.study.baselines.keys()
    found = study["baselines"]["rtn 4"]
    assert found["bytes"] == project.json("scores.json")["rtn 4"]["bytes"]
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    everywhere = experiment.space.everywhere(experiment.recipe.baselines["rtn 4"])
    pieces = plan_pieces(experiment, experiment.walk, everywhere)
    assert len(pieces) == len(experiment.units)
    kl = evaluate_rows(WorkerState(1), plain(experiment.calibration_judge), (0, 8), pieces)["kl"]
    assert found["kl"] == pytest.approx(math.fsum(kl) / (8 * 23), rel=1e-9)
    _, calls = project.tune(5)
    assert calls[EVALUATE] == 0 and project.json("study.json")["baselines"] == study["baselines"]


def test_a_baseline_that_fails_is_told_and_nothing_of_the_study_is_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = make(
        baselines={name: {**BITS, "bits": bits} for name, bits in (("a", 4), ("b", 2), ("c", 8))},
        tune={"objectives": ["bytes", "kl"], "sequences": 2},
    )
    judged, finished = resident.evaluate_plan, Trials.run
    study: dict[str, Any] = {}
    calls = 0

    def finish(self: Trials) -> None:
        finished(self)
        monkeypatch.setattr(resident, "evaluate_plan", broken)

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        study.update(project.json("study.json"))  # is there before any of them is judged
        calls += 1
        if calls == 1:
            raise MemoryError("no room for 3 GB")
        found = judged(*arguments, **named)
        return {**found, "kl": [math.nan] * len(found["kl"])} if calls == 2 else found

    monkeypatch.setattr(Trials, "run", finish)
    project.tune(4)
    assert study["trials"]["all"] == 4 and study["baselines"] == {}
    assert project.json("study.json")["baselines"].keys() == {"c"}
    told = capfd.readouterr().err
    assert "baseline a cannot be judged: MemoryError: no room for 3 GB" in told
    assert "baseline b cannot be compared: its KL is nan" in told


def as_long_as_large(
    state: Any, judge: Any, pieces: dict[str, str], mixtures: Mixtures
) -> dict[str, Any]:
    """A clock that ticks per byte."""
    members = [m for path in pieces.values() for m in members_of(path, mixtures).values()]
    size = sum(member.nbytes for member in members)
    return {"milliseconds": size / 1e5, "peak_bytes": 0}


def test_latency_is_measured_and_may_be_an_objective(make: Make) -> None:
    baselines = {"rtn 4": {**BITS, "bits": 4}}
    project = make(baselines=baselines, tune={"objectives": ["kl", "latency"], "sequences": 2})
    _, calls = project.tune(4, size=2)
    table, study = trials(project), project.json("study.json")
    assert (table["latency"] > 0).all() and study["objectives"] == ["kl", "latency"]
    assert calls["latency:measure_plan"] == table["plan"].nunique() + 1
    assert study["best"]["latency"] == table["latency"][study["best"]["trial"]]
    # The baselines stand in the front, timed once.
    assert study["baselines"].keys() == baselines.keys()
    assert study["baselines"]["rtn 4"]["latency"] > 0
    assert project.summary.study.baselines == study["baselines"]
    _, calls = project.tune(4)
    assert calls.total() == 0 and project.json("study.json")["baselines"] == study["baselines"]


def test_a_baseline_that_cannot_be_timed_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, studied = Trials.run, False

    def study(self: Trials) -> None:
        nonlocal studied
        run(self)
        studied = True

    def clock(state: Any, **given: Any) -> dict[str, Any]:
        if studied:
            raise RuntimeError("no kernel image is available")
        return as_long_as_large(state, **given)

    monkeypatch.setattr(Trials, "run", study)
    monkeypatch.setattr(latency, "measure_plan", clock)
    tune = {"objectives": ["bytes", "kl", "latency"], "sequences": 2}
    project = make(baselines={"rtn 4": {**BITS, "bits": 4}}, tune=tune)
    project.tune(4)
    told = "baseline rtn 4 cannot be timed: RuntimeError: no kernel image is available"
    assert told in capfd.readouterr().err
    assert project.json("study.json")["baselines"]["rtn 4"].keys() == {"kl", "bytes"}


def test_the_best_trial_keeps_to_the_constraints(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure_plan", as_long_as_large)
    about = {"objectives": ["bytes", "kl", "latency"], "sequences": 3, "sampler": "nsga2"}
    project = make(tune=about)
    project.tune(8)
    table = trials(project)
    least = table["kl"].idxmin()
    limit = float(table["latency"].median())
    assert table["latency"][least] > limit  # it makes a difference

    shutil.rmtree(project.output)
    project = make(tune={**about, "constraints": {"latency": limit}})
    project.tune(8)
    table, best = trials(project), project.json("study.json")["best"]
    feasible = table[table["feasible"].astype(bool)]
    assert 0 < len(feasible) < 8 and (feasible["latency"] <= limit).all()
    assert (table["latency"][~table["feasible"].astype(bool)] > limit).all()
    fitting = feasible[feasible["fits"]]
    assert best["kl"] == fitting["kl"].min() and best["trial"] == fitting["kl"].idxmin()
    assert {entry["trial"] for entry in project.json("study.json")["front"]} <= set(feasible.index)

    # Of a limit on the KL the smallest plan is left.
    shutil.rmtree(project.output)
    project = make(tune={**about, "constraints": {"kl": float(table["kl"].median())}})
    project.tune(8)
    table, best = trials(project), project.json("study.json")["best"]
    fitting = table[table["feasible"].astype(bool) & table["fits"]]
    assert best["bytes"] == fitting["bytes"].min()
    with pytest.raises(UserError, match="made with something else: constraints kl: .*, now 0.01"):
        make(tune={**about, "constraints": {"kl": 0.01}}).tune(9)


def test_a_study_without_a_feasible_trial_says_how_near_it_came(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure_plan", as_long_as_large)
    project = make(tune={"constraints": {"latency": 1e-3}, "sequences": 2})
    told = r"none of 4 keeps to tune.constraints; trial \d came nearest: latency [\d.]+ of 0.001 ms"
    with pytest.raises(RunError, match=told):
        project.tune(4)
    assert len(project.tracked) == 4


def test_a_plan_that_cannot_be_timed_is_a_failed_trial(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def once(state: Any, **given: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("no kernel image is available")
        return as_long_as_large(state, **given)

    monkeypatch.setattr(latency, "measure_plan", once)
    project = make(tune={"objectives": ["kl", "latency"], "sequences": 2})
    project.tune(4)
    assert list(trials(project)["state"]) == ["failed", *["complete"] * 3]
    assert trials(project)["reason"][0] == "RuntimeError: no kernel image is available"


def test_a_failed_trial_is_recorded_and_the_study_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tune={"prune": False})
    judged = resident.evaluate_plan
    count = 0

    def sometimes(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count in (1, 2, 4):
            raise MemoryError("no room for 3 GB")
        found = judged(*arguments, **named)
        return {**found, "kl": [math.nan] * len(found["kl"])} if count == 5 else found

    monkeypatch.setattr(resident, "evaluate_plan", sometimes)
    project.tune(8)
    table = trials(project)
    failed = table[table["state"] == "failed"]
    assert len(table) == 8 and len(failed) == 4
    assert set(failed["reason"]) == {
        "MemoryError: no room for 3 GB",
        "not finite: its KL is nan",
    }
    assert [told[4] for told in project.tracked].count("failed") == 4


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError("no room"), "no room: fewer workers"),
        (FileNotFoundError(2, "No such file", "x.safetensors"), "x.safetensors': a piece is gone"),
    ],
)
def test_three_failures_of_a_kind_stop_the_study_with_advice(
    error: Exception, advice: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tune={"prune": False})

    def never(*arguments: Any, **named: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(resident, "evaluate_plan", never)
        with pytest.raises(RunError, match=rf"3 trials in a row.*{advice}"):
            project.tune(8)
    assert len(project.tracked) == 3
    project.tune(5)
    assert list(trials(project)["state"]) == ["failed"] * 3 + ["complete"] * 2


def test_values_that_the_sampler_draws_without_any_plan_stop_the_study(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tune={"prune": False})

    def none(self: TrialPlans, values: Any, start: str | None) -> Plan:
        raise Infeasible("the smallest plan has 3 bytes, the budget is 2 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(TrialPlans, "of", none)
        advice = r"no plan: the smallest plan .*: allow more values of the knobs \(tune.knobs\), or"
        with pytest.raises(RunError, match=f"3 trials in a row failed: {advice}"):
            project.tune(12)
        assert [told[4] for told in project.tracked] == ["failed"] * 7  # starts first, then three
        with pytest.raises(RunError, match=f"no trial within the budget succeeded: {advice}"):
            project.tune(8)
    project.tune(10)
    assert list(trials(project)["state"]) == ["failed"] * 8 + ["complete"] * 2


def test_values_without_a_plan_among_others_stop_no_study(make: Make) -> None:
    """Groups of 16 do not fit this budget; half of the draws want them."""
    numbers = {"depth_slope": 0, "mix": 0, "weight.attention": 1, "score_exponent": 1}
    project = make(
        candidates=[GROUPS],
        budget={"bits_per_weight": 2.9},
        tune={
            "sampler": "random",
            "seed": 5,
            "sequences": 2,
            "knobs": {**numbers, "rtn.group_size": ["any", 16]},
        },
    )
    project.tune(14)
    table = trials(project)
    states = "".join("f" if state == "failed" else "." for state in table["state"])
    assert len(states) == 14 and "fff" in states
    assert set(table["reason"].dropna().str.slice(0, 8)) == {"no plan:"}

    # What is left with one value alone is known before any work.
    project = make(
        candidates=[GROUPS],
        budget={"bits_per_weight": 2.9},
        tune={"knobs": {"rtn.group_size": [16], "mix": 0}},
    )
    told = r"tune.knobs: with rtn.group_size as they are fixed the smallest plan has [\d,]+ bytes"
    with pytest.raises(UserError, match=told):
        project.tune(3)
    assert project.calls.total() == 0


def test_time_that_is_up_ends_a_study(make: Make, known_study: Path) -> None:
    project = make()
    with pytest.raises(RunError, match="succeeded: none was begun in the 0 s that --timeout gives"):
        project.tune(5, timeout=0)
    shutil.rmtree(project.output)
    copied(known_study, project.output)
    project.tune(9, timeout=0)
    assert len(trials(project)) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "search": ({"search": "uniform"}, "search: uniform does not add up losses"),
    "shares": ({"search": "strs"}, "search: strs does not add up losses"),
    "sampler": ({"tune": {"sampler": "grid"}}, "tune.sampler: unknown sampler 'grid'"),
    "several": (
        {"tune": {"sampler": "cmaes", "objectives": ["bytes", "kl"]}},
        "cmaes cannot do 2 objectives",
    ),
    "bytes alone": ({"tune": {"objectives": ["bytes"]}}, "objectives are kl alone, or kl and"),
    "knob": ({"tune": {"knobs": {"weight.head": 2}}}, "tune.knobs.weight.head: no such knob"),
    "range": ({"tune": {"knobs": {"mix": [0, 2]}}}, "tune.knobs.mix: [0, 2] is not within 0"),
    "constraint": ({"tune": {"constraints": {"size": 3}}}, "tune.constraints.size"),
    "no limit": ({"tune": {"constraints": {"latency": 0}}}, "latency: Input should be greater"),
    "infinite": ({"tune": {"constraints": {"latency": math.inf}}}, "tune.constraints.latency"),
    "bytes limit": ({"tune": {"constraints": {"bytes": "1 MB"}}}, "the budget is the limit"),
    "kl limit": ({"tune": {"constraints": {"kl": 0.1}}}, "kl is the only objective"),
    "several pruned": (
        {"tune": {"objectives": ["bytes", "kl"], "prune": True}},
        "prune: with several objectives or constraints no trial is given up early",
    ),
    "constrained pruned": (
        {"tune": {"constraints": {"latency": 1}, "prune": True}},
        "prune: with several objectives or constraints no trial is given up early",
    ),
    "unheeded": (
        {"tune": {"constraints": {"latency": 1}, "sampler": "cmaes"}},
        "cmaes heeds no constraints: take tpe, gp, nsga2",
    ),
    "other engine": (
        {"serve": "transformers", "candidates": [BITS], "tune": {"objectives": ["kl", "latency"]}},
        "tune: latency is measured with the modules of serve: moesaic",
    ),
    "group": ({"tune": {"groups": {"a": "nothing_like_it"}}}, "tune.groups.a: 'nothing_like_it'"),
    "part": (
        {"tune": {"groups": {"attention": "q_proj"}}},
        "tune.groups.attention: attention is a kind of part, with a weight of its own",
    ),
    "nothing": ({"tune": {"knobs": {"mix": None}}}, "tune.knobs.mix: None is no number, true, fal"),
    "nested": ({"tune": {"knobs": {"mix": [[0], 1]}}}, "tune.knobs.mix: [0] is no number, true, f"),
    "not finite": ({"tune": {"knobs": {"mix": [0, math.inf]}}}, "tune.knobs.mix: inf is no number"),
    "huge": ({"tune": {"knobs": {"mix": 10**400}}}, "is not within 0 to 1"),
    "no such value": (
        {"candidates": [GROUPS], "tune": {"knobs": {"rtn.group_size": 32}}},
        "tune.knobs.rtn.group_size: no candidate has 32, and one value alone adds nothing to try",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_refused_before_any_work(case: str, make: Make) -> None:
    changes, text = REFUSED[case]
    project = make(**changes)
    with pytest.raises(UserError) as error:
        project.tune(3)
    assert text in str(error.value) and "recipe.yaml" in str(error.value)
    assert project.calls.total() == 0


# What a study of CHAINS cannot be gone on with, and what is said of it.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "budget": (
        {"budget": {"bits_per_weight": 5}},
        "budget: 4.5 bits per weight, now 5.0 bits per weight",
    ),
    "bytes": (
        {"budget": {"bits_per_weight": None, "bytes": 110_000}},
        "budget: 4.5 bits per weight, now 110,000 bytes",
    ),
    "candidates": (
        {"candidates": [BITS, *CHAINS["candidates"][1:], {**BITS, "bits": [3, 6], "clip": "mse"}]},
        "candidates: 2 added (rtn(bits=3, group_size=-1, clip=mse); rtn(bits=6, group_size=-1, cl",
    ),
    "fewer": (
        {"candidates": [{**BITS, "bits": [2, 4]}]},
        "candidates: 5 removed (rtn(bits=8, group_size=-1); reap(keep=0.5) → rtn(bits=4, group_si",
    ),
    "text": ({"calibration": {"length": 23}}, "calibration text differs (its files, sequences"),
    "gradients": (
        {"calibration": {"gradient_sequences": 12}},
        "else: calibration gradient_sequences: 4, now 12. Undo that",
    ),
    "shards": ({"calibration": {"shards": 2}}, "else: calibration shards: 4, now 2. Undo that"),
    "experts": (
        {"calibration": {"experts": "all"}},
        "else: calibration experts: routed, now all. Undo that",
    ),
    "knobs": ({"tune": {"knobs": {"mix": 0}}}, "knobs mix: [0.0, 1.0], now [0.0, 0.0]"),
    "groups": ({"tune": {"groups": {"a": "q_proj"}}}, "groups a: none, now q_proj"),
    "objectives": (
        {"tune": {"objectives": ["kl", "bytes"], "prune": False}},
        'objectives: ["kl"], now ["kl", "bytes"]',
    ),
    "constraints": (
        {"tune": {"constraints": {"latency": 9}, "prune": False}},
        'constraints: null, now {"latency": 9.0}',
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_study_of_something_else_is_refused_before_any_work(
    case: str, make: Make, known_study: Path
) -> None:
    changes, text = OTHERS[case]
    project = make(**changes)
    before = copied(known_study, project.output)
    with pytest.raises(UserError) as error:
        project.tune(5)
    assert "was made with something else: " in str(error.value) and text in str(error.value)
    assert project.calls.total() == 0 and contents(project.output) == before


def test_a_study_is_on_record_by_what_it_is_made_of(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(storage: Path | None = None, **changes: Any) -> str:
        experiment = open_experiment(make(**changes).folder / "recipe.yaml", None)
        return study_id(experiment, StudyOptions(5, storage=storage))

    first = told()
    assert first == told(tune={"sampler": "gp", "seed": 3}, compute={"workers": 2})
    others = [told(**OTHERS[case][0]) for case in ("budget", "candidates", "shards", "objectives")]
    others += [told(Path("other.log")), told(name="other")]
    assert len({first, *others}) == 7
    monkeypatch.setattr(measure, "code_digest", lambda *modules: "other")
    assert told() == first


def test_another_model_is_told_by_its_name(
    make: Make, model: Path, known_study: Path, tmp_path: Path
) -> None:
    other = make_model_folder(tmp_path / "other", "qwen3_moe", tie_word_embeddings=True)
    project = make(model=str(other))
    before = copied(known_study, project.output)
    told = f"made with something else: the model differs: {re.escape(str(model))}, now {other}[.;]"
    with pytest.raises(UserError, match=told):
        project.tune(5)
    assert project.calls.total() == 0 and contents(project.output) == before


def test_a_study_that_is_there_may_be_refused_or_begun_elsewhere(
    make: Make, known_study: Path
) -> None:
    project = make()
    before = copied(known_study, project.output)
    with pytest.raises(UserError, match="the study 'small' is there already"):
        project.tune(5, resume=False)
    assert project.calls.total() == 0 and contents(project.output) == before
    project = make(budget={"bits_per_weight": 5.0})
    project.tune(4, storage=project.folder / "other.log")
    assert contents(project.output)["journal.log"] == before["journal.log"]


@pytest.mark.parametrize("state", ["damaged", "held", "a folder"])
def test_a_journal_that_cannot_be_used_is_refused_before_any_work(
    state: str, make: Make, known_study: Path
) -> None:
    project = make(baselines={"all": {**BITS, "bits": 4}})
    before = copied(known_study, project.output)
    journal = project.output / "journal.log"
    with ExitStack() as stack:
        told = f"process {os.getpid()} is at work on it"
        if state == "held":
            stack.enter_context(locked(journal))
        elif state == "damaged":
            journal.write_bytes(before["journal.log"] + b"garbage\n")
            told = "journal.log: is damaged"
        else:
            journal.unlink()
            journal.mkdir()
            told = "journal.log: cannot be used"
        before = contents(project.output)
        with pytest.raises(UserError, match=told):
            project.tune(5)
        assert project.calls.total() == 0 and contents(project.output) == before


def test_a_line_that_has_no_end_yet_is_no_obstacle_before_any_work(
    make: Make, known_study: Path
) -> None:
    project = make()
    before = copied(known_study, project.output)["journal.log"]
    (project.output / "journal.log").write_bytes(before + b'{"op_code": 4, "wor')
    project.tune(2)
    assert contents(project.output)["journal.log"].startswith(before)


def test_a_study_with_other_measurements_is_refused(
    make: Make,
    known_study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    project = make()
    copied(known_study, project.output)
    project.tune(2)
    said = "the study 'small' was begun by another version of moesaic"
    assert said not in capfd.readouterr().err
    # Other code makes other pieces, with the same errors or not: known when they are measured.
    before = trials(project)
    monkeypatch.setattr(measure, "code_digest", lambda *modules: "other")
    _, calls = project.tune(2)
    assert said in capfd.readouterr().err
    assert calls["measure:compress_job"] > 0 and calls[EVALUATE] == 0
    pd.testing.assert_frame_equal(trials(project), before)
    best = project.json("study.json")["best"]["trial"]
    project.tune(5)
    table = trials(project)
    assert table["plan"].nunique() == table["predicted_loss"].nunique()  # known across both
    assert table["plan"][2:].isin(table["plan"][:2]).any()
    assert project.json("study.json")["best"]["trial"] == best  # one of the old ones is taken
    monkeypatch.setattr(Allocator, "measured", lambda this: [["other"]])
    with pytest.raises(UserError, match=r"made with something else: measurements differ \(other"):
        project.tune(3)


def test_a_study_of_an_earlier_version_goes_on(make: Make, known_study: Path) -> None:
    """Its journal does not say how it was calibrated, and names plans by their files."""
    project = make()
    copied(known_study, project.output)
    journal = project.output / "journal.log"
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        known = line.get("user_attr", {}).get(MADE_OF)
        if known is not None:
            assert all(known.pop(fact) for fact in (CALIBRATION, VERSION, MODEL_NAME))
        if "plan" in line.get("user_attr", {}):
            line["user_attr"]["plan"] = "0" * 40
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    project.tune(3)
    assert len(trials(project)) == 3


@pytest.mark.parametrize("earlier", [False, True])
def test_a_trial_is_known_to_have_had_another_plan(earlier: bool) -> None:
    chosen = [{"a": (Spec.of("rtn", {"bits": bits}),), "b": ()} for bits in (4, 8)]
    plans = [Plan(units, 9, loss) for units, loss in zip(chosen, (0.5, 0.25), strict=True)]
    key = "0" * 40 if earlier else plan_key(plans[0])
    told = told_trial("complete", plan=key, predicted_loss=0.5)
    assert [is_plan_of(told, plan) for plan in plans] == [True, False]


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        (
            {"knobs": {"bits_per_weight": [6, 7]}},
            r"tune.knobs.bits_per_weight: from 6 on, but the budget is 4.5 bits per weight",
        ),
        (
            {"constraints": {"bytes": 1000}},
            r"tune.constraints.bytes: the smallest plan has [\d,]+ bytes, 1,000 are allowed",
        ),
    ],
)
def test_what_no_plan_can_meet_is_told_before_any_work(
    tune: dict[str, Any], told: str, make: Make
) -> None:
    project = make(tune={"objectives": ["bytes", "kl"], "sequences": 2, **tune})
    with pytest.raises(UserError, match=told):
        project.tune(4)
    assert project.calls.total() == 0 and project.tracked == []


def told_trial(state: str, **notes: Any) -> Told:
    return Told(0, state, {}, 0.5 if state == "complete" else None, {"bytes": 10, **notes}, {})


def test_advice_follows_from_why_no_trial_can_be_taken() -> None:
    bytes_alone = Limits(["bytes", "kl"], {"bytes": 8.0})
    cases: list[tuple[list[Told], Limits, float | None, str]] = [
        ([], Limits(["kl"], {}), 0.0, r"none was begun in the 0 s that --timeout gives: give more"),
        ([], Limits(["kl"], {}), None, r"none was made: ask for more \(--trials\)"),
        (
            [told_trial("complete", fits=False)] * 2,
            Limits(["kl"], {}),
            None,
            r"all 2 that are complete are larger than the budget: let the knobs reach",
        ),
        (
            [told_trial("complete", fits=True)],
            bytes_alone,
            None,
            r"none of 1 keeps to .*: allow more, or ask for more trials",
        ),
        (
            [told_trial("failed", reason="no plan: too large")],
            Limits(["kl"], {}),
            None,
            r"no plan: too large: allow more values of the knobs",
        ),
    ]
    for told, limits, timeout, text in cases:
        assert re.match(text, why_none(told, limits, timeout))


def test_starts_that_the_ranges_do_not_hold_are_not_called_so(make: Make) -> None:
    knobs = {"score_exponent": 1, "depth_slope": [1, 2]}
    project = make(tune={"prune": False, "sequences": 2, "knobs": knobs})
    project.tune(4)
    starts = [f"nearest to {name}" for name in ("as predicted", "greedy", "reductions × 4")]
    table = trials(project)
    assert list(table["start"].dropna()) == starts
    _, calls = project.tune(4)
    assert calls.total() == 0


def test_time_that_is_up_leaves_no_trial_that_seems_to_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tune={"prune": False, "sequences": 2})
    with monkeypatch.context() as patch:
        # Time is up once a trial was asked for ahead.
        late = lambda self: self.prepared is not None and self.shown.finished > 0  # noqa: E731
        patch.setattr(Trials, "_late", late)
        project.tune(6, timeout=60.0)
    study = optuna.load_study(
        study_name="small", storage=open_storage(project.output / "journal.log")
    )
    states = Counter(trial.state.name for trial in study.trials)
    assert len(trials(project)) == 2
    assert states == {"COMPLETE": 2, "FAIL": 1, "WAITING": 2}  # of four starts
    project.tune(6)
    table = trials(project)
    assert len(table) == 6 and set(table["state"]) == {"complete"}
    assert sorted(table["start"].dropna()) == ["as predicted", "even", "greedy", "reductions × 4"]


def test_the_bar_of_finished_trials_says_the_best_of_all(
    make: Make, known_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr(View, "finish", lambda self, name, told=(): said.append(list(told)))
    project = make()
    copied(known_study, project.output)
    for count in (2, 3, 3):
        project.tune(count)
        best = project.json("study.json")["best"]
        assert next(filter(None, reversed(said))) == [
            f"best {best['kl']:.4g} (trial {best['trial']})"
        ]


def test_a_run_takes_what_a_study_told_out_of_the_folder(make: Make, known_study: Path) -> None:
    project = make()
    copied(known_study, project.output)
    picture = project.output / "pictures" / "study_history.png"
    picture.parent.mkdir(exist_ok=True)
    picture.touch()
    project.run(stages=("search",))
    assert (project.output / "plan.json").exists() and (project.output / "journal.log").exists()
    for gone in (picture, project.output / "study.json", project.output / "trials.parquet"):
        assert not gone.exists()
    project.tune(2)
    assert (project.output / "study.json").exists()


def test_groups_and_options_are_knobs(make: Make) -> None:
    candidates = [
        {"method": "gptq", "bits": [2, 4, 8], "group_size": -1, "act_order": [True, False]}
    ]
    project = make(
        candidates=candidates,
        tune={"groups": {"values": "v_proj", "out": r"o_proj$"}, "knobs": {"weight.out": [2, 4]}},
    )
    project.tune(4)
    knobs = project.json("study.json")["knobs"]
    assert knobs["weight.out"]["allowed"] == [2.0, 4.0] and knobs["weight.out"]["default"] == 2.0
    assert knobs["weight.values"]["allowed"] == [0.125, 8.0]
    assert knobs["gptq.act_order"]["allowed"] == ["any", "false", "true"] or knobs[
        "gptq.act_order"
    ]["allowed"] == ["any", "true", "false"]
    assert set(project.json("study.json")["best"]["values"]) == set(knobs)
    _, calls = project.tune(4)  # what is known of knobs before measuring is what there is then
    assert calls.total() == 0


def test_a_study_of_layers_that_share_out_their_experts_goes_on(make: Make) -> None:
    """Their options are others once they have."""
    reduced = [{"method": "stun", "keep": 0.5, "window": [1, 2]}, {**BITS, "bits": [4, 8]}]
    project = make(candidates=[BITS, reduced], tune={"sequences": 2})
    project.tune(4)
    before = trials(project)
    project.tune(5)
    pd.testing.assert_series_equal(trials(project)["kl"][:4], before["kl"])
    other = make(candidates=[BITS, reduced], tune={"sequences": 2, "knobs": {"mix": 0}})
    with pytest.raises(UserError, match="else: knobs mix"):
        other.tune(6)


@pytest.mark.parametrize(
    ("candidate", "knob", "wish", "allowed"),
    [
        (GROUPS, "rtn.group_size", 16, ["16"]),
        (GROUPS, "rtn.group_size", -1, ["-1"]),
        (GROUPS, "rtn.group_size", [16], ["16"]),
        (GROUPS, "rtn.group_size", [16, "any"], ["16", "any"]),
        (GROUPS, "rtn.group_size", 16.0, ["16"]),
        (GROUPS, "rtn.group_size", "any", ["any"]),
        (GROUPS, "score_exponent", 0.5, [0.5, 0.5]),
        (GROUPS, "score_exponent", 1, [1.0, 1.0]),
        ({**GPTQ, "damp": [0.01, 1]}, "gptq.damp", 1, ["1.0"]),
        ({**GPTQ, "damp": [0.01, 1]}, "gptq.damp", [0.01], ["0.01"]),
        ({**GPTQ, "act_order": [True, False]}, "gptq.act_order", 1, None),
        (
            {**GPTQ, "act_order": [True, False]},
            "gptq.act_order",
            True,
            ["true"],
        ),
    ],
)
def test_values_of_options_are_fixed_as_they_are_written(
    candidate: dict[str, Any], knob: str, wish: Any, allowed: list[Any] | None, make: Make
) -> None:
    project = make(candidates=[{**BITS, "bits": 2}, candidate], tune={"knobs": {knob: wish}})
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    assert yaml.safe_load(experiment.recipe.to_yaml())["tune"]["knobs"] == {knob: wish}
    if allowed is None:
        with pytest.raises(UserError, match=f"{knob}: 1 is not among any, true, false"):
            study_terms.check_tune(experiment)
        return
    study_terms.check_tune(experiment)
    knobs = study_terms.knobs_of(experiment, study_terms.sized_allocator(experiment))
    (found,) = [k for k in knobs if k.name == knob]
    assert found.to_json()["allowed"] == allowed


@pytest.mark.parametrize("tune", [{}, {"prune": True}, {"objectives": ["bytes", "kl"]}])
def test_a_recipe_as_resolved_can_be_tuned_again(tune: dict[str, Any], make: Make) -> None:
    project = make(tune=tune)
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    again = project.folder / "again.yaml"
    again.write_text(experiment.recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == experiment.recipe
    section = study_terms.section(experiment)
    assert section.prunes == (len(section.objectives) == 1)


def test_rungs_grow_to_all_sequences(make: Make) -> None:
    project = make()
    file = project.folder / "recipe.yaml"
    experiment = open_experiment(file, project.output)
    assert study_terms.rungs(experiment) == [(0, 2), (2, 3), (3, 6), (6, 12)]
    make(tune={"sequences": 3})
    assert study_terms.rungs(open_experiment(file, project.output)) == [(0, 1), (1, 2), (2, 3)]
    make(tune={"objectives": ["kl", "bytes"]})
    assert study_terms.rungs(open_experiment(file, project.output)) == [(0, 12)]
