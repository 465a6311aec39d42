"""Scores, formulas and emq: what all scores must do, and what evolution finds of what is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import spearmanr

from moesaic.kernels.discovery import UnknownName
from moesaic.search.emq import Evolved, Observed, evolve, rank_correlations
from moesaic.search.features import FEATURES, Pairs, Rule, rule_of, scores
from moesaic.search.formula import Formula, evaluate, in_units, load_formula, nodes
from moesaic.search.random_plans import LARGEST, SMALLEST, random_plans
from tests.search.problems import FIXED, chain, extremes, problem, realistic

NAMES = scores()
ERRORS = frozenset(name for name, feature in FEATURES.items() if feature.error)


def some_features(pairs: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: np.exp(random.normal(0, 1.5, pairs)) for name in FEATURES}


def pairs_of(features: dict[str, np.ndarray], dense: int = 0) -> Pairs:
    """Pairs of which the last ones are left as they are."""
    count = len(next(iter(features.values())))
    chains = [chain(0)] * (count - dense) + [()] * dense
    return Pairs([(f"u{i}", chains[i]) for i in range(count)], features)


def test_discovery_finds_the_scores() -> None:
    assert {"gradient", "output", "swap_kl", "hessian_trace", "fisher", "outlier"} <= set(NAMES)
    assert {"block_importance", "mc_moe"} <= set(NAMES)
    with pytest.raises(UnknownName, match="unknown name 'trace' in scores: known are block_imp"):
        rule_of("trace")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_losses(name: str) -> None:
    rule, features = rule_of(name), some_features(50)
    assert rule.needs and rule.needs <= FEATURES.keys()
    losses = pairs_of(features, dense=5).losses(rule)
    assert (losses[:45] > 0).all() and (losses[45:] == 0).all()
    # It reads what it says it reads.
    assert np.array_equal(rule.compute({n: features[n] for n in rule.needs})[:45], losses[:45])

    larger = {n: v * 1.5 if n in ERRORS else v for n, v in features.items()}
    assert (rule.compute(larger) > rule.compute(features)).all()
    none = {n: np.zeros(50) if n in ERRORS else v for n, v in features.items()}
    assert (rule.compute(none) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_what_is_no_loss_is_refused_by_name(value: float) -> None:
    rule = Rule("strange", frozenset({"error"}), lambda features: features["error"])
    pairs = pairs_of({"error": np.array([1.0, value, 1.0])})
    with pytest.raises(ValueError, match=r"score strange: u1 under rtn.* is no loss \(1 of 3"):
        pairs.losses(rule)


TREES: list[tuple[Any, str]] = [
    ("error", "error"),
    (("mul", ("sqrt", "fisher_error"), "influence"), "sqrt(fisher_error) * influence"),
    (
        ("div", ("add", "error", "trace"), ("max", "gate", "trace")),
        "(error + trace) / max(gate, tr",
    ),
    (("log1p", ("inverse", ("square", "error"))), "log1p(inverse(square(error)))"),
]


@pytest.mark.parametrize(("tree", "text"), TREES)
def test_formulas_are_printed_saved_and_read_again(tree: Any, text: str, tmp_path: Path) -> None:
    formula = Formula(tree)
    assert str(formula).startswith(text)
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"formula": formula.to_json()}))
    assert load_formula(file, FEATURES) == formula
    rule = rule_of(str(file))
    assert rule.name == "some" and rule.needs == formula.inputs
    features = some_features(20)
    plain = {n: v / np.exp(np.mean(np.log(v))) for n, v in features.items()}
    e, f, i, t, g = (plain[n] for n in ("error", "fisher_error", "influence", "trace", "gate"))
    expected = [e, np.sqrt(f) * i, (e + t) / np.maximum(g, t), np.log(1 + 1 / e**2)]
    number = [one for one, _ in TREES].index(tree)
    np.testing.assert_allclose(rule.compute(features), expected[number], rtol=1e-12)


def test_units_are_those_of_what_is_above_zero() -> None:
    np.testing.assert_allclose(in_units(np.array([0.0, 2.0, 8.0])), [0, 0.5, 2])
    assert in_units(np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("{", "is no JSON"),
        ({"text": "error"}, "holds no formula"),
        ({"formula": "errors"}, "formula: unknown input 'errors': known are gradient, error"),
        ({"formula": ["exp", "error"]}, "formula: unknown operator 'exp': known are sqrt"),
        ({"formula": ["add", "error"]}, "formula: add takes 2 argument(s), not 1"),
        ({"formula": 3}, "formula: unknown operator 'None'"),
    ],
)
def test_files_without_a_formula_are_refused(document: Any, text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError) as error:
        rule_of(str(file))
    assert str(file) in str(error.value) and text in str(error.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        rule_of(str(tmp_path / "none.json"))


def test_rank_correlations_are_spearmans() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 6, (5, 30)).astype(float)  # with ties
    losses = random.integers(0, 9, 30).astype(float)
    expected = [spearmanr(row, losses).statistic for row in values]
    np.testing.assert_allclose(rank_correlations(values, losses), expected, rtol=1e-12)
    assert np.isnan(rank_correlations(np.ones((1, 30)), losses)).all()


def planted(seed: int, noise: float) -> tuple[dict[str, np.ndarray], Observed, Observed]:
    """Features, plans and swaps whose losses are sums of √fisher_error · influence."""
    random = np.random.default_rng(seed)
    features = some_features(300, seed)
    truth = np.sqrt(features["fisher_error"]) * features["influence"]
    members = csr_array((random.random((80, 300)) < 0.15).astype(float))
    blur = np.exp(random.normal(0, noise, 80))
    return (
        features,
        Observed(members, members @ truth * blur),
        Observed(csr_array(np.eye(300)[:100]), truth[:100] * np.exp(random.normal(0, noise, 100))),
    )


def found_in(seed: int, noise: float = 0.02) -> tuple[Evolved, float]:
    """What is evolved on one half of what is planted, and its correlation on the other."""
    features, plans, swaps = planted(seed, noise)
    changed = np.ones(300, dtype=bool)
    training = [plans.part(np.arange(40)), swaps.part(np.arange(50))]
    found = evolve(features, ERRORS, changed, training, seed, population=60, generations=30)
    unseen = plans.part(np.arange(40, 80))
    values = unseen.predicted(found.formula.losses(features))
    return found, float(spearmanr(values, unseen.losses).statistic)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_emq_finds_the_ranking_of_a_planted_formula(seed: int) -> None:
    found, unseen = found_in(seed)
    assert found.fitness >= 0.97 and unseen >= 0.95
    assert found.formula.inputs & ERRORS and found.formula.size <= 13
    assert found.tried > 500
    # It is a loss, as other scores are.
    features = planted(seed, 0.02)[0]
    for factor, less in ((0.0, False), (3.0, True)):
        plain = {n: in_units(v) for n, v in features.items()}
        scaled = {n: v * factor if n in ERRORS else v for n, v in plain.items()}
        values = evaluate(found.formula.tree, scaled)
        assert (values >= evaluate(found.formula.tree, plain)).all() if less else not values.any()


def test_a_formula_is_used_in_the_units_in_which_it_was_evolved() -> None:
    """Those of the compressed pairs: what is left as it is has parameters, influence … as well."""
    features, count = some_features(360, 5), 300
    for name in features.keys() - ERRORS:
        features[name][count:] *= 1e6
    for name in ERRORS:
        features[name][count:] = 0.0
    pairs = pairs_of(features, dense=60)
    truth = features["error"] + 0.3 * features["fisher_error"] * features["influence"]
    random = np.random.default_rng(5)
    members = csr_array((random.random((80, 360)) < 0.15).astype(float))
    plans = Observed(members, members @ np.where(pairs.changed, truth, 0.0))
    found = evolve(features, ERRORS, pairs.changed, [plans], 5, 60, 15)
    rule = Rule("emq", found.formula.inputs, found.formula.losses)
    (used,) = rank_correlations(plans.predicted(pairs.losses(rule))[None], plans.losses)
    assert used == pytest.approx(found.fitness, abs=1e-12)
    for tree in (("mul", "error", ("log1p", "parameters")), ("max", "error", "gate")):
        given = Formula(tree)
        rule = Rule("some", given.inputs, given.losses)
        alone = pairs_of({name: values[:count] for name, values in features.items()})
        assert np.array_equal(pairs.losses(rule)[:count], alone.losses(rule))


def test_emq_is_deterministic() -> None:
    first, again = found_in(3)[0], found_in(3)[0]
    assert first == again


def test_emq_beats_the_inputs_it_starts_from() -> None:
    features, plans, swaps = planted(4, 0.0)
    found = evolve(features, ERRORS, np.ones(300, dtype=bool), [plans, swaps], 4, 60, 30)
    single = [
        np.mean([rank_correlations(o.predicted(in_units(features[n]))[None], o.losses)[0]
                 for o in (plans, swaps)])
        for n in ERRORS
    ]  # fmt: skip
    assert found.fitness > max(single) + 0.02


def test_emq_rejects_formulas_that_are_no_losses() -> None:
    count = 40
    random = np.random.default_rng(0)
    features = {
        "error": np.exp(random.normal(size=count)),
        "weight_error": np.zeros(count),  # constant
        "influence": np.zeros(count),  # inverse of it is infinite
    }
    swaps = Observed(csr_array(np.eye(count)), features["error"] ** 2)
    found = evolve(features, ERRORS, np.ones(count, dtype=bool), [swaps], 0, 30, 10)
    values = evaluate(found.formula.tree, {n: in_units(v) for n, v in features.items()})
    assert np.isfinite(values).all() and values.std() > 0
    assert found.fitness == pytest.approx(1)
    assert found.formula == Formula("error")  # nothing longer ranks better
    assert list(nodes(found.formula.tree)) == ["error"]
    with pytest.raises(ValueError, match="tells the measured plans apart"):
        constant = {"weight_error": features["weight_error"]}
        evolve(constant, ERRORS, np.ones(count, dtype=bool), [swaps], 0)
    with pytest.raises(ValueError, match="three measured plans"):
        evolve(features, ERRORS, np.ones(count, dtype=bool), [swaps.part(np.arange(2))], 0)


def test_random_plans_are_near_the_budget_and_all_different() -> None:
    given = realistic(units=14, choices=6, share=0.4)
    plans = random_plans(given, 30, seed=5)
    assert len(plans) == 30 == len({tuple(plan.units.items()) for plan in plans})
    largest = max(m.bytes for found in given.choices.values() for m in found)
    for plan in plans:
        size = (plan.bytes - FIXED) / given.budget.unit_bytes
        assert SMALLEST - largest / given.budget.unit_bytes < size <= LARGEST
    assert len({plan.bytes for plan in plans}) > 20
    again = random_plans(given, 30, seed=5)
    assert plans == again and plans != random_plans(given, 30, seed=6)


def test_random_plans_keep_ties_and_stay_within_what_there_is() -> None:
    tables = [[(10 + u, 2.0), (20 + u, 1.0)] for u in range(3)]
    given = problem(tables, 0, ties=[[0, 2]])
    low, high = extremes(given)
    for unit_bytes in (low // 2, high * 3):
        plans = random_plans(problem(tables, unit_bytes, ties=[[0, 2]]), 5, seed=0)
        assert plans and all(low <= plan.bytes - FIXED <= high for plan in plans)
        assert all(plan.units["u0"] == plan.units["u2"] for plan in plans)
    assert len(random_plans(problem(tables, 50, ties=[[0, 2]]), 50, seed=0)) <= 4
