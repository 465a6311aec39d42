"""A node's cache that several processes fill: each file comes once, what the dead leave goes, and a
full disk is told as that of the cache."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from moesaic.orchestrator import cache as cache_module
from moesaic.orchestrator import objects, shared, turns
from moesaic.orchestrator.cache import Cache
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.remote_model import copies_folder, open_checkpoint
from moesaic.orchestrator.shared import CachePlace, RemoteStore, make_store, mirror_folder
from moesaic.orchestrator.store import digest
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import MANY, Faulty, emptied, forget, pinned

STORE, MODEL = "faulty://bucket/folder", "faulty://models/llama"
KEYS = [digest(number) for number in range(8)]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with emptied(monkeypatch):
        yield


@pytest.fixture
def filled(tmp_path: Path) -> RemoteStore:
    """A store of eight entries of 1000 bytes, as a node with an empty cache sees it."""
    made = make_store(STORE, CachePlace(tmp_path / "first", MANY))
    for key in KEYS:
        made.put("pieces", key, lambda path, key=key: path.write_bytes(key.encode() * 25))
    return seen(tmp_path)


def seen(tmp_path: Path, size: int = MANY) -> RemoteStore:
    forget()
    return RemoteStore(mirror_folder(STORE, CachePlace(tmp_path / "cache", size)))


def logged(monkeypatch: pytest.MonkeyPatch, log: Path, seconds: float = 0.3) -> None:
    """Every fetch of weights or entries takes its time, and is written down."""
    log.touch()

    def slow(operation: str, path: str) -> int:
        if operation == "read" and path.endswith(".safetensors"):
            with log.open("a") as stream:
                stream.write(f"{path.rpartition('/')[2]}\n")
            time.sleep(seconds)
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(slow))


def together(work: Callable[[int], object], count: int = 4) -> list[int]:
    """Exit codes of processes that begin ``work(number)`` at once."""
    barrier = FORK.Barrier(count)

    def begin(number: int) -> None:
        barrier.wait(60)
        work(number)

    processes = [FORK.Process(target=begin, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]  # type: ignore[misc]


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.tmp-*") if path.is_file()]


# One process fetches, the others wait


def test_processes_that_want_the_same_entries_fetch_each_once(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(monkeypatch, tmp_path / "log")

    def work(number: int) -> None:
        for key in KEYS[:3]:
            file = shared.fetched(seen(tmp_path).path("pieces", key))
            assert file.read_bytes() == key.encode() * 25

    assert together(work) == [0] * 4
    came = (tmp_path / "log").read_text().split()
    assert sorted(came) == sorted(f"{key}.safetensors" for key in KEYS[:3])
    assert not temporaries(tmp_path / "cache")


def test_processes_that_want_the_same_model_fetch_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model", "llama", max_shard_size="60KB")
    for file in model.iterdir():
        fsspec.filesystem("faulty").pipe_file(f"/models/llama/{file.name}", file.read_bytes())
    shards = {file.name for file in model.glob("*.safetensors")}
    log = tmp_path / "log"
    get = Faulty.get_file

    def get_file(self: Faulty, path: str, local: str, *rest: Any, **more: Any) -> None:
        with log.open("a") as stream:
            stream.write(f"{path.rpartition('/')[2]}\n")
        time.sleep(0.1)
        get(self, path, local, *rest, **more)

    monkeypatch.setattr(Faulty, "get_file", get_file)

    def work(number: int) -> None:
        place = CachePlace(tmp_path / "cache", MANY)
        found = open_checkpoint(copies_folder(MODEL, place))
        found.fetch()
        for name in shards:
            assert (found.folder / name).read_bytes() == (model / name).read_bytes()

    assert together(work, 3) == [0] * 3
    came = log.read_text().split()
    assert len(came) == len(set(came)) and set(came) > shards and len(shards) > 1


def test_threads_of_one_process_fetch_once_though_all_files_share_a_lock(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_LOCKS", 1)
    logged(monkeypatch, tmp_path / "log", 0.05)
    done: list[str] = []

    def work(first: int) -> None:
        for key in KEYS[first:] + KEYS[:first]:
            shared.fetched(filled.path("pieces", key))
            done.append(key)

    threads = [threading.Thread(target=work, args=(2 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4 * len(KEYS)
    came = (tmp_path / "log").read_text().split()
    assert sorted(came) == sorted(f"{key}.safetensors" for key in KEYS)
    assert [file.name for file in (tmp_path / "cache" / ".turns").iterdir()] == ["0"]


def test_what_a_process_waits_for_is_in_use(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays although who fetched it lets go of it, and room is wanted at once."""
    other = seen(tmp_path, 4000)
    path = other.path("pieces", KEYS[0])
    with other.mirror.cache.fetching(path, 1000) as begins:
        waiting = FORK.Process(target=lambda: shared.fetched(path).read_bytes()[999])
        waiting.start()
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with other.mirror.cache._locked():  # while no list is begun
                if pinned(other.mirror.cache):
                    break
            time.sleep(0.01)
        # As this process does it, which needs no pin of its own for that.
        name = str(path.relative_to(other.root))
        sealed = other.mirror.seal(name)
        assert sealed and other.mirror._downloaded(name, path, sealed, begins)
        assert pinned(other.mirror.cache) == {str(path.relative_to(tmp_path / "cache"))}
        other.mirror.cache._unseen = None
        other.mirror.cache.make_room(3900)
        assert path.exists()
    waiting.join(60)
    assert waiting.exitcode == 0


