"""A place at a URL for tests, in memory, that fails as it is told to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moesaic.orchestrator import cache, objects, shared
from moesaic.orchestrator.worker import WorkerState

MANY = 10**9


class Faulty(MemoryFileSystem):
    """A file system in memory that fails as it is told to.

    Attributes:
        faults: called with an operation and a path before it is done; raises, or gives bytes that
            are to be cut off what is read.
        calls: operations that were asked for.
    """

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    faults: Callable[[str, str], int] = staticmethod(lambda operation, path: 0)
    calls: list[tuple[str, str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))

    def _asked(self, operation: str, path: str) -> int:
        Faulty.calls.append((operation, path))
        return Faulty.faults(operation, path)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        cut = self._asked("read", path)
        found: bytes = super().cat_file(path, start, end, **more)
        return found[: len(found) - cut]

    def get_file(self, path: str, local: str, *rest: Any, **more: Any) -> None:
        cut = self._asked("read", path)
        found = super().cat_file(path)
        Path(local).write_bytes(found[: len(found) - cut])

    def put_file(self, local: str, path: str, *rest: Any, **more: Any) -> None:
        self._asked("write", path)
        super().pipe_file(path, Path(local).read_bytes())

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        self._asked("write", path)
        super().pipe_file(path, value)


fsspec.register_implementation("faulty", Faulty, clobber=True)


def forget() -> None:
    """As a process that begins."""
    shared._opened.cache_clear()
    shared._mirror.cache_clear()


def in_use(folder: Path) -> set[str]:
    """Names of the copies in a node's cache that a process has in use."""
    (known,) = {id(known): known for known in cache._OPEN if known.folder == folder}.values()
    return pinned(known) if (folder / ".pins").exists() else set()


def pinned(known: cache.Cache) -> set[str]:
    """Names of the copies that any process of the node has in use."""
    return set[str]().union(*known._living().values()) - {""}


def sizes_of_cache(patch: pytest.MonkeyPatch, folder: Path) -> list[tuple[int, int]]:
    """Filled after every task of an :class:`InlinePool`: bytes of all copies in a node's cache, and
    of those that the task had in use."""
    found: list[tuple[int, int]] = []
    release = cache.release_pins

    def released() -> None:
        used = in_use(folder)
        release()
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        found.append((sum(sizes.values()), sum(sizes.get(name, 0) for name in used)))

    patch.setattr(cache, "release_pins", released)
    return found


@contextmanager
def emptied(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The place without files and faults, asked without pauses by a process that begins."""
    patch.setattr(objects, "PAUSE_SECONDS", 0.001)
    patch.setattr(Faulty, "faults", staticmethod(lambda operation, path: 0))
    Faulty.store.clear()
    Faulty.calls.clear()
    forget()
    yield
    cache.release_pins()


def pinning(state: WorkerState, path: str) -> list[str]:
    """A task that reads a file: names in use while it runs."""
    shared.fetched(path)
    found = shared._inside(Path(path))
    assert found is not None
    return sorted(pinned(found[0].cache))
