"""The recipe's section refine: what it asks of workers, what it leaves, what it refuses."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest

from moesaic.methods.base import Spec
from moesaic.orchestrator import latency, refine, resident
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.evaluate import evaluate_rows
from moesaic.orchestrator.kept_limits import KeptLimits
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.listing import listing
from moesaic.orchestrator.pieces import is_cut
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.refinement import Watch
from moesaic.orchestrator.run import check_recipe, open_experiment
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.trials import Trials
from moesaic.orchestrator.worker import WorkerState, plain
from moesaic.search.base import Plan
from moesaic.search.refining import Answer, Batch, Request, cut
from tests.orchestrator.inline import Killed, Project, measured_store
from tests.orchestrator.projects import make_model_folder

BITS = {"method": "rtn", "bits": [2, 4, 8], "group_size": -1}
CHAINS: dict[str, Any] = {
    "candidates": [BITS, [{"method": "reap", "keep": [0.5, 0.75]}, {**BITS, "bits": [4, 8]}]],
    "baselines": {},
    "budget": {"bits_per_weight": 4.5},
    "evaluation": {"sequences": 2},
    "search": "uniform",  # leaves something to gain
    "refine": {
        "method": ["evolve", "relax"],
        "generations": 3,
        "offspring": 4,
        "steps": 2,
        "draws": 2,
    },
}
EVALUATE, SLOPES = "resident:evaluate_plan", "slopes:plan_slopes"
SEARCH = ("search",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which everything is measured, and no plan was run yet."""
    return measured_store(tmp_path_factory.mktemp("measured"), model, **CHAINS)


Make = Callable[..., Project]


