"""Recipes that slice: what a run leaves, what it is compared with, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.orchestrator import finished_model
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.forecast import forecast
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plugin import MoesaicConfig
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run import check_recipe
from moesaic.orchestrator.store import Store
from tests.orchestrator.inline import InlinePool, InlineVerifier, Killed, Project
from tests.orchestrator.projects import make_model_folder

ALONE: dict[str, Any] = {
    "candidates": [],
    "baselines": {},
    "budget": {"bits_per_weight": 32},
}
RTN: dict[str, Any] = {"method": "rtn", "group_size": -1, "symmetric": True}
BITS: dict[str, Any] = {
    "candidates": [{**RTN, "bits": [3, 8]}, {**RTN, "method": "gptq", "bits": 4}],
    "baselines": {"rtn 4": {**RTN, "bits": 4}},
    "budget": {"bits_per_weight": 6},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "qwen2", "qwen3_moe", "olmo2")
    return {
        name: make_model_folder(tmp_path_factory.mktemp(name), name, dtype=torch.float32)
        for name in names
    }


def project(
    folder: Path, model: Path, patch: pytest.MonkeyPatch, *changes: dict[str, Any], **more: Any
) -> Project:
    made = Project(folder, model, patch)
    merged = {key: value for change in changes for key, value in change.items()}
    made.write(**{**merged, **more})
    return made


def log_probabilities(folder: Path, ids: Tensor, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits.double().log_softmax(-1)[:, :-1]


def divergence(made: Project, folder: Path, **options: Any) -> tuple[float, float]:
    """KL to the original in nats per token, and perplexity, both with transformers."""
    experiment = Experiment(load_recipe(made.folder / "recipe.yaml"), made.output)
    ids = torch.from_numpy(experiment.evaluation.ids).long()
    p, q = log_probabilities(made.model, ids), log_probabilities(folder, ids, **options)
    nll = -q.gather(-1, ids[:, 1:, None]).mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(nll.exp())


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_slicing_alone_is_a_run(
    model_type: str,
    shortcuts: bool,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tied embeddings, and with experts; nothing is calibrated or measured."""
    own = {"hidden": 32, "shortcuts": shortcuts}
    made = project(tmp_path, models[model_type], monkeypatch, ALONE, slice=own)
    _, calls = made.run(size=2)
    assert {name.partition(":")[0] for name in calls} == {"slice_walk", "slicing", "evaluate"}
    scores, plan = made.json("scores.json"), made.json("plan.json")
    assert list(scores) == ["dense", "plan"]
    assert set(map(tuple, plan["units"].values())) == {()}

    model = made.output / "model"
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert scores["plan"]["bytes"] == plan["bytes"] == size
    assert scores["dense"]["bytes"] == (made.model / "model.safetensors").stat().st_size
    tensors = load_file(model / "model.safetensors")
    turned = [name for name in tensors if ".shortcuts." in name]
    assert len(turned) == 4 * shortcuts  # stored, and so counted
    assert size > sum(tensor.nbytes for tensor in tensors.values()) - 1
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    config = json.loads((model / "config.json").read_text())
    assert ("quantization_config" in config) == shortcuts
    kl, perplexity = divergence(made, model)
    assert kl == pytest.approx(scores["plan"]["kl"], rel=1e-4) and kl > 1e-3
    assert perplexity == pytest.approx(scores["plan"]["perplexity"], rel=1e-4)

    left = made.left()
    _, calls = made.run()
    assert calls.total() == 0 and made.left() == left