def test_a_process_that_is_suspended_while_it_fetches_is_named_and_its_end_frees_the_others(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled.path("pieces", KEYS[0])
    get, own = Faulty.get_file, os.getpid()

    def get_file(self: Faulty, source: str, local: str, *rest: Any, **more: Any) -> None:
        get(self, source, local, *rest, **more)
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(Faulty, "get_file", get_file)
    monkeypatch.setattr(objects, "longest_silence", lambda size: size / 1000)
    host = socket.gethostname()
    with monkeypatch.context() as patch:  # a folder that several hosts share
        patch.setattr(socket, "gethostname", lambda: "gpu-9")
        child = FORK.Process(target=shared.fetched, args=(path,))
        child.start()
    assert child.pid
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        (left,) = temporaries(tmp_path / "cache")
        assert left.stat().st_size == 1000
        with pytest.raises(RunError) as error:
            shared.fetched(path)
        name = path.relative_to(tmp_path / "cache")
        assert host != "gpu-9"
        assert f"process {child.pid} of host gpu-9 has fetched {name} for 1 s" in str(error.value)
        assert "end it, or give another cache.folder" in str(error.value)
        assert "\n" not in str(error.value)
        assert left.exists()  # of a process that lives
    finally:
        child.kill()
        child.join(60)
    assert shared.fetched(path).read_bytes() == KEYS[0].encode() * 25
    assert not left.exists() and not temporaries(tmp_path / "cache")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_by_name(
    filled: RemoteStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    folder = filled.mirror.cache.folder
    for use in (
        lambda: filled.mirror.cache.pin(filled.path("pieces", KEYS[0])),
        lambda: filled.mirror.cache.make_room(10**8),
    ):
        filled.mirror.cache._unseen = None
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(turns.fcntl, "flock", refuse)
            use()
        assert str(error.value).startswith(f"{folder}/.lock: files cannot be locked there")
        assert str(error.value).endswith(": give a cache.folder on a disk of every node's own")
        assert socket.gethostname() in str(error.value) and "\n" not in str(error.value)


def test_lists_of_the_living_are_told_without_leave_to_write_them(tmp_path: Path) -> None:
    """NFS gives an exclusive lock only to who has a file open for writing."""
    cache = Cache(tmp_path, 1000)
    cache.pin(tmp_path / "file")
    (pins,) = (tmp_path / ".pins").iterdir()
    shown = []
    flock = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        shown.append(mode)
        if mode == os.O_RDONLY and operation & fcntl.LOCK_EX:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module.fcntl, "flock", as_on_nfs)
        assert cache._living() == {pins.name: {"file", ""}}
    assert shown


def test_who_waits_is_patient_while_attempts_go_on(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three fail, which together take longer than a holder may show no sign of life."""
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(objects, "BYTES_PER_SECOND", 2000.0)
    monkeypatch.setattr(objects, "ATTEMPTS", 4)
    path, tries, own = filled.path("pieces", KEYS[0]), tmp_path / "tries", os.getpid()

    def hang(operation: str, source: str) -> int:
        if operation == "read" and source.endswith(".safetensors") and os.getpid() != own:
            with tries.open("a") as stream:
                stream.write("x")
            time.sleep(0 if tries.stat().st_size > 3 else 5)
        return 0

    monkeypatch.setattr(Faulty, "faults", staticmethod(hang))
    child = FORK.Process(target=shared.fetched, args=(path,))
    child.start()
    ends = time.monotonic() + 60
    while not tries.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    started = time.monotonic()
    assert shared.fetched(path).read_bytes() == KEYS[0].encode() * 25
    assert time.monotonic() - started > objects.longest_silence(1000) > 1.7
    child.join(60)
    assert child.exitcode == 0 and tries.read_text() == "xxxx"


# What is being written


def copies(folder: Path) -> list[Path]:
    made = [folder / name for name in ("one", "two", "three.tmp-1.safetensors")]
    for number, path in enumerate(made):
        path.write_bytes(bytes(1000))
        os.utime(path, (number, number))
    return made


def test_what_is_being_written_counts_and_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5000)
    one, two, three = copies(tmp_path)
    with cache.writing(tmp_path / "folder" / "four") as temporary:
        temporary.write_bytes(bytes(1900))
        os.utime(temporary, (0, 0))
        part = temporary.with_name(f"{temporary.name}-0123abcd")
        part.write_bytes(b"")
        Cache(tmp_path, 5000).make_room(1000)
        assert [one.exists(), two.exists(), three.exists()] == [False, False, True]
        assert temporary.exists() and part.exists()
    assert not temporary.exists()


def test_what_the_dead_were_writing_leaves_when_the_folder_is_looked_at(tmp_path: Path) -> None:
    made = copies(tmp_path)

    def die() -> None:
        with Cache(tmp_path, MANY).writing(tmp_path / "four") as temporary:
            temporary.write_bytes(bytes(1900))
            os._exit(0)

    child = FORK.Process(target=die)
    child.start()
    child.join(60)
    assert len(temporaries(tmp_path)) == 2  # one of which is only called so
    Cache(tmp_path, MANY).make_room(1)
    assert temporaries(tmp_path) == made[2:] and all(path.exists() for path in made)


def test_what_is_written_and_in_use_stays_so_when_somebody_cleared_the_list(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1500)
    (path, *_) = copies(tmp_path)
    cache.pin(path)
    for file in (tmp_path / ".pins").iterdir():
        file.unlink()
    with cache.writing(tmp_path / "four") as temporary:
        temporary.touch()
        Cache(tmp_path, 1500).make_room(1000)
        assert temporary.exists() and path.exists()


def test_attempts_that_were_given_up_leave_nothing(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    goes_on, ended, get = threading.Event(), threading.Event(), Faulty.get_file

    def get_file(self: Faulty, source: str, local: str, *rest: Any, **more: Any) -> None:
        goes_on.wait(60)
        get(self, source, local, *rest, **more)
        assert Path(local).exists()
        ended.set()

    monkeypatch.setattr(Faulty, "get_file", get_file)
    with pytest.raises(RunError, match="no answer within"):
        shared.fetched(filled.path("pieces", KEYS[0]))
    goes_on.set()
    assert ended.wait(60)
    ends = time.monotonic() + 60
    while temporaries(tmp_path / "cache") and time.monotonic() < ends:
        time.sleep(0.01)
    assert not temporaries(tmp_path / "cache")


# A full disk


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["fetch", "copy", "write", "lock", "model"])
def test_a_full_disk_of_the_cache_is_told_as_such(
    filled: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, cached = filled.path("pieces", KEYS[0]), tmp_path / "cache"
    if what == "model":
        fsspec.filesystem("faulty").pipe_file("/models/llama/config.json", b"{}")
    if what in ("fetch", "model"):
        monkeypatch.setattr(Faulty, "get_file", full)
    elif what == "copy":
        monkeypatch.setattr(Path, "replace", full)
    elif what == "lock":
        monkeypatch.setattr(Path, "mkdir", full)
    Faulty.calls.clear()
    with pytest.raises(RunError) as error:
        if what == "write":
            filled.put("pieces", "ab" + 38 * "0", full)
        elif what == "model":
            open_checkpoint(copies_folder(MODEL, CachePlace(cached, MANY)))
        else:
            shared.fetched(path)
    text = str(error.value)
    assert text.startswith(f"{cached}") and "the disk is full" in text and "\n" not in text
    for word in (f"host {socket.gethostname()}", f"cache.folder ({cached})", "1,000,000,000 bytes"):
        assert word in text
    assert "cache.size" in text and "store gc" not in text
    monkeypatch.undo()
    assert not temporaries(cached) and not path.exists()
