"""From a recipe to a checkpoint, without Ray: what a run leaves, and what it does not do twice."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from moesaic.methods.base import Spec, chain_text
from moesaic.orchestrator import experiment as experiment_module
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import load_recipe
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder

# Whole rows and symmetric: what transformers loads as well.
LOADABLE: dict[str, Any] = {
    "candidates": [
        {"method": "rtn", "bits": [3, 8], "group_size": -1, "symmetric": True},
        {"method": "gptq", "bits": 4, "group_size": -1, "symmetric": True},
    ],
    "baselines": {"rtn 4": {"method": "rtn", "bits": 4, "group_size": -1, "symmetric": True}},
    "budget": {"bits_per_weight": 5.5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_model_folder(tmp_path_factory.mktemp(name), name)
        for name in ("qwen3_moe", "llama")
    }


@pytest.fixture
def project(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "one", models["qwen3_moe"], monkeypatch)
    made.write()
    return made


@pytest.mark.parametrize("serve", ["moesaic", "transformers"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_a_run_leaves_what_it_promises(
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    serve: str,
) -> None:
    project = Project(tmp_path, models[model_type], monkeypatch)
    recipe = load_recipe(project.write(serve=serve, **LOADABLE))
    result, _ = project.run(size=2)
    experiment = Experiment(recipe, project.output)

    plan = project.json("plan.json")
    names = [choice.name for unit in experiment.units for choice in choices(unit)]
    assert list(plan["units"]) == names
    allowed = {(), *recipe.candidates}
    chosen = {
        name: tuple(Spec.of(s["method"], s["options"]) for s in specs)
        for name, specs in plan["units"].items()
    }
    assert set(chosen.values()) <= allowed
    assert len(set(chosen.values())) > 1  # the budget lies between two candidates
    for tie in experiment.space.ties():
        assert len({chosen[name] for name in tie}) == 1

    weights = list((project.output / "model").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    assert plan["bytes"] == size
    # The budget in bits is for the compressible weights; what lies around them comes on top.
    table = pd.read_parquet(project.output / "measurements.parquet")
    by_chain = table.set_index(["unit", "chain"])["bytes"]
    units = sum(int(by_chain[name, chain_text(chain)]) for name, chain in chosen.items())
    weights_bytes = int(5.5 * experiment.sizes.size.weights / 8)
    assert units <= weights_bytes
    assert plan["budget_bytes"] == size - units + weights_bytes
    assert plan["budget_bytes"] - size < 0.1 * size  # and little of it is left over
    assert result["plan"]["bytes"] == size
    assert result["model"] == str(project.output / "model")

    scores = project.json("scores.json")
    assert list(scores) == ["dense", "rtn 4", "plan"] == list(result["scores"])
    for name, score in scores.items():
        assert {"bytes", "bits_per_weight", "perplexity", "kl"} <= score.keys()
        assert math.isfinite(score["kl"]) and score["perplexity"] > 1
        assert (score["kl"] == 0) == (name == "dense")
    assert scores["plan"]["bytes"] == size
    assert scores["dense"]["bits_per_weight"] == 16
    original = [path.stat().st_size for path in project.model.glob("*.safetensors")]
    assert scores["dense"]["bytes"] == sum(original)
    assert 4 < scores["rtn 4"]["bits_per_weight"] < 5.3
    assert scores["plan"]["bits_per_weight"] <= 5.5

    dense_offered = serve == "transformers" or model_type == "llama"
    for unit in experiment.units:
        for choice in choices(unit):
            rows = table[table["unit"] == choice.name]
            dense = {()} if dense_offered or unit.kind == "linear" else set()
            wanted = {chain_text(c) for c in {*recipe.chains(), *dense}}
            assert set(rows["chain"]) == wanted and len(rows) == len(wanted)
            assert (rows["bytes"] > 0).all() and (rows["predicted_kl"] >= 0).all()
            least = rows.sort_values("bits_per_weight").iloc[0]
            assert least["predicted_kl"] == rows["predicted_kl"].max()

    again = load_recipe(project.output / "recipe.yaml")
    assert again == recipe


@pytest.mark.parametrize(
    ("asked", "cluster", "in_hardware", "dtype"),
    [
        ("auto", None, False, torch.float32),
        ("auto", None, True, torch.bfloat16),
        ("auto", "127.0.0.1:6379", False, torch.bfloat16),
        ("bfloat16", None, False, torch.bfloat16),
    ],
)
def test_a_processor_without_16_bit_products_computes_in_float32_unless_told(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    cluster: str | None,
    in_hardware: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(experiment_module, "has_16_bit_products", lambda: in_hardware)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    compute = {"dtype": asked} | ({"address": cluster} if cluster else {})
    experiment = Experiment(load_recipe(project.write(compute=compute)), project.output)
    assert experiment.model.dtype == dtype
    named = asked if dtype == torch.bfloat16 else "float32"
    assert experiment.walk.dtype == experiment.judge.dtype == named
    assert experiment.dtype == torch.bfloat16  # scales are written in the checkpoint's


def test_a_budget_in_bytes_holds_for_the_files_and_is_spent(project: Project) -> None:
    project.run(stages=("search",))
    given = project.json("plan.json")["bytes"]
    project.write(budget={"bits_per_weight": None, "bytes": given + 3000})
    project.run(stages=("search", "assemble"))
    plan = project.json("plan.json")
    size = (project.output / "model" / "model.safetensors").stat().st_size
    assert plan["bytes"] == size <= plan["budget_bytes"] == given + 3000
    assert size > given + 2000


@pytest.mark.parametrize("kill_at", [None, 5])
def test_propagated_plans_learn_from_compressed_predecessors(
    project: Project,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int | None,
) -> None:
    plain, _ = project.run()
    keys = set((project.folder / "store").glob("stats/*/*.safetensors"))
    project.write(propagate=True)
    calls: Counter[str] = Counter()
    if kill_at is not None:
        for _ in range(60):
            try:
                propagated, _ = project.run(size=2, kill_at=kill_at)
                break
            except Killed:
                continue
    else:
        propagated, calls = project.run(size=2)
        assert calls["calibrate:forward"] == calls["gradients:reverse"] == 0
        assert min(calls["calibrate:collect"], calls["calibrate:advance"]) > 0
    # The first block's statistics are the dense model's, the second block's each plan's own.
    assert len(set((project.folder / "store").glob("stats/*/*.safetensors")) - keys) == 2
    assert propagated["plan"]["bytes"] == plain["plan"]["bytes"]
    for name in ("rtn 4", "plan"):
        assert math.isfinite(propagated["scores"][name]["kl"])
    # rtn does not look at statistics; what gptq makes of the second block has changed.
    assert propagated["scores"]["rtn 4"]["kl"] == plain["scores"]["rtn 4"]["kl"]
    left = project.left()
    _, calls = project.run(size=1)
    assert calls.total() == 0
    assert project.left() == left


def test_propagation_gives_other_statistics_after_the_first_block_only(project: Project) -> None:
    project.write(
        propagate=True,
        candidates=[{"method": "gptq", "bits": [3, 4], "group_size": 16}],
        baselines=None,
        budget={"bits_per_weight": 4.5},
    )
    project.run()
    by_block: dict[int, list[Path]] = {}
    for seal in (project.folder / "store").glob("stats/*/*.seal.json"):
        block = json.loads(seal.read_text())["metadata"]["block"]
        by_block.setdefault(block, []).append(
            seal.with_name(seal.name.replace(".seal.json", ".safetensors"))
        )
    assert {block: len(paths) for block, paths in by_block.items()} == {0: 1, 1: 2}
    with safe_open(by_block[1][0], "pt") as one, safe_open(by_block[1][1], "pt") as two:
        names = [key for key in one.keys() if key.endswith("|hessian")]  # noqa: SIM118
        assert len(names) > 2
        for name in names:
            assert not torch.equal(one.get_tensor(name), two.get_tensor(name))


def test_units_that_the_recipe_keeps_stay_as_they_are(project: Project) -> None:
    project.write(keep=["o_proj$", r"layers\.1\.mlp"], budget={"bits_per_weight": 5})
    project.run()
    plan = project.json("plan.json")
    assert not [name for name in plan["units"] if "o_proj" in name or "layers.1.mlp" in name]
    with (
        safe_open(project.model / "model.safetensors", "pt") as old,
        safe_open(project.output / "model" / "model.safetensors", "pt") as new,
    ):
        names = [n for n in old.keys() if "o_proj" in n or "layers.1.mlp.experts" in n]  # noqa: SIM118
        assert len(names) > 10
        for name in names:
            assert torch.equal(old.get_tensor(name), new.get_tensor(name))


def refused(project: Project, **changes: Any) -> str:
    """The answer to a recipe before anything starts."""
    project.write(**changes)
    with pytest.raises(UserError) as error:
        project.run()
    assert not list((project.folder / "store").glob("stats/*/*"))
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


def test_a_budget_below_the_smallest_plan_is_told_what_would_do(project: Project) -> None:
    message = refused(project, budget={"bits_per_weight": 2})
    assert "too few" in message and "not compressed" in message
    bits = float(message.partition("(")[2].partition(" bits per weight")[0])
    smallest = int(message.partition("allow has ")[2].partition(" bytes")[0].replace(",", ""))
    project.write(budget={"bits_per_weight": bits})
    project.run(stages=("search",))  # what the message says is enough
    assert project.json("plan.json")["bytes"] <= smallest + 1000
    project.write(budget={"bits_per_weight": None, "bytes": smallest})
    project.run(stages=("search",))
    assert project.json("plan.json")["bytes"] <= smallest


def test_a_budget_above_the_dense_model_is_refused(project: Project) -> None:
    message = refused(project, budget={"bits_per_weight": None, "bytes": "1 GB"})
    assert "1,000,000,000 bytes hold the whole dense model" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 32}]},
            ["group", "32", "48", "keep"],
        ),
        ({"keep": ["."]}, ["keep", "no unit"]),
        ({"model": "/no/such/folder"}, ["model", "/no/such/folder"]),
        ({"calibration": {"sequences": 40000}}, ["calibration", "first.txt", "tokens"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    project: Project, changes: dict[str, Any], words: list[str]
) -> None:
    message = refused(project, **changes)
    for word in words:
        assert word in message


def test_candidates_that_the_target_cannot_load_are_refused_where_none_is_left(
    project: Project,
) -> None:
    asymmetric = {"method": "rtn", "bits": [4, 8], "group_size": 16, "symmetric": False}
    symmetric = {"rtn 4": {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": True}}
    message = refused(project, serve="transformers", candidates=[asymmetric], baselines=symmetric)
    assert "transformers" in message and "symmetric" in message
