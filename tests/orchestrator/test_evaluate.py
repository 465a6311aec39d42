"""Scores against plain transformers, in float64 from its logits on."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.orchestrator import evaluate, stages
from moesaic.orchestrator.console import View
from moesaic.orchestrator.evaluate import evaluate_rows, score
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Texts
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.inline import InlinePool
from tests.orchestrator.planning import grouped, make_pieces
from tests.orchestrator.projects import make_model_folder, make_recipe

SEQUENCES, LENGTH = 9, 20


@pytest.fixture(scope="module", params=["qwen3_moe", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts; and a head that shares the embedding's weight and caps its logits."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_model_folder(folder, request.param, dtype=torch.float32)


def judged_on(folder: Path, model: Path, second: str) -> Experiment:
    """Two texts, six sequences of one and three of the other, which is called ``second``."""
    texts = [{"file": "first.txt", "weight": 2}, {"file": "held-out.txt", "name": second}]
    section = {"texts": texts, "sequences": SEQUENCES, "length": LENGTH}
    file = make_recipe(folder, model, evaluation=section, budget={"bits_per_weight": 8})
    return Experiment(load_recipe(file), folder / "runs" / "small")


@pytest.fixture
def experiment(tmp_path: Path, model: Path) -> Experiment:
    return judged_on(tmp_path, model, "other")


@pytest.fixture
def pieces(experiment: Experiment, tmp_path: Path) -> dict[str, str]:
    made = make_pieces(experiment.model, lambda *_: grouped(3), tmp_path / "made")
    return {unit: str(path) for unit, path in made.items()}


def logits(model: Path, ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Of transformers, ``[B, T, vocab]`` in float64."""
    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    missing = reference.load_state_dict(dict(weights or {}), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        return reference(ids).logits.double()


def decoded(experiment: Experiment, pieces: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of pieces under the names of transformers' modules."""
    found = {}
    for name, members in evaluate.dense_members(pieces).items():
        if "weight" in members:
            found[f"{name}.weight"] = members["weight"]
        else:
            found[f"{name}.gate_up_proj"] = torch.cat([members["gate"], members["up"]], dim=1)
            found[f"{name}.down_proj"] = members["down"]
    return found


def reference_scores(dense: Tensor, other: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Sums over each sequence, by the definitions."""
    log_p, log_q = (x[:, :-1].log_softmax(-1) for x in (dense, other))
    targets = ids[:, 1:, None]
    return {
        "nll": -log_q.gather(-1, targets).sum((1, 2)),
        "kl": (log_p.exp() * (log_p - log_q)).sum((1, 2)),
        "correct": (log_q.argmax(-1, keepdim=True) == targets).sum((1, 2)),
    }


def part(experiment: Experiment, rows: tuple[int, int], pieces: Mapping[str, str]) -> Any:
    return evaluate_rows(WorkerState(1), asdict(experiment.judge), rows, dict(pieces))


def test_sums_are_those_of_transformers_logits(
    experiment: Experiment, model: Path, pieces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evaluate, "_LOGIT_ROWS_ON_CPU", 7
    )  # several steps per sequence, the last shorter
    ids = torch.from_numpy(experiment.evaluation.ids).long()
    dense = logits(model, ids)
    part(experiment, (0, SEQUENCES), {})
    found = part(experiment, (0, SEQUENCES), pieces)
    wanted = reference_scores(dense, logits(model, ids, decoded(experiment, pieces)), ids)
    assert found["tokens"] == LENGTH - 1
    assert torch.allclose(torch.tensor(found["nll"]).double(), wanted["nll"], rtol=1e-4)
    assert torch.allclose(torch.tensor(found["kl"]).double(), wanted["kl"], rtol=1e-3)
    assert found["correct"] == wanted["correct"].tolist()
    assert min(found["kl"]) > 1e-4


def test_the_dense_model_has_no_divergence_from_itself(experiment: Experiment, model: Path) -> None:
    found = part(experiment, (0, SEQUENCES), {})
    ids = torch.from_numpy(experiment.evaluation.ids).long()
    dense = logits(model, ids)
    wanted = reference_scores(dense, dense, ids)
    assert found["kl"] == [0.0] * SEQUENCES
    assert torch.allclose(torch.tensor(found["nll"]).double(), wanted["nll"], rtol=1e-5)


def test_parts_are_independent_of_how_the_sequences_are_cut(
    experiment: Experiment, pieces: dict[str, str]
) -> None:
    for rows in ((0, 9), (0, 4), (4, 9)):
        part(experiment, rows, {})
    whole = part(experiment, (0, 9), pieces)
    halves = [part(experiment, rows, pieces) for rows in ((0, 4), (4, 9))]
    for name in ("nll", "kl"):
        together = halves[0][name] + halves[1][name]
        assert together == pytest.approx(whole[name], rel=1e-4)


def test_scores_are_means_over_tokens_and_over_each_source() -> None:
    parts = [
        {"nll": [3.0, 6.0], "kl": [0.3, 0.6], "correct": [1, 2], "tokens": 3},
        {"nll": [9.0], "kl": [0.9], "correct": [3], "tokens": 3},
    ]
    parts = [{**p, "seconds": 2.0, "peak_bytes": b} for p, b in zip(parts, (5, 7), strict=True)]
    found = score(parts, [0, 1, 0], ["a", "b", "unused"])
    assert found["perplexity"] == pytest.approx(math.exp(18 / 9))
    assert found["kl"] == pytest.approx(1.8 / 9)
    assert found["accuracy"] == pytest.approx(6 / 9)
    assert found["tokens_per_second"] == pytest.approx(4 * 3 / 4)
    assert found["peak_memory_bytes"] == 7
    assert found["sources"].keys() == {"a", "b"}
    assert found["sources"]["a"]["perplexity"] == pytest.approx(math.exp(12 / 6))
    assert found["sources"]["b"]["kl"] == pytest.approx(0.2)


@pytest.mark.parametrize("nll", [1e6, math.inf, math.nan])
def test_a_hopeless_model_has_no_perplexity(nll: float) -> None:
    broken = {"nll": [nll], "kl": [1.0], "correct": [0], "tokens": 2, "seconds": 0, "peak_bytes": 1}
    found = score([broken], [0], ["a"])
    assert found["perplexity"] is None is found["sources"]["a"]["perplexity"]
    assert found["kl"] == 0.5
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("kl", [math.inf, math.nan, -math.inf])
def test_a_kl_without_bound_is_no_number(kl: float) -> None:
    part = {"nll": [1.0, 1.0], "kl": [0.5, kl], "correct": [0, 0], "tokens": 2}
    found = score([{**part, "seconds": 0, "peak_bytes": 1}], [0, 0], ["a"])
    assert found["kl"] is None
    assert found["perplexity"] == pytest.approx(math.exp(0.5))


def test_known_scores_are_not_made_again_and_lost_states_are(
    experiment: Experiment, pieces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Texts, "batch", property(lambda self: 2))

    def run() -> tuple[InlinePool, dict[str, Any]]:
        pool = InlinePool()
        return pool, stages.evaluated(experiment, pool, View(), {"plan": pieces})

    pool, first = run()
    calls = pool.calls["evaluate:evaluate_rows"]
    assert calls == 6  # three parts of each model
    assert first["dense"]["kl"] == 0 < first["plan"]["kl"]
    assert first["plan"]["sources"].keys() == {"first.txt", "other"}
    two, one = (first["plan"]["sources"][name]["kl"] for name in ("first.txt", "other"))
    assert first["plan"]["kl"] == pytest.approx((2 * two + one) / 3)
    pool, second = run()
    assert pool.calls.total() == 0 and second == first
    # One of the dense model's remembered states is damaged: only the dense model runs again.
    states = sorted(experiment.store.root.glob("hidden/*/*.safetensors"))
    states[0].write_bytes(states[0].read_bytes()[:-4])
    pool, third = run()
    assert pool.calls.total() == 3
    assert third["plan"] == first["plan"]
    assert third["dense"]["perplexity"] == first["dense"]["perplexity"]


def test_scores_know_their_sources_when_only_a_name_changes(
    experiment: Experiment, pieces: dict[str, str], tmp_path: Path, model: Path
) -> None:
    stages.evaluated(experiment, InlinePool(), View(), {"plan": pieces})
    renamed = judged_on(tmp_path, model, "renamed")
    found = stages.evaluated(renamed, InlinePool(), View(), {"plan": pieces})
    assert found["plan"]["sources"].keys() == {"first.txt", "renamed"}
