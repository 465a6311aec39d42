"""moesaic scores, and the recipe's key score: figures, resuming, what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from moesaic.methods.base import Spec
from moesaic.orchestrator import results
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.evaluate import evaluate_rows
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.score_features import error_features, weight_features
from moesaic.orchestrator.scoring import pairs_of, rated
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.worker import WorkerState, plain
from moesaic.search.base import Problem
from moesaic.search.features import FEATURES, Pairs, rule_of, scores
from tests.orchestrator.inline import InlinePool, Killed, Project
from tests.orchestrator.projects import make_model_folder

CHAINS: dict[str, Any] = {
    "candidates": [{"method": "rtn", "bits": [2, 3, 4, 8], "group_size": -1}],
    "baselines": {},
    "budget": {"bits_per_weight": 4.5},
    "evaluation": {"sequences": 2},
}
EVALUATE = "resident:evaluate_plan"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def compared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose scores were compared, and its store."""
    patch = pytest.MonkeyPatch()
    project = Project(tmp_path_factory.mktemp("compared"), model, patch)
    project.write(**CHAINS)
    project.result, project.counted = project.scores(16, 2, pictures=True)  # type: ignore[attr-defined]
    patch.undo()
    return project


Make = Callable[..., Project]


@pytest.fixture
def make(model: Path, compared: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(**changes)``: another project with the store of that one."""

    def project(**changes: Any) -> Project:
        made = Project(tmp_path, model, monkeypatch)
        made.write(**{**CHAINS, **changes})
        if not (tmp_path / "store").exists():
            shutil.copytree(compared.folder / "store", tmp_path / "store")
        return made

    return project


def opened(project: Project) -> Experiment:
    return open_experiment(project.folder / "recipe.yaml", project.output)


def features_of(project: Project) -> tuple[Experiment, Problem, Pairs]:
    """All features, from the store alone."""
    experiment = opened(project)
    table = results.measurements(experiment)
    problem = results.problem(experiment, table)
    pool = InlinePool()
    pairs = pairs_of(experiment, pool, View(), table, problem, FEATURES)  # type: ignore[arg-type]
    assert not pool.calls
    return experiment, problem, pairs


# Scores against their definitions


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """A weight, a compressed one, inputs and gradients of some tokens; two experts."""
    random = np.random.default_rng(0)
    weight, inputs, slopes = (random.normal(size=s) for s in ((2, 4, 3), (2, 50, 3), (2, 50, 4)))
    return {"w": weight, "q": np.round(weight, 1), "x": inputs, "g": slopes}


@pytest.fixture(scope="module")
def computed(tiny: dict[str, Any]) -> dict[str, np.ndarray]:
    weight, other = torch.from_numpy(tiny["w"]), torch.from_numpy(tiny["q"])
    moments = torch.from_numpy(np.square(tiny["x"]).mean(1))
    slopes = torch.from_numpy(np.square(tiny["g"]).mean(1))
    found = weight_features(weight) | error_features(weight, other, moments, slopes)
    return {name: value.numpy() for name, value in found.items()} | {"parameters": np.full(2, 12.0)}


def test_fisher_is_the_expected_square_of_each_weights_gradient(
    tiny: dict[str, Any], computed: dict[str, np.ndarray]
) -> None:
    expected = [
        sum(
            0.5
            * np.mean(tiny["g"][e][:, i] ** 2)
            * np.mean(tiny["x"][e][:, j] ** 2)
            * (tiny["w"][e, i, j] - tiny["q"][e, i, j]) ** 2
            for i in range(4)
            for j in range(3)
        )
        for e in range(2)
    ]
    np.testing.assert_allclose(rule_of("fisher").compute(computed), expected, rtol=1e-12)


def test_hessian_trace_is_that_of_the_kronecker_product(
    tiny: dict[str, Any], computed: dict[str, np.ndarray]
) -> None:
    expected = []
    for e in range(2):
        x, g = tiny["x"][e], tiny["g"][e]
        hessian = np.kron(g.T @ g / 50, x.T @ x / 50)  # [12, 12]
        change = np.square(tiny["w"][e] - tiny["q"][e]).sum()
        expected.append(0.5 * np.trace(hessian) / 12 * change)
    np.testing.assert_allclose(rule_of("hessian_trace").compute(computed), expected, rtol=1e-12)


def test_outlier_is_the_largest_ratio_of_a_column(
    tiny: dict[str, Any], computed: dict[str, np.ndarray]
) -> None:
    expected = []
    for e in range(2):
        size = np.abs(tiny["w"][e])
        ratio = max(size[:, j].max() / size[:, j].mean() for j in range(3))
        change = tiny["w"][e] - tiny["q"][e]
        expected.append(ratio * np.sum(change**2) / np.sum(tiny["w"][e] ** 2))
    np.testing.assert_allclose(rule_of("outlier").compute(computed), expected, rtol=1e-12)
    zeros = torch.zeros(2, 4, 3)
    assert weight_features(zeros)["outlier"].tolist() == [0, 0]


def test_mc_moe_and_block_importance_weigh_the_relative_error() -> None:
    used = {"frequency": np.array([0.5, 1]), "gate": np.array([0.25, 1]), "error": np.full(2, 0.04)}
    np.testing.assert_allclose(
        rule_of("mc_moe").compute(used), [0.5 * 0.25**1.5 * 0.2**2, 0.04], rtol=1e-12
    )
    turned = {"influence": np.array([0.1, 0.3]), "error": np.array([0.2, 0.4])}
    np.testing.assert_allclose(rule_of("block_importance").compute(turned), [0.02, 0.12])


def test_features_of_the_store_are_those_of_pieces_and_statistics(compared: Project) -> None:
    experiment, problem, pairs = features_of(compared)
    walk, model = experiment.walk, experiment.model
    places = {c.name: (u, c) for u in experiment.units for c in choices(u)}
    known = {
        m.unit: {n.chain: n for n in found} for found in problem.choices.values() for m in found
    }
    checked = 0
    for index, (name, chain) in enumerate(pairs.names):
        got = {feature: values[index] for feature, values in pairs.features.items()}
        unit, choice = places[name]
        if not chain:
            assert all(got[n] == 0 for n, f in FEATURES.items() if f.error)
            continue
        if index % 11:
            continue
        checked += 1
        at = () if choice.expert is None else choice.expert
        path = experiment.store.path("pieces", experiment.key(unit.name, chain, walk))
        weight = model.read_unit(unit)[choice.member][at].double().numpy()
        change = weight - read_piece(path)[choice.member].effective()[at].double().numpy()
        sums = load_stats(experiment.store.path("stats", walk.stats_key(unit.block)))
        site = sums[unit.sites[choice.member]]
        tokens = max(int(site["tokens"][at]), 1)
        gram = site["hessian"][at].double().numpy() / tokens
        slopes = load_stats(experiment.store.path("gradients", walk.gradients_key(unit.block)))
        squares = slopes[f"{unit.name}|{choice.member}"]["grad_sq"][at].double().numpy()
        squares = squares / experiment.gradient_samples()
        expected = {
            "weight_error": np.sum(change**2),
            "weight_norm": np.sum(weight**2),
            "output_error": np.trace(change @ gram @ change.T),
            "output_norm": np.trace(weight @ gram @ weight.T),
            "diagonal_error": np.sum(change**2 @ np.diag(gram)),
            "trace": np.trace(gram),
            "gradient_norm": squares.sum(),
            "fisher_error": 0.5 * squares @ change**2 @ np.diag(gram),
            "gradient": 0.5 * squares @ np.diag(change @ gram @ change.T),
            "parameters": weight.size,
            "error": known[name][chain].error,
        }
        for feature, value in expected.items():
            assert got[feature] == pytest.approx(value, rel=2e-4, abs=1e-12), (name, feature)
    assert checked > 20


def test_routers_give_all_tokens_away(compared: Project) -> None:
    experiment, _, pairs = features_of(compared)
    frequency, gate = {}, {}
    for index, (name, _) in enumerate(pairs.names):
        frequency[name] = pairs.features["frequency"][index]
        gate[name] = pairs.features["gate"][index]
    load, _ = results.expert_load(experiment, experiment.walk)
    tokens = experiment.calibration.ids.size
    for unit in experiment.units:
        names = [choice.name for choice in choices(unit) if choice.member == "up"]
        if unit.kind == "linear":
            assert frequency[unit.name] == gate[unit.name] == 1
            continue
        # Two experts per token, whose gates add up to one.
        assert [round(frequency[n] * tokens) for n in names] == load[unit.block]
        assert sum(frequency[n] for n in names) == pytest.approx(2)
        assert sum(gate[n] for n in names) == pytest.approx(1, rel=1e-5)


def test_swap_kl_of_a_units_choices_adds_up_to_what_is_measured(compared: Project) -> None:
    experiment, _, pairs = features_of(compared)
    bank = next(unit for unit in experiment.units if unit.kind == "bank")
    linear = experiment.units[0]
    judge = plain(experiment.calibration_judge)
    for unit in (bank, linear):
        chain = experiment.offers[unit.name][0]
        names = {choice.name for choice in choices(unit)}
        own = [i for i, (n, c) in enumerate(pairs.names) if n in names and c == chain]
        assert len(own) == len(names)
        pieces = plan_pieces(experiment, experiment.walk, dict.fromkeys(names, chain))
        kl = evaluate_rows(WorkerState(1), judge, (0, 12), pieces)["kl"]
        expected = math.fsum(kl) / (12 * 23)
        shares = pairs.features["swap_kl"][own]
        assert shares.sum() == pytest.approx(expected, rel=1e-9)
        predicted = pairs.features["gradient"][own]
        np.testing.assert_allclose(shares / shares.sum(), predicted / predicted.sum(), rtol=1e-9)


# The command


def test_the_table_has_every_score_and_its_correlation_on_unseen_plans(compared: Project) -> None:
    result = compared.result  # type: ignore[attr-defined]
    document = compared.json("score_table.json")
    assert {key: result[key] for key in document} == document
    rows = {row["score"]: row for row in document["scores"]}
    assert set(rows) == {*scores(), "emq"}
    assert document["measured"] == {"plans": 16, "swaps": 40}
    assert document["held_out"] == {"plans": 8, "swaps": 20}
    values = [row["plans"]["spearman"] for row in document["scores"]]
    assert values == sorted(values, reverse=True)
    assert rows["swap_kl"]["swaps"] == {"spearman": None, "kendall": None}
    points = pd.read_parquet(compared.output / "score_points.parquet")
    for kind in ("plans", "swaps"):
        own = points[(points["kind"] == kind) & points["held_out"]]
        for name in ("gradient", "emq", "outlier"):
            expected = {
                "spearman": spearmanr(own[name], own["kl"]).statistic,
                "kendall": kendalltau(own[name], own["kl"]).statistic,
            }
            assert rows[name][kind] == pytest.approx(expected)
    single = points[points["kind"] == "swaps"]
    np.testing.assert_allclose(single["swap_kl"], single["kl"], rtol=1e-12)
    # Random weights have no structure, but what gradients say is right.
    assert rows["gradient"]["swaps"]["spearman"] > 0.9
    pictures = {path.stem for path in (compared.output / "pictures").glob("score_*.png")}
    assert pictures == {f"score_{name}" for name in rows}
    counted = compared.counted  # type: ignore[attr-defined]
    assert counted[EVALUATE] == 56 and counted["score_features:unit_features"] == 10


def test_what_a_killed_command_measured_is_not_measured_again(
    make: Make, compared: Project
) -> None:
    project = make()
    for path in (project.folder / "store" / "features").rglob("*"):
        if path.is_file():
            path.unlink()
    shutil.rmtree(project.folder / "store" / "scores")
    with pytest.raises(Killed):
        project.scores(16, size=2, kill_at=30)
    done = project.calls[EVALUATE]
    _, calls = project.scores(16)
    assert done > 20 and calls[EVALUATE] == 56 - done
    assert calls["measure:compress_job"] == 0
    # One worker or two, at once or in two attempts.
    for name in ("score_table.json", "emq.json"):
        assert (project.output / name).read_bytes() == (compared.output / name).read_bytes()


def test_fewer_swaps_leave_their_score_out(make: Make) -> None:
    project = make()
    result, calls = project.scores(16, swaps=8)
    assert result["measured"] == {"plans": 16, "swaps": 8} and calls[EVALUATE] == 0
    assert "swap_kl" not in {row["score"] for row in result["scores"]}


def test_scores_that_want_gradients_are_left_out_without(model: Path, make: Make) -> None:
    few = {"candidates": [{"method": "rtn", "bits": [3, 8], "group_size": -1}]}
    project = make(calibration={"gradient_sequences": 0, "sequences": 4}, **few)
    result, _ = project.scores(8, swaps=0)
    names = {row["score"] for row in result["scores"]}
    assert names == {"output", "outlier", "block_importance", "mc_moe", "emq"}
    assert result["measured"] == {"plans": 8} and "swaps" not in result["scores"][0]


# The recipe's key


def searched(project: Project) -> dict[str, Any]:
    project.run(stages=("search",))
    plan: dict[str, Any] = project.json("plan.json")
    return plan


@pytest.mark.parametrize("name", ["fisher", "mc_moe", "swap_kl", "output"])
def test_a_search_makes_the_score_of_the_recipe_small(name: str, make: Make) -> None:
    plain_plan = searched(make())
    project = make(score=name)
    plan = searched(project)
    experiment, problem, pairs = features_of(project)
    losses = dict(zip(pairs.names, pairs.losses(rule_of(name)), strict=True))
    table = results.measurements(experiment)
    given = rated(experiment, InlinePool(), View(), table, problem)  # type: ignore[arg-type]
    for choice, found in given.choices.items():
        for m in found:
            assert m.loss == pytest.approx(losses[choice, m.chain], rel=1e-12)

    def total(units: dict[str, Any]) -> float:
        chains = {u: tuple((s["method"], json.dumps(s["options"], sort_keys=True)) for s in c)
                  for u, c in units.items()}  # fmt: skip
        by_text = {(u, tuple((s.method, s.options) for s in c)): v for (u, c), v in losses.items()}
        return sum(by_text[unit, chain] for unit, chain in chains.items())

    assert plan["bytes"] <= plan["budget_bytes"]
    assert total(plan["units"]) <= total(plain_plan["units"]) * (1 + 1e-9)
    # What is told of the plan is still its predicted KL, which the other one makes smallest.
    assert plan["loss"] >= plain_plan["loss"] * (1 - 1e-9)
    if name != "fisher":
        assert plan["units"] != plain_plan["units"]


def test_without_the_key_and_with_the_default_plans_are_the_same_bytes(make: Make) -> None:
    searched(make())
    project = make()
    first = (project.output / "plan.json").read_bytes()
    assert b"score" not in (project.output / "recipe.yaml").read_bytes()
    searched(make(score="gradient"))
    assert (project.output / "plan.json").read_bytes() == first


def test_an_evolved_formula_is_a_score(make: Make, compared: Project) -> None:
    project = make(score=str(compared.output / "emq.json"))
    assert searched(project)["loss"] > 0
    kept = (project.output / "recipe.yaml").read_text()
    assert f"score: {compared.output}/emq.json" in kept


def test_a_study_starts_from_the_score_and_goes_on_with_no_other(make: Make) -> None:
    project = make(score="fisher", tune={"prune": False})
    plan = searched(project)
    project.tune(2)
    told = pd.read_parquet(project.output / "trials.parquet")
    pairs = features_of(project)[2]
    fisher = dict(zip(pairs.names, pairs.losses(rule_of("fisher")), strict=True))
    chains = {u: tuple(Spec(x["method"], json.dumps(x["options"], sort_keys=True)) for x in c)
              for u, c in plan["units"].items()}  # fmt: skip
    expected = sum(fisher[unit, chain] for unit, chain in chains.items())
    assert told["start"][0] == "as predicted"
    assert told["predicted_loss"][0] == pytest.approx(expected, rel=1e-9)
    project = make(score="mc_moe", tune={"prune": False})
    with pytest.raises(UserError, match="made with something else: score: fisher, now mc_moe"):
        project.tune(3)


REDUCED = [{"method": "reap", "keep": 0.5}, {"method": "rtn", "bits": 4, "group_size": -1}]
NO_GRADIENTS = {"gradient_sequences": 0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"score": "trace"}, "score: unknown score 'trace': known are block_importance, fish"),
    "file": ({"score": "none.json"}, "score: no file"),
    "gradients": (
        {"score": "fisher", "calibration": NO_GRADIENTS},
        "score: fisher needs gradients: set calibration.gradient_sequences to 16 or more, or",
    ),
    "search": ({"score": "fisher", "search": "strs"}, "score: search: strs shares out by a rule"),
    "reductions": (
        {"score": "mc_moe", "candidates": [*CHAINS["candidates"], REDUCED]},
        "score: mc_moe does not tell what fewer or narrower experts, heads or MLPs lose",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_score_that_cannot_be_is_refused_before_any_work(case: str, make: Make) -> None:
    changes, text = REFUSED[case]
    project = make(**changes)
    with pytest.raises(UserError) as error:
        project.run(stages=("search",))
    assert text in str(error.value) and "recipe.yaml" in str(error.value)
    assert project.calls.total() == 0


def test_scores_near_several_budgets_are_refused_before_any_work(make: Make) -> None:
    project = make(budget={"bits_per_weight": [3.0, 4.0]})
    with pytest.raises(UserError, match="budget: scores are compared near one budget"):
        project.scores(4)
    assert project.calls.total() == 0


def test_a_file_without_a_formula_is_refused(make: Make) -> None:
    project = make(score="bad.json")
    (project.folder / "bad.json").write_text('{"formula": ["exp", "error"]}')
    with pytest.raises(UserError, match=r"recipe.yaml: score: .*bad.json: formula: unknown oper"):
        project.run(stages=("search",))


def test_reductions_are_left_out_and_reductions_alone_refused(make: Make) -> None:
    few = {"method": "rtn", "bits": [3, 8], "group_size": -1}
    project = make(candidates=[few, REDUCED], calibration={"sequences": 4, "shards": 2})
    result, _ = project.scores(8, swaps=0)
    assert result["measured"] == {"plans": 8}
    experiment = opened(project)
    reduced = {
        experiment.key(unit, chain, experiment.walk)
        for unit, chains in experiment.offers.items()
        for chain in chains
        if len(chain) > 1
    }
    used = {Path(path).stem for call in project.judged for path in call["pieces"].values()}
    assert reduced and used and not reduced & used
    points = pd.read_parquet(project.output / "score_points.parquet")
    assert (points["gradient"] > 0).all()
    project = make(candidates=[REDUCED], budget={"bits_per_weight": 5.5})
    with pytest.raises(UserError, match=r"candidates: none leaves the shape of .*experts as it is"):
        project.scores(8)


def test_a_dense_model_has_no_score_about_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "llama", "llama")
    project = Project(tmp_path, folder, monkeypatch)
    project.write(**CHAINS, score="mc_moe")
    with pytest.raises(UserError, match="score: mc_moe is about experts, and there are none"):
        project.run(stages=("search",))


def test_what_slicing_loses_is_no_swaps_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "llama", "llama")
    project = Project(tmp_path, folder, monkeypatch)
    sliced = {"slice": {"method": "slicegpt", "hidden": 0.7}, "score": "swap_kl"}
    project.write(**{**CHAINS, **sliced, "budget": {"bits_per_weight": 8}})
    project.run(stages=("search", "evaluate"))
    scores = project.json("scores.json")
    # Would every swap have it, whatever stays as it is would seem to save all of it.
    assert scores["sliced"]["kl"] > 0.1
    assert scores["plan"]["kl"] < 1.1 * scores["sliced"]["kl"]
