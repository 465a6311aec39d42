"""Finalists: plans that trust predictions more or less, and the one that is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.methods.base import Spec
from moesaic.orchestrator import results
from moesaic.orchestrator.finalists import CHARGES, charged, taken, uncorrected, variants
from moesaic.search.base import Alternative, Budget, Measurement, Plan, Problem
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
    assert list(found) == ["reductions × 1", "without reductions"]
    assert found["without reductions"] < found["reductions × 1"]
    assert not any(s["method"] == "reap" for specs in plan["units"].values() for s in specs)
    _, calls = made.run()
    assert calls.total() == 0


EORA = {"method": "eora", "rank": 1}
CORRECTED: dict[str, Any] = {
    "candidates": [BITS, [{**BITS, "bits": 2}, EORA]],
    "baselines": {},
    "budget": {"bits_per_weight": 5},
}


@pytest.mark.parametrize("flattering", [True, False])
def test_corrections_are_taken_only_where_they_are_no_worse_than_bits_alone(
    flattering: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flattered, a correction of rank 1 makes two bits as good as dense."""
    made = Project(tmp_path / "joint", model, monkeypatch)
    made.write(**CORRECTED)
    measurements = results.measurements

    def flattered(*arguments: Any) -> results.Table:
        table = measurements(*arguments)
        found = [
            replace(m, score=0.0) if m.chain and m.chain[-1].method == "eora" else m
            for m in table.measurements
        ]
        return replace(table, measurements=found)

    if flattering:
        monkeypatch.setattr(results, "measurements", flattered)
    made.run()
    plan = made.json("plan.json")
    kl = plan["finalists"]
    assert list(kl) == ["as offered", "without corrections"]
    corrected = any(s["method"] == "eora" for specs in plan["units"].values() for s in specs)
    assert not corrected or kl["as offered"] < kl["without corrections"]
    assert not (flattering and corrected)
    alone = Project(tmp_path / "alone", model, monkeypatch)
    alone.write(**{**CORRECTED, "candidates": [BITS]})
    alone.run(stages=("search",))
    if not corrected:
        assert plan["units"] == alone.json("plan.json")["units"]


@pytest.mark.parametrize(
    ("gains", "name"),
    [
        ([0.010, 0.011, 0.012, 0.009], "as offered"),  # little, but on every sequence
        ([0.10, -0.08, 0.09, -0.09], "without corrections"),  # in the mean, by chance
        ([-0.01] * 4, "without corrections"),
        ([0.01], "without corrections"),  # one sequence tells nothing
    ],
)
def test_a_correction_must_gain_more_than_the_sample_could_feign(
    gains: list[float], name: str
) -> None:
    bits, eora = Spec.of("rtn"), Spec.of("eora")
    plans = {
        "as offered": Plan({"q": (bits, eora)}, 8, 0.1),
        "without corrections": Plan({"q": (bits,)}, 8, 0.2),
    }
    alone = [0.3 + 0.1 * place for place in range(len(gains))]
    losses = {
        "as offered": [value - gain for value, gain in zip(alone, gains, strict=True)],
        "without corrections": alone,
    }
    assert taken(plans, losses) == name
    # Where nothing can be had without corrections, or nobody corrects, the least is taken.
    only = {"as offered": plans["as offered"]}
    assert taken(only, losses) == "as offered"
    plain = dict.fromkeys(plans, plans["without corrections"])
    least = min(losses, key=lambda key: sum(losses[key]))
    assert taken(plain, losses) == least


def corrected() -> Problem:
    """A linear and a bank that may be corrected, and the bank reduced."""
    bits, eora, reap = Spec.of("rtn"), Spec.of("eora"), (Spec.of("reap", {"keep": 0.5}),)

    def offers(name: str) -> list[Measurement]:
        chains = ((), (bits,), (bits, eora))
        return [Measurement(name, chain, 8, 0.0, 0.1, 0.0) for chain in chains]

    choices = {"b.0.gate": offers("b.0.gate")}
    bank = [Alternative((), "2x2", 0, 0.0, choices), Alternative(reap, "1x2", -4, 0.3, choices)]
    return Problem({"q": offers("q")}, [], Budget(100, 10), {"b": bank})


def test_every_charge_is_offered_with_and_without_corrections() -> None:
    prices = ["reductions × 1", "reductions × 2", "reductions × 4", "without reductions"]
    given = corrected()
    found = variants(given)
    assert list(found) == [*prices, *(f"{name}, without corrections" for name in prices)]
    assert found["reductions × 1"] == given
    plain = replace(given, banks={})
    assert list(variants(plain)) == ["as offered", "without corrections"]
    assert list(variants(problem())) == prices


def test_without_corrections_nothing_else_is_missing() -> None:
    given = corrected()
    rest = uncorrected(given)
    assert rest is not None
    assert [len(m.chain) for m in rest.choices["q"]] == [0, 1]
    assert [a.prefix for a in rest.banks["b"]] == [a.prefix for a in given.banks["b"]]
    for alternative in rest.banks["b"]:
        assert [len(m.chain) for m in alternative.choices["b.0.gate"]] == [0, 1]
    assert uncorrected(rest) is None
    only = replace(given, choices={"q": given.choices["q"][2:]})
    assert uncorrected(only) is None  # the linear cannot do without


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
