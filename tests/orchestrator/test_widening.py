"""Candidates that tune.knobs adds: which they are, what is refused, a study and check with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moesaic.methods.base import Chain, Spec
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.run import check_recipe
from moesaic.orchestrator.widening import widened
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder, make_recipe

RTN = {"method": "rtn", "bits": [2, 8], "group_size": -1}
GPTQ = {"method": "gptq", "bits": [2, 4], "group_size": -1}

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(knobs, candidates)``: a recipe that names no model that there is."""

    def loaded(knobs: dict[str, Any], candidates: list[Any] | None = None) -> Recipe:
        chosen = [RTN, GPTQ] if candidates is None else candidates
        return load_recipe(
            make_recipe(tmp_path, "some/model", candidates=chosen, tune={"knobs": knobs})
        )

    return loaded


def spec(method: str, **options: Any) -> Spec:
    return Spec.of(method, options)


def gptq(bits: int, **options: Any) -> Chain:
    return (spec("gptq", bits=bits, group_size=-1, **options),)


def test_values_that_no_candidate_has_are_given_to_all_of_the_method(load: Load) -> None:
    recipe = load({"gptq.damp": [0.005, 0.01, 0.05]})
    found = widened(recipe)
    assert found.candidates[:4] == recipe.candidates
    assert set(found.added) == {gptq(b, damp=d) for b in (2, 4) for d in (0.005, 0.05)}
    assert found.candidates[4:] == list(found.added)
    assert set(found.added.values()) == {"gptq.damp"}
    assert found.tune == recipe.tune


def test_values_that_some_candidate_has_stay_where_they_are(load: Load) -> None:
    candidates = [RTN, {**GPTQ, "damp": 0.01}, {**GPTQ, "bits": 8, "damp": 0.05}]
    assert not widened(load({"gptq.damp": [0.01, 0.05]}, candidates)).added
    assert not widened(load({"gptq.damp": 0.05, "mix": 0}, candidates)).added
    assert not widened(load({"gptq.damp": "any"}, candidates)).added
    more = widened(load({"gptq.damp": ["any", 0.05, 1]}, candidates)).added
    assert set(more) == {gptq(bits, damp=1.0) for bits in (2, 4, 8)}


def test_several_options_are_all_combined_and_chains_keep_their_links(load: Load) -> None:
    chain = [{"method": "hc_smoe", "keep": 0.5}, {**GPTQ, "bits": 4}]
    knobs = {"gptq.act_order": [True, False], "hc_smoe.router": ["map", "mean"]}
    found = widened(load(knobs, [RTN, chain]))
    made = {
        (
            spec("hc_smoe", keep=0.5, router=router),
            spec("gptq", bits=4, group_size=-1, act_order=order),
        )
        for router in ("map", "mean")
        for order in (False, True)
    }
    assert made == set(found.candidates[2:]) and len(found.candidates) == 6


def test_suggested_stands_for_what_there_is_and_what_the_method_says(load: Load) -> None:
    found = widened(load({"gptq.damp": "suggested"}, [{**GPTQ, "damp": 0.1}]))
    assert set(found.added) == {gptq(b, damp=d) for b in (2, 4) for d in (0.005, 0.01, 0.05)}
    assert found.tune is not None and found.tune.knobs == {
        "gptq.damp": ["any", 0.1, 0.005, 0.01, 0.05]
    }
    assert not widened(load({"rtn.clip": "suggested"}, [{**RTN, "clip": ["none", "mse"]}])).added


