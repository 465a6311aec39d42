"""Runs that choose between fewer experts and fewer bits: plans, resuming, what is kept."""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.methods.base import Spec, chain_text, reducers
from moesaic.orchestrator import run
from moesaic.orchestrator.compression import Bench
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.listing import read_run
from moesaic.orchestrator.recipe import load_recipe
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder

GPTQ = {"method": "gptq", "bits": [2, 4], "group_size": 16}
FOUR = {**GPTQ, "bits": 4}
REAP = {"method": "reap", "keep": [0.75, 0.5]}
HC_SMOE = {"method": "hc_smoe", "keep": 0.5}
JOINT: dict[str, Any] = {
    "candidates": [GPTQ, [REAP, GPTQ]],
    "baselines": {"half": [{"method": "reap", "keep": 0.5}, FOUR]},
    "budget": {"bits_per_weight": 4.2},
}
KINDS = ("reductions", "pieces", "errors", "stats", "gradients", "ids")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "one", model, monkeypatch)
    made.write(**JOINT)
    return made


def entries(project: Project, *kinds: str) -> dict[str, bytes]:
    """Entries of the store by kind and name."""
    store = project.folder / "store"
    paths = [path for kind in kinds for path in store.glob(f"{kind}/*/*.safetensors")]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def test_the_joint_plan_is_never_worse_than_either_alone(project: Project) -> None:
    only_experts = [FOUR, *([{"method": "reap", "keep": keep}, FOUR] for keep in (0.75, 0.5))]
    others = {"bits": [GPTQ], "experts": only_experts}
    for bits in (3.2, 3.7, 4.2):
        loss = {}
        for name, candidates in (("joint", JOINT["candidates"]), *others.items()):
            project.write(
                **{**JOINT, "candidates": candidates, "budget": {"bits_per_weight": bits}}
            )
            project.run(stages=("search",))
            plan = project.json("plan.json")
            assert plan["bytes"] <= plan["budget_bytes"]
            loss[name] = plan["loss"]
        assert loss["joint"] <= min(loss.values()) * (1 + 1e-9), (bits, loss)
        assert loss["joint"] > 0


