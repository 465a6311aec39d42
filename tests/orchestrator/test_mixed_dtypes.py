"""Checkpoints whose files hold another dtype than the configuration states, or several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.stated_dtype import dtype_change
from moesaic.orchestrator.targets import Serve
from moesaic.orchestrator.verify import TOLERANCE, verify
from tests.orchestrator.planning import IDS, channel, make_pieces, open_model
from tests.orchestrator.projects import make_model_folder, make_recipe
from tests.orchestrator.tiny import save_tiny


def round_files(folder: Path, which: Callable[[str], bool], stated: str, **keys: Any) -> Path:
    """Rounds some tensors of a float32 model to bfloat16; the configuration states ``stated``."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    rounded = {n: t.bfloat16() if which(n) else t for n, t in tensors.items()}
    save_file(rounded, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": stated, **keys}))
    return folder


def is_norm(name: str) -> bool:
    return "norm" in name


CASES: dict[str, tuple[str, Callable[[str], bool], str, str]] = {
    "norms and head in float32": (
        "llama",
        lambda name: not is_norm(name) and "lm_head" not in name,
        "bfloat16",
        "bfloat16",
    ),
    "files in float32": ("llama", lambda name: False, "bfloat16", "float32"),
    "experts in float32": ("qwen3_moe", lambda name: False, "bfloat16", "float32"),
    "files in bfloat16": ("llama", lambda name: True, "float16", "bfloat16"),
    "experts in bfloat16": ("qwen3_moe", lambda name: True, "float32", "bfloat16"),
}


@pytest.mark.parametrize("serve", ["moesaic", "transformers"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_planned(case: str, serve: Serve, tmp_path: Path) -> None:
    model_type, which, stated, written = CASES[case]
    source = round_files(save_tiny(tmp_path / "model", model_type), which, stated)
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    assemble(model, source, chosen, serve, tmp_path / "out", "card")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written
    told = dtype_change(model.checkpoint, tmp_path / "out")
    assert told == (
        None
        if stated == written
        else f"config.json said dtype {stated}, the compressed weights are {written}: it says"
        f" {written} now"
    )
    difference = verify(tmp_path / "out", model.checkpoint, chosen, serve, IDS)
    assert difference < TOLERANCE / 100


def test_the_old_key_for_the_dtype_is_corrected_as_well(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    round_files(source, lambda name: True, "float16", torch_dtype="float16")
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    assemble(model, source, chosen, "moesaic", tmp_path / "out", "card")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    untouched = {**config, "dtype": "float16", "torch_dtype": "float16"}
    assert untouched.pop("quantization_config")
    assert untouched == json.loads((source / "config.json").read_text())


def test_weights_of_several_dtypes_are_refused_where_all_are_loaded_in_one(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", "llama", dtype=torch.float32)
    round_files(model, lambda name: "down_proj" not in name, "bfloat16")
    budget = {"bits_per_weight": 8}
    recipe = make_recipe(tmp_path / "one", model, serve="transformers", budget=budget)
    told = r"bfloat16 \(model\.layers\.0\.self_attn\.q_proj …\), float32 \(model\.layers\.0\.mlp\.d"
    with pytest.raises(UserError, match=told):
        open_experiment(recipe, None)
    assert open_experiment(make_recipe(tmp_path / "two", model, budget=budget), None).units
    kept = make_recipe(
        tmp_path / "three", model, serve="transformers", budget=budget, keep=["down_proj"]
    )
    assert len(open_experiment(kept, None).units) == 12


def test_experts_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", "qwen3_moe", dtype=torch.float32)
    round_files(model, lambda name: "layers.0.mlp.experts.1." not in name, "bfloat16")
    bank = "model.layers.0.mlp.experts"
    with pytest.raises(UserError, match=f"{bank} in bfloat16 and float32: .* keep: .{bank}.$"):
        open_experiment(make_recipe(tmp_path / "one", model), None)
    kept = make_recipe(tmp_path / "two", model, keep=[bank], budget={"bits_per_weight": 8})
    assert bank not in {unit.name for unit in open_experiment(kept, None).units}
