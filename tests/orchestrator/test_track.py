"""The record of runs in MLflow, read back with MLflow's own client.

Making a database takes seconds: the tests share one, each with an experiment of its own.
"""

import json
import math
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.db import utils as mlflow_tables
from sqlalchemy import Engine, event

from moesaic.methods.base import Event, Spec
from moesaic.orchestrator import mlflow_database
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.mlflow_connection import Connection
from moesaic.orchestrator.recipe_sections import Tracking
from moesaic.orchestrator.refinement import Moment, Refinement, Stage
from moesaic.orchestrator.track import Tracker
from moesaic.search.base import Plan

RTN, GPTQ = Spec.of("rtn", {"bits": 3}), Spec.of("gptq", {"bits": 4, "group_size": 32})
PLANS = {
    "rtn 3": Plan({"a": (RTN,), "b": (RTN,), "c": (RTN,)}, 90, 0.4),
    "plan": Plan({"a": (RTN,), "b": (GPTQ,), "c": (RTN,)}, 100, 0.2),
}
SCORES: dict[str, dict[str, Any]] = {
    "dense": {"bytes": 400, "kl": 0.0, "sources": {"wiki.txt": {"kl": 0.0}}},
    "rtn 3": {"bytes": 90, "kl": 0.5, "sources": {"wiki.txt": {"kl": 0.5}}},
    "plan": {
        "bytes": 100,
        "kl": 0.25,
        "note": "no number",
        "sources": {"wiki.txt": {"kl": 0.125}, "ça (new)": {"kl": math.nan}},
    },
}
PARAMS = {"model": "tiny", "budget": {"bytes": 100, "bits_per_weight": None}, "keep": ["lm_head"]}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('record')}/shared.db"


@pytest.fixture
def tracking(database: str, request: pytest.FixtureRequest) -> Tracking:
    return Tracking(uri=database, experiment=request.node.name)


@pytest.fixture
def client(database: str) -> MlflowClient:
    return MlflowClient(database)


@pytest.fixture
def track(tracking: Tracking, tmp_path: Path) -> Callable[..., Tracker]:
    def make(
        params: Any = PARAMS,
        output: str = "small",
        verb: str = "run",
        study: str = "",
        **changes: Any,
    ) -> Tracker:
        changed = tracking.model_copy(update=changes)
        return Tracker(changed, "small-0.6b", tmp_path / output, params, verb, study)

    return make


def children(client: MlflowClient, run: Run) -> dict[str, Run]:
    found = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert len({child.info.run_name for child in found}) == len(found)
    return {child.info.run_name: child for child in found}


def test_a_trial_is_a_child_run_that_is_logged_once(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    knobs, metrics = {"weight.mlp": "0.5", "plan": "ab12"}, {"kl": 0.25, "bytes": 100.0}
    steps = {2: 0.5, 8: 0.25}
    with pytest.raises(KeyboardInterrupt), track() as tracker:
        tracker.log_trial("trial 0", knobs, metrics, steps, "complete")
        raise KeyboardInterrupt
    with track() as tracker:  # the same run, gone on with
        tracker.log_trial("trial 0", knobs, {"kl": 9.0}, {}, "complete")
        tracker.log_trial("trial 1", knobs, metrics, {2: 0.7}, "pruned")
        tracker.log_trial("trial 2", knobs, {}, {}, "failed", "MemoryError: no room")
    found = children(client, client.get_run(tracker.run_id))
    assert sorted(found) == ["trial 0", "trial 1", "trial 2"]
    first = found["trial 0"]
    assert first.data.params == knobs
    assert first.data.metrics == {**metrics, "kl_so_far": 0.25}
    history = client.get_metric_history(first.info.run_id, "kl_so_far")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (8, 0.25)]
    assert [child.info.status for _, child in sorted(found.items())] == [
        "FINISHED",
        "FINISHED",
        "FAILED",
    ]
    assert found["trial 1"].data.tags["outcome"] == "pruned"
    assert found["trial 2"].data.tags["failure"] == "MemoryError: no room"


