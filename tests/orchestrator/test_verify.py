"""Verification must notice whatever would make an engine compute something else."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.methods.base import Unit
from moesaic.orchestrator import verifier
from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import SERVES, Serve
from moesaic.orchestrator.verifier import VerifierProcess
from moesaic.orchestrator.verify import TOLERANCE, verify
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import IDS, Choice, channel, make_pieces, open_model

Written = tuple[Path, StreamedModel, dict[str, Path | None]]


def write(tiny: Tiny, folder: Path, serve: Serve, choose: Any = None) -> Written:
    source = tiny("qwen3_moe")
    model = open_model(source)
    chosen = make_pieces(model, choose or (lambda *_: channel(4)), folder / "pieces")
    assemble(model, source, chosen, serve, folder / "out", "card")
    return folder / "out", model, chosen


def apart(folder: Path, model: StreamedModel, chosen: dict[str, Path | None]) -> float:
    with VerifierProcess() as process:
        return process.verify(folder, model.checkpoint, chosen, "moesaic", IDS)


def test_a_process_that_gives_no_answer_is_told_and_ended(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, chosen = write(tiny, tmp_path, "moesaic")
    size = model.checkpoint.file_bytes + (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(verifier, "_SECONDS", 0.2)
    monkeypatch.setattr(verifier, "_BYTES_PER_SECOND", size / 0.8)
    started = time.monotonic()
    text = r"out: the process that reloads it gave no answer in 1 s;"
    with pytest.raises(RunError, match=text), VerifierProcess() as process:
        os.kill(process._process.pid, signal.SIGSTOP)
        process.verify(folder, model.checkpoint, chosen, "moesaic", IDS)
    assert 1 <= time.monotonic() - started < 10 and process._process.returncode == -signal.SIGKILL


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("serve", SERVES)
def test_altered_scale_is_noticed(serve: Serve, tiny: Tiny, tmp_path: Path) -> None:
    folder, model, chosen = write(tiny, tmp_path, serve)
    assert verify(folder, model.checkpoint, chosen, serve, IDS) < TOLERANCE / 100

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight_scale"][:8] *= 0.5

    change(folder, halve)
    with pytest.raises(RunError, match=r"logits differ .* limit 1e-03"):
        verify(folder, model.checkpoint, chosen, serve, IDS)


@pytest.mark.parametrize("serve", SERVES)
def test_nan_is_noticed(serve: Serve, tiny: Tiny, tmp_path: Path) -> None:
    folder, model, chosen = write(tiny, tmp_path, serve)

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight_scale"][0] = torch.nan

    change(folder, poison)
    with pytest.raises(RunError, match="logits differ .* nan"):
        verify(folder, model.checkpoint, chosen, serve, IDS)


@pytest.mark.parametrize("serve", SERVES)
def test_missing_and_surplus_tensors_are_noticed(serve: Serve, tiny: Tiny, tmp_path: Path) -> None:
    folder, model, chosen = write(tiny, tmp_path, serve)
    norm = "model.layers.0.input_layernorm.weight"
    change(folder, lambda tensors: tensors.update({"model.surplus.weight": tensors[norm] + 0}))
    with pytest.raises(RunError, match=r"(unexpected|too many).*model\.surplus\.weight"):
        verify(folder, model.checkpoint, chosen, serve, IDS)

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[norm], tensors["model.surplus.weight"]

    change(folder, remove)
    with pytest.raises(RunError, match=r"(missing|no tensor).*input_layernorm"):
        verify(folder, model.checkpoint, chosen, serve, IDS)


def test_experts_that_differ_by_block_are_right_for_vllm_and_wrong_in_transformers(
    tiny: Tiny, tmp_path: Path
) -> None:
    def by_block(_: int, unit: Unit) -> Choice:
        return channel(4 + 4 * unit.block) if unit.kind == "bank" else channel(4)

    folder, model, chosen = write(tiny, tmp_path, "vllm", by_block)
    assert verify(folder, model.checkpoint, chosen, "vllm", IDS) < TOLERANCE / 100
    with pytest.raises(RunError, match="read by transformers, its logits differ"):
        verify(folder, model.checkpoint, chosen, "transformers", IDS)


def test_zero_points_are_right_for_vllm_and_refused_by_transformers(
    tiny: Tiny, tmp_path: Path
) -> None:
    def choose(_: int, unit: Unit) -> Choice:
        return channel(4, symmetric=unit.kind == "bank")

    folder, model, chosen = write(tiny, tmp_path, "vllm", choose)
    assert verify(folder, model.checkpoint, chosen, "vllm", IDS) < TOLERANCE / 100
    with pytest.raises(RunError, match="transformers cannot load it"):
        verify(folder, model.checkpoint, chosen, "transformers", IDS)


@pytest.mark.parametrize("fault", ["no target", "two targets", "ignored", "bits"])
def test_wrong_configuration_is_noticed_for_vllm(fault: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, model, chosen = write(
        tiny, tmp_path, "vllm", lambda _, unit: channel(4 if unit.kind == "bank" else 8)
    )
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"]
    first, second = stated["config_groups"].values()
    name = "model.layers.0.self_attn.o_proj"
    if fault == "no target":
        first["targets"].remove(name)
    elif fault == "two targets":
        second["targets"].append(name)
    elif fault == "ignored":
        stated["ignore"].append("re:.*o_proj")
    else:
        first["weights"]["num_bits"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="o_proj has|logits differ"):
        verify(folder, model.checkpoint, chosen, "vllm", IDS)


def test_a_process_of_its_own_finds_the_same(tiny: Tiny, tmp_path: Path) -> None:
    folder, model, chosen = write(tiny, tmp_path, "moesaic")
    assert apart(folder, model, chosen) < TOLERANCE / 100
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match="transformers cannot load it"):
        apart(folder, model, chosen)


def test_a_process_that_dies_is_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, chosen = write(tiny, tmp_path, "moesaic")
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(RunError, match="ended .killed: out of memory"):
        apart(folder, model, chosen)


def test_constants_that_16_bits_round_make_no_difference(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("gemma", dtype=torch.bfloat16)  # multiplies embeddings by the root of their width
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    assemble(model, source, chosen, "transformers", tmp_path / "out", "card")
    found = verify(tmp_path / "out", model.checkpoint, chosen, "transformers", IDS)
    assert found < TOLERANCE / 100
