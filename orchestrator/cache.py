"""A bounded folder of copies on this node, which all processes of the node share.

What was used longest ago leaves first, by the files' access times, which are set here. A file in
use never leaves: every process keeps a list of the files that it is working with (its *pins*), in a
file that it holds locked for as long as it lives. Who makes room reads the lists of all the living.
A pin is written, and room is made, under one lock of the folder, so that no file goes between the
moment when it was found and the moment when it was pinned.

    FOLDER/.lock            held while a pin is written or room is made; says by which process
    FOLDER/.pins/<id>       names of files in use, locked by the process that uses them
    FOLDER/...              the copies

The bound holds for what is not in use; all that is may be more. A process counts what it adds and
looks at the whole folder when that is more than a hundredth of the bound, so that several processes
may pass it by as many hundredths for a moment.
"""

import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.store import disk_errors, make_folder

_LOCK, _PINS = ".lock", ".pins"
# Room is made down to this share of the bound, so that it is not made for every file.
_FILLED = 0.9
# What a process may add, as a share of the bound, before it looks at the whole folder.
_UNSEEN = 0.01
# Of files that are being written; those of a writer that died leave after so many seconds.
TEMPORARY, _DEAD_SECONDS = ".tmp-", 86_400.0
# Whoever holds the lock looks at every copy at most, and removes some; all wait meanwhile.
_LOCK_SECONDS, _FIRST_LOOK_SECONDS, _LOOK_SECONDS = 300.0, 0.001, 0.1


class Cache:
    """The copies in one folder, seen from one process; safe to use from several threads.

    Args:
        folder: made if it is not there.
        limit_bytes: of all files together.

    Raises:
        RecipeError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        make_folder(folder, "cache.folder")
        self._guard = threading.Lock()
        self._pinned: set[str] = set()
        self._lasting: set[str] = set()
        self._pins: IO[str] | None = None
        self._process = 0
        self._unseen: float | None = None  # bytes added since the folder was looked at

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes.

        Raises:
            RunError: another one does not let go of it.
        """
        if not self._guard.acquire(timeout=2 * _LOCK_SECONDS):
            raise self._stuck(f"another thread of process {os.getpid()}")
        try:
            (self.folder / _PINS).mkdir(parents=True, exist_ok=True)  # somebody may have cleared it
            with (self.folder / _LOCK).open("a+", encoding="utf-8") as lock:
                self._wait_for(lock)
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                yield
        finally:
            self._guard.release()

    def _wait_for(self, lock: IO[str]) -> None:
        ends, pause = time.monotonic() + _LOCK_SECONDS, _FIRST_LOOK_SECONDS
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends:
                    lock.seek(0)
                    raise self._stuck(f"process {lock.read(20) or '?'} of this node") from None
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)

    def _stuck(self, who: str) -> RunError:
        return RunError(
            f"{self.folder}: {who} has held its lock for {_LOCK_SECONDS:.0f} s, and hangs or is"
            " suspended: end it, or give another cache.folder, and run the same command again"
        )

    def _own_pins(self) -> IO[str]:
        """This process's list; a process that was forked off begins its own."""
        if self._pins is None or self._process != os.getpid():
            self._pinned, self._lasting = set(), set()
            self._pins = (self.folder / _PINS / uuid.uuid4().hex).open("w", encoding="utf-8")
            fcntl.flock(self._pins, fcntl.LOCK_EX)
            self._process = os.getpid()
        return self._pins

    def pin(self, path: Path, lasting: bool = False) -> None:
        """Keeps a file, there or to come, until :meth:`release`.

        Args:
            lasting: until the process ends: for what others than us open by its name.
        """
        name = str(path.relative_to(self.folder))
        if name not in self._pinned or self._process != os.getpid():
            with self._locked(), disk_errors(self.folder):
                pins = self._own_pins()
                pins.write(f"{name}\n")
                pins.flush()
                self._pinned.add(name)
        if lasting:
            self._lasting.add(name)

    def release(self) -> None:
        """Nothing is in use any more but what lasts. What a process has mapped into memory stays
        readable."""
        if self._pinned - self._lasting and self._process == os.getpid():
            with self._locked(), disk_errors(self.folder):
                pins = self._own_pins()
                pins.seek(0)
                pins.truncate()
                pins.writelines(f"{name}\n" for name in sorted(self._lasting))
                pins.flush()
                self._pinned = set(self._lasting)

    def used(self, path: Path) -> None:
        """Remembers that a file was used now."""
        with contextlib.suppress(OSError):
            state = path.stat()
            os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))

    def make_room(self, size: int) -> None:
        """Removes files until ``size`` more bytes fit, as far as no one uses them.

        Raises:
            RunError: not even an empty folder has room for them.
        """
        if size > self.limit_bytes:
            raise RunError(
                f"cache.size: {self.limit_bytes:,} bytes are less than one file of {size:,} bytes:"
                " give more"
            )
        added = None if self._unseen is None else self._unseen + size
        if added is not None and added <= self.limit_bytes * _UNSEEN:
            self._unseen = added
            return
        with self._locked():
            files = self._files()
            total = sum(state.st_size for _, state in files)
            self._unseen = 0.0
            if total + size <= self.limit_bytes:
                return
            kept = self._in_use()
            for name, state in sorted(files, key=lambda item: item[1].st_atime_ns):
                if total + size <= self.limit_bytes * _FILLED:
                    break
                if name not in kept:
                    with contextlib.suppress(FileNotFoundError):
                        (self.folder / name).unlink()
                    total -= state.st_size

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """Every copy with what the system knows of it; leftovers of dead writers are removed."""
        found: list[tuple[str, os.stat_result]] = []
        for folder, folders, names in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders[:] = [name for name in folders if name != _PINS]
                names = [name for name in names if name != _LOCK]
            for name in names:
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    state = path.lstat()
                    if TEMPORARY not in name:
                        found.append((str(path.relative_to(self.folder)), state))
                    elif time.time() - state.st_mtime > _DEAD_SECONDS:
                        path.unlink()
        return found

    def _in_use(self) -> set[str]:
        """Names in the lists of all living processes; lists of the dead are removed."""
        found: set[str] = set()
        for file in (self.folder / _PINS).iterdir():
            with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found |= set(stream.read().split("\n"))
                else:
                    file.unlink()
        return found


@cache
def cache_at(folder: Path, limit_bytes: int) -> Cache:
    """The cache of this process in a folder."""
    found = Cache(folder, limit_bytes)
    _OPEN.append(found)
    return found


_OPEN: list[Cache] = []


def release_pins() -> None:
    """Lets go of everything that this process uses, in all caches: a worker after a task, the
    driver when it has read what it needs."""
    for known in _OPEN:
        known.release()