@pytest.fixture
def make(model: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(folder, **changes)``: a project whose pieces are there."""

    def project(folder: str = "one", **changes: Any) -> Project:
        made = Project(tmp_path / folder, model, monkeypatch)
        made.write(**{**CHAINS, **changes})
        if not (made.folder / "store").exists():
            shutil.copytree(measured, made.folder / "store")
        return made

    return project


Whole = tuple[bytes, Counter[str]]


@pytest.fixture(scope="module")
def whole(model: Path, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The plan of an undisturbed search by one worker, and what it called."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        project = Project(folder, model, patch)
        project.write(**CHAINS)
        shutil.copytree(measured, folder / "store")
        _, calls = project.run(stages=SEARCH)
    return (project.output / "plan.json").read_bytes(), calls


def test_a_plan_is_refined_and_all_of_it_is_on_record(make: Make, whole: Whole) -> None:
    project = make()
    project.run(stages=("assemble",))
    assert (project.output / "plan.json").read_bytes() == whole[0]
    assert (project.output / "model" / "config.json").exists()
    plan, document = project.json("plan.json"), project.json("refine.json")
    assert {"units", "bytes", "loss", "budget_bytes", "search"} <= plan.keys()
    assert plan["bytes"] <= plan["budget_bytes"]
    refined = plan["refined"]
    assert [s["method"] for s in refined["stages"]] == ["evolve", "relax"]
    kl = [refined["start_kl"], *(s["kl"] for s in refined["stages"])]
    assert kl == sorted(kl, reverse=True) and kl[-1] < kl[0]
    assert refined["sequences"] == document["sequences"] == 12
    for told, short in zip(document["stages"], refined["stages"], strict=True):
        assert told["evaluations"] == short["evaluations"] == told["trace"][-1][1]
        assert told["kl"] == short["kl"] and told["seconds"] >= 0
        best = [moment[3] for moment in told["trace"]]
        assert best == sorted(best, reverse=True)
    # The plan's KL, streamed: of the same text, but in one go.
    assert kl_streamed(project, plan) == pytest.approx(kl[-1], rel=1e-4)


@pytest.mark.parametrize("method", ["evolve", "relax"])
def test_ranks_are_refined_like_anything_else(method: str, make: Make) -> None:
    """All ranks but the largest are pieces without tensors of their own: cuts of that one."""
    ranks = {"method": "svd_llm", "rank": [0.2, 0.35, 0.5, 0.7, 0.9]}
    project = make(
        candidates=[ranks],
        budget={"bits_per_weight": 9.0},
        refine={"method": method, "generations": 6, "offspring": 6, "steps": 4, "draws": 4},
    )
    project.run(stages=("assemble",))
    plan = project.json("plan.json")
    refined = plan["refined"]
    assert plan["bytes"] <= plan["budget_bytes"]
    assert refined["stages"][0]["kl"] < refined["start_kl"]
    taken = {specs[0]["options"]["rank"] for specs in plan["units"].values() if specs}
    assert len(taken) > 1
    kl = kl_streamed(project, plan)
    assert kl == pytest.approx(refined["stages"][0]["kl"], rel=1e-4)
    units = open_experiment(project.folder / "recipe.yaml", project.output).units
    made = (project.folder / "store" / "pieces").rglob("*.safetensors")
    assert sum(map(is_cut, made)) == 4 * len(units)


def kl_streamed(project: Project, plan: dict[str, Any]) -> float:
    """A plan's KL on all twelve sequences, by a worker that keeps no model."""
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    judge = plain(experiment.calibration_judge)
    state = WorkerState(1)
    evaluate_rows(state, judge, (0, 12), {})
    units = {
        name: tuple(Spec.of(s["method"], s["options"]) for s in specs)
        for name, specs in plan["units"].items()
    }
    pieces = plan_pieces(experiment, experiment.walk, units)
    return math.fsum(evaluate_rows(state, judge, (0, 12), pieces)["kl"]) / (12 * 23)


def test_the_number_of_workers_changes_nothing(make: Make, whole: Whole) -> None:
    project = make()
    _, calls = project.run(size=3, stages=SEARCH)
    assert (project.output / "plan.json").read_bytes() == whole[0]
    assert calls[EVALUATE] == whole[1][EVALUATE] > 8 and calls[SLOPES] == whole[1][SLOPES] >= 2


@pytest.mark.parametrize("left_out", [1, 20])
def test_a_killed_run_goes_on_to_the_same_plan_and_runs_nothing_twice(
    left_out: int, make: Make, whole: Whole
) -> None:
    project = make()
    with pytest.raises(Killed):
        project.run(kill_at=whole[1].total() - left_out, stages=SEARCH)
    first = project.calls.copy()
    _, second = project.run(size=2, stages=SEARCH)
    assert (project.output / "plan.json").read_bytes() == whole[0]
    for function in (EVALUATE, SLOPES):
        assert first[function] + second[function] == whole[1][function]


def test_the_same_command_again_runs_nothing(make: Make) -> None:
    project = make(refine={"generations": 1, "offspring": 2})
    project.run(stages=SEARCH)
    plan = project.json("plan.json")
    _, calls = project.run(stages=SEARCH)
    assert calls.total() == 0
    assert project.json("plan.json") == plan


def test_a_plan_that_loses_nothing_is_left_as_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one may that differs from the dense model only in experts which no token reaches."""
    judged = resident.evaluate_plan

    def lossless(*arguments: Any, **named: Any) -> Any:
        found = judged(*arguments, **named)
        return {**found, "kl": [0.0] * len(found["kl"])}

    monkeypatch.setattr(resident, "evaluate_plan", lossless)
    project = make()
    _, calls = project.run(stages=SEARCH)
    refined = project.json("plan.json")["refined"]
    assert refined["start_kl"] == 0
    assert [(s["kl"], s["steps"]) for s in refined["stages"]] == [(0, 0), (0, 0)]
    assert calls[EVALUATE] == len(cut(12, refine.BLOCKS).blocks) and calls[SLOPES] == 0
    told = capfd.readouterr().err
    for method in ("evolve", "relax"):
        assert f"{method}: the plan loses nothing on this text: nothing to refine" in told


def test_losses_are_told_as_measured_whatever_was_searched_by(make: Make) -> None:
    project = make(score="output", candidates=[BITS])
    project.run(stages=SEARCH)
    plan = project.json("plan.json")
    assert plan["refined"]["stages"][-1]["kl"] < plan["refined"]["start_kl"]
    table = pd.read_parquet(project.output / "measurements.parquet")
    rows = zip(table["unit"], table["specs"], table["predicted_kl"], strict=True)
    losses = {(unit, str(json.loads(specs))): loss for unit, specs, loss in rows}
    chosen = [losses[unit, str(chain)] for unit, chain in plan["units"].items()]
    assert plan["loss"] == pytest.approx(sum(chosen))


def test_a_study_s_best_plan_is_refined(make: Make) -> None:
    project = make(
        search="knapsack", tune={"prune": False}, refine={"generations": 3, "offspring": 4}
    )
    project.tune(5)
    study, plan = project.json("study.json"), project.json("plan.json")
    assert plan["refined"]["start_kl"] == pytest.approx(study["best"]["kl"], rel=1e-5)
    assert plan["refined"]["stages"][0]["kl"] <= plan["refined"]["start_kl"]
    assert project.summary.study is not None and project.summary.refinement is not None


SEVERAL: dict[str, Any] = {"objectives": ["bytes", "kl"], "sequences": 6}
EVOLVE: dict[str, Any] = {"sequences": 4, "generations": 4, "offspring": 6}


def test_refining_keeps_to_a_limit_on_bytes(make: Make) -> None:
    project = make(search="knapsack", tune=SEVERAL, refine=None)
    project.tune(6)
    table = pd.read_parquet(project.output / "trials.parquet")
    limit = int(table["bytes"].min() * 1.03)
    assert limit < project.json("plan.json")["budget_bytes"] - 4000  # more could be had
    tune = {**SEVERAL, "constraints": {"bytes": limit}}
    project = make("limited", search="knapsack", tune=tune, refine=EVOLVE)
    project.tune(6)
    plan = project.json("plan.json")
    assert plan["bytes"] <= limit
    assert plan["refined"]["stages"][0]["kl"] < plan["refined"]["start_kl"]


def test_refining_the_smallest_plan_within_a_limit_on_the_kl_makes_it_no_larger(
    make: Make,
) -> None:
    project = make(search="knapsack", tune=SEVERAL, refine=None)
    project.tune(6)
    table = pd.read_parquet(project.output / "trials.parquet")
    limit = float(table["kl"][table["bytes"].idxmin()]) * 1.001
    tune = {**SEVERAL, "constraints": {"kl": limit}}
    project = make("limited", search="knapsack", tune=tune, refine=EVOLVE)
    project.tune(6)
    plan, best = project.json("plan.json"), project.json("study.json")["best"]
    assert plan["bytes"] <= best["bytes"] < plan["budget_bytes"] - 4000
    assert plan["refined"]["stages"][0]["kl"] < plan["refined"]["start_kl"]
    # On all of the study's text, of which refining saw a part.
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    state, judge = WorkerState(1), plain(experiment.calibration_judge)
    evaluate_rows(state, judge, (0, 6), {})
    units = {
        name: tuple(Spec.of(s["method"], s["options"]) for s in specs)
        for name, specs in plan["units"].items()
    }
    pieces = plan_pieces(experiment, experiment.walk, units)
    sums = evaluate_rows(state, judge, (0, 6), pieces)["kl"]
    assert math.fsum(sums) / (6 * 23) <= limit


def test_a_refined_plan_beyond_a_limit_is_not_taken(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of the study take a millisecond each, those that a refiner finds ``refined``."""
    refined, studied, timed = 2.0, False, 0
    run = Trials.run

    def clock(state: Any, judge: Any, pieces: Any, mixtures: Any) -> dict[str, Any]:
        nonlocal timed
        timed += 1
        return {"milliseconds": refined if studied else 1.0, "peak_bytes": 0}

    def study(self: Trials) -> None:
        nonlocal studied
        studied = False
        run(self)
        studied = True

    monkeypatch.setattr(latency, "measure_plan", clock)
    monkeypatch.setattr(Trials, "run", study)
    tune = {"sequences": 6, "constraints": {"latency": 1.5}}
    project = make(search="knapsack", tune=tune, refine=EVOLVE)
    project.tune(4)
    told = project.json("plan.json")["refined"]
    assert told["stages"][0]["kl"] == told["start_kl"]
    (event,) = project.summary.events[-1:]
    assert event.kind == "refined_beyond_limits" and event.value >= 1
    assert "latency 2 of 1.5 ms per token: the study's plan is kept" in event.message
    before = timed
    project.tune(4)
    assert timed == before  # how long plans take is known

    refined = 1.4
    project = make("quick", search="knapsack", tune=tune, refine=EVOLVE)
    project.tune(4)
    told = project.json("plan.json")["refined"]
    assert told["stages"][0]["kl"] < told["start_kl"]
    assert "refined_beyond_limits" not in {event.kind for event in project.summary.events}


def test_a_refined_plan_whose_loss_is_no_number_is_beyond_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = MagicMock()
    pipeline.planned.of.return_value = {}, {}
    best = Told(0, "complete", {}, 0.1, {"bytes": 9, "fits": True}, {})
    kept = KeptLimits(pipeline, Limits(["kl", "bytes"], {"kl": 0.2}), best)
    for value, keeps in ((0.2, True), (0.3, False), (math.nan, False)):
        figures = [("kl", value)]
        monkeypatch.setattr(kept, "_figures", lambda *about, figures=figures: figures)
        assert kept.keeps(Plan({}, 8, 0.0)) is keeps


def test_a_budget_in_bytes_is_kept_by_the_files(make: Make) -> None:
    project = make(refine={"generations": 3, "offspring": 4})
    project.run(stages=SEARCH)
    limit = int(project.json("plan.json")["bytes"] * 1.02)
    project = make(budget={"bytes": limit, "bits_per_weight": None}, refine={"generations": 4})
    project.run(stages=SEARCH)
    plan = project.json("plan.json")
    assert plan["bytes"] <= limit == plan["budget_bytes"]


def test_a_plan_is_only_taken_if_it_fits_and_is_better(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(refine={"generations": 4, "offspring": 6})
    run = refine.Refining.run
    monkeypatch.setattr(
        refine.Refining, "run", lambda self, start, *_: run(self, start, lambda plan: False)
    )
    project.run(stages=SEARCH)
    refined = project.json("plan.json")["refined"]
    assert refined["stages"][0]["kl"] == refined["start_kl"]
    units = project.json("plan.json")["units"]
    without = make("without", refine=None)
    without.run(stages=SEARCH)
    assert units == without.json("plan.json")["units"]


def test_engines_with_ties_and_one_form_are_refined(make: Make) -> None:
    chains = [
        {"method": "rtn", "bits": [4, 8], "group_size": 16},
        [
            {"method": "reap", "keep": 0.5},
            {"method": "rtn", "bits": [4, 8], "group_size": 16},
        ],
    ]
    project = make(
        serve="transformers",
        candidates=chains,
        budget={"bits_per_weight": 6},
        refine={"method": ["evolve", "relax"], "generations": 3, "offspring": 4, "steps": 2},
    )
    project.run(stages=SEARCH)
    units = project.json("plan.json")["units"]
    experts = {str(specs) for name, specs in units.items() if ".experts." in name}
    assert len(experts) == 1
    assert project.json("plan.json")["refined"]["stages"][-1]["evaluations"] > 8


def test_an_engine_that_wants_one_form_is_refined_where_nothing_is_reduced(make: Make) -> None:
    project = make(
        serve="vllm",
        candidates=[{"method": "rtn", "bits": [4, 8], "group_size": -1}],
        budget={"bits_per_weight": 6},
        refine={"method": "relax", "steps": 2, "draws": 2},
    )
    project.run(stages=SEARCH)
    assert project.json("plan.json")["refined"]["stages"][0]["evaluations"] > 8


def test_a_model_that_is_ruined_stops_with_advice(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = resident.evaluate_plan

    def ruined(*arguments: Any, **named: Any) -> Any:
        found = judged(*arguments, **named)
        return {**found, "kl": [float("nan")] * len(found["kl"])}

    monkeypatch.setattr(resident, "evaluate_plan", ruined)
    project = make()
    with pytest.raises(RunError, match="evolve: the KL of the plan to start from is not finite"):
        project.run(stages=SEARCH)
    assert project.calls[EVALUATE] <= refine.BLOCKS  # no offspring of it was run


@pytest.mark.parametrize(
    ("passes", "bars"),
    [(None, [(1000, 0), (1000, 0), (1000, 1)]), (4.0, [(32, 0), (32, 8), (32, 8 + 16 + 4)])],
)
def test_what_is_left_is_told_by_what_bounds_it(
    passes: float | None, bars: list[tuple[int, int]]
) -> None:
    """A thousand generations, or the text four times; slopes count as four passes."""
    view, text = View(), cut(8, 2)
    watch = Watch("evolve", view, text, 7, passes)
    plan = Plan({}, 0, 0.0)
    batches = [
        Batch([Request(plan, 0), Request(plan, 1)], 0, 1000, None),
        Batch([Request(plan, 0, slopes=True), Request(plan, 1)], 1, 1000, 0.5),
    ]
    found = []

    def told() -> None:
        (bar,) = view.progress.tasks
        found.append((bar.total, bar.completed))

    for batch in batches:
        watch.asked(batch)
        if not found:
            told()
        watch.told(batch, [Answer([0.5] * 4) for _ in batch.requests])
        told()
    assert found == bars


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"refine": {"method": "anneal"}},
        "refine.method: no refiner 'anneal': known are evolve, relax",
    ),
    "number": ({"refine": {"method": [3]}}, "refine.method: no refiner 3: known are evolve, relax"),
    "none": ({"refine": {"method": []}}, "refine.method: List should have at least 1 item"),
    "key": ({"refine": {"rounds": 3}}, "refine.rounds: unknown key (allowed here: method, seq"),
    "zero": ({"refine": {"passes": 0}}, "refine.passes: Input should be greater than 0"),
    "section": ({"refine": 3}, "refine: must be a mapping (keys: method, sequences"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_refined_is_refused_before_any_work(case: str, make: Make) -> None:
    changes, text = REFUSED[case]
    project = make(**changes)
    for ask in (project.run, lambda: check_recipe(project.folder / "recipe.yaml", project.output)):
        with pytest.raises(UserError) as error:
            ask()
        assert text in str(error.value) and "recipe.yaml" in str(error.value)
    assert project.calls.total() == 0


def test_refiners_are_told_from_allocators() -> None:
    found = listing("searches")
    assert found["evolve"].startswith("refines a plan (refine.method): EvoPress")
    assert not found["knapsack"].startswith("refines")
