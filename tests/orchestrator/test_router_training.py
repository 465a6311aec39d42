"""Router calibration: its gradients, its independence of workers and accidents, what it gains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moesaic.methods.router_calibration import divergence, divergence_gradient
from moesaic.orchestrator import router_training
from moesaic.orchestrator.evaluate import Judge, evaluate_rows
from moesaic.orchestrator.worker import WorkerState, plain
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder

BITS = {"method": "rtn", "bits": 8, "group_size": -1}
REAP = [{"method": "reap", "keep": 0.5}, BITS]
SMALL: dict[str, Any] = {
    "candidates": [BITS, [{"method": "hc_smoe", "keep": 0.5}, BITS]],
    "baselines": {"reap": REAP},
    "budget": {"bits_per_weight": 5.5},
    "router_calibration": {"epochs": 2, "batch": 3, "learning_rate": 0.03, "held_back": 0.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3_moe")


def project(folder: Path, model: Path, patch: pytest.MonkeyPatch, **changes: Any) -> Project:
    made = Project(folder, model, patch)
    made.write(**{**SMALL, **changes})
    return made


def test_divergence_is_the_sum_of_kl_and_zero_at_home() -> None:
    generator = torch.Generator().manual_seed(0)
    own, dense = torch.randn(2, 7, 11, generator=generator)
    wanted = F.kl_div(own.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(divergence(own, dense), wanted)
    assert divergence(own, own) == 0


def test_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    head, dense_head = (
        torch.randn(11, 5, generator=generator),
        torch.randn(11, 8, generator=generator),
    )
    hidden, dense = (
        torch.randn(700, 5, generator=generator),
        torch.randn(700, 8, generator=generator),
    )
    total, gradient = divergence_gradient(
        hidden, dense, lambda x: x @ head.T, lambda x: x @ dense_head.T
    )
    leaf = hidden.clone().requires_grad_(True)
    loss = divergence(leaf @ head.T, dense @ dense_head.T)
    torch.testing.assert_close(total, float(loss.detach()), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_router_gradients_are_those_of_the_whole_model(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through the reduced checkpoint as plain transformers loads it."""
    source = make_model_folder(tmp_path / "model", model_type, dtype=torch.float32)
    made = Project(tmp_path / "project", source, monkeypatch)
    only = [{"method": "reap", "keep": 0.5}]
    made.write(
        serve="transformers",
        candidates=[only],
        keep=["self_attn"],
        baselines={},
        budget={"bits_per_weight": 24},
    )
    made.run()
    judge, pieces = _opened(made)
    state = WorkerState(1)
    evaluate_rows(state, judge, (0, 2), {})
    routers = _routers(pieces)
    save_file(routers, tmp_path / "routers")
    output = str(tmp_path / "gradients")
    found = router_training.chunk(state, judge, (0, 2), pieces, str(tmp_path / "routers"), output)
    ids = load_file(judge["ids"])["ids"][:2].long()
    dense = AutoModelForCausalLM.from_pretrained(source)
    reduced = AutoModelForCausalLM.from_pretrained(
        made.output / "model", experts_implementation="eager"
    )
    with torch.no_grad():
        target = dense(ids).logits
    loss = divergence(reduced(ids).logits.flatten(0, 1), target.flatten(0, 1))
    loss.backward()
    torch.testing.assert_close(found["kl"], float(loss.detach()), rtol=1e-4, atol=1e-6)
    wanted = {
        name: parameter.grad
        for name, parameter in reduced.named_parameters()
        if name.endswith(("gate.weight", "router.weight", "router.bias"))
    }
    gradients = load_file(output)
    assert len(gradients) == len(wanted) > 0
    for (key, gradient), (name, own) in zip(
        sorted(gradients.items()), sorted(wanted.items()), strict=True
    ):
        assert key.rpartition("|")[2] == name.rpartition(".")[2]
        torch.testing.assert_close(gradient, own, rtol=2e-3, atol=1e-6 * float(own.abs().max()))


def _opened(made: Project) -> tuple[dict[str, Any], dict[str, str]]:
    """The judge of the calibration text, and the pieces of the plan."""
    from moesaic.orchestrator import results
    from moesaic.orchestrator.experiment import Experiment
    from moesaic.orchestrator.plan_pieces import plan_pieces
    from moesaic.orchestrator.recipe import load_recipe
    from moesaic.search.alternatives import solve

    experiment = Experiment(load_recipe(made.folder / "recipe.yaml"), made.output)
    plan = solve(results.problem(experiment, results.measurements(experiment)), "knapsack")
    judge: Judge = experiment.calibration_judge
    return plain(judge), plan_pieces(experiment, experiment.walk, plan.units)


def _routers(pieces: dict[str, str]) -> dict[str, torch.Tensor]:
    from moesaic.orchestrator.pieces import read_piece

    return {
        f"{unit}|{name.removeprefix('router_')}": member.dense().float()
        for unit, path in pieces.items()
        for name, member in read_piece(Path(path)).items()
        if name in ("router_weight", "router_bias")
    }


def test_any_number_of_workers_gives_the_same_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    for size in (1, 3):
        made = project(tmp_path / str(size), model, monkeypatch)
        made.run(size=size)
        left.append(made.left())
    for name in left[0].keys() - {"README.md"}:
        assert left[0][name] == left[1][name], name


def test_a_killed_training_goes_on_from_its_last_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = project(tmp_path / "whole", model, monkeypatch)
    _, calls = whole.run()
    assert calls["router_training:chunk"] > 12
    broken = project(tmp_path / "broken", model, monkeypatch)
    total = calls.total()
    for kill_at in (total - calls["evaluate:evaluate_rows"] - 4, 3, 9):
        with pytest.raises(Killed):
            broken.run(kill_at=kill_at)
    _, rest = broken.run()
    assert rest["router_training:chunk"] < calls["router_training:chunk"]
    for name in whole.left().keys() - {"README.md"}:
        assert whole.left()[name] == broken.left()[name], name


def test_gain_is_told_and_a_second_run_trains_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, model, monkeypatch)
    result, _ = made.run()
    for name in ("plan", "reap"):
        before = result["scores"][name]["before_router_calibration"]
        assert before.keys() == {"perplexity", "kl", "accuracy"}
    reap = result["scores"]["reap"]
    assert reap["before_router_calibration"]["kl"] != reap["kl"]
    assert not (made.folder / "store" / "scratch").exists() or not any(
        (made.folder / "store" / "scratch").iterdir()
    )
    _, calls = made.run()
    assert calls["router_training:chunk"] == 0


def test_routers_that_got_no_better_stay_and_that_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"epochs": 1, "batch": 3, "learning_rate": 50.0}
    made = project(tmp_path, model, monkeypatch, router_calibration=wild)
    result, _ = made.run(stages=("evaluate", "assemble", "report"))
    score = result["scores"]["plan"]
    assert score["kl"] == score["before_router_calibration"]["kl"]
    assert "routers not better" in (made.output / "report.html").read_text(encoding="utf-8")


def test_asking_for_it_without_a_reduction_is_a_mistake(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, model, monkeypatch, candidates=[BITS], baselines={})
    with pytest.raises(Exception, match="router_calibration: nothing in this recipe reduces"):
        made.run()
