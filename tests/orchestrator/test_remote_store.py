"""A store at a URL: a server of S3's kind over the loopback interface, and places that fail."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from moesaic.orchestrator import cache as cache_module
from moesaic.orchestrator import objects, run, seals, shared, worker
from moesaic.orchestrator.cache import Cache, release_pins
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.measure import Job
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.shared import (
    CachePlace,
    RemoteStore,
    make_store,
    mirror_folder,
    open_store,
)
from moesaic.orchestrator.stages import measure_task
from moesaic.orchestrator.store import Store, digest
from moesaic.orchestrator.worker import Worker
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder, make_recipe
from tests.orchestrator.remote import (
    MANY,
    Faulty,
    emptied,
    forget,
    in_use,
    pinned,
    sizes_of_cache,
)

KEY, OTHER = "ab" + "0" * 38, "cd" + "1" * 38


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emptied(monkeypatch):
        yield


@pytest.fixture
def place(tmp_path: Path) -> CachePlace:
    return CachePlace(tmp_path / "cache", MANY)


@pytest.fixture
def store(place: CachePlace) -> Store:
    return make_store("faulty://bucket/folder", place)


def on_another_node(store: Store, folder: Path) -> RemoteStore:
    """The same store, seen with an empty cache."""
    assert isinstance(store, RemoteStore)
    return RemoteStore(shared.mirror_folder(store.where, CachePlace(folder, MANY)))


def writing(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def test_an_entry_written_on_one_node_is_read_on_another(store: Store, tmp_path: Path) -> None:
    made = store.put("mosaics", KEY, writing(b"some bytes"), {"unit": "größe"})
    other = on_another_node(store, tmp_path / "other")
    found = other.get("mosaics", KEY)
    assert found is not None and (found.size, found.metadata) == (10, {"unit": "größe"})
    assert found.path != made.path and not found.path.exists()
    assert shared.fetched(found.path).read_bytes() == b"some bytes"
    assert other.get("errors", KEY) is None
    assert store.put_json("scores", KEY, {"kl": 1.5}) and other.get_json("scores", KEY) == {
        "kl": 1.5
    }
    with pytest.raises(FileNotFoundError):
        shared.fetched(other.path("mosaics", OTHER))
    with pytest.raises(ValueError, match="no kind of entry 'piece'"):
        store.put("piece", KEY, writing(b""))


def test_a_root_is_all_that_another_process_is_told(store: Store) -> None:
    store.put("mosaics", KEY, writing(b"x"))
    forget()
    again = open_store(str(store.root))
    assert isinstance(again, RemoteStore) and again.where == "faulty://bucket/folder"
    assert again.get("mosaics", KEY) is not None
    with pytest.raises(ValueError, match=r"stands for a URL"):
        Store(store.root)


def test_a_copy_on_the_node_is_not_fetched_again_and_altered_ones_are(
    store: Store, tmp_path: Path
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    path = on_another_node(store, tmp_path / "other").path("mosaics", KEY)
    shared.fetched(path)
    Faulty.calls.clear()
    assert shared.fetched(path) == path and Faulty.calls == []
    path.write_bytes(b"some bytez")
    assert shared.fetched(path).read_bytes() == b"some bytes"


def test_many_entries_are_looked_up_with_one_listing(store: Store) -> None:
    keys = [digest(number) for number in range(40)]
    for number, key in enumerate(keys[:30]):
        store.put("mosaics", key, writing(bytes(number)), {"number": number})
    damaged = Faulty.store[f"/bucket/folder/mosaics/{keys[3][:2]}/{keys[3]}.safetensors"]
    damaged.seek(0, os.SEEK_END)
    damaged.write(b"more")
    found = store.get_many("mosaics", keys)
    assert list(found) == [*keys[:3], *keys[4:30]]
    assert [entry.metadata["number"] for entry in found.values()] == [*range(3), *range(4, 30)]
    Faulty.calls.clear()
    assert store.get_many("mosaics", keys) == found
    assert [call for call in Faulty.calls if call[0] == "read"] == []  # seals that stayed


def test_an_entry_does_not_exist_before_its_seal(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(operation: str, path: str) -> int:
        if path.endswith(".seal.json"):
            raise KeyboardInterrupt
        return 0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Faulty, "faults", staticmethod(killed))
        store.put("mosaics", KEY, writing(b"some bytes"))
    assert f"/bucket/folder/mosaics/ab/{KEY}.safetensors" in Faulty.store
    assert store.get("mosaics", KEY) is None
    with pytest.raises(FileNotFoundError):
        shared.fetched(store.path("mosaics", KEY))


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_truncated_read_is_repeated(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    other = on_another_node(store, tmp_path / "other")
    left = [wrong] * wrong

    def cut(operation: str, path: str) -> int:
        return left.pop() if operation == "read" and path.endswith("tensors") and left else 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(cut))
    assert shared.fetched(other.path("mosaics", KEY)).read_bytes() == b"some bytes"
    assert not left


def test_what_stays_truncated_is_missing_and_can_be_made_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    other = on_another_node(store, tmp_path / "other")

    def cut(operation: str, path: str) -> int:
        return int(operation == "read" and path.endswith("tensors"))

    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "faults", staticmethod(cut))
        with pytest.raises(RunError, match="does not match its seal, read 3 times") as error:
            shared.fetched(other.path("mosaics", KEY))
    assert f"faulty://bucket/folder/mosaics/ab/{KEY}.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    assert other.get("mosaics", KEY) is None and store.get("mosaics", KEY) is None
    assert not list(other.root.rglob("*.safetensors*"))
    store.put("mosaics", KEY, writing(b"some bytes"))
    assert shared.fetched(other.path("mosaics", KEY)).read_bytes() == b"some bytes"


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_file_that_became_larger_than_its_seal_says_does_not_fill_the_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    path = on_another_node(store, tmp_path / "other").path("mosaics", KEY)
    system, name = fsspec.filesystem("faulty"), f"/bucket/folder/mosaics/ab/{KEY}.safetensors"
    system.pipe_file(name, bytes(5 << 20))
    real, most = type(system).info, []
    monkeypatch.setattr(Faulty, "get_file", fsspec.AbstractFileSystem.get_file)
    monkeypatch.setattr(Faulty, "blocksize", 1 << 10, raising=False)
    if when == "between":  # the last moment, after its size was asked for
        monkeypatch.setattr(
            Faulty, "info", lambda *of, **more: {**real(*of, **more), "size": 10, "type": "file"}
        )
    unlink = Path.unlink

    def watched(file: Path, missing_ok: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError):
            most.append(file.stat().st_size)
        unlink(file, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    with pytest.raises(RunError, match="does not match its seal, read 3 times"):
        shared.fetched(path)
    assert max(most, default=0) <= 1 << 10 and not path.exists()


def test_a_seal_that_is_read_half_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    left = [5, 7]
    monkeypatch.setattr(Faulty, "faults", staticmethod(lambda *call: left.pop() if left else 0))
    assert store.get("mosaics", KEY) is not None and not left


@pytest.mark.parametrize("operation", ["read", "write"])
def test_what_fails_for_a_moment_is_tried_again_with_growing_pauses(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    left, pauses = [ConnectionError("reset by peer"), TimeoutError("no answer")], []

    def fail(asked: str, path: str) -> int:
        if asked == operation and left:
            raise left.pop()
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(fail))
    monkeypatch.setattr(objects.time, "sleep", pauses.append)
    monkeypatch.setattr(objects.random, "random", lambda: 0.5)
    if operation == "read":
        assert store.get("mosaics", KEY) is not None
    else:
        store.put("mosaics", OTHER, writing(b"other"))
    assert not left and pauses == [0.001, 0.002]


@pytest.mark.parametrize("operation", ["read", "write"])
def test_what_keeps_failing_is_one_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    Faulty.calls.clear()

    def fail(asked: str, path: str) -> int:
        if asked == operation:
            raise OSError(5, "the server is on fire")
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(fail))
    with pytest.raises(RunError) as error:
        if operation == "read":
            store.get("mosaics", KEY)
        else:
            store.put("mosaics", OTHER, writing(b"other"))
    text = str(error.value)
    assert text.startswith("faulty://bucket/folder/mosaics/") and "\n" not in text
    assert "tried 6 times" in text and "the server is on fire" in text
    assert len(Faulty.calls) == objects.ATTEMPTS
    monkeypatch.undo()
    assert store.get("mosaics", OTHER) is None


HANGS = {
    "read": lambda store: store.get("mosaics", KEY),
    "fetch": lambda store: shared.fetched(store.path("mosaics", KEY)),
    "write": lambda store: store.put("mosaics", OTHER, writing(b"other")),
}


@pytest.mark.parametrize("what", HANGS)
def test_a_place_that_never_answers_is_one_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))
    other, ended = on_another_node(store, tmp_path / "other"), threading.Event()
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(objects, "ATTEMPTS", 2)

    def hang(operation: str, path: str) -> int:
        if operation == "write" or path.endswith("tensors") or what == "read":
            ended.wait(60)
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(hang))
    started = time.monotonic()
    try:
        with pytest.raises(
            RunError, match=r"^faulty://.*tried 2 times: .*no answer within"
        ) as error:
            HANGS[what](other)
        assert "\n" not in str(error.value) and time.monotonic() - started < 10
    finally:
        ended.set()
    monkeypatch.undo()
    assert shared.fetched(other.path("mosaics", KEY)).read_bytes() == b"some bytes"


def test_bytes_may_take_their_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("mosaics", KEY, writing(bytes(2000)))
    other = on_another_node(store, tmp_path / "other")
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(objects, "BYTES_PER_SECOND", 100.0)

    def slow(operation: str, path: str) -> int:
        time.sleep(0.5 if path.endswith("tensors") else 0)
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(slow))
    Faulty.calls.clear()
    assert shared.fetched(other.path("mosaics", KEY)).stat().st_size == 2000
    assert len(Faulty.calls) == 2


def test_a_full_place_is_one_line_at_once_and_everything_finished_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("mosaics", KEY, writing(b"some bytes"))

    def full(operation: str, path: str) -> int:
        if operation == "write":
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(full))
    Faulty.calls.clear()
    with pytest.raises(RunError, match=r"faulty://.*no space is left there") as error:
        store.put("mosaics", OTHER, writing(b"other"))
    assert "\n" not in str(error.value) and len(Faulty.calls) == 1
    assert store.get("mosaics", KEY) is not None and store.get("mosaics", OTHER) is None


def test_a_place_that_refuses_is_the_users_to_mend(
    place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(operation: str, path: str) -> int:
        raise PermissionError(13, "Forbidden")

    monkeypatch.setattr(Faulty, "faults", staticmethod(refuse))
    with pytest.raises(RecipeError, match=r"^store: faulty://bucket/f/moesaic-store\.json: cannot"):
        make_store("faulty://bucket/f", place)
    assert len(Faulty.calls) == 1


def test_a_package_that_is_missing_is_named(
    place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(url: str, **options: Any) -> Any:
        if url.startswith("hdfs"):  # what pyarrow says
            raise OSError("Unable to load libjvm\ndlopen(/usr/lib/jvm/libjvm.so) failed: No such f")
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    needs = {"gs": "pip install 'moesaic[gcs]'", "s3": "pip install 'moesaic[s3]'"}
    for protocol, what in {**needs, "hdfs": "pip install pyarrow, Java (JAVA_HOME"}.items():
        with pytest.raises(RecipeError) as error:
            make_store(f"{protocol}://bucket/x", place)
        assert f"{protocol}:// needs another package: {what}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"store": "s3://key:secret@bucket/x"}, "store: a URL must not hold a password"),
        ({"store": "s3://"}, "store: 's3://' names no folder"),
        ({"store": "simplecache::s3://b/x"}, "store: .* is no URL of a folder"),
        ({"store": "s3://b//x"}, "store: 's3://b//x' is no URL of a folder"),
        ({"model": "s3://b/x#y"}, "model: 's3://b/x#y' is no URL of a folder"),
        ({"store": "file://relative"}, "file:// is followed by an absolute path"),
        ({"cache": {"size": 0}}, "cache.size: 0 is not a size"),
        ({"cache": {"where": "x"}}, "cache.where: unknown key .allowed here: folder, size"),
        (
            {"store": "memory://x"},
            "store: 'memory://x' lives in the memory of one process, and wor",
        ),
        (
            {"model": "memory://x"},
            "model: 'memory://x' lives in the memory of one process, and wor",
        ),
        ({"publish": "folder"}, "publish: 'folder' is no URL of a server"),
    ],
)
def test_a_recipe_with_a_wrong_place_is_refused(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_recipe(make_recipe(tmp_path, tmp_path, **keys))
    assert "secret" not in str(error.value)


def test_a_file_url_is_its_folder(tmp_path: Path) -> None:
    where = tmp_path / "with space"
    recipe = load_recipe(make_recipe(tmp_path, tmp_path, store=where.as_uri()))
    assert recipe.store == str(where)
    assert load_recipe(make_recipe(tmp_path, tmp_path, store="s3://b/x/")).store == "s3://b/x"


def test_a_store_in_memory_is_refused_in_another_process(place: CachePlace) -> None:
    root = shared.mirror_folder("memory://never/made", place)
    for use in (lambda: open_store(root).get("mosaics", KEY), lambda: shared.fetched(root / "x")):
        with pytest.raises(RecipeError, match="lives in the memory of one process"):
            use()
    made = make_store("memory://made/here", place)
    made.put("mosaics", KEY, writing(b"x"))
    assert open_store(made.root).get("mosaics", KEY) is not None


def test_unfinished_work_goes_from_node_to_node(store: Store, tmp_path: Path) -> None:
    path = store.root / "scratch" / KEY / "hidden-0001.safetensors"
    assert not shared.exists(path)
    shared.write_shared(path, writing(b"states"))
    there = on_another_node(store, tmp_path / "other").root / path.relative_to(store.root)
    assert shared.exists(there) and shared.fetched(there).read_bytes() == b"states"
    shared.remove(there)
    assert not shared.exists(path)
    shared.write_shared(path, writing(b"states"))
    shared.remove_unfinished(there.parent)
    assert not shared.exists(path) and not [name for name in Faulty.store if "scratch" in name]


def test_gc_keeps_what_is_used_or_young_and_touches_nothing_else(store: Store) -> None:
    used = store.put("mosaics", KEY, writing(b"used")).path
    store.put("mosaics", OTHER, writing(b"unused"))
    store.put_json("scores", OTHER, {"kl": 2})
    kept, gone = (store.root / "scratch" / key / "x.safetensors" for key in (KEY, OTHER))
    for path in (kept, gone):
        shared.write_shared(path, writing(b"work"))
    fsspec.filesystem("faulty").pipe_file("/bucket/folder/mosaics/notes.txt", b"mine")
    assert store.gc([used, kept.parent], minimum_age_seconds=3600) == (0, 0)
    before = set(Faulty.store)
    sizes = {name: file.getbuffer().nbytes for name, file in Faulty.store.items()}
    removed, freed = store.gc([used, kept.parent], minimum_age_seconds=-60)
    lost = before - set(Faulty.store)
    assert {name for name in before if OTHER in name} == lost
    assert (removed, freed) == (len(lost), sum(sizes[name] for name in lost)) and removed == 6
    assert store.get("mosaics", KEY) and shared.exists(kept)


@pytest.mark.parametrize("size", [0, 3 << 20])
def test_a_seal_that_is_none_is_not_read_beyond_its_bound(
    store: Store, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    keys = [digest(number) for number in range(12)]
    for key in keys:
        store.put("mosaics", key, writing(b"some bytes"))
    there, read = fsspec.filesystem("faulty"), []
    for key in keys[:2]:
        seal = f"/bucket/folder/mosaics/{key[:2]}/{key}.seal.json"
        there.pipe_file(seal, there.cat_file(seal).ljust(size) if size else b"")
    cat_file = Faulty.cat_file

    def counted(self: Faulty, path: str, *part: Any, **more: Any) -> bytes:
        found = cat_file(self, path, *part, **more)
        if not found:  # as S3 does, whatever part is asked for
            raise OSError(22, "InvalidRange")
        read.append(len(found))
        return found

    monkeypatch.setattr(Faulty, "cat_file", counted)
    assert store.get("mosaics", keys[0]) is None
    assert store.get_many("mosaics", keys).keys() == set(keys[2:])
    assert max(read) <= seals.MOST_BYTES + 1 and len(read) >= 10
    assert not [name for name in Faulty.store if keys[0] in name or keys[1] in name]


# The cache of a node


def test_the_cache_stays_below_its_bound_and_drops_what_was_used_longest_ago(
    store: Store, tmp_path: Path
) -> None:
    keys = [digest(number) for number in range(12)]
    for key in keys:
        store.put("mosaics", key, writing(key.encode() * 25))  # 1000 bytes
    root = shared.mirror_folder(store.where, CachePlace(tmp_path / "small", 8000))
    other = RemoteStore(root)
    for key in [*keys[:4], keys[0], *keys[4:]]:
        shared.fetched(other.path("mosaics", key))
        release_pins()
        kept = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in kept) <= 8000
    left = {path.stem for path in other.root.rglob("*.safetensors")}
    assert keys[-1] in left and keys[1] not in left and keys[2] not in left
    assert 3 <= len(left) < 8


def test_what_is_in_use_stays_whoever_uses_it(store: Store, tmp_path: Path) -> None:
    keys = [digest(number) for number in range(12)]
    for key in keys:
        store.put("mosaics", key, writing(key.encode() * 25))
    root = shared.mirror_folder(store.where, CachePlace(tmp_path / "small", 4000))
    other = RemoteStore(root)
    path = shared.fetched(other.path("mosaics", keys[0]))
    neighbour = Cache(tmp_path / "small", 4000)  # as another process of the node has it
    second = other.path("mosaics", keys[1])
    neighbour.pin(second)
    for key in keys[1:]:
        shared.fetched(other.path("mosaics", key))
        used = pinned(other.mirror.cache)
        release_pins()
        other.mirror.cache.pin(path)
        assert str(second.relative_to(tmp_path / "small")) in used
        assert path.exists() and second.exists()
    neighbour.release()
    release_pins()
    other.mirror.cache.make_room(3900)
    assert not path.exists() and not second.exists()


def test_pins_of_the_dead_are_forgotten(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    path = tmp_path / "file"
    path.write_bytes(bytes(900))
    child = os.fork()
    if child == 0:
        cache.pin(path)
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((tmp_path / ".pins").iterdir())) == 1
    cache.make_room(500)
    assert not path.exists() and not list((tmp_path / ".pins").iterdir())


def test_a_process_that_is_suspended_with_the_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_LOCK_SECONDS", 0.3)
    cache = Cache(tmp_path, 1000)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with cache._locked():
            os.write(write, b"x")
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        started = time.monotonic()
        for use in (lambda: cache.pin(tmp_path / "file"), lambda: cache.make_room(500)):
            with pytest.raises(RunError) as error:
                use()
            who = f"{tmp_path}/.lock: process {child} of host {socket.gethostname()} has held"
            assert str(error.value).startswith(who)
            assert "cache.folder" in str(error.value) and "\n" not in str(error.value)
        assert 0.6 < time.monotonic() - started < 10
        os.kill(child, signal.SIGCONT)
        monkeypatch.setattr(cache_module, "_LOCK_SECONDS", 20.0)
        cache.pin(tmp_path / "file")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_worker_uses_nothing_after_its_task(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "clean_streams", lambda: None)  # those of the tests stay theirs
    path = store.put("mosaics", KEY, writing(b"x")).path
    release_pins()
    used = Worker(1).call("tests.orchestrator.remote:pinning", {"path": str(path)})
    assert isinstance(store, RemoteStore) and used == [str(path.relative_to(path.parents[4]))]
    assert not pinned(store.mirror.cache)


def test_a_driver_uses_nothing_while_its_workers_work(store: Store) -> None:
    path = store.put("mosaics", KEY, writing(b"x")).path
    assert isinstance(store, RemoteStore)
    folder = store.mirror.cache.folder
    store.mirror.cache.pin(path.with_name("config.json"), lasting=True)
    assert {Path(name).name for name in in_use(folder)} == {path.name, "config.json"}
    Pool(Compute()).run([])
    assert {Path(name).name for name in in_use(folder)} == {"config.json"}


@pytest.mark.parametrize(
    ("model", "remote"),
    [("m", False), ("m", True), ("s3://b/m", False)],
)
def test_what_nodes_copy_or_have_in_their_page_cache_is_read_by_few_of_them(
    tmp_path: Path, model: str, remote: bool
) -> None:
    root = mirror_folder("s3://b/store", CachePlace(tmp_path, 1000))
    experiment: Any = SimpleNamespace(
        recipe=SimpleNamespace(model=model),
        store=RemoteStore(root) if remote else Store(tmp_path / "store"),
        space=SimpleNamespace(by_name={"up": SimpleNamespace(kind="linear")}),
    )
    job = Job(model, "float32", False, 3, ("up",), {}, {}, "stats", "store")
    assert measure_task(experiment, job, (4, 3), None).near == "block 3"


def test_a_file_larger_than_the_cache_is_refused(store: Store, tmp_path: Path) -> None:
    store.put("mosaics", KEY, writing(bytes(5000)))
    root = shared.mirror_folder(store.where, CachePlace(tmp_path / "small", 4000))
    with pytest.raises(RunError, match=r"cache.size: 4,000 bytes are less than one file of 5,000"):
        shared.fetched(RemoteStore(root).path("mosaics", KEY))


# A server of S3's kind


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("llama"), "llama")


# Every file of a store takes its requests, and every request some milliseconds.
SMALLER: dict[str, Any] = {
    "calibration": {"shards": 2, "gradient_sequences": 2},
    "candidates": [{"method": "gptq", "bits": [3, 8], "group_size": 16}],
}


def test_a_run_on_s3_killed_and_resumed_with_an_empty_cache_leaves_the_bytes_of_a_local_one(
    bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Project(tmp_path / "local", model, monkeypatch)
    local.write(**SMALLER)
    _, whole = local.run()
    made = Project(tmp_path / "remote", model, monkeypatch)
    url = f"{bucket}/some/store"
    made.write(store=url, cache={"folder": "first", "size": "1 GB"}, **SMALLER)
    with pytest.raises(Killed):
        made.run(size=2, kill_at=whole.total() // 2)
    done = made.calls.copy()
    release_pins()
    forget()
    # Less than the model has, and than a third of what is read and written.
    made.write(store=url, cache={"folder": "second", "size": "100 kB"}, **SMALLER)
    with monkeypatch.context() as patch:
        sizes = sizes_of_cache(patch, made.folder / "second")
        made.run(size=2)
    assert sum(path.stat().st_size for path in model.glob("*.safetensors")) > 100_000
    assert sum(fsspec.filesystem("s3").du(url, total=False).values()) > 250_000
    assert len(sizes) > 3 and 70_000 < max(total for total, _ in sizes) <= 101_000
    assert not in_use(made.folder / "second")  # by the driver, when it has written the model
    assert done.total() > 3 and made.calls.total() > 3
    one, two = local.left(), made.left()
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    # Nothing of it lies where a local store would, and unfinished work is gone.
    assert not (made.folder / "store").exists() and not (made.folder / "runs" / "store").exists()
    assert not fsspec.filesystem("s3").find(f"{url}/scratch")
    assert fsspec.filesystem("s3").find(f"{url}/pieces")
    removed, _ = run.collect_garbage(url, [made.output], 0)
    _, calls = made.run()
    assert removed > 0 and calls.keys() <= {"evaluate:evaluate_rows"}
    make_store(f"{bucket}/other", CachePlace(tmp_path / "first", MANY))
    with pytest.raises(UserError, match=r"its store is s3://.*/some/store, not s3://.*/other"):
        run.collect_garbage(f"{bucket}/other", [made.output], 0)
    with pytest.raises(UserError, match=r"s3://.*: is no store of moesaic"):
        run.collect_garbage(bucket, [], 0)


def test_a_sliced_model_lives_at_a_url_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and resumed on a node whose cache is empty and holds less than the model; in memory,
    which takes the same calls as S3 and is ten times faster."""
    sliced: dict[str, Any] = {
        "slice": {"method": "slicegpt", "hidden": 32, "shortcuts": True},
        "candidates": [{"method": "rtn", "bits": 4, "group_size": -1, "symmetric": True}],
        "baselines": {},
        "budget": {"bits_per_weight": 16},
    }
    local = Project(tmp_path / "local", model, monkeypatch)
    local.write(**sliced)
    _, whole = local.run()
    made = Project(tmp_path / "remote", model, monkeypatch)
    url = "faulty://bucket/sliced-one"
    made.write(store=url, cache={"folder": "first", "size": "1 GB"}, **sliced)
    with pytest.raises(Killed):
        made.run(size=2, kill_at=whole.total() // 2)
    release_pins()
    forget()
    made.write(store=url, cache={"folder": "second", "size": "60 kB"}, **sliced)
    with monkeypatch.context() as patch:
        sizes = sizes_of_cache(patch, made.folder / "second")
        made.run(size=2)
    there = fsspec.filesystem("faulty")
    assert sum(there.du(f"{url}/sliced", total=False).values()) > 80_000
    # One task evaluates all of the model; what no task has in use makes room.
    everything = sum(there.du(url, total=False).values())
    assert all(total <= max(60_000, used) + 1_000 for total, used in sizes)
    assert max(used for _, used in sizes) < 0.5 * everything
    assert {Path(name).name for name in in_use(made.folder / "second")} == {
        "config.json",
        "model.safetensors.index.json",
        "entries.json",
    }
    one, two = local.left(), made.left()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    assert one.keys() == two.keys()
    (folder,) = {path.rpartition("/")[0] for path in there.find(f"{url}/models")}
    run.collect_garbage(url, [made.output], 0)
    assert there.exists(f"{folder}/entries.json")  # what a run uses stays
    run.collect_garbage(url, [], 0)
    there.invalidate_cache()
    assert not there.find(f"{url}/models") and not there.find(f"{url}/sliced")


def test_small_files_on_s3_are_read_within_their_bound(bucket: str) -> None:
    place = objects.Objects(f"{bucket}/small")
    for name, content in (("empty", b""), ("one", b"1"), ("ten", b"0123456789")):
        place.write(name, content)
        assert place.read(name, 10) == content
    assert place.read_many({"one": 1, "ten": 4, "gone": 3}) == {"one": b"1", "ten": b"0123"}
    with pytest.raises(ValueError, match="has more than 9 bytes"):
        place.read("ten", 9)
    with pytest.raises(FileNotFoundError):
        place.read("gone", 9)


def test_what_s3_refuses_is_one_line(
    bucket: str, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RecipeError, match=r"^store: s3://no-such-bucket/x: no such bucket"
    ) as error:
        make_store("s3://no-such-bucket/x", place)
    assert "\n" not in str(error.value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    forget()
    with pytest.raises(RecipeError, match=r"^store: s3://.*redentials") as error:
        make_store(f"{bucket}/x", place)
    assert "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_one_line(
    bucket: str, place: CachePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    with pytest.raises(RunError, match=r"s3://.*tried 2 times: .*127\.0\.0\.1:9") as error:
        make_store(f"{bucket}/x", place)
    assert "\n" not in str(error.value)