@pytest.mark.parametrize(
    ("model_type", "serve", "shortcuts"),
    [
        ("llama", "vllm", False),
        ("qwen3_moe", "moesaic", True),
    ],
)
def test_a_sliced_model_is_compressed_and_compared_with_the_original(
    model_type: str,
    serve: str,
    shortcuts: bool,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"hidden": 0.7, "shortcuts": shortcuts}
    made = project(tmp_path, models[model_type], monkeypatch, BITS, serve=serve, slice=own)
    made.run(size=2)
    scores = made.json("scores.json")
    assert list(scores) == ["dense", "sliced", "rtn 4", "plan"]
    known = divergence(made, made.model)
    assert known == pytest.approx((0, scores["dense"]["perplexity"]), rel=1e-4)
    assert scores["dense"]["kl"] == 0
    assert scores["sliced"]["bytes"] > scores["plan"]["bytes"] > scores["rtn 4"]["bytes"]
    assert 0 < scores["sliced"]["kl"] < scores["rtn 4"]["kl"]
    assert scores["plan"]["bytes"] <= made.json("plan.json")["budget_bytes"]
    kl, perplexity = divergence(made, made.output / "model")
    assert kl == pytest.approx(scores["plan"]["kl"], rel=1e-3)
    assert perplexity == pytest.approx(scores["plan"]["perplexity"], rel=1e-3)
    if shortcuts:
        unpacked = MoesaicConfig(dequantize=True)
        again = divergence(made, made.output / "model", quantization_config=unpacked)
        assert again == pytest.approx((kl, perplexity), rel=1e-4)


