"""Finalists: plans that trust reductions more or less, and the one that is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.methods.base import Spec
from moesaic.orchestrator import results
from moesaic.orchestrator.finalists import CHARGES, charged
from moesaic.search.base import Alternative, Budget, Measurement, Problem
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

BITS = {"method": "rtn", "bits": [2, 8], "group_size": -1}
CHAINS: dict[str, Any] = {
    "candidates": [BITS, [{"method": "reap", "keep": 0.25}, {**BITS, "bits": 8}]],
    "baselines": {},
    "budget": {"bits_per_weight": 4.5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


def problem() -> Problem:
    reap = (Spec.of("reap", {"keep": 0.5}),)
    choices = {"b.0.gate": [Measurement("b.0.gate", (), 8, 0.0, 0.1, 0.0)]}
    banks = {
        "a": [Alternative((), "2x2", 0, 0.0, choices), Alternative(reap, "1x2", -4, 0.3, choices)],
        "b": [Alternative(reap, "1x2", -4, 0.2, choices)],
    }
    return Problem({}, [], Budget(100, 10), banks)


def test_a_charge_multiplies_what_reductions_lose() -> None:
    given = problem()
    assert charged(given, 1.0) == given
    dear = charged(given, 4.0).banks
    assert [a.loss for a in dear["a"]] == [0.0, 1.2] and dear["b"][0].loss == 0.8
    assert dear["a"][1].choices == given.banks["a"][1].choices


def test_without_reductions_only_banks_that_need_them_keep_them() -> None:
    given = problem()
    left = charged(given, None).banks
    assert [a.prefix for a in left["a"]] == [()]
    assert left["b"] == given.banks["b"]


def test_a_reduction_that_promised_too_much_is_not_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As predicted, dropping three quarters of the experts costs nothing here."""
    made = Project(tmp_path, model, monkeypatch)
    made.write(**CHAINS)
    measurements = results.measurements

    def flattered(*arguments: Any) -> results.Table:
        table = measurements(*arguments)
        cheap = {key: replace(m, score=0.0) for key, m in table.reductions.items()}
        return replace(table, reductions=cheap)

    monkeypatch.setattr(results, "measurements", flattered)
    made.run()
    plan = made.json("plan.json")
    found = plan["finalists"]
    assert list(found) == ["× 1", "without"]
    assert found["without"] < found["× 1"]
    assert not any(s["method"] == "reap" for specs in plan["units"].values() for s in specs)
    _, calls = made.run()
    assert calls.total() == 0


def test_one_plan_needs_no_comparison(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Project(tmp_path, model, monkeypatch)
    made.write(**{**CHAINS, "budget": {"bits_per_weight": 9.0}})
    _, calls = made.run(stages=("search",))
    assert "evaluate:evaluate_rows" not in calls
    assert "finalists" not in made.json("plan.json")


def test_the_last_charge_does_without() -> None:
    assert CHARGES[0] == 1.0 and CHARGES[-1] is None
