"""The store: what is finished is there, what is not is not, whoever writes and whatever happens."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.orchestrator import store as module
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.files import write_atomically
from moesaic.orchestrator.store import Store, digest, file_digest, remove_scratch, scratch_folder

KEY = "ab" + "0" * 38
OTHER = "cd" + "1" * 38


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def writing(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_an_entry_is_there_after_put_with_its_metadata(store: Store) -> None:
    assert store.get("mosaics", KEY) is None
    made = store.put("mosaics", KEY, writing(b"some bytes"), {"unit": "größe"})
    found = store.get("mosaics", KEY)
    assert found == made and found is not None
    assert found.path == store.path("mosaics", KEY)
    assert (found.size, found.metadata) == (10, {"unit": "größe"})
    assert files(store.root) == [f"mosaics/ab/{KEY}.safetensors", f"mosaics/ab/{KEY}.seal.json"]
    assert store.get("errors", KEY) is None


def test_json_comes_back_as_it_went_in(store: Store) -> None:
    value = {"a": [1, 2.5, None], "ö": {"kl": 1e-300}}
    store.put_json("scores", KEY, value)
    assert store.get_json("scores", KEY) == value
    assert store.get_json("scores", OTHER) is None


def test_a_kind_that_gc_would_not_know_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="no kind of entry 'piece': there are .*mosaics"):
        store.put("piece", KEY, writing(b""))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b"S" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["truncated", "longer", "altered", "empty"],
)
def test_a_damaged_entry_is_removed_and_can_be_made_again(
    store: Store, damage: Callable[[Path], None]
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    store.put("mosaics", OTHER, writing(b"other bytes"))
    damage(store.path("mosaics", KEY))
    assert store.get("mosaics", KEY) is None
    assert files(store.root) == [f"mosaics/cd/{OTHER}.safetensors", f"mosaics/cd/{OTHER}.seal.json"]
    store.put("mosaics", KEY, writing(b"some bytes"))
    assert store.get("mosaics", KEY) is not None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b'{"size": 10}', b"\xff\xfe", b'"text"']
)
def test_an_altered_seal_is_no_entry(store: Store, content: bytes) -> None:
    path = store.put("mosaics", KEY, writing(b"some bytes")).path
    (path.parent / f"{KEY}.seal.json").write_bytes(content)
    assert store.get("mosaics", KEY) is None
    assert files(store.root) == []


def test_a_seal_without_metadata_is_no_entry(store: Store) -> None:
    path = store.put("mosaics", KEY, writing(b"some bytes")).path
    seal = path.parent / f"{KEY}.seal.json"
    sealed = json.loads(seal.read_text())
    del sealed["metadata"]
    seal.write_text(json.dumps(sealed))
    assert store.get("mosaics", KEY) is None


@pytest.mark.parametrize("lost", ["safetensors", "seal.json"])
def test_half_an_entry_is_no_entry(store: Store, lost: str) -> None:
    path = store.put("mosaics", KEY, writing(b"some bytes")).path
    (path.parent / f"{KEY}.{lost}").unlink()
    assert store.get("mosaics", KEY) is None


@pytest.mark.parametrize("moment", ["before", "amid"])
def test_a_writer_that_fails_leaves_nothing(store: Store, moment: str) -> None:
    def write(path: Path) -> None:
        if moment == "amid":
            path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("mosaics", KEY, write)
    assert files(store.root) == []
    assert store.get("mosaics", KEY) is None


def test_an_entry_does_not_exist_before_its_seal(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put("mosaics", KEY, writing(b"some bytes"))
    assert files(store.root) == [f"mosaics/ab/{KEY}.safetensors"]
    assert store.get("mosaics", KEY) is None


def test_a_failed_rewrite_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, writing(b"old"))

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and files(tmp_path) == ["plan.json"]


def _write_many(root: Path, seed: int, wrong: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    store = Store(root)
    for turn in range(40):
        key = digest((turn * 7 + seed) % 5)
        content = key.encode() * 2000
        store.put("mosaics", key, writing(content), {"writer": seed})
        found = store.get("mosaics", key)
        if found is None or found.path.read_bytes() != content:
            wrong.put(key)


def test_many_writers_of_the_same_keys_leave_valid_entries(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    writers = [context.Process(target=_write_many, args=(store.root, s, wrong)) for s in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert wrong.empty()
    for number in range(5):
        key = digest(number)
        found = store.get("mosaics", key)
        assert found is not None and found.path.read_bytes() == key.encode() * 2000
    assert len(files(store.root)) == 10  # no temporary is left


def _full(path: Path) -> None:
    path.write_bytes(b"the first half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_leaves_no_temporary(store: Store) -> None:
    store.put("mosaics", OTHER, writing(b"finished"))
    before = files(store.root)
    with pytest.raises(RunError) as error:
        store.put("mosaics", KEY, _full)
    assert "moesaic store gc STORE --keep RUN" in str(error.value)
    assert "the disk is full" in str(error.value) and "\n" not in str(error.value)
    assert str(store.path("mosaics", KEY)) in str(error.value)
    assert files(store.root) == before
    assert store.get("mosaics", OTHER) is not None


def test_a_full_disk_is_recognised_when_safetensors_meets_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library raises its own error, with the system's number only in its text."""
    monkeypatch.setattr(errno, "EDQUOT", errno.EFBIG)  # a limit that a test may set
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with pytest.raises(RunError, match="the disk is full"):
            store.put("stats", KEY, lambda p: save_file({"a": torch.zeros(1 << 16)}, p))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert files(store.root) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_store_that_is_not_writable_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="cannot be written") as error:
        Store(tmp_path / "store")
    assert str(tmp_path / "store") in str(error.value)


