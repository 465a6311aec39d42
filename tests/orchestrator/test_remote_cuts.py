"""Cuts of a piece in a store at a URL: each node fetches the whole that they are of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.kernels import dense, lowrank
from moesaic.orchestrator import shared
from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.pieces import is_cut, read_piece, write_cut, write_piece
from moesaic.orchestrator.shared import CachePlace, RemoteStore, make_store, mirror_folder
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import MANY, emptied, forget

WHOLE, CUT = "ab" + "0" * 38, "cd" + "1" * 38
URL = "faulty://bucket/cuts"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emptied(monkeypatch):
        yield


def test_a_cut_is_read_on_a_node_that_has_not_fetched_its_whole(tmp_path: Path) -> None:
    store = make_store(URL, CachePlace(tmp_path / "one", MANY))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator) for s in ((6, 4), (4, 8)))
    members = {"weight": lowrank.pack(dense.pack(left), dense.pack(right))}
    store.put("pieces", WHOLE, lambda path: write_piece(path, members, {}))
    store.put("pieces", CUT, lambda path: write_cut(path, WHOLE, {"weight": 2}, {}))

    other = RemoteStore(mirror_folder(URL, CachePlace(tmp_path / "two", MANY)))
    path = other.path("pieces", CUT)
    expected = left[:, :2] @ right[:2]
    torch.testing.assert_close(read_piece(path)["weight"].dense(), expected)
    # Both are in use until pins are released; evicted, they are fetched again.
    whole = other.path("pieces", WHOLE)
    assert path.is_file() and whole.is_file()
    release_pins()
    for file in (path, whole):
        file.unlink()
    torch.testing.assert_close(read_piece(path)["weight"].dense(), expected)

    shared.remove(whole)
    with pytest.raises(RunError, match=f"it is a cut of {WHOLE}.safetensors, which is gone"):
        read_piece(path)


def test_a_run_with_ranks_is_resumed_with_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model", "llama")
    ranks: dict[str, Any] = {
        "candidates": [{"method": "svd", "rank": [6, 10]}],
        "baselines": {},
        "budget": {"bits_per_weight": 6},
        "calibration": {"shards": 2, "gradient_sequences": 2},
    }
    local = Project(tmp_path / "local", model, monkeypatch)
    local.write(**ranks)
    local.run()
    made = Project(tmp_path / "remote", model, monkeypatch)
    made.write(store=URL, cache={"folder": "first", "size": "1 GB"}, **ranks)
    made.run(stages=("measure",))
    release_pins()
    forget()
    made.write(store=URL, cache={"folder": "second", "size": "1 GB"}, **ranks)
    _, calls = made.run()
    assert "measure:compress_job" not in calls
    one, two = local.left(), made.left()
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    fetched = list((made.folder / "second").glob("**/pieces/*/*.safetensors"))
    assert any(is_cut(path) for path in fetched)