def test_the_plans_of_a_front_are_logged_models_of_their_trials(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    made = []

    def plan() -> dict[str, Any]:
        made.append(1)
        return {"units": {"a": []}, "pieces": {}}

    with pytest.raises(KeyboardInterrupt), track() as tracker:
        tracker.log_trial("trial 0", {}, {"kl": 0.25}, {}, "complete", "", plan)
        figures = {"trial 0": {"kl": 0.25, "bytes": 90.0}}
        model_id = tracker.log_trial_models(figures, "trial 0")["trial 0"]
        raise KeyboardInterrupt
    with track() as tracker:
        tracker.log_trial("trial 0", {}, {"kl": 0.25}, {}, "complete", "", plan)
        assert tracker.log_trial_models(figures, "trial 0") == {"trial 0": model_id}
    assert len(made) == 1
    child = children(client, client.get_run(tracker.run_id))["trial 0"].info.run_id
    file = artifact(client, child, "plan.json", tmp_path / "down")
    assert json.loads(file.read_text()) == {"units": {"a": []}, "pieces": {}}
    model = client.get_logged_model(model_id)
    assert (model.name, model.source_run_id) == ("small-0_6b-trial-0", child)
    assert model.tags["plan"] == f"runs:/{child}/plan.json" and model.tags["best"] == "true"
    assert {m.key: m.value for m in model.metrics} == {"kl": 0.25, "bytes": 90.0}


def test_models_of_an_old_front_are_told_apart_however_many_there_are(
    track: Callable[..., Tracker], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow gives what it finds a page at a time, here two."""
    searches = {
        name: getattr(MlflowClient, name) for name in ("search_runs", "search_logged_models")
    }
    for name, search in searches.items():
        small = partial(_by_twos, search)
        monkeypatch.setattr(MlflowClient, name, lambda self, *a, _s=small, **n: _s(self, *a, **n))
    figures = {f"trial {n}": {"kl": 0.5, "bytes": 90.0 + n} for n in range(5)}
    with track(verb="tune") as first:
        for name in figures:
            first.log_trial(name, {"mix": name}, {}, {}, "complete", "", lambda: {"units": {}})
        models = first.log_trial_models(figures, "trial 1")
    with track(verb="tune", study="ab12") as second:
        for name in figures:
            second.log_trial(name, {"mix": name}, {}, {}, "complete", "", lambda: {"units": {}})
        front = {name: figures[name] for name in ("trial 0", "trial 3")}
        again = second.log_trial_models(front, "trial 3")
    assert again == {name: models[name] for name in front}
    tags = {name: client.get_logged_model(model).tags for name, model in models.items()}
    assert {name for name, own in tags.items() if own["front"] == "true"} == set(front)
    assert {name for name, own in tags.items() if own["best"] == "true"} == {"trial 3"}
    assert {own["front"] for own in tags.values()} == {"true", "false"}
    everything = client.search_runs([client.get_run(first.run_id).info.experiment_id])
    assert len(everything) == 2  # a page of 1 + 5
    monkeypatch.undo()
    assert len(client.search_runs([client.get_run(first.run_id).info.experiment_id])) == 6


def _by_twos(search: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return search(*arguments, **{"max_results": 2, **named})


def test_a_trial_took_as_long_as_it_did_and_may_have_many_params(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    knobs = {f"weight.group{n}": "1.0" for n in range(130)}
    with track() as tracker:
        tracker.log_trial("trial 0", knobs, {"kl": 0.5}, {}, "complete", times=(1000.5, 1003.25))
    child = children(client, client.get_run(tracker.run_id))["trial 0"]
    assert (child.info.start_time, child.info.end_time) == (1_000_500, 1_003_250)
    assert child.data.params == knobs


def test_each_budget_has_a_child_with_files_and_a_model_of_its_own(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    scores = {"dense": SCORES["dense"], "3bpw": SCORES["plan"], "2.5bpw": SCORES["rtn 3"]}
    with track(register_as="several sizes") as tracker:
        tracker.log_scores(scores, {"3bpw": PLANS["plan"], "2.5bpw": PLANS["rtn 3"]})
        for label in ("3bpw", "2.5bpw"):
            tracker.log_files([tmp_path / "plan.json"], label)
            tracker.log_model(tmp_path / label, scores[label], label)
    found = children(client, client.get_run(tracker.run_id))
    assert set(found) == set(scores)
    child = found["2.5bpw"].info.run_id
    assert [file.path for file in client.list_artifacts(child)] == ["plan.json"]
    (output,) = client.get_run(child).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.source_run_id) == ("small-0_6b-2_5bpw", child)
    versions = client.search_model_versions("name = 'several sizes'")
    assert {v.tags["path"] for v in versions} == {str(tmp_path / n) for n in ("3bpw", "2.5bpw")}


def artifact(client: MlflowClient, run_id: str, name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(client.download_artifacts(run_id, name, str(folder)))


def test_run_is_running_inside_and_finished_after(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    with track() as tracker:
        assert client.get_run(tracker.run_id).info.status == "RUNNING"
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "small-0.6b"
    assert run.data.params == {"model": "tiny", "budget.bytes": "100", "keep": '["lm_head"]'}
    assert run.data.tags["output"] == str(tmp_path / "small")
    assert "failure" not in run.data.tags
    memory = json.loads((tmp_path / "small" / "mlflow_run.json").read_text())
    assert memory == {"run_id": tracker.run_id, "uri": tracker.uri}


def test_scores_are_on_the_run_and_on_a_child_per_plan(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    with track() as tracker:
        tracker.log_scores(SCORES, PLANS)
    run = client.get_run(tracker.run_id)
    (odd,) = (name for name in run.data.metrics if re.match("sources/_a _new_-[0-9a-f]+/kl", name))
    assert math.isnan(run.data.metrics.pop(odd))
    assert run.data.metrics == {"bytes": 100, "kl": 0.25, "sources/wiki.txt/kl": 0.125}
    found = children(client, run)
    assert found.keys() == SCORES.keys()
    assert {child.info.status for child in found.values()} == {"FINISHED"}
    assert found["rtn 3"].data.metrics == {
        "bytes": 90,
        "kl": 0.5,
        "sources/wiki.txt/kl": 0.5,
        "predicted_loss": 0.4,
    }
    assert found["rtn 3"].data.params == {"choice.rtn bits:3 group_size:64": "3"}
    assert found["dense"].data.params == {}
    assert found["plan"].data.params == {
        "choice.rtn bits:3 group_size:64": "2",
        "choice.gptq bits:4 group_size:32": "1",
    }


def test_more_metrics_and_params_than_one_batch_are_all_kept(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    params = {f"p{index}": index for index in range(203)}
    with track(params) as tracker:
        tracker.log_stages({f"s{index}": index / 2 for index in range(2001)})
    run = client.get_run(tracker.run_id)
    assert run.data.params == {name: str(value) for name, value in params.items()}
    assert run.data.metrics == {f"seconds.s{index}": index / 2 for index in range(2001)}


def test_refining_is_a_curve_by_evaluations(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    stages = []
    for method in ("evolve", "relax"):
        trace = (Moment(0, 8, 80, 0.5), Moment(2, 20, 200, 0.25))
        stages.append(Stage(method, 0.5, 0.25, 2, 20, 200, 1.5, trace))
    with track() as tracker:
        tracker.log_refinement(Refinement(sequences=8, length=10, stages=tuple(stages)))
    metrics = client.get_run(tracker.run_id).data.metrics
    assert metrics["refine.start_kl"] == 0.5 and metrics["refine.kl"] == 0.25
    assert metrics["refine.2-relax.tokens"] == 200 and metrics["refine.1-evolve.seconds"] == 1.5
    curve = client.get_metric_history(tracker.run_id, "refine.best_kl")
    assert [(m.step, m.value) for m in curve] == [(8, 0.5), (20, 0.25), (28, 0.5), (40, 0.25)]


def test_how_the_plan_of_a_budget_was_refined_is_told_on_its_child(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    stage = Stage("evolve", 0.5, 0.25, 2, 20, 200, 1.5, (Moment(0, 8, 80, 0.5),))
    with track() as tracker:
        tracker.log_scores({"dense": SCORES["dense"], "3bpw": SCORES["plan"]}, {})
        tracker.log_refinement(Refinement(sequences=8, length=10, stages=(stage,)), "3bpw")
    run = client.get_run(tracker.run_id)
    child = children(client, run)["3bpw"]
    assert child.data.metrics["refine.kl"] == 0.25 and child.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(child.info.run_id, "refine.best_kl")] == [8]
    assert not any(name.startswith("refine") for name in run.data.metrics)


def test_table_files_and_events_are_artifacts(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"unit": ["a<b>", "c"], "bits": [3.0, 4.25]})
    (tmp_path / "plan.json").write_text("{}")
    events = [
        Event("few_tokens", "3 of 64", "a", 3.0),
        Event("few_tokens", "5 of 64", "b", 5.0),
        Event("damping grew", "0.1", "c", 0.1),
    ]
    with track() as tracker:
        tracker.log_table(frame)
        tracker.log_files([tmp_path / "plan.json"])
        tracker.log_events(events)
        tracker.log_description("| plan | 3.0 |")
    names = {file.path for file in client.list_artifacts(tracker.run_id)}
    assert names == {"layers.parquet", "layers.html", "plan.json", "events.json"}
    folder = tmp_path / "fetched"
    fetched = artifact(client, tracker.run_id, "layers.parquet", folder)
    pd.testing.assert_frame_equal(pd.read_parquet(fetched), frame)
    html = artifact(client, tracker.run_id, "layers.html", folder).read_text()
    assert "a&lt;b&gt;" in html and "4.25" in html
    listed = json.loads(artifact(client, tracker.run_id, "events.json", folder).read_text())
    assert [Event(**event) for event in listed["events"]] == events
    data = client.get_run(tracker.run_id).data
    assert data.metrics == {"events.few_tokens": 2, "events.damping grew": 1}
    assert data.tags["mlflow.note.content"] == "| plan | 3.0 |"


def test_param_over_6000_characters_is_kept_whole_as_an_artifact(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    long = "x" * 6001
    with track({"fits": "y" * 6000, "candidates": {"chains": long}}) as tracker:
        pass
    params = client.get_run(tracker.run_id).data.params
    assert params["fits"] == "y" * 6000
    file = "params/candidates.chains.txt"
    assert params["candidates.chains"].startswith(f"6,001 characters, see artifact {file} (")
    assert artifact(client, tracker.run_id, file, tmp_path / "fetched").read_text() == long


def test_failure_ends_the_run_and_open_children_with_the_reason(
    track: Callable[..., Tracker], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Connection.log

    def breaks(self: Connection, run_id: str, metrics: dict[str, float], *rest: Any) -> None:
        if "predicted_loss" in metrics:
            raise RunError("layer 3:\n  the matrix is singular")
        log(self, run_id, metrics, *rest)

    monkeypatch.setattr(Connection, "log", breaks)
    tracker = track()
    with pytest.raises(RunError, match="singular"), tracker:
        tracker.log_scores(SCORES, PLANS)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == "layer 3: the matrix is singular"
    assert {c.info.run_name: c.info.status for c in children(client, run).values()} == {
        "dense": "FINISHED",
        "rtn 3": "FAILED",
    }


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (ValueError("a\nb"), "FAILED", "ValueError: a b"),
        (OSError(28, "No space left on device"), "FAILED", "OSError: [Errno 28] No space left"),
        (UserError("budget: too few"), "FAILED", "budget: too few"),
    ],
    ids=["ctrl-c", "bug", "disk", "user"],
)
def test_error_passes_through_and_is_on_record(
    track: Callable[..., Tracker],
    client: MlflowClient,
    error: BaseException,
    status: str,
    reason: str,
) -> None:
    tracker = track()
    with pytest.raises(type(error)) as caught, tracker:
        raise error
    assert caught.value is error
    run = client.get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.tags["failure"].startswith(reason)
    assert "\n" not in run.data.tags["failure"]


def test_failed_run_goes_on_when_started_again(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    first = track()
    with pytest.raises(KeyboardInterrupt), first:
        first.log_scores(SCORES, PLANS)
        raise KeyboardInterrupt
    with track() as second:
        run = client.get_run(first.run_id)
        assert (run.info.status, run.data.tags.get("failure")) == ("RUNNING", None)
        second.log_scores(SCORES, PLANS)
    assert second.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert children(client, run).keys() == SCORES.keys()


def test_run_left_behind_by_kill_9_goes_on(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    first = track().__enter__()  # and nobody leaves the block
    with track() as second:
        pass
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"


def fail(tracker: Tracker) -> str:
    with pytest.raises(RunError, match="stop"), tracker:
        raise RunError("stop")
    return tracker.run_id


def test_new_run_begins_when_params_changed(track: Callable[..., Tracker]) -> None:
    first = fail(track())
    with track({**PARAMS, "model": "other"}) as second:
        assert second.run_id != first


def test_no_verb_goes_on_with_the_run_of_another(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    first = fail(track())
    with track(verb="tune") as study:
        assert study.run_id != first
        assert client.get_run(study.run_id).data.tags["moesaic.verb"] == "tune"
    memory = study.output / "mlflow_run.json"
    text = memory.read_text()
    assert client.get_run(first).info.status == "FAILED"
    again = fail(track(verb="tune"))
    with track(verb="tune") as study:
        assert study.run_id == again
    memory.write_text(text.replace(json.loads(text)["run_id"], first))
    client.delete_tag(first, "moesaic.verb")  # as runs were before there was the tag
    with track(verb="scores") as scores:
        assert scores.run_id != first
    memory.write_text(text.replace(json.loads(text)["run_id"], first))
    with track() as run:
        assert run.run_id == first


def test_new_run_begins_when_only_the_end_of_a_long_param_changed(
    track: Callable[..., Tracker],
) -> None:
    first = fail(track({"long": "x" * 9000 + "a"}))
    with track({"long": "x" * 9000 + "b"}) as second:
        assert second.run_id != first


def test_new_run_begins_when_the_last_one_finished(track: Callable[..., Tracker]) -> None:
    with track() as first, track(output="elsewhere") as elsewhere:
        assert elsewhere.run_id != first.run_id
    with track() as second:
        assert second.run_id != first.run_id


def test_a_study_goes_on_in_the_run_that_had_finished(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    def trial(tracker: Tracker, number: int, knob: str, front: bool = True) -> str:
        document = {"units": {"a": []}}
        told = {"kl": 0.5}
        name = f"trial {number}"
        tracker.log_trial(name, {"mix": knob}, told, {}, "complete", "", lambda: document)
        return tracker.log_trial_models({name: told}, name)[name] if front else ""

    with track(verb="tune") as first:
        first.belongs_to("ab12")
        before = trial(first, 0, "0.1")
        first.log_scores(SCORES, PLANS)
    better = {**PLANS, "plan": Plan({"a": (GPTQ,), "b": (GPTQ,), "c": (RTN,)}, 100, 0.1)}
    # As it is where the folder, sampler and machine are others, which a study may go on with.
    changed = {**PARAMS, "model": "small", "tune": {"sampler": "gp"}, "keep": ["lm_head"]}
    with track(changed, "elsewhere", verb="tune", study="ab12") as second:
        assert second.run_id == first.run_id
        run = client.get_run(second.run_id).data
        assert run.params["model"] == "tiny" and run.tags["output"].endswith("elsewhere")
        now = {tag: value for tag, value in run.tags.items() if tag.startswith("now.")}
        assert now == {"now.model": "small", "now.tune.sampler": "gp"}
        assert client.get_run(second.run_id).info.status == "RUNNING"
        trial(second, 0, "0.1", front=False)
        after = trial(second, 1, "0.2")
        second.log_scores(SCORES, better)
    assert client.get_run(first.run_id).info.status == "FINISHED"
    tags = [client.get_logged_model(model).tags for model in (before, after)]
    assert [own["best"] for own in tags] == [own["front"] for own in tags] == ["false", "true"]
    # Those of one name: the plan before, and the better one, which is the last.
    found = client.search_runs(
        [client.get_run(first.run_id).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{first.run_id}'",
        order_by=["attributes.start_time ASC"],
    )
    names = [run.info.run_name for run in found]
    assert sorted(names) == ["dense", "plan", "plan", "rtn 3", "trial 0", "trial 1"]
    with track(verb="tune", study="ab12") as third:
        assert not any(t.startswith("now.") for t in client.get_run(third.run_id).data.tags)
        third.log_scores(SCORES, better)  # the same once more
        other = trial(third, 1, "0.3")  # of a study that was begun anew
        assert other != after
    assert len(client.search_runs([found[0].info.experiment_id])) == 1 + 6 + 1
    with track(verb="tune", output="another", study="cd34") as another:
        assert another.run_id != first.run_id


def test_a_study_that_was_killed_goes_on_in_its_run(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    killed = track(verb="tune")
    killed.__enter__()  # and never left
    killed.belongs_to("ab12")
    client.set_tag(killed.run_id, "failure", "of an earlier time")
    with track({"model": "other"}, verb="tune", study="ab12") as again:
        assert again.run_id == killed.run_id
    run = client.get_run(killed.run_id)
    assert run.info.status == "FINISHED" and "failure" not in run.data.tags


def test_new_run_begins_when_the_last_one_was_deleted(
    track: Callable[..., Tracker], client: MlflowClient
) -> None:
    first = fail(track())
    client.delete_run(first)
    with track() as second:
        assert second.run_id != first


def test_new_run_begins_when_the_database_does_not_know_the_last_one(
    track: Callable[..., Tracker], tmp_path: Path
) -> None:
    first = fail(track())
    memory = tmp_path / "small" / "mlflow_run.json"
    memory.write_text(memory.read_text().replace(first, "0" * 32))
    with track() as second:
        assert second.run_id not in (first, "0" * 32)


def test_damaged_memory_is_named(track: Callable[..., Tracker], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mlflow_run.json").write_text("{")
    with pytest.raises(UserError, match=r"mlflow_run\.json: is damaged; remove it"), track():
        pass


def test_model_points_to_its_folder_and_is_registered_once(
    track: Callable[..., Tracker], client: MlflowClient, tmp_path: Path
) -> None:
    folder = tmp_path / "small" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"\1" * 100_000)
    first = track(register_as="tiny model")
    with pytest.raises(RunError, match="later"), first:
        first.log_scores(SCORES, PLANS)
        model_id = first.log_model(folder, SCORES["plan"])
        raise RunError("later")
    with track(register_as="tiny model") as second:
        second.log_scores(SCORES, PLANS)
        assert second.log_model(folder, SCORES["plan"]) == model_id
    model = client.get_logged_model(model_id)
    assert model.tags["path"] == str(folder)
    assert model.source_run_id == first.run_id
    assert model.params["model"] == "tiny"
    assert {m.key: m.value for m in model.metrics if m.key == "kl"} == {"kl": 0.25}
    (version,) = client.search_model_versions("name = 'tiny model'")
    assert (version.run_id, version.source) == (first.run_id, f"models:/{model_id}")
    outputs = client.get_run(first.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model_id]
    # Scores and model of one attempt are one point each on the run's curves.
    assert len(client.get_metric_history(first.run_id, "kl")) == 2
    kept = second.mlflow.place.artifacts
    assert kept is not None
    assert max(file.stat().st_size for file in kept.rglob("*") if file.is_file()) < 10_000


def test_model_leaves_the_default_place_alone(
    track: Callable[..., Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track() as tracker:
        tracker.log_model(tmp_path, SCORES["plan"])
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b"])
def test_name_that_the_registry_refuses_is_found_out_at_the_start(
    track: Callable[..., Tracker], name: str
) -> None:
    with pytest.raises(UserError, match=r"tracking\.register_as"):
        track(register_as=name)


def test_default_place_is_beside_the_output(tmp_path: Path) -> None:
    tracker = Tracker(Tracking(), "small", tmp_path / "runs" / "small", {})
    assert tracker.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracker.mlflow.place.artifacts == tmp_path / "runs" / "mlartifacts"


def test_relative_sqlite_uri_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(Tracking(uri="sqlite:///mine.db"), "small", tmp_path / "out", {})
    assert tracker.uri == f"sqlite:///{tmp_path}/mine.db"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "file:mlruns", "mlruns", "/tmp/mlruns"])
def test_folder_of_files_is_refused_with_advice(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match=r"no longer writes: write sqlite:///FILE\.db"):
        Tracker(Tracking(uri=uri), "small", tmp_path, {})


@pytest.mark.parametrize("uri", ["ftp://host/x", "sqlite:///", "sqlite://", ""])
def test_other_bad_uri_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri"):
        Tracker(Tracking(uri=uri), "small", tmp_path, {})


def unreachable(tmp_path: Path) -> Iterator[tuple[str, str]]:
    yield "http://user:secret@127.0.0.1:9", "http://user:***@127.0.0.1:9"
    yield f"sqlite:///{tmp_path}/file/mlflow.db", "NotADirectory|FileExists"
    yield f"sqlite:///{tmp_path}/file", "file is not a database"


@pytest.mark.parametrize("case", range(3), ids=["server", "folder", "no database"])
def test_unreachable_place_is_one_line_within_seconds(tmp_path: Path, case: int) -> None:
    (tmp_path / "file").write_text("no database at all, but long enough for a header " * 4)
    uri, reason = list(unreachable(tmp_path))[case]
    started = time.monotonic()
    with pytest.raises(RunError, match="^tracking: MLflow at ") as caught:
        Tracker(Tracking(uri=uri), "small", tmp_path / "out", {}).__enter__()
    assert time.monotonic() - started < 8
    assert caught.match(reason.replace("*", r"\*"))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_lost_server_does_not_hide_the_error_of_the_work(
    track: Callable[..., Tracker], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tracker = track()
    with pytest.raises(ValueError, match="the real one"), tracker:
        tracker.mlflow.client = MlflowClient("http://127.0.0.1:9")
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        raise ValueError("the real one")
    del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    assert "the failure is not recorded: tracking: MLflow at" in capsys.readouterr().err


def test_deleted_experiment_is_named(
    track: Callable[..., Tracker], client: MlflowClient, tracking: Tracking
) -> None:
    client.delete_experiment(client.create_experiment(tracking.experiment))
    with pytest.raises(UserError, match="was deleted"), track():
        pass


def test_nothing_is_printed(
    track: Callable[..., Tracker], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fresh = f"sqlite:///{tmp_path}/fresh/new.db"
    with track(uri=fresh) as tracker:
        tracker.log_scores(SCORES, PLANS)
        tracker.log_model(tmp_path, SCORES["plan"])
    assert capfd.readouterr() == ("", "")


def default_tracker(tmp_path: Path) -> Tracker:
    return Tracker(Tracking(), "small", tmp_path / "small", PARAMS)


@pytest.fixture
def real_tables(tables_made_once: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are made, not copied."""
    monkeypatch.setattr(mlflow_tables, "_initialize_tables", tables_made_once)


@pytest.mark.usefixtures("real_tables")
def test_kill_9_while_the_database_is_made_leaves_no_half_of_it(tmp_path: Path) -> None:
    """Each process dies when it has sent so many statements; about 1,700 make a database."""
    for statements in (3, 100, 300):
        child = os.fork()
        if child == 0:
            sent = 0

            def die_at_last(*_: Any, last: int = statements) -> None:
                nonlocal sent
                sent += 1
                if sent == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(Engine, "after_cursor_execute", die_at_last)
            default_tracker(tmp_path).__enter__()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists()
    left = list(tmp_path.glob(".mlflow.db.tmp-*"))
    assert len(left) == 3
    os.utime(left[0], (0, 0))  # so old that nobody can still be at it
    with default_tracker(tmp_path) as tracker:
        pass
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert sorted(tmp_path.glob(".mlflow.db.tmp-*")) == sorted(left[1:])


def test_database_that_somebody_else_made_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    name_once = mlflow_database._name_once

    def too_late(made: Path, wanted: Path) -> None:
        assert made.stat().st_size > 100_000
        wanted.write_text("theirs")
        name_once(made, wanted)

    monkeypatch.setattr(mlflow_database, "_name_once", too_late)
    mlflow_database.make_database(file)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert file.read_text() == "theirs"


@pytest.mark.usefixtures("real_tables")
@pytest.mark.parametrize("exists", [False, True], ids=["new", "grown"])
def test_full_disk_is_said_as_the_store_says_it(tmp_path: Path, exists: bool) -> None:
    """sqlite itself says that it is full: it may have no more pages than it has."""
    pages = 20
    if exists:
        mlflow_database.make_database(tmp_path / "mlflow.db")
        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()

    def limit(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(Engine, "connect", limit)
    try:
        with (
            pytest.raises(RunError, match=r"mlflow\.db: the disk is full; free space") as caught,
            default_tracker(tmp_path) as tracker,
        ):
            tracker.log_stages({f"s{index:0200}": 1.0 for index in range(5000)})
    finally:
        event.remove(Engine, "connect", limit)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "mlflow.db").exists() == exists


def hangs(seconds: float = 30.0) -> Any:
    """What never answers, as long as a test lasts."""
    threading.Event().wait(seconds)


def test_a_database_server_that_never_answers_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection; a driver waits then without end."""
    real = sqlalchemy.create_engine
    monkeypatch.setattr(mlflow_database, "_TRY_SECONDS", 0.2)
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda uri: real("sqlite://", creator=hangs))
    started = time.monotonic()
    uri = "postgresql://user:secret@127.0.0.1/x"
    with pytest.raises(RunError) as caught:
        Tracker(Tracking(uri=uri), "small", tmp_path / "out", {}).__enter__()
    assert str(caught.value) == (
        "tracking: MLflow at postgresql://user:***@127.0.0.1/x: NoAnswer: no answer within 0.2 s"
    )
    assert time.monotonic() - started < 8


def test_a_database_server_that_answers_no_more_does_not_hold_up_the_end(
    track: Callable[..., Tracker],
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = track()
    tracker.mlflow.place = replace(tracker.mlflow.place, file=None)  # as of a server
    with pytest.raises(ValueError, match="the real one"), tracker:
        tracker.log_trial("trial 0", {"a": "b"}, {"kl": 0.25}, {}, "complete", plan=dict)
        assert children(client, client.get_run(tracker.run_id)).keys() == {"trial 0"}
        monkeypatch.setattr(mlflow_database, "ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(MlflowClient, "set_tag", lambda *_: hangs())
        raise ValueError("the real one")
    said = capsys.readouterr().err
    assert "the failure is not recorded: tracking: MLflow at" in said and "within 0.2 s" in said
