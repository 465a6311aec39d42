"""How fast a store's files are, in a folder and at a URL, and `moesaic check` that asks for it."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.file_probes import file_speeds
from moesaic.orchestrator.outlook import predict_on
from moesaic.orchestrator.run import check_recipe
from moesaic.orchestrator.shared import CachePlace, RemoteStore, make_store
from tests.orchestrator.projects import make_model_folder, make_recipe
from tests.orchestrator.remote import MANY, Faulty, emptied

MARK = "/bucket/folder/moesaic-store.json"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emptied(monkeypatch):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("llama"), "llama")


def test_a_folder_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "store"), CachePlace(tmp_path / "cache", MANY))
    assert all(0 < speed < math.inf for speed in vars(file_speeds(store)).values())
    assert not list(store.root.iterdir())


@pytest.mark.parametrize("limit", [MANY, 300_000])
def test_a_url_is_measured_itself_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Reading takes 0.1 s a file there and writing 0.2 s, of which a file and its seal are two."""
    store = make_store("faulty://bucket/folder", CachePlace(tmp_path / "cache", limit))
    assert isinstance(store, RemoteStore)
    size = min(16 << 20, limit)

    def slow(operation: str, path: str) -> int:
        time.sleep(0.1 if operation == "read" else 0.2)
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(slow))
    found = file_speeds(store)
    assert size / 2 < found.read < size / 0.1 and size / 4 < found.save < size / 0.4
    assert 0.4 < found.entry < 4 and found.write == found.entry
    assert found.digest > size / 0.1
    assert list(Faulty.store) == [MARK]
    assert not [path for path in store.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_place_that_fails_meanwhile_is_one_line_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store = make_store("faulty://bucket/folder", CachePlace(tmp_path / "cache", MANY))

    def fail(asked: str, path: str) -> int:
        if asked == operation and path.endswith(("large.safetensors", "small.safetensors")):
            raise PermissionError(13, "Forbidden")
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(fail))
    with pytest.raises(RunError, match=r"^faulty://.*large.safetensors: cannot be .*Forbidden"):
        file_speeds(store)
    assert list(Faulty.store) == [MARK]
    assert not [path for path in store.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("kind", "cluster"), [("s3", "2xH100:16cpu"), ("faulty", "2*2cpu")])
def test_check_predicts_a_run_whose_store_is_a_url(
    kind: str, cluster: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("bucket") if kind == "s3" else "faulty://bucket"
    url = f"{bucket}/store"
    recipe = make_recipe(
        tmp_path, model, store=url, cache={"folder": str(tmp_path / "cache"), "size": "1 GB"}
    )
    here = check_recipe(recipe, tmp_path / "out")
    assert here["store"]["path"] == url and here["store"]["free"] is None
    assert 0 < here["time"]["total"] < math.inf
    there = predict_on(recipe, tmp_path / "out", cluster, None)
    assert 0 < there["time"]["total"] < math.inf
    left = fsspec.filesystem(kind).find(f"{url}/scratch") if kind == "s3" else Faulty.store
    assert not [name for name in left if "scratch" in name]