def test_a_store_where_no_folder_can_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    for path in (Path("/proc/store"), tmp_path / ("n" * 300)):
        with pytest.raises(RecipeError, match="^store: .*cannot be written .*: name a folder that"):
            Store(path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(RecipeError, match="^store: .* must be a folder: a file is in its"):
            Store(path)


def _age(path: Path, seconds: float = 7200) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("altered", ["safetensors", "seal.json"])
def test_an_entry_is_read_once_and_again_when_file_or_seal_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch, altered: str
) -> None:
    path = store.put("mosaics", KEY, writing(b"some bytes")).path
    files = [path, path.with_name(f"{KEY}.seal.json")]
    digest_of, read = module.file_digest, []
    monkeypatch.setattr(module, "file_digest", lambda p: read.append(p) or digest_of(p))
    for _ in range(2):  # just written: its time might not show a change
        assert store.get("mosaics", KEY) is not None
    assert len(read) == 2
    for file in files:
        _age(file)
    assert all(store.get_many("mosaics", [KEY, OTHER]).keys() == {KEY} for _ in range(3))
    assert len(read) == 3
    file = path.with_name(f"{KEY}.{altered}")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"bytes", b"bytez").replace(b"digest", b"digezt"))
    assert store.get("mosaics", KEY) is None and not path.exists()


def test_gc_keeps_what_is_used_or_young_and_removes_the_rest(store: Store) -> None:
    used = store.put("mosaics", KEY, writing(b"used")).path
    unused = store.put("mosaics", OTHER, writing(b"unused")).path
    used_json = store.put_json("scores", KEY, {"kl": 1}).path
    unused_json = store.put_json("scores", OTHER, {"kl": 2}).path
    leftover = unused.with_name(f"{unused.name}.tmp-123")
    leftover.write_bytes(b"12345")
    old = [path for path in store.root.rglob("*") if path.is_file()]
    expected = sum(
        path.stat().st_size
        for path in (unused, unused_json, leftover, *store.root.glob(f"*/cd/{OTHER}.seal.json"))
    )
    for path in old:
        _age(path)
    young = store.put("errors", OTHER, writing(b"young")).path
    removed = store.gc([used, used_json], minimum_age_seconds=3600)
    assert removed == (5, expected)
    assert files(store.root) == sorted(
        [
            f"mosaics/ab/{KEY}.safetensors",
            f"mosaics/ab/{KEY}.seal.json",
            f"scores/ab/{KEY}.json",
            f"scores/ab/{KEY}.seal.json",
            f"errors/cd/{OTHER}.safetensors",
            f"errors/cd/{OTHER}.seal.json",
        ]
    )
    assert store.get("mosaics", KEY) and store.get_json("scores", KEY) and young.exists()
    assert not (store.root / "mosaics" / "cd").exists()
    assert store.gc([], minimum_age_seconds=0)[0] == 6
    assert files(store.root) == []


