"""Writing model folders: right for every engine, repeatable to the byte, never half done."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moesaic.kernels import int_group
from moesaic.methods.base import Unit
from moesaic.orchestrator import assemble as assemble_module
from moesaic.orchestrator import tensorfile
from moesaic.orchestrator.assemble import assemble, folder_bytes, header_bytes_bound
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.pieces import piece_metadata, read_piece, write_piece
from moesaic.orchestrator.targets import SERVES, Serve
from moesaic.orchestrator.tensorfile import Stored, read_file
from moesaic.orchestrator.verify import verify
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import (
    IDS,
    Choice,
    channel,
    file_bytes,
    grouped,
    headers,
    loadable,
    make_pieces,
    mixed,
    open_model,
)

FUSED = [t for t in families() if (bank := load_family(t).experts) and bank.fused]


def packed(shape: tuple[int, ...], bits: int, dtype: torch.dtype, symmetric: bool) -> Any:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand((*shape[:-1], 1), generator=generator).to(dtype)
    zero = None if symmetric else torch.ones(scale.shape, dtype=torch.int8)
    return int_group.pack(codes, scale, zero, bits=bits, group_size=-1, dtype=dtype)


def test_piece_reads_back_what_was_written(tmp_path: Path) -> None:
    members = {
        "up": packed((3, 5, 7), 3, torch.bfloat16, symmetric=True),
        "down": packed((3, 7, 5), 8, torch.float16, symmetric=False),
    }
    path = tmp_path / "piece.safetensors"
    write_piece(path, members, {"unit": "somewhere"})
    back = read_piece(path)
    assert piece_metadata(path) == {"unit": "somewhere"}
    assert sorted(back) == ["down", "up"]
    by_library = load_file(path)
    assert len(by_library) == sum(len(member.parts) for member in members.values())
    for name, member in members.items():
        assert (back[name].format, back[name].shape) == (member.format, member.shape)
        assert (back[name].dtype, back[name].params) == (member.dtype, dict(member.params))
        assert torch.equal(back[name].dense(), member.dense())
        for part, tensor in member.parts.items():
            assert torch.equal(by_library[f"{name}.{part}"], tensor)
    again = tmp_path / "again.safetensors"
    write_piece(again, dict(reversed(members.items())), {"unit": "somewhere"})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [3, 60, -1])
def test_piece_raises_when_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "piece.safetensors"
    write_piece(path, {"weight": packed((4, 6), 4, torch.float32, True)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"piece\.safetensors"):
        read_piece(path)


@pytest.mark.parametrize("model_type", families())
def test_transformers_loads_what_was_planned(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(model_type)
    model = open_model(source)

    def choose(index: int, unit: Unit) -> Choice:
        dense = unit.kind == "bank" and model_type in FUSED
        return None if dense else loadable(index, unit)

    chosen = make_pieces(model, choose, tmp_path / "pieces")
    assemble(model, source, chosen, "transformers", tmp_path / "out", "card")
    assert verify(tmp_path / "out", model.checkpoint, chosen, "transformers", IDS) < 2e-6


def test_transformers_loads_every_width_in_rows_and_groups(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama", dtype=torch.bfloat16)
    model = open_model(source)

    def choose(index: int, unit: Unit) -> Choice:
        rows = index >= 7 or unit.shapes["weight"][1] % 16 != 0
        return channel(2 + index % 7) if rows else grouped(2 + index % 7)

    chosen = make_pieces(model, choose, tmp_path / "pieces")
    assemble(model, source, chosen, "transformers", tmp_path / "out", "card")
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert len(groups["config_groups"]) == 13  # 7 widths in rows, 6 of them in groups
    assert verify(tmp_path / "out", model.checkpoint, chosen, "transformers", IDS) < 2e-6


def test_transformers_loads_dense_experts_beside_packed_attention(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("qwen3_moe")
    model = open_model(source)
    chosen = make_pieces(
        model, lambda _, unit: None if unit.kind == "bank" else channel(4), tmp_path / "pieces"
    )
    assemble(model, source, chosen, "transformers", tmp_path / "out", "card")
    assert verify(tmp_path / "out", model.checkpoint, chosen, "transformers", IDS) < 2e-6


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_vllm_folder_decodes_to_what_was_planned(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Experts differ by block, attention by block, one bank is dense, linears have zero points."""
    source = tiny(model_type, dtype=torch.bfloat16)
    model = open_model(source)

    def choose(_: int, unit: Unit) -> Choice:
        if unit.kind == "bank":
            return channel(4 * (unit.block + 1)) if unit.block < 2 else None
        return channel((4, 8, 4)[unit.block], symmetric=unit.block != 1)

    chosen = make_pieces(model, choose, tmp_path / "pieces")
    assemble(model, source, chosen, "vllm", tmp_path / "out", "card")
    assert verify(tmp_path / "out", model.checkpoint, chosen, "vllm", IDS) < 2e-6