def test_other_stages_go_on_as_ever(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts pruned, routers taught by the wider original, each block on its predecessors."""
    made = project(
        tmp_path,
        models["qwen3_moe"],
        monkeypatch,
        candidates=[[{"method": "reap", "keep": [0.75, 0.5]}, {**RTN, "bits": 4}]],
        baselines={},
        budget={"bits_per_weight": 5},
        slice={"hidden": 40, "shortcuts": True},
        router_calibration={"learning_rate": 1e-3, "batch": 4},
        propagate=True,
        keep=["self_attn"],
    )
    made.run()
    scores = made.json("scores.json")
    kl, _ = divergence(made, made.output / "model")
    assert kl == pytest.approx(scores["plan"]["kl"], rel=1e-3)
    assert "before_router_calibration" in scores["plan"]


def test_a_report_tells_of_the_slice(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, models["llama"], monkeypatch, BITS, slice={"hidden": 32})
    monkeypatch.setattr(finished_model, "VerifierProcess", InlineVerifier)
    experiment = Experiment(load_recipe(made.folder / "recipe.yaml"), made.output)
    with View() as view:
        own: Any = InlinePool()
        whole = Pipeline(experiment, own, view)
        whole.slice()
        whole.measure()
        whole.search()
        scores = whole.evaluate()
        summary = whole.summary(scores)
        page = whole.report(scores).read_text(encoding="utf-8")
    assert summary.part_bytes(None)["not compressed"] > 0
    assert sum(summary.part_bytes(None).values()) == scores["dense"]["bytes"]
    assert "sliced" in page and "hidden: 32" in page


def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"hidden": 32, "shortcuts": True}
    whole = project(tmp_path / "one", models["llama"], monkeypatch, BITS, slice=own)
    whole.run(size=1)
    other = project(tmp_path / "two", models["llama"], monkeypatch, BITS, slice=own)
    kills = 0
    while True:
        try:
            other.run(size=2, kill_at=12)
            break
        except Killed:
            kills += 1
    assert kills >= 2
    one, two = whole.left(), other.left()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}


def test_check_knows_the_bytes_before_anything_is_sliced(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, models["llama"], monkeypatch, BITS, slice={"hidden": 32})
    experiment = Experiment(load_recipe(made.folder / "recipe.yaml"), made.output)
    found = forecast(experiment)
    assert {unit.shapes["weight"][1] for unit in experiment.units} >= {32}
    assert not list(experiment.store.root.glob("sliced/*/*"))
    made.run(stages=("search",))
    smallest = found["bytes"]["smallest"]["bytes"]
    assert smallest < made.json("plan.json")["bytes"] <= made.json("plan.json")["budget_bytes"]
    assert found["bytes"]["dense"]["bytes"] == (made.model / "model.safetensors").stat().st_size


def test_garbage_collection_keeps_what_the_run_needs(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, models["llama"], monkeypatch, BITS, slice={"hidden": 40})
    made.run(stages=("search",))
    made.write(**BITS, slice={"hidden": 32})
    made.run(stages=("search",))
    store = Store(made.folder / "store")
    assert len(list(store.root.glob("models/*"))) == 2
    experiment = Experiment(load_recipe(made.output / "recipe.yaml"), made.output)
    store.gc(experiment.entries(), minimum_age_seconds=-1)
    assert len(list(store.root.glob("models/*"))) == 1
    _, calls = made.run(stages=("search",))
    assert calls.total() == 0
    store.gc([], minimum_age_seconds=-1)
    assert not list(store.root.glob("models/*")) and not list(store.root.glob("sliced/*/*"))


def refusal(made: Project) -> str:
    with pytest.raises(UserError) as error:
        check_recipe(made.folder / "recipe.yaml", made.output)
    text = str(error.value)
    assert "Traceback" not in text and all(len(line) < 400 for line in text.splitlines())
    return text


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        ({"hidden": 0}, {}, "slice.hidden: 0 is no multiple of 8"),
        ({"hidden": 0.0}, {}, "slice.hidden: 0.0 is no share"),
        ({"hidden": 1.5}, {}, "slice.hidden: 1.5 is no share"),
        ({"hidden": 30}, {}, "slice.hidden: 30 is no multiple of 8"),
        ({"hidden": 56}, {}, "slice.hidden: 56 is above 48, the model's hidden size"),
        ({"hidden": 0.1}, {}, "slice.hidden: 0.1 of 48 leaves no multiple of 8"),
        ({"hidden": "most"}, {}, "slice.hidden: 'most' is neither a width"),
        ({"hidden": 32, "shortcut": True}, {}, "slice.shortcut: unknown key (allowed here: method"),
        ({"method": "pca"}, {}, "slice.method: "),
        (0.8, {}, "slice: must be a mapping"),
        (
            {"hidden": 32, "shortcuts": True},
            {"serve": "transformers"},
            "slice.shortcuts: serve: transformers loads no shortcut matrices",
        ),
        (
            {"hidden": 40},
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 16}]},
            "model.layers.0.self_attn.q_proj",
        ),
        (None, {"candidates": []}, "candidates: needs a list with at least one candidate"),
        (None, {"candidates": [{"method": "slicegpt"}]}, "slicegpt is no candidate"),
        (
            {"hidden": 32},
            {"baselines": {"sliced": {"method": "rtn", "bits": 4}}},
            "'sliced' is no name for a baseline",
        ),
        (
            {"hidden": 32},
            {"budget": {"bytes": 1000, "bits_per_weight": None}},
            "budget: 1,000 bytes are too few",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    own: Any,
    more: dict[str, Any],
    said: str,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = project(tmp_path, models["llama"], monkeypatch, BITS, {"slice": own}, more)
    assert said in refusal(made)


def test_a_family_that_cannot_be_sliced_is_named(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, models["olmo2"], monkeypatch, BITS, slice={"hidden": 32})
    assert "slice: olmo2 cannot be sliced" in refusal(made)


def test_a_width_that_heads_do_not_divide_is_answered_with_those_that_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = make_model_folder(tmp_path / "model", "llama", head_dim=24, **sizes)
    made = project(tmp_path, model, monkeypatch, ALONE, slice={"hidden": 56})
    text = refusal(made)
    assert "slice.hidden: 56 is no width for llama" in text and "give 48" in text
    made.write(**ALONE, slice={"hidden": 0.9})  # 64 is the multiple of 8 below it
    recipe = load_recipe(made.folder / "recipe.yaml")
    experiment = Experiment(recipe, made.output)
    assert experiment.cut is not None and experiment.cut.width == 48


def test_a_recipe_that_slices_reads_back_as_the_same(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, models["llama"], monkeypatch, ALONE, slice={"hidden": 0.8})
    recipe = load_recipe(made.folder / "recipe.yaml")
    again = made.folder / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
