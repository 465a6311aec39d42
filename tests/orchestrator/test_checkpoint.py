"""Reading safetensors folders against the safetensors library, and what is wrong with bad ones."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.orchestrator import digests
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError

TENSORS: dict[str, Tensor] = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "float": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7, dtype=torch.float16),
    "bfloat": torch.linspace(-2, 2, 33).to(torch.bfloat16).reshape(3, 11),
    "double": torch.tensor([1e300, -1.0], dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "counts": torch.tensor([-(2**40), 7]),
    "mask": torch.tensor([True, False, True]),
    "eighth": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate([names[:4], names[4:]]):
        shard = f"model-{number}.safetensors"
        save_file({name: TENSORS[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_read_equals_safetensors_when_sharded(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype == checkpoint.dtype(name)
        assert read.shape == tensor.shape == checkpoint.shape(name)
        assert torch.equal(raw(read), raw(tensor)), name
        assert checkpoint.nbytes(name) == tensor.numel() * tensor.element_size()
    assert checkpoint.total_bytes == sum(t.numel() * t.element_size() for t in TENSORS.values())
    files = folder.glob("*.safetensors")
    assert checkpoint.file_bytes == sum(file.stat().st_size for file in files)


def test_read_equals_safetensors_when_single_file(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)  # the single file comes first, as in transformers
    assert checkpoint.files == [folder / "model.safetensors"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(raw(checkpoint.read(name)), raw(tensor)), name


def test_read_fills_given_tensor(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    stack = torch.full((2, 3, 11), 9.0, dtype=torch.bfloat16)
    checkpoint.read("bfloat", out=stack[1])
    assert torch.equal(stack[1], TENSORS["bfloat"])
    assert bool((stack[0] == 9).all())
    wide = torch.empty(3, 11)
    checkpoint.read("bfloat", out=wide)
    assert torch.equal(wide, TENSORS["bfloat"].float())
    with pytest.raises(ValueError, match=r"bfloat has shape \(3, 11\)"):
        checkpoint.read("bfloat", out=torch.empty(11, 3))


def test_read_shares_no_memory_with_the_file(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    before = checkpoint.read("float")
    before.zero_()
    assert torch.equal(checkpoint.read("float"), TENSORS["float"])
    shutil.rmtree(folder)
    assert bool((before == 0).all())


def test_folder_of_links_is_read_as_the_hub_caches_it(folder: Path, tmp_path: Path) -> None:
    blobs, links = (tmp_path / "models--a--b" / part for part in ("blobs", "snapshots/0123"))
    folder.rename(blobs.parent.mkdir() or blobs)
    links.mkdir(parents=True)
    for file in blobs.iterdir():
        (links / file.name).symlink_to(f"../../blobs/{file.name}")
    assert torch.equal(Checkpoint(links).read("float"), TENSORS["float"])


@pytest.mark.parametrize("name", ["model-0.safetensors", "config.json", "tokenizer.json", "1/x"])
def test_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "private"
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    secret.write_bytes(link.read_bytes() if link.exists() else b"{}")
    link.unlink(missing_ok=True)
    link.symlink_to("../" * (name.count("/") + 1) + "private")
    with pytest.raises(UserError, match=f"{name}: is a symbolic link to .*private, outside"):
        Checkpoint(folder)


@pytest.mark.parametrize("link", ["a/b/model-0.safetensors", "a/b", "a"])
def test_weights_deep_below_are_no_way_out(folder: Path, tmp_path: Path, link: str) -> None:
    """The index names a file that is a link, or lies below one."""
    index = json.loads((folder / INDEX).read_text())
    deep = "a/b/model-0.safetensors"
    moved = {
        name: deep if file == "model-0.safetensors" else file
        for name, file in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": moved}))
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "model-0.safetensors").rename(folder / deep)
    assert torch.equal(Checkpoint(folder).read("float"), TENSORS["float"])
    (folder / link).rename(tmp_path / "private")
    (folder / link).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is a symbolic link to .*private.*, outside"):
        Checkpoint(folder)


def test_blobs_that_are_a_link_themselves_allow_nothing(folder: Path, tmp_path: Path) -> None:
    """Or an archive could let the folder's links lead anywhere."""
    repo, secret = tmp_path / "models--a--b", tmp_path / "elsewhere" / "secret"
    (repo / "snapshots").mkdir(parents=True)
    inside = repo / "snapshots" / "0123"
    folder.rename(inside)
    secret.parent.mkdir()
    secret.write_text("{}")
    (repo / "blobs").symlink_to(tmp_path / "elsewhere")
    (inside / "notes.txt").symlink_to("../../blobs/secret")
    with pytest.raises(UserError, match="notes.txt: is a symbolic link to .*secret, outside"):
        Checkpoint(inside)


