"""Model folders whose weights are entries of a store, in a folder and at a URL."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.orchestrator import objects, shared
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.remote_model import open_checkpoint
from moesaic.orchestrator.shared import CachePlace, make_store, mirror_folder
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.stored_model import model_folder, shard_file, write_stored
from tests.orchestrator.remote import MANY, Faulty, emptied

CONFIG = {"model_type": "llama"}
TENSORS = {"a.safetensors": "first", "b.safetensors": "second"}
KEYS = {"a.safetensors": "ab" + "0" * 38, "b.safetensors": "cd" + "1" * 38}
MODEL = "ef" * 20
URL = "faulty://bucket/models"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emptied(monkeypatch):
        yield


@pytest.fixture(params=["folder", "URL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    where = URL if request.param == "URL" else str(tmp_path / "store")
    return make_store(where, CachePlace(tmp_path / "cache", MANY))


def written(store: Store, keys: dict[str, str] = KEYS) -> Path:
    """A model of two shards, the folder first, as before anything is sliced."""
    folder = model_folder(store.root, MODEL)
    index = {"metadata": {}, "weight_map": {name: shard for shard, name in TENSORS.items()}}
    write_stored(folder, CONFIG, index, keys)
    for number, (shard, name) in enumerate(TENSORS.items()):
        tensor = torch.full((2, 3), float(number))
        store.put("sliced", KEYS[shard], lambda p, n=name, t=tensor: save_file({n: t}, p))  # type: ignore[misc]
    return folder


def seen_elsewhere(store: Store, cache: Path) -> Path:
    """The folder's path on a node with an empty cache."""
    if store.where != URL:
        return model_folder(store.root, MODEL)
    return model_folder(mirror_folder(URL, CachePlace(cache, MANY)), MODEL)


def test_another_node_reads_what_one_wrote(store: Store, tmp_path: Path) -> None:
    folder = written(store)
    found = open_checkpoint(seen_elsewhere(store, tmp_path / "other"))
    assert found.config == CONFIG and found.names() == ["first", "second"]
    assert [file.exists() for file in found.files] == [store.where != URL] * 2
    assert torch.equal(found.read("second"), torch.ones(2, 3))
    assert [file.exists() for file in found.files] == [store.where != URL, True]
    assert torch.equal(found.read_rows("first", 1, 2), torch.zeros(1, 3))
    assert found.file_bytes == sum(file.stat().st_size for file in found.files)
    assert found.entries()["first"].file == shard_file(
        found.path, "a.safetensors", KEYS["a.safetensors"]
    )
    again = open_checkpoint(folder)
    assert again.fingerprint == found.fingerprint
    again.fetch()
    assert all(file.is_file() for file in again.files)


def test_in_a_folder_it_is_a_model_for_any_tool(tmp_path: Path) -> None:
    folder = written(make_store(str(tmp_path / "store"), CachePlace(tmp_path / "cache", MANY)))
    assert type(open_checkpoint(folder)) is Checkpoint
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *TENSORS,
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for number, name in enumerate(TENSORS.values()):
        assert torch.equal(load_file(folder / index[name])[name], torch.full((2, 3), float(number)))


def test_what_stands_there_is_not_written_again(store: Store) -> None:
    folder = written(store)
    times = {path: path.lstat().st_mtime_ns for path in folder.iterdir()}
    Faulty.calls.clear()
    written(store)
    assert {path: path.lstat().st_mtime_ns for path in folder.iterdir()} == times
    assert not [name for kind, name in Faulty.calls if kind == "write" and "/models/ef" in name]


def entry(shard: str) -> str:
    """The name of a file of weights at the URL."""
    key = KEYS[shard]
    return f"/bucket/models/sliced/{key[:2]}/{key}.safetensors"


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    with pytest.raises(RunError, match=r"config.json: is gone; run the same command again$"):
        open_checkpoint(model_folder(store.root, MODEL))
    folder = written(store)
    gone = rf"^faulty:/{entry('b.safetensors')}: is gone; run the same command again$"
    opened = open_checkpoint(seen_elsewhere(store, tmp_path / "other"))
    shared.remove(store.path("sliced", KEYS["b.safetensors"]))
    for use in (
        lambda: open_checkpoint(folder),
        lambda: opened.fetch(),
        lambda: opened.read("second"),
        lambda: opened.read_rows("second", 0, 1),
    ):
        with pytest.raises(RunError, match=gone):
            use()
    assert torch.equal(opened.read("first"), torch.zeros(2, 3))


