"""A model at a URL: the bytes of the folder, copied as far as they are needed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from moesaic.orchestrator import objects, remote_model
from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.forecast import inspect_model
from moesaic.orchestrator.publish import MARK, publish
from moesaic.orchestrator.remote_model import RemoteCheckpoint, copies_folder, open_checkpoint
from moesaic.orchestrator.shared import CachePlace
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import MANY, Faulty, emptied, in_use

URL = "faulty://models/llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("llama"), "llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with emptied(monkeypatch):
        upload(model, "faulty", "/models/llama")
        Faulty.calls.clear()
        yield


def upload(folder: Path, protocol: str, to: str) -> None:
    system = fsspec.filesystem(protocol)
    for file in folder.iterdir():
        system.pipe_file(f"{to}/{file.name}", file.read_bytes())


def opened(tmp_path: Path, size: int = MANY) -> RemoteCheckpoint:
    found = open_checkpoint(copies_folder(URL, CachePlace(tmp_path / "cache", size)))
    assert isinstance(found, RemoteCheckpoint)
    return found


def weights(found: RemoteCheckpoint) -> set[str]:
    return {file.name for file in found.folder.glob("*.safetensors")}


def test_it_is_the_checkpoint_of_the_folder(model: Path, tmp_path: Path) -> None:
    one, two = Checkpoint(model), opened(tmp_path)
    assert two.names() == one.names() and two.config == one.config
    assert (two.total_bytes, two.file_bytes) == (one.total_bytes, one.file_bytes)
    for name in one.names():
        assert torch.equal(one.read(name), two.read(name))
    assert two.fingerprint == one.fingerprint


def test_only_the_shards_that_are_wanted_come_and_they_come_once(
    model: Path, tmp_path: Path
) -> None:
    found = opened(tmp_path)
    assert weights(found) == set()
    name = found.names()[0]
    found.read(name)
    assert weights(found) == {Checkpoint(model).entries()[name].file.name}
    Faulty.calls.clear()
    found.read(name)
    assert opened(tmp_path).read(name) is not None
    assert not [path for kind, path in Faulty.calls if not _is_header(kind, path)]


def test_where_tensors_lie_is_told_without_a_copy_until_all_are_fetched(
    model: Path, tmp_path: Path
) -> None:
    found = opened(tmp_path)
    files = {entry.file for entry in found.entries().values()}
    assert len(files) > 1 and weights(found) == set()
    found.fetch()
    assert weights(found) == {file.name for file in files}


def _is_header(kind: str, path: str) -> bool:
    """Headers are read by every process that opens the model."""
    return kind == "read" and path.endswith(".safetensors")


def test_a_copy_that_was_altered_or_is_out_of_date_is_made_again(
    model: Path, tmp_path: Path
) -> None:
    found = opened(tmp_path)
    name = found.names()[0]
    good = found.read(name)
    file = found.entries()[name].file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert torch.equal(found.read(name), good)
    config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    fsspec.filesystem("faulty").pipe_file("/models/llama/config.json", json.dumps(config).encode())
    assert opened(tmp_path).config["rms_norm_eps"] == 0.5


def test_shards_leave_a_small_cache_and_come_back(model: Path, tmp_path: Path) -> None:
    whole = Checkpoint(model)
    limit = whole.file_bytes // 2
    found = opened(tmp_path, limit)
    release_pins()
    for _ in range(2):
        for name in whole.names():
            assert torch.equal(found.read(name), whole.read(name))
            release_pins()
            kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in kept) <= limit


def test_the_digest_of_a_model_takes_no_more_room_than_there_is(
    model: Path, tmp_path: Path
) -> None:
    """What transformers opens by its name stays."""
    whole = Checkpoint(model)
    limit = whole.file_bytes // 2
    found = opened(tmp_path, limit)
    assert found.fingerprint == whole.fingerprint
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= limit
    used = {Path(name).name for name in in_use(tmp_path / "cache")}
    assert used == {path.name for path in model.iterdir() if path.suffix != ".safetensors"}
    assert all((found.folder / name).exists() for name in used)


def test_a_truncated_download_is_repeated_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, left = opened(tmp_path), [3, 1]
    monkeypatch.setattr(Faulty, "faults", staticmethod(lambda *call: left.pop() if left else 0))
    found.read(found.names()[0])
    assert not left
    monkeypatch.setattr(Faulty, "faults", staticmethod(lambda *call: 1))
    with pytest.raises(RunError, match=r"faulty://models/llama/.* of which 3 times not all came"):
        for name in found.names():
            found.read(name)


def test_a_damaged_header_is_told_by_its_url_and_nothing_is_removed(tmp_path: Path) -> None:
    system = fsspec.filesystem("faulty")
    (name, *_) = (path for path in system.find("/models/llama") if path.endswith(".safetensors"))
    system.pipe_file(name, system.cat_file(name).replace(b'"shape"', b'"shabe"', 1))
    before = {path: system.cat_file(path) for path in system.find("/models/llama")}
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^faulty:/{name}: header entry of tensor .* incomp"):
            opened(tmp_path)
    assert {path: system.cat_file(path) for path in system.find("/models/llama")} == before


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "a.bin"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    system = fsspec.filesystem("faulty")
    name = "/models/llama/model.safetensors.index.json"
    index = json.loads(system.cat_file(name))
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    system.pipe_file(name, json.dumps(index).encode())
    with pytest.raises(UserError, match="is not a name of a .safetensors file inside the folder"):
        opened(tmp_path)
    assert not list(tmp_path.rglob("secret*"))


def test_a_listing_that_leads_elsewhere_writes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = objects.Objects.listing

    def hostile(self: objects.Objects, folder: str = "") -> dict[str, Any]:
        found = dict(listing(self, folder))
        return {**found, "../../evil.json": found["config.json"], "/evil.json": {"size": 3}}

    monkeypatch.setattr(objects.Objects, "listing", hostile)
    assert opened(tmp_path).names()
    assert not list(tmp_path.rglob("evil*")) and not Path("/evil.json").exists()


def test_of_other_folders_nothing_is_copied_but_an_encoder_s_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fsspec.filesystem("faulty")
    others = ["checkpoint-500/config.json", "runs/1_a/config.json", "data/texts.txt", "onnx/v.json"]
    for name in ("1_Pooling/config.json", "1_Pooling/notes.json", "large.txt", *others):
        system.pipe_file(f"/models/llama/{name}", b"{}" if name != "large.txt" else bytes(500_000))
    monkeypatch.setattr(remote_model, "_SMALL_BYTES", 400_000)
    found = opened(tmp_path)
    copies = {str(path.relative_to(found.folder)) for path in found.folder.glob("**/*.*")}
    kept = {name for name in copies if not name.endswith(".copy")}
    assert {name for name in kept if "/" in name} == {"1_Pooling/config.json"}
    assert {"config.json", "tokenizer.json"} <= kept and "large.txt" not in kept

    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(remote_model, "_ALL_SMALL_BYTES", 1000)
    with pytest.raises(
        UserError, match=f"^{URL}: the files beside the weights have .* bytes, limit 1,000 bytes"
    ) as error:
        opened(tmp_path)
    assert "largest: tokenizer.json, " in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_a_model_s_own_code_is_copied_where_it_may_run(tmp_path: Path) -> None:
    fsspec.filesystem("faulty").pipe_file("/models/llama/modeling_own.py", b"x = 1")
    fsspec.filesystem("faulty").pipe_file("/models/llama/tools/other.py", b"x = 1")
    folder = copies_folder(URL, CachePlace(tmp_path / "cache", MANY))
    for code, copied in ((False, set()), (True, {"modeling_own.py"})):
        open_checkpoint(folder, code=code)
        assert {path.name for path in folder.rglob("*.py")} == copied


def test_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^faulty://models/none: no model folder: there is no con"):
        open_checkpoint(copies_folder("faulty://models/none", CachePlace(tmp_path, MANY)))
    with pytest.raises(RecipeError, match=r"^model: nosuch://x/y: "):
        open_checkpoint(copies_folder("nosuch://x/y", CachePlace(tmp_path, MANY)))


def test_a_run_from_and_to_s3_leaves_the_bytes_of_a_local_one(
    bucket: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {"calibration": {"gradient_sequences": 0}, "baselines": None}
    candidates = [{"method": "rtn", "bits": [3, 8], "group_size": 16}]
    local = Project(tmp_path / "local", model, monkeypatch)
    local.write(candidates=candidates, **sections)
    local.run()
    upload(model, "s3", f"{bucket}/llama")
    cache = {"folder": str(tmp_path / "cache"), "size": "1 GB"}
    made = Project(tmp_path / "remote", f"{bucket}/llama", monkeypatch)  # type: ignore[arg-type]
    made.write(candidates=candidates, cache=cache, **sections)
    made.run(size=2)
    one, two = local.left(), made.left()
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    shutil.rmtree(tmp_path / "cache")  # nobody is hurt
    assert inspect_model(f"{bucket}/llama")["files"] > 3


def test_a_published_folder_is_complete_only_with_its_mark(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, system = "faulty://out/model", fsspec.filesystem("faulty")

    def fail(operation: str, path: str) -> int:
        if path.endswith("tokenizer.json"):
            raise PermissionError(13, "Forbidden")
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "faults", staticmethod(fail))
        with pytest.raises(RunError, match=r"^publish: faulty://out/model/.*the checkpoint itself"):
            publish(model, url)
    assert not system.exists(f"/out/model/{MARK}") and system.exists("/out/model/config.json")
    assert publish(model, url)
    there = {Path(path).name: system.cat_file(path) for path in system.find("/out/model")}
    assert set(json.loads(there.pop(MARK))) == set(there)
    assert there == {file.name: file.read_bytes() for file in model.iterdir()}
    assert not publish(model, url)
    for mark in (b"[" * 100_000, b"", b"{}"):
        system.pipe_file(f"/out/model/{MARK}", mark)
        assert publish(model, url) and not publish(model, url)
    place = CachePlace(tmp_path / "cache", MANY)
    assert open_checkpoint(copies_folder(url, place)).fingerprint == Checkpoint(model).fingerprint


def test_a_run_publishes_what_it_verified(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Project(tmp_path / "one", model, monkeypatch)
    candidates = [{"method": "rtn", "bits": [3, 8], "group_size": 16}]
    settings = {"calibration": {"gradient_sequences": 0}, "baselines": None}
    made.write(publish="faulty://out/run", candidates=candidates, **settings)
    made.run(stages=("assemble",))
    there = fsspec.filesystem("faulty").cat_file("/out/run/model.safetensors")
    assert there == made.left()["model.safetensors"]
    made.write(publish="/some/folder", candidates=candidates, **settings)
    with pytest.raises(UserError, match=r"publish: '/some/folder' is no URL of a server"):
        made.run()