def test_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "model-0.safetensors").rename(folder / "weights")
    (folder / "model-0.safetensors").symlink_to("weights")
    assert torch.equal(Checkpoint(folder).read("float"), TENSORS["float"])


def test_unknown_tensor_raises(folder: Path) -> None:
    with pytest.raises(KeyError, match="no tensor nonsense"):
        Checkpoint(folder).read("nonsense")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_names_tensor(folder: Path, value: float, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(folder)
    tensor = torch.zeros(3, 5, dtype=dtype)
    checkpoint.check_finite("float", tensor)
    tensor[2, 1] = value
    with pytest.raises(UserError, match="tensor float has 1 values of 15 that are NaN or .*: copy"):
        checkpoint.check_finite("float", tensor)


def test_check_finite_accepts_what_has_no_nan(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name, tensor in TENSORS.items():
        checkpoint.check_finite(name, tensor)
    with pytest.raises(UserError, match="tensor eighth"):
        checkpoint.check_finite("eighth", torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_fingerprint_tells_content_not_place(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    original = Checkpoint(folder).fingerprint
    assert Checkpoint(copied).fingerprint == original
    (copied / "config.json").write_text('{"model_type": "qwen2"}')
    assert Checkpoint(copied).fingerprint != original
    shutil.copy(folder / "config.json", copied)
    assert Checkpoint(copied).fingerprint == original
    shard = copied / "model-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)  # one bit, same size
    assert Checkpoint(copied).fingerprint != original


def test_file_digest_is_remembered_for_unchanged_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "TICK_NS", -1)
    file = tmp_path / "data"
    file.write_bytes(b"one")
    first = digests.file_digest(file)
    (entry,) = digests.cache_folder().iterdir()
    entry.write_text("f" * 32)
    assert digests.file_digest(file) == "f" * 32
    file.write_bytes(b"two!")
    assert digests.file_digest(file) not in {first, "f" * 32}
    entry.write_text("torn")
    file.unlink()
    file.write_bytes(b"one")
    assert digests.file_digest(file) == first


@pytest.mark.parametrize("tick", [-1, digests.TICK_NS])
def test_another_file_of_the_same_size_and_time_has_its_own_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick: int
) -> None:
    """A model that took another's place, as rsync and tar leave it; or within a clock's tick."""
    monkeypatch.setattr(digests, "TICK_NS", tick)
    file = tmp_path / "data"
    found = set()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, ns=(10**18, 10**18))
        found.add(digests.file_digest(file))
        time.sleep(0.02 if tick < 0 else 0.0)  # longer than a tick of the system's clock
    assert len(found) == 2
    own = digests.file_digest(file, own=True)
    os.utime(file, ns=(10**18 + 5, 10**18))  # used
    assert digests.file_digest(file, own=True) == own


def test_file_digest_works_when_cache_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"one")
    expected = digests.file_digest(file)
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert digests.file_digest(file) == expected


# Bad input: what is done to the folder, and what the message must name.


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model-0.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw_header = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw_header)) + raw_header + content[8 + length :])


def write_shard(folder: Path, content: bytes) -> None:
    (folder / "model-0.safetensors").write_bytes(content)


def truncate(folder: Path, count: int) -> None:
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-count])


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def same_tensor_twice(folder: Path) -> None:
    save_file(
        {"bytes": TENSORS["bytes"], "float": TENSORS["float"]}, folder / "model-1.safetensors"
    )