def test_a_run_says_what_became_of_the_experts(project: Project, tmp_path: Path) -> None:
    project.write(
        **{**JOINT, "budget": {"bits_per_weight": 2.5}},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )
    result, calls = project.run(stages=("evaluate", "assemble", "report"))
    assert calls["measure:compress_job"] > 0
    plan, scores = project.json("plan.json"), project.json("scores.json")
    chosen = {
        name: tuple(Spec.of(s["method"], s["options"]) for s in links)
        for name, links in plan["units"].items()
    }
    lengths = {len(chain) for chain in chosen.values()}
    assert lengths == {1, 2}  # linears, and experts after a reduction
    size = sum(p.stat().st_size for p in (project.output / "model").glob("*.safetensors"))
    assert plan["bytes"] == size == scores["plan"]["bytes"]
    assert scores["plan"]["bits_per_weight"] <= 2.5
    for score in scores.values():
        assert math.isfinite(score["kl"]) and math.isfinite(score["perplexity"])

    table = pd.read_parquet(project.output / "measurements.parquet")
    by_name = table.set_index(["unit", "chain"])
    assert not by_name.index.duplicated().any()
    used = {
        (name.rsplit(".", 2)[0], chain_text(chain[:1]))
        for name, chain in chosen.items()
        if len(chain) == 2
    }
    assert used
    rows = [*used, *((name, chain_text(chain)) for name, chain in chosen.items())]
    stored = sum(int(by_name.loc[row, "bytes"]) for row in rows)
    loss = sum(float(by_name.loc[row, "predicted_kl"]) for row in rows)
    assert plan["loss"] == pytest.approx(loss, rel=1e-6)
    experiment = Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
    bits = stored * 8 / experiment.sizes.size.weights
    assert scores["plan"]["bits_per_weight"] == pytest.approx(bits, rel=1e-9)
    shown = read_run(project.output)
    assert sum(shown["choices"].values()) == len(chosen)
    assert any("reap" in text and "→" in text for text in shown["choices"])
    card = (project.output / "model" / "README.md").read_text(encoding="utf-8")
    assert "reap(keep=0.5) → gptq" in card

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (tracked,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    assert tracked.info.status == "FINISHED"
    assert "reap(keep=0.75) → gptq" in tracked.data.params["candidates.chains"]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId")]
    assert any("reap" in name for child in children for name in child.data.params)
    assert tracked.data.metrics["kl"] == scores["plan"]["kl"]
    layers = client.download_artifacts(tracked.info.run_id, "layers.parquet", str(tmp_path))
    assert pd.read_parquet(layers)["bytes"].sum() == stored
    assert result["report"] == str(project.output / "report.html")


@pytest.mark.parametrize("serve", ["transformers", "vllm"])
def test_engines_get_layers_that_are_all_alike(project: Project, serve: str) -> None:
    bits = {"method": "rtn", "bits": [4, 8], "group_size": -1}
    mean = {"method": "hc_smoe", "keep": [0.75, 0.5], "router": "mean"}
    recipe = {
        "candidates": [bits, [REAP, bits], [mean, bits], [{"method": "slim", "width": 0.5}, bits]],
        "baselines": {"half": [{"method": "reap", "keep": 0.5}, {**bits, "bits": 4}]},
        "serve": serve,
    }
    forms = set()
    for budget in (2.8, 4.2):
        project.write(**recipe, budget={"bits_per_weight": budget})
        project.run(stages=("assemble",))
        plan = project.json("plan.json")
        file = project.output / "model" / "model.safetensors"
        assert plan["bytes"] == file.stat().st_size <= plan["budget_bytes"]
        names = [name for name in plan["units"] if ".experts." in name]
        blocks = [sum(f"layers.{block}." in name for name in names) for block in (0, 1)]
        assert blocks[0] == blocks[1]
        config = json.loads((project.output / "model" / "config.json").read_text())
        assert config["num_local_experts"] == blocks[0] // 3
        forms.add((config["num_local_experts"], config["moe_intermediate_size"]))
    assert (8, 32) not in forms  # nothing of four bits fits the first budget unreduced


def test_a_recipe_may_have_nothing_but_reductions(project: Project) -> None:
    project.write(
        candidates=[[{"method": "mone", "keep": [0.5, 0.75]}]],
        baselines=None,
        budget={"bits_per_weight": 11.5},
    )
    project.run(stages=("evaluate", "assemble"))
    plan = project.json("plan.json")
    assert {tuple(link["method"] for link in links) for links in plan["units"].values()} == {
        (),
        ("mone",),
    }
    assert project.json("scores.json")["plan"]["bits_per_weight"] <= 11.5


def test_what_is_odd_about_experts_is_an_event_and_never_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens go to two experts of biased ones, whose weights are those of two others."""
    folder = make_model_folder(tmp_path / "model", "gpt_oss")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[:] = torch.tensor([0.0, 1e3, 0.0, 0.0, 1e3, 0.0])
        if ".experts." in name:
            tensor[[0, 5]] = tensor[[1, 4]].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    project = Project(tmp_path / "project", folder, monkeypatch)
    halves = [{"method": name, "keep": 0.5} for name in reducers() if name != "slim"]
    links = [*halves, {"method": "slim", "width": 0.5}]
    own = ("reap", "stun", "slim")  # what is left loads everywhere
    few = [{**HC_SMOE, "router": "mean"}, *(link for link in links if link["method"] in own)]
    served = {
        "moesaic": {"candidates": [FOUR, *([link, FOUR] for link in links)]},
        "transformers": {"candidates": [FOUR, *([link] for link in few)], "keep": ["self_attn"]},
    }
    for serve, recipe in served.items():
        bits = 3 if serve == "moesaic" else 11  # experts in one tensor stay as they are for engines
        project.write(
            serve=serve,
            baselines=None,
            budget={"bits_per_weight": bits},
            **{"keep": None, **recipe},
        )
        project.run(stages=("evaluate", "assemble"))
        score = project.json("scores.json")["plan"]
        assert math.isfinite(score["kl"]) and math.isfinite(score["perplexity"])
        table = pd.read_parquet(project.output / "measurements.parquet")
        assert bool(table["predicted_kl"].map(math.isfinite).all())
        reduced = table[table["unit"].str.endswith("experts")]
        assert len(reduced) == 2 * (len(recipe["candidates"]) - 1)
        assert all("unreached_experts" in events for events in reduced["events"])


def test_other_bits_after_a_reduction_do_not_reduce_again(
    project: Project, reductions: list[str]
) -> None:
    project.run(stages=("measure",))
    assert reductions == ["reap"] * 4  # two counts in two blocks
    before = entries(project, "reductions")
    assert len(before) == 4
    project.write(**{**JOINT, "candidates": [GPTQ, [REAP, {**GPTQ, "bits": [3, 5]}]]})
    _, calls = project.run(stages=("measure",))
    assert calls.keys() == {"measure:compress_job"}
    assert reductions == ["reap"] * 4
    assert entries(project, "reductions") == before
    project.write(**{**JOINT, "candidates": [GPTQ, [{"method": "reap", "keep": 3}, FOUR]]})
    project.run(stages=("measure",))
    assert reductions == ["reap"] * 6


def test_a_reduction_is_not_made_again_where_a_run_died_after_it(
    project: Project, reductions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Bench._write

    def die(bench: Bench, *rest: Any) -> None:
        if bench.side:
            raise Killed
        write(bench, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_write", die)
        with pytest.raises(Killed):
            project.run(stages=("measure",))
    assert reductions == ["reap"]
    project.run(stages=("measure",))
    assert reductions == ["reap"] * 4


@pytest.mark.parametrize("kind", ["reductions", "pieces"])
def test_a_damaged_entry_is_made_again(project: Project, kind: str) -> None:
    project.run(stages=("search",))
    plan, before = project.json("plan.json"), entries(project, *KINDS)
    for name in entries(project, kind):
        path = project.folder / "store" / name
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    project.run(stages=("search",))
    assert project.json("plan.json") == plan
    assert entries(project, *KINDS) == before


def test_a_run_killed_at_every_call_ends_with_the_same_bytes(
    project: Project, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        **JOINT,
        "candidates": [GPTQ, [{"method": "reap", "keep": 0.5}, FOUR]],
        "calibration": {"shards": 2},
    }
    project.write(**small)
    _, whole = project.run()
    other = Project(tmp_path / "two", model, monkeypatch)
    other.write(**small)
    kills = 0
    while True:
        try:
            # The first call may find that its work was done.
            other.run(kill_at=3 if kills else 1)
        except Killed:
            kills += 1
            assert kills <= whole.total()
        else:
            break
    assert kills > whole.total() // 2
    one, two = project.left(), other.left()
    assert {name for name in one if one[name] != two.get(name)} <= {"README.md"}


@pytest.mark.parametrize("propagate", [False, True])
def test_gc_keeps_reductions_that_a_named_run_needs(
    project: Project, reductions: list[str], propagate: bool
) -> None:
    shared = {"method": "stun", "keep": 0.75, "window": 0}
    recipe = {**JOINT, "candidates": [GPTQ, [REAP, FOUR], [shared, FOUR]], "propagate": propagate}
    project.write(**recipe)
    project.run()
    left, before = project.left(), entries(project, *KINDS)
    assert {name.partition("/")[0] for name in before} == set(KINDS)
    project.write(**{**recipe, "name": "other", "candidates": [GPTQ, [{**REAP, "keep": 7}, FOUR]]})
    other = project.folder / "runs" / "other"
    run.run_recipe(project.folder / "recipe.yaml", other, ("measure",))
    assert len(entries(project, "reductions")) > sum("reductions" in name for name in before)
    run.collect_garbage(project.folder / "store", [project.output], 0)
    assert entries(project, *KINDS) == before
    reductions.clear()
    project.write(**recipe)
    _, calls = project.run()
    assert calls.keys() <= {"evaluate:evaluate_rows"} and not reductions
    assert project.left()["model.safetensors"] == left["model.safetensors"]


def test_propagated_reductions_learn_from_compressed_predecessors(
    project: Project, reductions: list[str]
) -> None:
    recipe = {**JOINT, "candidates": [GPTQ, [{"method": "mone", "keep": 0.5}, FOUR]]}
    project.write(**{**recipe, "budget": {"bits_per_weight": 2.8}}, propagate=True)
    result, _ = project.run(stages=("evaluate",))
    # By the dense walk each bank under both; then the second block's again, for either plan.
    assert reductions.count("mone") in (2, 3) and reductions.count("reap") == 3
    for score in result["scores"].values():
        assert math.isfinite(score["kl"])
    made = len(reductions)
    _, calls = project.run(stages=("evaluate",))
    assert calls.total() == 0 and len(reductions) == made