def test_a_recipe_as_resolved_is_not_widened_any_further(load: Load, tmp_path: Path) -> None:
    found = widened(load({"gptq.damp": "suggested", "gptq.act_order": [True, False]}))
    again = tmp_path / "again.yaml"
    again.write_text(found.to_yaml(), encoding="utf-8")
    other = load_recipe(again)
    assert other.candidates == found.candidates and other.tune == found.tune
    assert widened(other) == other


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"gtpq.damp": [0.1, 0.2]},
        "gtpq.damp: no candidate has the method gtpq (there are: rtn, gptq)",
    ),
    "option": ({"gptq.dampen": [0.1, 0.2]}, "gptq.dampen: gptq has no option dampen (there are: "),
    "size": ({"gptq.bits": [2, 3]}, "gptq.bits: bits is a size, which the allocation chooses"),
    "value": ({"gptq.damp": [0.01, 3]}, "gptq.damp: option damp: Input should be less than or equ"),
    "word": ({"rtn.clip": ["none", "weighted"]}, "rtn.clip: option clip: Input should be 'none'"),
    "kind": ({"gptq.act_order": [0, 1]}, "gptq.act_order: 0 is no value of act_order, or other"),
    "decided": (
        {"gptq.static_groups": [False, True]},
        "gptq.static_groups: False is no value of static_groups, or other options of all",
    ),
    "one": ({"gptq.damp": 0.1}, "gptq.damp: no candidate has 0.1, and one value alone adds"),
    "one in a list": ({"gptq.damp": [0.1]}, "gptq.damp: no candidate has 0.1, and one value alone"),
    "nothing": ({"gptq.block_size": "suggested"}, "block_size: gptq suggests no values of"),
    "in a list": ({"gptq.damp": ["suggested", 0.2]}, "gptq.damp: suggested stands by itself, not"),
    "many": (
        {"rtn.group_size": list(range(1, 600))},
        "tune.knobs: with the values of rtn.group_size there are 1,202 candidates: at most 1,000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_added_is_refused(case: str, load: Load) -> None:
    knobs, text = REFUSED[case]
    recipe = load(knobs, [RTN, {**GPTQ, "act_order": True}])
    with pytest.raises(RecipeError) as error:
        widened(recipe)
    assert str(error.value).startswith("tune.knobs") and text in str(error.value)


def test_all_mistakes_are_told_at_once(load: Load) -> None:
    with pytest.raises(RecipeError) as error:
        widened(load({"gptq.damp": 0.1, "mix": 0, "rtn.bit": [1, 2]}))
    assert len(error.value.args) == 2


# With the model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


Make = Callable[..., Project]


@pytest.fixture
def make(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(knobs, candidates, **changes)``: a project of a small model."""

    def project(knobs: dict[str, Any], candidates: Any = (GPTQ,), **changes: Any) -> Project:
        made = Project(tmp_path, model, monkeypatch)
        about: dict[str, Any] = {"candidates": list(candidates), "baselines": None, **changes}
        tune = {"sequences": 2, "sampler": "random", "knobs": knobs}
        made.write(**about, evaluation={"sequences": 2}, tune=tune)
        return made

    return project


def test_a_study_measures_and_tries_what_was_added(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    project = make({"gptq.damp": ["any", 0.01, 0.5], "mix": 0})
    project.tune(14)
    told = "tune.knobs: gptq.damp: 2 candidates more; a unit has 4 instead of 2"
    assert told in capfd.readouterr().err
    table = pd.read_parquet(project.output / "trials.parquet")
    assert table["knob gptq.damp"].nunique() == 3
    measured = pd.read_parquet(project.output / "measurements.parquet")
    assert {"gptq(bits=2, group_size=-1, damp=0.5)", "gptq(bits=2, group_size=-1)"} <= set(
        measured["chain"]
    )
    # Other values of the option lead to other plans.
    by_value = {value: set(rows["plan"]) for value, rows in table.groupby("knob gptq.damp")}
    assert not by_value["0.01"] & by_value["0.5"]
    # The same goes on from the recipe as it was resolved, and does nothing anew.
    resolved = (project.output / "recipe.yaml").read_text(encoding="utf-8")
    (project.folder / "recipe.yaml").write_text(resolved, encoding="utf-8")
    _, calls = project.tune(14)
    assert calls.total() == 0
    with pytest.raises(UserError, match=r"candidates: 2 removed \(gptq\(bits=2.*damp=0.5\)"):
        make({"mix": 0}).tune(14)


def test_values_that_do_not_fit_the_model_are_refused_by_the_knob(make: Make) -> None:
    with pytest.raises(UserError, match=r"tune.knobs.gptq.group_size: gptq\(bits=2, group_size=7"):
        make({"gptq.group_size": [-1, 7]}).tune(3)
    about = {"serve": "transformers", "budget": {"bits_per_weight": 8.0}}
    rtn = {"method": "rtn", "bits": [4, 8], "group_size": -1}
    project = make({"rtn.symmetric": [True, False]}, [rtn], **about)
    with pytest.raises(UserError, match=r"tune.knobs.rtn.symmetric: no unit can have false"):
        project.tune(3)
    assert project.calls.total() == 0


def test_check_reckons_with_them_and_says_so(make: Make) -> None:
    project = make({"gptq.damp": "suggested"})
    found = check_recipe(project.folder / "recipe.yaml", project.output)
    assert found["work"]["candidates"] == 6
    (event,) = [e for e in found["events"] if e["kind"] == "more_candidates"]
    assert "gptq.damp: 4 candidates more; a unit has 6 instead of 2" in event["message"]
    project = make({"gptq.damp": 0.1, "mix": 7})
    with pytest.raises(UserError, match="one value alone"):
        check_recipe(project.folder / "recipe.yaml", project.output)
