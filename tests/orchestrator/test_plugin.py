"""Folders for ``serve: moesaic`` through plain transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.kernels.tensor import CompressedTensor
from moesaic.orchestrator import compressed_modules
from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.compressed_modules import (
    CompressedExperts,
    CompressedLinear,
    Packed,
    multiply,
)
from moesaic.orchestrator.family import families
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.plugin import MoesaicConfig
from moesaic.orchestrator.verify import verify
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import IDS, channel, make_pieces, mixed, open_model


def written(tiny: Tiny, folder: Path, model_type: str, **kwargs: Any) -> Path:
    source = tiny(model_type, **kwargs)
    model = open_model(source)
    chosen = make_pieces(model, mixed, folder / "pieces")
    assemble(model, source, chosen, "moesaic", folder / "out", "card")
    return folder / "out"


def load(folder: Path, **kwargs: Any) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager", **kwargs
    )
    assert not any(report.values()), report
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-6 * b.abs().max())


@pytest.mark.parametrize("model_type", families())
def test_reloaded_logits_are_those_of_the_plan(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Schemes differ by unit and by member, with zero points and units left dense."""
    source = tiny(model_type)
    model = open_model(source)
    chosen = make_pieces(model, mixed, tmp_path / "pieces")
    assert 0 < sum(path is None for path in chosen.values()) < len(chosen)
    assemble(model, source, chosen, "moesaic", tmp_path / "out", "card", max_shard_bytes=50_000)
    assert verify(tmp_path / "out", model.checkpoint, chosen, "moesaic", IDS) < 2e-6


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt_oss", "granitemoe", "gemma3_text", "bloom", "opt", "gpt_neox"]
)
def test_weights_of_half_precision_are_rounded_once(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(model_type, dtype=torch.bfloat16)
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    assemble(model, source, chosen, "moesaic", tmp_path / "out", "card")
    assert verify(tmp_path / "out", model.checkpoint, chosen, "moesaic", IDS) < 2e-6
    own = load(tmp_path / "out")
    assert own.dtype == torch.bfloat16
    assert torch.isfinite(logits(own)).all()


def test_weights_stay_packed_and_keep_their_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("mixtral", dtype=torch.bfloat16)
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    assemble(model, source, chosen, "moesaic", tmp_path / "out", "card")
    loaded = load(tmp_path / "out", dtype=torch.float32)
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, Packed)}
    assert len(packed) == 2 * (4 + 3)
    assert not any(isinstance(m, nn.Linear) for n, m in loaded.named_modules() if n != "lm_head")
    pieces = [t for path in chosen.values() if path for t in read_piece(path).values()]
    nbytes = sum(t.nbytes for t in pieces)
    assert sum(m.tensor.nbytes for m in packed.values()) == nbytes
    on_disk = load_file(tmp_path / "out/model.safetensors")
    nn.Module.double(loaded)  # converts everything else
    assert loaded.lm_head.weight.dtype == torch.float64
    for name, module in packed.items():
        for part in module.part_names:
            assert torch.equal(module.get_buffer(part), on_disk[f"{name}.{part}"])
            assert module.get_buffer(part).dtype == on_disk[f"{name}.{part}"].dtype


@pytest.mark.parametrize("model_type", ["llama", "phimoe", "granitemoe", "gpt_oss"])
def test_dequantized_model_gives_the_same_logits(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = written(tiny, tmp_path, model_type)
    packed = load(folder)
    expected = logits(packed)
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = load(folder, quantization_config=MoesaicConfig(dequantize=True))
    packed.dequantize()
    original = AutoModelForCausalLM.from_pretrained(tiny(model_type))
    for model in (dense, packed):
        assert not any(isinstance(m, Packed | CompressedExperts) for m in model.modules())
        assert not hasattr(model.config, "quantization_config")
        assert close(logits(model), expected)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        assert shapes == {name: p.shape for name, p in original.named_parameters()}


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_saving_a_loaded_model_round_trips(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path, model_type)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    first, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    # Transformers saves Mixtral's experts under the name of the block that they have on its hub.
    named = {name.replace(".block_sparse_moe.", ".mlp."): t for name, t in again.items()}
    assert named.keys() == {n.replace(".block_sparse_moe.", ".mlp.") for n in first}
    assert sum(t.nbytes for t in again.values()) == sum(t.nbytes for t in first.values())


def test_folder_of_a_later_version_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 2, this moesaic reads version 1"):
        load(folder)


def test_compressed_linear_refuses_another_shape(tiny: Tiny, tmp_path: Path) -> None:
    model = open_model(tiny("llama"))
    chosen = make_pieces(model, mixed, tmp_path)
    member = next(read_piece(path)["weight"] for path in chosen.values() if path)
    described = {
        "format": member.format,
        "shape": list(member.shape),
        "dtype": "float32",
        "params": dict(member.params),
    }
    with pytest.raises(ValueError, match=r"\(5, 6\)"):
        CompressedLinear(described, nn.Linear(6, 5))


class _OnGpu:
    """An activation that says it is on a GPU."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("x", "path"),
    [
        (_OnGpu(torch.bfloat16), "kernel"),
        (_OnGpu(torch.float16), "reference"),  # the kernel would round the weights to float16
        (_OnGpu(torch.float32), "reference"),
        (torch.ones(1, dtype=torch.bfloat16), "reference"),
    ],
)
def test_kernel_runs_only_where_its_numbers_are_the_reference(
    x: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Format:
        @staticmethod
        def matmul(x: Any, weight: CompressedTensor) -> str:
            return "kernel"

        @staticmethod
        def matmul_reference(x: Any, weight: CompressedTensor) -> str:
            return "reference"

    monkeypatch.setattr(compressed_modules, "format_module", lambda name: Format)
    weight = CompressedTensor("any", {}, (2, 1), torch.bfloat16)
    assert str(multiply(x, weight)) == path


def run_python(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light_and_enough_for_from_pretrained(tiny: Tiny, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path, "granitemoe")
    script = f"""
import moesaic, sys
assert not {{'torch', 'transformers'}} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    assert run_python(script, tmp_path) == "CompressedLinear"


def test_import_registers_at_once_where_transformers_is_already_there(tmp_path: Path) -> None:
    script = """
from transformers.quantizers import auto
assert "moesaic" not in auto.AUTO_QUANTIZER_MAPPING
import moesaic
print(auto.AUTO_QUANTIZER_MAPPING["moesaic"].__name__)
"""
    assert run_python(script, tmp_path) == "MoesaicQuantizer"
