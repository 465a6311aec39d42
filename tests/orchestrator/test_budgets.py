"""Recipes with a list of budgets: measured once, a run's results for each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moesaic.methods.base import Event
from moesaic.orchestrator import run as run_module
from moesaic.orchestrator.budgets import Budgets
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.forecast import forecast
from moesaic.orchestrator.listing import read_run
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import BudgetSection
from moesaic.orchestrator.run import check_recipe, collect_garbage, open_experiment
from tests.orchestrator.inline import InlineTracker, Killed, Project
from tests.orchestrator.projects import make_model_folder, make_recipe

SEVERAL: dict[str, Any] = {
    "budget": {"bits_per_weight": [4.5, 6, 5]},
    "baselines": {"plan b": {"method": "rtn", "bits": 8, "group_size": 16}},
}
REFINE = {"method": "evolve", "generations": 1, "offspring": 2, "sequences": 4}
LABELS = ["4.5bpw", "6bpw", "5bpw"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture
def project(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path, model, monkeypatch)
    made.write(**SEVERAL)
    return made


def test_each_budget_gets_what_a_run_of_its_own_would(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, calls = project.run(size=2)
    assert list(result["plans"]) == list(result["models"]) == LABELS
    scores = project.json("scores.json")
    assert list(scores) == ["dense", "plan b", *LABELS] and scores == result["scores"]
    assert scores["4.5bpw"]["bytes"] < scores["5bpw"]["bytes"] < scores["6bpw"]["bytes"]
    front = project.json("front.json")
    assert [entry["plan"] for entry in front["plans"]] == ["plan b", *LABELS]
    assert all(entry["kl"] == scores[entry["plan"]]["kl"] for entry in front["plans"])
    points = [(point["bytes"], point["predicted_kl"]) for point in front["predicted"]]
    assert points == sorted(points) and [loss for _, loss in points] == sorted(
        (loss for _, loss in points), reverse=True
    )
    for entry in front["plans"][1:]:  # no plan is better than the front
        smaller = [loss for size, loss in points if size <= entry["bytes"]]
        assert entry["predicted_kl"] <= smaller[-1]
    shown = read_run(project.output)
    assert list(shown["plans"]) == LABELS
    assert list(read_run(project.output / "5bpw")["scores"]) == ["dense", "plan b", "plan"]

    for label in LABELS:
        folder = project.output / label
        alone = load_recipe(folder / "recipe.yaml")
        assert alone.name == f"small-{label}" and not alone.budget.several
        plan = json.loads((folder / "plan.json").read_text())
        assert plan["bytes"] == scores[label]["bytes"] <= plan["budget_bytes"]
    # The same as a run with that budget alone, which finds everything done.
    project.write(budget={"bits_per_weight": 5.0}, baselines=SEVERAL["baselines"])
    together = {
        path.name: path.read_bytes()
        for path in (project.output / "5bpw").iterdir()
        if path.name in ("plan.json", "scores.json")
    }
    weights = (project.output / "5bpw" / "model" / "model.safetensors").read_bytes()
    project.output = project.folder / "runs" / "alone"
    _, again = project.run()
    assert not again
    for name, content in together.items():
        assert (project.output / name).read_bytes() == content
    assert (project.output / "model" / "model.safetensors").read_bytes() == weights
    assert calls["evaluate:evaluate_rows"] == 5  # dense, a baseline, three plans


def test_a_run_that_was_killed_between_two_plans_goes_on_there(project: Project) -> None:
    _, whole = project.run()
    for name in ("scores", "hidden"):
        shutil.rmtree(project.folder / "store" / name)
    shutil.rmtree(project.output)
    with pytest.raises(Killed):
        project.run(kill_at=4)
    _, calls = project.run()
    assert calls == {"evaluate:evaluate_rows": 2} and whole["evaluate:evaluate_rows"] == 5
    assert list(project.json("scores.json")) == ["dense", "plan b", *LABELS]


def test_garbage_collection_keeps_every_budget(project: Project) -> None:
    project.write(**SEVERAL, propagate=True)
    project.run(stages=("evaluate",))
    store = project.folder / "store"
    pieces = set((store / "pieces").iterdir())
    collect_garbage(store, [project.output], 0)
    assert set((store / "pieces").iterdir()) == pieces
    _, calls = project.run(stages=("assemble",))
    assert not calls


def test_everything_is_on_record(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[Any, ...]] = []

    class Remembering(InlineTracker):
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: logged.append((name, *map(_listed, arguments)))

    original = Pipeline.events

    def events(this: Pipeline) -> list[Event]:
        own = [Event("told", "before"), Event("told", this.output.name)]
        return [*original(this), *own]

    monkeypatch.setattr(Pipeline, "events", events)
    monkeypatch.setattr(run_module, "Tracker", lambda *about: Remembering([]))
    project.write(**SEVERAL, refine=REFINE)
    result, _ = project.run(stages=("evaluate", "assemble", "report"))
    models = {call[3]: call[1] for call in logged if call[0] == "log_model"}
    assert models == {label: Path(result["models"][label]) for label in LABELS}
    files = [call for call in logged if call[0] == "log_files" and len(call) == 3]
    assert [call[2] for call in files] == LABELS
    assert all(path.exists() for call in files for path in call[1])
    for call in files:
        assert {path.name for path in call[1]} == {
            "recipe.yaml", "plan.json", "scores.json", "front.json", "refine.json", "report.html"
        }  # fmt: skip
    refined = {call[2]: call[1] for call in logged if call[0] == "log_refinement"}
    assert list(refined) == LABELS
    for label, refinement in refined.items():
        assert refinement.to_json() == project.json(f"{label}/refine.json")
    (events,) = [set(call[1]) for call in logged if call[0] == "log_events"]
    assert len(events) == len(next(call for call in logged if call[0] == "log_events")[1])
    assert {"before", *LABELS} == {event.message for event in events if event.kind == "told"}
    plans = next(call for call in logged if call[0] == "log_scores")[2]
    assert list(plans) == ["plan b", *LABELS]
    page = (project.output / "report.html").read_text()
    assert all(f'href="{label}/report.html"' in page for label in LABELS)
    assert all((project.output / label / "report.html").exists() for label in LABELS)


def _listed(value: Any) -> Any:
    return list(value) if hasattr(value, "__next__") else value


def test_another_recipe_in_the_same_folder_leaves_no_old_plan(project: Project) -> None:
    project.write(budget={"bits_per_weight": 5.0}, refine=REFINE)
    project.run(stages=("evaluate",))
    assert "plan" in read_run(project.output)
    picture = project.output / "pictures" / "refinement.png"
    picture.parent.mkdir()
    picture.write_bytes(b"old")
    project.write(budget={"bits_per_weight": 5.0})
    project.run(stages=("measure",))  # makes no plan: the old one stands
    assert "refined" in project.json("plan.json") and (project.output / "refine.json").exists()
    project.run(stages=("evaluate",))
    assert "refined" not in project.json("plan.json")
    assert not (project.output / "refine.json").exists() and not picture.exists()

    project.write(budget={"bits_per_weight": 5.0}, refine=REFINE)
    project.run(stages=("evaluate",))
    project.write(**SEVERAL, refine=REFINE)
    project.run(stages=("evaluate",))
    assert list(read_run(project.output)["plans"]) == LABELS
    left = {path.parent.name for path in project.output.rglob("refine.json")}
    assert left == set(LABELS) and not (project.output / "plan.json").exists()
    project.write(**SEVERAL)
    project.run(stages=("evaluate",))
    assert not list(project.output.rglob("refine.json"))


def test_check_predicts_for_all_of_them(project: Project) -> None:
    found = check_recipe(project.folder / "recipe.yaml", project.output)["bytes"]
    assert list(found["budgets"]) == LABELS and "budget" not in found
    assert found["budgets"]["6bpw"]["bits_per_weight"] == pytest.approx(6, abs=1e-3)
    one = {"bits_per_weight": [5]}
    file = project.write(budget=one)
    assert list(forecast(open_experiment(file, project.output))["bytes"]["budgets"]) == ["5bpw"]


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too small, too large": (
        {"budget": {"bits_per_weight": [1, 5, 30]}},
        ["budget 1bpw: .* too few: the smallest plan", "budget 30bpw: .* the whole dense model"],
    ),
    "value": (
        {"budget": {"bits_per_weight": [3, 0]}},
        [r"budget.bits_per_weight.1: Input should be greater than 0, got 0"],
    ),
    "size": (
        {"budget": {"bits_per_weight": None, "bytes": ["1 MB", "two"]}},
        [r"budget.bytes.1: 'two' is not a size"],
    ),
    "none": ({"budget": {"bits_per_weight": []}}, ["budget: a list holds at least one budget"]),
    "one folder": (
        {"budget": {"bits_per_weight": [5, 2.5, 2.50000001]}},
        ["budget: 2.5 and 2.50000001 are both called 2.5bpw: keep one of them"],
    ),
    "twice": ({"budget": {"bits_per_weight": [4, 4.0]}}, ["and none of them twice"]),
    "both": (
        {"budget": {"bits_per_weight": [4], "bytes": [10**6]}},
        ["budget: give either bytes or bits_per_weight"],
    ),
    "name": (
        {"baselines": {"5bpw": {"method": "rtn", "bits": 4}}, "budget": {"bits_per_weight": [5]}},
        ["baselines: '5bpw' is no name for a baseline: a budget is called so"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lists_that_cannot_be_are_refused(case: str, model: Path, tmp_path: Path) -> None:
    changes, texts = REFUSED[case]
    recipe = make_recipe(tmp_path, model, **changes)
    for text in texts:
        with pytest.raises(UserError, match=text):
            check_recipe(recipe, tmp_path / "runs" / "small")


def test_a_study_takes_one_budget(project: Project) -> None:
    project.write(**SEVERAL, tune={"sequences": 8})
    found = check_recipe(project.folder / "recipe.yaml", project.output)
    assert found["events"][0]["message"].startswith(
        "moesaic tune will refuse this: budget: a study is made under one budget"
    )
    with pytest.raises(UserError, match=r"budget: a study is made under one budget"):
        project.tune(3)
    assert not project.calls


def test_sizes_are_names_of_folders() -> None:
    sizes = BudgetSection(bytes=("1.1 MB", 1_048_576, 999, "1.5 TB", 10**18, 1000))  # type: ignore[arg-type]
    assert list(sizes.each) == ["1.1MB", "1.048576MB", "999B", "1.5TB", "1000000TB", "1kB"]
    assert [one.bytes for one in sizes.each.values()] == list(sizes.bytes or ())  # type: ignore[arg-type]


def test_budgets_can_be_asked_for_their_plans(project: Project) -> None:
    seen = []
    original = Budgets.search

    def search(this: Budgets) -> Any:
        found = original(this)
        seen.append({label: len(this.each[label].plans) for label in found})
        return found

    project.patch.setattr(Budgets, "search", search)
    project.run(stages=("search",))
    assert seen == [dict.fromkeys(LABELS, 2)]
    assert all("kl" not in entry for entry in project.json("front.json")["plans"])