def test_an_entry_that_was_cut_off_is_gone(tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    folder = written(store)
    Faulty.store[entry("a.safetensors")].truncate(40)
    with pytest.raises(RunError, match=r"^faulty://.*/sliced/ab/.*: is gone; run the same command"):
        open_checkpoint(folder)
    assert entry("a.safetensors") not in Faulty.store


def incomplete(content: bytes) -> bytes:
    return content.replace(b'"shape"', b'"shabe"')


def renamed(content: bytes) -> bytes:
    return content.replace(b'"first"', b'"firsu"')


def too_long(content: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + content[8:]


DAMAGES = pytest.mark.parametrize("damage", [incomplete, renamed, too_long])


@DAMAGES
def test_an_entry_with_a_damaged_header_is_removed_and_made_again(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """The size stays, so that only reading the whole file tells."""
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    written(store)
    there, place = Faulty.store[entry("a.safetensors")], seen_elsewhere(store, tmp_path / "other")
    damaged = damage(there.getvalue())
    there.seek(0)
    there.write(damaged)
    with pytest.raises(RunError) as error:
        open_checkpoint(place)
    assert str(error.value) == (
        f"faulty:/{entry('a.safetensors')}: does not match its seal, read 3 times: it is removed;"
        " run the same command again, it is made anew"
    )
    assert {name for name in Faulty.store if "/sliced/" in name} == {
        entry("b.safetensors"),
        entry("b.safetensors").replace(".safetensors", ".seal.json"),
    }
    written(store)  # as the next start does it
    assert torch.equal(open_checkpoint(place).read("first"), torch.zeros(2, 3))


@DAMAGES
def test_a_header_that_was_read_wrong_once_does_no_harm(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    written(store)
    read = objects.Objects.read_range

    def wrong(self: objects.Objects, name: str, start: int, stop: int) -> bytes:
        return damage(read(self, name, start, stop))

    monkeypatch.setattr(objects.Objects, "read_range", wrong)
    opened = open_checkpoint(seen_elsewhere(store, tmp_path / "other"))
    assert torch.equal(opened.read("first"), torch.zeros(2, 3))


def test_offsets_that_were_read_wrong_are_not_read_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that could be one: the shape is another one of as many values."""
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    written(store)
    read = objects.Objects.read_range

    def wrong(self: objects.Objects, name: str, start: int, stop: int) -> bytes:
        return read(self, name, start, stop).replace(b"[2,3]", b"[3,2]")

    monkeypatch.setattr(objects.Objects, "read_range", wrong)
    opened = open_checkpoint(seen_elsewhere(store, tmp_path / "other"))
    with pytest.raises(RunError, match=r"^faulty://.*: its header was read wrong; run the same"):
        opened.read_rows("first", 1, 2)


def test_an_entry_whose_seal_fits_what_is_no_file_of_weights_is_removed(tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    folder = written(store)
    shared.write_shared(
        store.path("sliced", KEYS["a.safetensors"]),
        lambda path: path.write_bytes(b"x" * 50) and None,
    )
    with pytest.raises(RunError, match=r"^faulty://.*: it is removed; run the same command again"):
        open_checkpoint(folder)
    assert entry("a.safetensors") not in Faulty.store


@pytest.mark.parametrize(
    "key", ["../../../../private", "ab" * 20 + "/..", "", "AB" * 20, 10**39, None, ["ab" * 20]]
)
def test_keys_that_lead_elsewhere_are_refused(key: Any, tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    folder = written(store, {**KEYS, "b.safetensors": key})
    with pytest.raises(UserError, match=r"entries.json: names what no entry is called"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{"])
def test_a_list_of_keys_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "cache", MANY))
    folder = written(store)
    file = folder / "entries.json"
    shared.write_shared(file, lambda path: path.write_text(content) and None)
    with pytest.raises(UserError, match=r"entries.json: (not readable as|must hold a) JSON"):
        open_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text()) == CONFIG