INDEX = "model.safetensors.index.json"
QUANTIZED = '{"quantization_config": {"quant_method": "gptq"}}'
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "folder missing": (shutil.rmtree, ["no such model folder"]),
    "config missing": (lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
    "config torn": (lambda f: (f / "config.json").write_text('{"a":'), ["config.json", "JSON"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xfa"), ["config.json"]),
    "quantized": (lambda f: (f / "config.json").write_text(QUANTIZED), ["already", "gptq"]),
    "no weights": (no_weights, ["no weights", "model.safetensors"]),
    "pickled": (pickled, ["pytorch_model.bin", "refused"]),
    "index torn": (lambda f: (f / INDEX).write_text("{"), [INDEX, "JSON"]),
    "index empty": (lambda f: edit_index(f, dict.clear), [INDEX, "weight_map"]),
    "shard missing": (lambda f: (f / "model-1.safetensors").unlink(), [INDEX, "model-1.saf"]),
    "tensor missing": (
        lambda f: edit_index(f, lambda m: m.update(ghost="model-0.safetensors")),
        [INDEX, "ghost", "model-0.safetensors"],
    ),
    "tensor elsewhere": (
        lambda f: edit_index(f, lambda m: m.update(float="model-1.safetensors")),
        ["tensor float is not in model-1.safetensors"],
    ),
    "path traversal": (
        lambda f: edit_index(f, lambda m: m.update(float="../model-0.safetensors")),
        [INDEX, "'../model-0.safetensors'", "inside the folder"],
    ),
    "absolute path": (
        lambda f: edit_index(f, lambda m: m.update(float=str(f / "model-0.safetensors"))),
        [INDEX, "inside the folder"],
    ),
    "pickle in index": (
        lambda f: edit_index(f, lambda m: m.update(float="model-0.bin")),
        [INDEX, "'model-0.bin'"],
    ),
    "number in index": (lambda f: edit_index(f, lambda m: m.update(float=3)), [INDEX, "3"]),
    "list in index": (
        lambda f: edit_index(f, lambda m: m.update(float=["a"])),
        [INDEX, "tensor float", "inside the folder"],
    ),
    "long name in index": (
        lambda f: edit_index(f, lambda m: m.update(float="n" * 5000 + ".safetensors")),
        [INDEX, "which is not in the folder"],
    ),
    "index nested": (lambda f: (f / INDEX).write_text("[" * 100_000), [INDEX, "JSON"]),
    "tensor twice": (same_tensor_twice, ["tensor float", "model-0.safetensors as well"]),
    "truncated by one byte": (lambda f: truncate(f, 1), ["model-1.safetensors: truncated"]),
    "trailing bytes": (
        lambda f: write_shard(f, (f / "model-0.safetensors").read_bytes() + b"xy"),
        ["model-0.safetensors: 2 bytes behind"],
    ),
    "empty shard": (lambda f: write_shard(f, b""), ["model-0.safetensors: truncated: 0 bytes"]),
    "header cut": (
        lambda f: write_shard(f, (f / "model-0.safetensors").read_bytes()[:20]),
        ["model-0.safetensors: truncated: header"],
    ),
    "absurd header": (
        lambda f: write_shard(f, struct.pack("<Q", 2**60) + b"{}"),
        ["1152921504606846976", "100000000 bytes"],
    ),
    "header no JSON": (
        lambda f: write_shard(f, struct.pack("<Q", 4) + b"{{{{"),
        ["model-0.safetensors", "JSON"],
    ),
    "header a list": (lambda f: write_shard(f, struct.pack("<Q", 2) + b"[]"), ["JSON object"]),
    "offsets overlap": (
        lambda f: edit_header(f, lambda h: h["half"].update(data_offsets=[0, 14])),
        ["model-0.safetensors", "overlaps"],
    ),
    "offsets negative": (
        lambda f: edit_header(f, lambda h: h["half"].update(data_offsets=[-14, 0])),
        ["tensor half", "illegal"],
    ),
    "offsets too short": (
        lambda f: edit_header(f, lambda h: h["float"].update(shape=[30, 5])),
        ["tensor float of shape [30, 5] needs 600 bytes"],
    ),
    "entry incomplete": (
        lambda f: edit_header(f, lambda h: h["float"].pop("dtype")),
        ["tensor float is incomplete"],
    ),
    "dtype a list": (
        lambda f: edit_header(f, lambda h: h["float"].update(dtype=["F32"])),
        ["tensor float has dtype ['F32']", "BF16"],
    ),
    "unknown dtype": (
        lambda f: edit_header(f, lambda h: h["float"].update(dtype="F4")),
        ["tensor float has dtype F4", "BF16"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_folder_is_told_in_two_lines(folder: Path, damage: str) -> None:
    do, parts = DAMAGES[damage]
    do(folder)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert message.count("\n") <= 1
    assert str(folder) in message
    for part in parts:
        assert part in message, message


def test_read_tells_when_file_shrank_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[: -checkpoint.total_bytes])
    with pytest.raises(UserError, match=r"model-1\.safetensors: ends inside tensor \w+"):
        for name in checkpoint.names():
            checkpoint.read(name)
