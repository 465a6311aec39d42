"""What the stages of a run took, and what of it no model changes."""

from pathlib import Path

import pytest

from moesaic.orchestrator import overheads
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.overheads import measure_overheads, tiny_recipe
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.stage_times import OVERHEADS
from moesaic.orchestrator.stopwatch import STAGES, Taken, Watch, WatchedView, _spans, timed_run


def test_a_stage_lasts_from_the_end_of_the_one_before() -> None:
    marks = {"calibrate": (5.0, 7.0), "start": (2.0, 3.0), "report": (9.0, 8.0)}
    assert dict(_spans(marks)) == {
        "start": Taken(2.0, 3.0),
        "calibrate": Taken(3.0, 4.0),
        "report": Taken(4.0, 1.0),
    }


def test_a_stage_that_ends_while_the_one_before_goes_on_takes_nothing_of_its_own() -> None:
    marks = {"gradients": (6.0, 6.0), "measure": (4.0, 4.0), "search": (7.0, 7.0)}
    found = dict(_spans(marks))
    assert found["measure"] == Taken(0.0, 0.0)
    assert found["search"] == Taken(1.0, 1.0)
    assert list(found) == ["gradients", "measure", "search"]


def test_the_search_ends_where_evaluation_begins_and_a_stage_with_its_last_step() -> None:
    watch = Watch()
    with WatchedView(watch) as view:
        view.stage("measure", 2)
        assert watch.marks == {}
        view.advance("measure")
        first = watch.marks["measure"]
        view.advance("measure")
        view.stage("evaluate", 1)
    assert list(watch.marks) == ["measure", "search"]
    assert first < watch.marks["measure"] <= watch.marks["search"]
    watch.mark("measure", again=False)
    assert watch.marks["measure"] <= watch.marks["search"]


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the run failed:\n(?s:.*)nowhere\.yaml"):
        timed_run(tmp_path / "nowhere.yaml", tmp_path / "out")


def test_the_tiny_recipe_is_right_and_tiny(tmp_path: Path) -> None:
    experiment = open_experiment(tiny_recipe(tmp_path, 1), tmp_path / "out")
    assert experiment.walk.sequences * experiment.recipe.calibration.length == 32
    assert crew(experiment.recipe.compute, experiment.workers_per_gpu).workers == 1
    assert all(len(chains) == 1 for chains in experiment.offers.values())


def test_what_no_model_changes_is_what_a_tiny_run_takes_beyond_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {stage: float(number) for number, stage in enumerate(STAGES)}
    taken = {stage: Taken(seconds + 0.5, 9.0) for stage, seconds in work.items()}
    taken["measure"] = Taken(work["measure"] - 1, 9.0)  # less than was predicted
    monkeypatch.setattr(overheads, "timed_run", lambda recipe, output: taken)
    monkeypatch.setattr(overheads, "predict_seconds", lambda *_, overheads: work)
    found = measure_overheads(1, tmp_path)
    assert found.keys() == OVERHEADS.keys()
    assert found.pop("measure") == 0.0
    assert set(found.values()) == {0.5}
    assert not list(tmp_path.iterdir())