def test_shards_stay_under_the_limit_and_hold_the_same_tensors(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen2_moe")
    model = open_model(source)
    chosen = make_pieces(model, mixed, tmp_path / "pieces")
    limit = 30_000
    assemble(model, source, chosen, "moesaic", tmp_path / "one", "card")
    assemble(model, source, chosen, "moesaic", tmp_path / "many", "card", max_shard_bytes=limit)
    assert (tmp_path / "one/model.safetensors").exists()
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert sorted(index["weight_map"]) == sorted(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == shard.name
            assert torch.equal(tensor, whole[name])
    assert verify(tmp_path / "many", model.checkpoint, chosen, "moesaic", IDS) < 2e-6


@pytest.mark.parametrize("serve", SERVES)
def test_repetition_gives_the_same_bytes(serve: Serve, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    choose = mixed if serve == "moesaic" else lambda *_: channel(4)
    for run in ("a", "b"):
        model = open_model(source)
        chosen = make_pieces(model, choose, tmp_path / run / "pieces")
        ordered = dict(reversed(chosen.items())) if run == "b" else chosen
        assemble(model, source, ordered, serve, tmp_path / run / "out", "card", 40_000)
    assert file_bytes(tmp_path / "a/out") == file_bytes(tmp_path / "b/out")


def test_tensors_are_copied_in_small_chunks(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("qwen3")
    model = open_model(source)
    assemble(model, source, {}, "moesaic", tmp_path / "a", "card")
    monkeypatch.setattr(tensorfile, "_CHUNK_BYTES", 1000)
    assemble(model, source, {}, "moesaic", tmp_path / "b", "card")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    tensors = read_file(tmp_path / "a/model.safetensors")[0]
    embedding = tensors["model.embed_tokens.weight"]
    lengths = [len(chunk) for chunk in embedding.chunks()]
    assert lengths == [1000] * 18 + [embedding.nbytes - 18_000]


@pytest.mark.parametrize("serve", SERVES)
def test_header_bound_is_not_exceeded(serve: Serve, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    model = open_model(source)
    for name, choose in {"packed": lambda *_: channel(4), "dense": lambda *_: None}.items():
        chosen = make_pieces(model, choose, tmp_path / name)
        assemble(model, source, chosen, serve, tmp_path / "out", "card")
        file = tmp_path / "out/model.safetensors"
        header = file.stat().st_size - sum(s.nbytes for s in read_file(file)[0].values())
        assert folder_bytes(model, headers(chosen), serve) == file.stat().st_size
        bound = header_bytes_bound(model, model.units(), serve)
        assert header <= bound
    few = header_bytes_bound(model, [], serve)
    assert header <= few <= 1.15 * header  # nothing may be compressed: nearly exact


def test_companions_are_copied_and_weights_are_not(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny("qwen3").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    copied = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "x",
        "LICENSE": "free",
        "merges.txt": "",
    }
    others = {"pytorch_model.bin": "b", "README.md": "old", "run.py": "", ".hidden": ""}
    for name, text in {**copied, **others}.items():
        (source / name).write_text(text)
    model = open_model(source)
    assemble(model, source, {}, "transformers", tmp_path / "out", "new card")
    written = file_bytes(tmp_path / "out")
    assert sorted(written) == sorted(
        [*copied, "README.md", "config.json", "generation_config.json", "model.safetensors"]
    )
    assert written["README.md"] == b"new card"
    assert "quantization_config" not in json.loads(written["config.json"])
    assert verify(tmp_path / "out", model.checkpoint, {}, "transformers", IDS) < 2e-6


def test_earlier_output_is_replaced_whole(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3")
    model = open_model(source)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("old")
    for leftover in (".out.partial", ".out.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_text("half")
    assemble(model, source, {}, "moesaic", out, "card")
    assert not (out / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_that_does_not_pass_its_check_leaves_the_earlier_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("qwen3")
    model = open_model(source)
    out = tmp_path / "out"
    passed: list[Path] = []
    assemble(model, source, {}, "moesaic", out, "first", check=passed.append)
    first = file_bytes(out)

    def refuse(folder: Path) -> None:
        assert file_bytes(folder) == {**first, "README.md": b"second"}  # complete by now
        assert file_bytes(out) == first
        raise RunError("wrong")

    with pytest.raises(RunError, match="^wrong$"):
        assemble(model, source, {}, "moesaic", out, "second", check=refuse)
    assert passed != [out]
    assert file_bytes(out) == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_survives_a_kill_between_the_renames_and_a_failure(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("qwen3")
    model = open_model(source)
    assemble(model, source, {}, "moesaic", tmp_path / "out", "first")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")

    def full(self: Stored) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Stored, "chunks", full)
    with pytest.raises(RunError, match="disk is full"):
        assemble(model, source, {}, "moesaic", tmp_path / "out", "second")
    assert (tmp_path / "out/README.md").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["first tensor", "last tensor", "companions"])
def test_kill_leaves_the_earlier_output_and_the_next_run_is_whole(
    moment: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("qwen3")
    model = open_model(source)
    assemble(model, source, {}, "moesaic", tmp_path / "out", "card")
    before = file_bytes(tmp_path / "out")
    count = len(read_file(tmp_path / "out/model.safetensors")[0])
    original, calls = Stored.chunks, 0

    def die_at_last(self: Stored) -> Iterator[bytes]:
        nonlocal calls
        calls += 1
        if calls == (1 if moment == "first tensor" else count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        if moment == "companions":
            monkeypatch.setattr(assemble_module, "_copy_companions", die)
        else:
            monkeypatch.setattr(Stored, "chunks", die_at_last)
        assemble(model, source, {}, "moesaic", tmp_path / "out", "other")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / ".out.partial").exists()
    assert file_bytes(tmp_path / "out") == before
    assemble(model, source, {}, "moesaic", tmp_path / "out", "card")
    assert file_bytes(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_assemble_refuses_what_the_target_would_misread(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    model = open_model(source)

    def refused(serve: Serve, choose: Any) -> str:
        chosen = make_pieces(model, choose, tmp_path / "pieces")
        with pytest.raises(RunError) as caught:
            assemble(model, source, chosen, serve, tmp_path / "out", "card")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    def by_layer(_: int, unit: Unit) -> Choice:
        return channel(4 + 4 * unit.block) if unit.kind == "bank" else None

    message = refused("transformers", by_layer)
    assert "model.layers.0.mlp.experts and model.layers.1.mlp.experts" in message
    members = {"gate": channel(4), "up": channel(8), "down": channel(4)}
    by_member = refused("vllm", lambda _, unit: members if unit.kind == "bank" else None)
    assert "all members" in by_member
    by_part = refused("vllm", lambda i, unit: channel(4) if unit.name.endswith("k_proj") else None)
    assert "q_proj and model.layers.0.self_attn.k_proj" in by_part
    assert "zero points" in refused("transformers", lambda *_: channel(4, symmetric=False))


def test_assemble_refuses_pieces_of_other_units(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama")
    model = open_model(source)
    chosen = make_pieces(model, lambda *_: channel(4), tmp_path / "pieces")
    swapped = {**chosen, "model.layers.0.self_attn.q_proj": chosen["model.layers.0.mlp.up_proj"]}
    with pytest.raises(RunError, match=r"holds shapes .*q_proj"):
        assemble(model, source, swapped, "moesaic", tmp_path / "out", "card")
    with pytest.raises(ValueError, match="no unit nonsense"):
        assemble(model, source, {"nonsense": None}, "moesaic", tmp_path / "out", "card")
