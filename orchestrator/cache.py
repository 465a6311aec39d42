"""A bounded folder of copies on this node, which all processes of the node share.

What was used longest ago leaves first, by the files' access times, which are set here. A file in
use never leaves: every process keeps a list of the files that it is working with (its *pins*), in a
file that it holds locked for as long as it lives. Who makes room reads the lists of all the living.
A pin is written, and room is made, under one lock of the folder, so that no file goes between the
moment when it was found and the moment when it was pinned.

A file that several processes want is fetched by one of them, while the others wait; each takes one
of a fixed number of locks, by the file's name. Who has one may take the lock of the folder, never
the other way round, and nobody takes two of them; so no two wait for each other.

    FOLDER/.lock                      held while a pin is written or room is made
    FOLDER/.turns/<number>            held while a file is fetched
    FOLDER/.pins/<id>                 names of files in use, locked by the process that uses them
    FOLDER/.../<name>.tmp-<id>-...    a file that the process with these pins is writing
    FOLDER/...                        the copies

The bound holds for what is not in use; all that is may be more. What is being written counts as far
as it is there; it is in use while its writer lives, and is removed afterwards. A process counts
what it adds and looks at the whole folder when that is more than a hundredth of the bound, so that
several processes may pass it by as many hundredths for a moment.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import IO

from moesaic.orchestrator import objects
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.files import disk_errors, make_folder
from moesaic.orchestrator.turns import turn

_LOCK, _PINS, _TURNS = ".lock", ".pins", ".turns"
# Room is made down to this share of the bound, so that it is not made for every file.
_FILLED = 0.9
# What a process may add, as a share of the bound, before it looks at the whole folder.
_UNSEEN = 0.01
# A file that is being written; who fetches it may have put more behind its name.
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{16})(?:-[0-9a-f]{8})+$")
# Whoever holds the lock looks at every copy at most, and removes some; all wait meanwhile.
_LOCK_SECONDS = 300.0
# Two files with one lock wait for each other, which costs time only.
_LOCKS = 256
_HANGS = "end it, or give another cache.folder, and run the same command again"
_ELSEWHERE = "give a cache.folder on a disk of every node's own"


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
        make_folder(folder, "cache.folder", self._advice)
        self._pinned: set[str] = set()
        self._lasting: set[str] = set()
        self._pins: IO[str] | None = None
        self._process = 0
        self._unseen: float | None = None  # bytes added since the folder was looked at

    @property
    def _advice(self) -> str:
        """For a full disk."""
        return (
            f"on host {socket.gethostname()}, make room beside the copies in cache.folder"
            f" ({self.folder}), or give a cache.size that fits there (now {self.limit_bytes:,}"
            " bytes) or another cache.folder,"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes.

        Raises:
            RunError: another one does not let go of it; the disk is full.
            UserError: files cannot be locked there.
        """
        with disk_errors(self.folder, self._advice):
            (self.folder / _PINS).mkdir(parents=True, exist_ok=True)  # somebody may have cleared it
            what = "held the cache's lock"
            with turn(self.folder / _LOCK, _LOCK_SECONDS, what, _HANGS, _ELSEWHERE):
                yield

    @contextlib.contextmanager
    def fetching(self, path: Path, size: int) -> Iterator[Callable[[], None]]:
        """Alone among all threads and processes of the node that fetch a file of ``size`` bytes;
        the next one finds it there.

        Yields:
            to be called when an attempt begins, or others take the process for one that hangs.

        Raises:
            RunError: another one hangs; the disk is full.
        """
        name = str(path.relative_to(self.folder))
        lock = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _LOCKS
        seconds = objects.longest_silence(size)
        with disk_errors(self.folder, self._advice):
            (self.folder / _TURNS).mkdir(parents=True, exist_ok=True)
            file, what = self.folder / _TURNS / str(lock), f"fetched {name}"
            with turn(file, seconds, what, _HANGS, _ELSEWHERE) as begins:
                yield begins

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A name to write a file under, beside its own, which it is given when it is whole; what
        still has it in the end is removed.

        Raises:
            RunError: the disk is full.
            UserError: it cannot be written.
        """
        with self._locked():
            writer = Path(self._own_pins().name).name
        with disk_errors(path, self._advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp-{writer}-{uuid.uuid4().hex[:8]}")
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def _own_pins(self) -> IO[str]:
        """This process's list. One that was forked off begins its own; one whose list was removed
        with all of the folder writes it again."""
        if self._process != os.getpid():
            self._pins, self._pinned, self._lasting = None, set(), set()
            self._process = os.getpid()
        if self._pins is None or not os.fstat(self._pins.fileno()).st_nlink:
            pins = (self.folder / _PINS / uuid.uuid4().hex[:16]).open("w", encoding="utf-8")
            fcntl.flock(pins, fcntl.LOCK_EX)
            pins.writelines(f"{name}\n" for name in sorted(self._pinned))
            pins.flush()
            self._pins = pins
        return self._pins

    def pin(self, path: Path, lasting: bool = False) -> None:
        """Keeps a file, there or to come, until :meth:`release`.

        Args:
            lasting: until the process ends: for what others than us open by its name.
        """
        name = str(path.relative_to(self.folder))
        if name not in self._pinned or self._process != os.getpid():
            with self._locked():
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
            with self._locked():
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
            RunError: not even an empty folder has room for them; as :meth:`writing`.
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
            lists = self._living()
            files = self._files(lists.keys())
            total = sum(state.st_size for _, state in files)
            self._unseen = 0.0
            if total + size <= self.limit_bytes:
                return
            kept = set[str]().union(*lists.values())
            for name, state in sorted(files, key=lambda item: item[1].st_atime_ns):
                if total + size <= self.limit_bytes * _FILLED:
                    break
                if name not in kept and not _TEMPORARY.search(name):
                    with contextlib.suppress(FileNotFoundError):
                        (self.folder / name).unlink()
                    total -= state.st_size

    def _files(self, living: Collection[str]) -> list[tuple[str, os.stat_result]]:
        """Every file with what the system knows of it; what writers left that do not live is
        removed."""
        found: list[tuple[str, os.stat_result]] = []
        for folder, folders, names in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders[:] = [name for name in folders if name not in (_PINS, _TURNS)]
                names = [name for name in names if name != _LOCK]
            for name in names:
                path, writer = Path(folder) / name, _TEMPORARY.search(name)
                with contextlib.suppress(FileNotFoundError):
                    if writer is None or writer[1] in living:
                        found.append((str(path.relative_to(self.folder)), path.lstat()))
                    else:
                        path.unlink()
        return found

    def _living(self) -> dict[str, set[str]]:
        """The lists of all living processes, by their ids: names of files; lists of the dead are
        removed."""
        found: dict[str, set[str]] = {}
        for file in (self.folder / _PINS).iterdir():
            with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8") as stream:
                try:
                    # Not exclusively: NFS wants the file open for writing then.
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found[file.name] = set(stream.read().split("\n"))
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
