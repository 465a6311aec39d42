"""How fast files are written and read where a store lies: in a folder, or at a URL.

At a URL one large and one small object are put, fetched and removed, once each: they cross the
network, and may cost money. What is done to a copy on this node is measured beside it.
"""

import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesaic.orchestrator import shared
from moesaic.orchestrator.files import write_atomically
from moesaic.orchestrator.probes import shortest
from moesaic.orchestrator.shared import RemoteStore
from moesaic.orchestrator.store import Store, digest, file_digest, scratch_folder, seal_path

_LARGE_BYTES, _SMALL_BYTES = 16 << 20, 4096


@dataclass(frozen=True)
class FileSpeeds:
    """What files of a store take.

    Attributes:
        read: bytes per second of a large file.
        write: seconds to write a small file so that it survives a crash.
        entry: seconds for a small entry.
        save: bytes per second of a large file that is written and flushed.
        digest: bytes per second of a file on this node whose digest is taken.
    """

    read: float
    write: float
    entry: float
    save: float
    digest: float


def file_speeds(store: Store) -> FileSpeeds:
    """Measures a store; nothing is left behind, whatever happens.

    Raises:
        RunError, UserError: it cannot be written or read.
    """
    if isinstance(store, RemoteStore):
        return _at_url(store)
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=store.root) as name:
        folder = Path(name)
        return FileSpeeds(
            read=probe_load(folder),
            write=probe_write(folder),
            entry=probe_entry(folder),
            save=probe_save(folder),
            digest=probe_digest(folder),
        )


def _at_url(store: RemoteStore) -> FileSpeeds:
    # What a killed process leaves there is unfinished work, which `moesaic store gc` removes.
    folder = scratch_folder(store.root, digest(uuid.uuid4().hex))
    large, small = folder / "large.safetensors", folder / "small.safetensors"
    size = min(_LARGE_BYTES, store.mirror.cache.limit_bytes)
    try:
        save = _seconds(lambda: shared.write_shared(large, lambda path: _fill(path, size)))
        entry = _seconds(lambda: shared.write_shared(small, _fill))
        for file in (large, seal_path(large)):  # which may have left already
            file.unlink(missing_ok=True)
        read = _seconds(lambda: shared.fetched(large))
    finally:
        shared.remove_unfinished(folder)
    with tempfile.TemporaryDirectory(prefix="moesaic-") as name:
        # A small file is put there as a small entry is: with its seal.
        return FileSpeeds(size / read, entry, entry, size / save, probe_digest(Path(name)))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return max(time.perf_counter() - started, 1e-9)


def probe_write(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"

    def write() -> None:
        write_atomically(path, _fill)
        path.unlink()

    return shortest(write, "disk")


def probe_entry(folder: Path) -> float:
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as name:
        store = Store(Path(name))
        return shortest(lambda: store.put("errors", digest("probe"), _fill), "disk")


def probe_save(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"

    def write() -> None:
        write_atomically(path, lambda temporary: _fill(temporary, _LARGE_BYTES))
        path.unlink()

    return _LARGE_BYTES / shortest(write, "disk")


def probe_load(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"
    _fill(path, _LARGE_BYTES)
    try:
        return _LARGE_BYTES / shortest(path.read_bytes, "disk")
    finally:
        path.unlink()


def probe_digest(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"
    _fill(path, _LARGE_BYTES)
    try:
        return _LARGE_BYTES / shortest(lambda: file_digest(path), "disk")
    finally:
        path.unlink()


def _fill(path: Path, size: int = _SMALL_BYTES) -> None:
    path.write_bytes(bytes(size))