def test_gc_keeps_unfinished_work_that_is_named(store: Store) -> None:
    folders = [scratch_folder(store.root, key) for key in (KEY, OTHER)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "hidden.safetensors").write_bytes(b"x")
        _age(folder / "hidden.safetensors")
    assert store.gc([folders[0]]) == (1, 1)
    assert files(store.root) == [f"scratch/{KEY}/hidden.safetensors"]


def test_gc_touches_nothing_that_is_not_the_stores(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("mosaics", KEY, writing(b"x"))
    mine = [
        ".tmp-notes",
        "mlflow.db",
        "model/model.safetensors",
        f"models/{KEY}/README.md",
        "models/deepseek/config.json",
        "models/deepseek/model.safetensors",
        "mosaics/ab/config.json",
        f"mosaics/ab/{KEY}.safetensors.bak",
        f"mosaics/ab/{OTHER}.safetensors",  # it would lie in cd
        "mosaics/abc/notes.json",
        "mosaics/notes.txt",
        "scratch/cafe/model.safetensors",
        "stats.csv",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for path in tmp_path.rglob("*"):
        _age(path)
    assert store.gc([])[0] == 2
    assert files(tmp_path) == sorted(mine)


def test_scratch_is_removed_with_its_files_and_may_be_gone_already(tmp_path: Path) -> None:
    folder = scratch_folder(tmp_path, KEY)
    remove_scratch(folder)
    write_atomically(folder / "hidden-0001.safetensors", writing(b"x"))
    (folder / "hidden-0002.safetensors.tmp-12ab").write_text("half")
    remove_scratch(folder)
    assert not folder.exists()


def test_digests_depend_on_the_value_only(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": (2, 3), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"x" * 3_000_000)
    assert file_digest(one) == file_digest(two)
    two.write_bytes(b"x" * 2_999_999 + b"y")
    assert file_digest(one) != file_digest(two)


def test_gc_removes_links_that_lead_nowhere_and_counts_no_target_twice(store: Store) -> None:
    entry = store.put("ids", "ab" * 20, writing(b"x" * 1000))
    folder = store.root / module.MODELS / ("cd" * 20)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(entry.path)
    (folder / "gone.safetensors").symlink_to(store.root / "ids" / "nothing")
    links = sum(path.lstat().st_size for path in folder.iterdir())
    seal = sum(path.stat().st_size for path in entry.path.parent.iterdir()) - 1000
    removed, freed = store.gc([], 0)
    assert not folder.exists() and removed == 4
    assert freed == 1000 + seal + links


@pytest.mark.parametrize("turn", [0.0, 1000.0])
def test_many_entries_are_found_in_whatever_way_they_are_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, turn: float
) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 3)
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    monkeypatch.setattr(module, "_TURN_SECONDS", turn)
    keys = [f"{number:040x}" for number in range(40)]
    for key in keys[:30]:
        store.put("mosaics", key, writing(key.encode()), {"own": key})
    store.path("mosaics", keys[7]).write_bytes(b"altered")
    found = store.get_many("mosaics", keys)
    assert list(found) == [key for key in keys[:30] if key != keys[7]]
    assert all(entry.metadata == {"own": key} for key, entry in found.items())
    assert not store.path("mosaics", keys[7]).exists()
