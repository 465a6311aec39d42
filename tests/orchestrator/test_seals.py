"""What a seal says of an entry is checked before anybody counts on it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import seals
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.seals import UnfitError, check_metadata, parse_seal, seal_text
from moesaic.orchestrator.shared import CachePlace, make_store
from moesaic.orchestrator.store import Store, digest, file_digest
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import MANY, Faulty, emptied

EVENT = {"kind": "dead_inputs", "message": "3 of 16", "unit": "u", "value": 3}
PIECE: dict[str, Any] = {"unit": "u", "bytes": {"weight": 8}, "seconds": 1, "events": [EVENT]}
KEYS = [digest(number) for number in range(12)]


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emptied(monkeypatch):
        yield


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {**PIECE, "events": [{**EVENT, "more": 1}]},  # no such event can be made
        {**PIECE, "events": [{"kind": "x"}]},
        {**PIECE, "events": {}},
        {**PIECE, "bytes": [8]},
        {**PIECE, "bytes": {"weight": -1}},
        {**PIECE, "bytes": {"weight": True}},
        {**PIECE, "bytes": {"weight": 10**400}},
        {**PIECE, "seconds": "1"},
        {**PIECE, "seconds": float("nan")},
        {**PIECE, "cut_of": "../../elsewhere"},
        {**PIECE, "cut_of": f"{'a' * 40}\n"},
        {**PIECE, "cut_of": None},
    ],
)
def test_metadata_that_no_piece_has_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(UnfitError, match=r"^metadata\.\w+") as error:
        check_metadata("pieces", metadata)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("pieces", {**PIECE, "cut_of": "a" * 40}, {"seconds": -1.0}),
        ("reductions", {"unit": "u", "seconds": 0.5, "events": [], "tokens": 7}, {"tokens": 0.5}),
        ("stats", {"block": 0, "tokens": {"a": 3.0, "b": [1, 2]}, "routed": {}}, {"routed": []}),
        ("bases", {"dropped": 0.1, "events": []}, {"dropped": "0.1"}),
        ("routers", {"before": float("inf"), "after": 1.0}, {"after": None}),
    ],
)
def test_each_kind_has_its_own_metadata(
    kind: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    check_metadata(kind, good)
    for wrong in ({**good, **bad}, {}):
        with pytest.raises(UnfitError):
            check_metadata(kind, wrong)
    check_metadata("errors", {})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"size": 1, "digest": "x", "metadata": []}',
        b'{"size": 1, "digest": "x", "metadata": null}',
        b'{"size": -1, "digest": "x", "metadata": {}}',
        b'{"size": true, "digest": "x", "metadata": {}}',
        b'{"size": 1, "digest": 2, "metadata": {}}',
        b'{"size": 1, "digest": "x"}',
        b"[" * 100_000,
        b'{"size": 1, "digest": "x", "metadata": {}}' + b" " * seals.MOST_BYTES,
    ],
)
def test_what_is_no_seal_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_seal(raw)


def test_a_seal_that_nobody_would_read_is_not_written(tmp_path: Path) -> None:
    assert parse_seal(seal_text(3, "ab", PIECE).encode()) == {
        "size": 3,
        "digest": "ab",
        "metadata": PIECE,
    }
    store = Store(tmp_path / "store")
    with pytest.raises(ValueError, match="limit 1,048,576 bytes"):
        store.put("ids", KEYS[0], Path.touch, {"more": "x" * seals.MOST_BYTES})
    assert store.get("ids", KEYS[0]) is None


def _fill(path: Path) -> None:
    path.write_bytes(b"some bytes")


@pytest.mark.parametrize("url", [None, "faulty://bucket/seals"])
@pytest.mark.parametrize("metadata", [[], {**PIECE, "seconds": None}], ids=["none", "unfit"])
def test_an_entry_with_unfit_metadata_is_removed_and_made_again(
    tmp_path: Path, url: str | None, metadata: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One by one, and many at once, which are read with one listing at a URL."""
    where = url or str(tmp_path / "store")
    store = make_store(where, CachePlace(tmp_path / "cache", MANY))
    for key in KEYS:
        entry = store.put("pieces", key, _fill, PIECE)
    sealed = {"size": 10, "digest": file_digest(entry.path), "metadata": metadata}
    for key in KEYS[:2]:
        name = f"pieces/{key[:2]}/{key}.seal.json"
        if url is None:
            (store.root / name).write_text(json.dumps(sealed))
        else:
            Faulty().pipe_file(f"/bucket/seals/{name}", json.dumps(sealed).encode())
    assert store.get("pieces", KEYS[0]) is None
    assert store.get_many("pieces", KEYS).keys() == set(KEYS[2:])
    told = capsys.readouterr().err.splitlines()
    if metadata:
        assert [line.split(": metadata.seconds: ")[0] for line in told] == [
            f"{where}/pieces/{key[:2]}/{key}.seal.json" for key in KEYS[:2]
        ]
        assert all(line.endswith(": the entry is removed and made again") for line in told)
    left = list(store.root.rglob("*.json")) if url is None else Faulty.store
    assert not any(key in str(name) for key in KEYS[:2] for name in left)
    assert store.put("pieces", KEYS[0], _fill, PIECE) == store.get("pieces", KEYS[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project that was run once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        project = Project(folder / "own", make_model_folder(folder / "model"), patch)
        rtn = {"method": "rtn", "bits": [3, 8], "group_size": 16}
        project.write(baselines={}, candidates=[rtn])
        project.run(stages=("assemble",))
        yield project


def _altered(project: Project, kind: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The seal of an entry after a change of its metadata."""
    files = sorted((project.folder / "store" / kind).glob("*/*.seal.json"))
    for file in files:
        sealed = json.loads(file.read_text())
        if change(sealed["metadata"]) is not None:
            file.write_text(json.dumps(sealed))
            return file
    raise AssertionError(f"no seal of {kind} can be changed so")


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no events": ("pieces", lambda told: told.pop("events")),
    "no seconds": ("pieces", lambda told: told.pop("seconds")),
    "no routed": ("stats", lambda told: told.pop("routed")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_makes_again_what_a_seal_does_not_tell(finished: Project, change: str) -> None:
    before = finished.left()
    seal = _altered(finished, *CHANGES[change])
    damaged = seal.read_bytes()
    finished.run(stages=("assemble",))
    assert finished.left() == before and seal.read_bytes() != damaged
    assert "the entry is removed and made again" in (finished.output / "log.txt").read_text()


OF_ANOTHER: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "member": ("pieces", lambda told: told["bytes"].pop("weight", None)),
    "site": ("stats", lambda told: told["routed"].popitem()),
    "experts": ("stats", lambda told: next(iter(told["routed"].values())).pop()),
}


@pytest.mark.parametrize("change", OF_ANOTHER)
def test_metadata_of_another_unit_ends_the_run_with_one_line_and_the_next_one_goes_on(
    finished: Project, change: str
) -> None:
    before = finished.left()
    _altered(finished, *OF_ANOTHER[change])
    with pytest.raises(RunError, match="its metadata is not that of its unit .*made anew") as error:
        finished.run(stages=("assemble",))
    assert "\n" not in str(error.value)
    finished.run(stages=("assemble",))
    assert finished.left() == before
