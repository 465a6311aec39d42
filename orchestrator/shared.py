"""Files that several nodes read and write: in a folder that all of them see, or at a URL.

A store at a URL is named, everywhere in the program, by the folder on a node that mirrors it:

    CACHE/moesaic-store@BYTES/QUOTED-URL/<kind>/<first two digits>/<key>.<suffix>

The name says all that a process on any node needs to open it: where the cache is (the same path on
every node, each with its own files), how much it may hold, and what is mirrored. So a path is a
path, in task arguments as well; but it is only there once it was fetched. The functions of this
module take paths of both kinds, and do nothing but what the file system does where the path is not
in a mirror.

Every file at a URL has a seal beside it (see :mod:`moesaic.orchestrator.store`), unfinished work
too: written after the data, read first, compared with every download.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from moesaic.orchestrator import objects
from moesaic.orchestrator.cache import Cache, cache_at
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.files import write_atomically
from moesaic.orchestrator.objects import Objects, OtherSizeError, Refusal, is_url, version_of
from moesaic.orchestrator.seals import (
    MOST_BYTES,
    UnfitError,
    check_metadata,
    parse_seal,
    read_seal,
    seal_text,
    tell_unfit,
)
from moesaic.orchestrator.store import (
    MIRRORS,
    SEAL,
    Entry,
    Store,
    checked_digest,
    file_digest,
    is_own,
    remove_scratch,
    seal_path,
)

_PATTERN = re.compile(rf"(/.*?)/({MIRRORS}\d+)/([^/]+)(?:/(.*))?")
# Written whenever a store is opened by who may make one: says that it is one, and that it can be
# written.
_MARK = "moesaic-store.json"
# URLs of stores that this process made, or may have made.
_made: set[str] = set()
# Downloads of a file that does not match its seal before it counts as missing; what is being
# written at this moment may be read half.
READS = 3
_THREADS = 8
LONGEST_NAME = 255


@dataclass(frozen=True)
class CachePlace:
    """Where copies of what lies at URLs are kept, on every node."""

    folder: Path
    limit_bytes: int


def mirror_folder(url: str, place: CachePlace, key: str = "store") -> Path:
    """The folder that stands for a store at a URL.

    Raises:
        RecipeError: it would have too long a name.
    """
    name = quote(url.rstrip("/"), safe="")
    if len(name) > LONGEST_NAME:
        raise RecipeError(f"{key}: {url[:80]} … is too long: at most {LONGEST_NAME} characters")
    return place.folder / f"{MIRRORS}{place.limit_bytes}" / name


class Mirror:
    """One URL as this process sees it."""

    def __init__(self, folder: Path, url: str, cache: Cache) -> None:
        self.folder, self.url, self.cache = folder, url, cache
        self._known: dict[str, dict[str, Any]] = {}  # seals that this process has read

    @cached_property
    def objects(self) -> Objects:
        """What is there; opened when it is first needed."""
        if self.url.startswith("memory:") and self.url not in _made:
            raise RecipeError(
                f"store: {self.url}: lives in the memory of one process, and workers are others:"
                " give a folder, or the URL of a server"
            )
        return Objects(self.url)

    def seal(self, name: str) -> dict[str, Any] | None:
        """The seal of a file; None where there is none, or it stays unreadable."""
        for attempt in range(READS):
            if attempt:
                time.sleep(objects.PAUSE_SECONDS)
            try:
                return self.know(name, self.objects.read(_seal_name(name), MOST_BYTES))
            except FileNotFoundError:
                return None
            except ValueError:  # cut off, altered, or being written at this moment
                continue
        return None

    def know(self, name: str, content: bytes) -> dict[str, Any]:
        """Remembers a seal that was read among others; raises ValueError for what is none."""
        self._known[name] = parse_seal(content)
        return self._known[name]

    def fetched(self, name: str, lasting: bool = False) -> Path:
        """The file on this node, in use until pins are released.

        Args:
            lasting: or until the process ends; see :meth:`Cache.pin`.

        Raises:
            FileNotFoundError: there is none.
            RunError: what is there does not match its seal; it is removed.
        """
        path = self.folder / name
        self.cache.pin(path, lasting)
        if self._is_whole(path):
            self.cache.used(path)
            self.cache.used(seal_path(path))
            return path
        sealed = self._known.get(name)
        for _ in range(READS):
            sealed = sealed or self.seal(name)
            if sealed is None:
                raise FileNotFoundError(2, "no such file", f"{self.url}/{name}")
            with self.cache.fetching(path, sealed["size"]) as begins:
                # Another process may have fetched it meanwhile.
                if self._is_whole(path) or self._downloaded(name, path, sealed, begins):
                    return path
            sealed = None
            time.sleep(objects.PAUSE_SECONDS)
        self.remove(name)
        raise RunError(
            f"{self.url}/{name}: does not match its seal, read {READS} times: it is removed; run"
            " the same command again, it is made anew"
        )

    def _is_whole(self, path: Path) -> bool:
        try:
            sealed = read_seal(seal_path(path))
            size = path.stat().st_size
            return bool(size == sealed["size"] and checked_digest(path) == sealed["digest"])
        except (FileNotFoundError, ValueError):
            return False

    def _downloaded(
        self, name: str, path: Path, sealed: dict[str, Any], begins: Callable[[], None]
    ) -> bool:
        """Whether a file came as its seal describes it; only then is it kept."""
        self.cache.make_room(sealed["size"])
        with self.cache.writing(path) as temporary:
            try:
                self.objects.download(name, temporary, sealed["size"], begins)
            except (FileNotFoundError, OtherSizeError):
                return False
            if temporary.stat().st_size != sealed["size"]:
                return False
            if file_digest(temporary) != sealed["digest"]:
                return False
            temporary.replace(path)
        self._keep_seal(path, seal_text(**sealed))
        return True

    def _keep_seal(self, path: Path, text: str) -> None:
        seal = seal_path(path)
        with self.cache.writing(seal) as temporary:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(seal)

    def write(
        self, name: str, fill: Callable[[Path], None], metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Makes a file: here, then there, its seal last.

        Returns:
            the seal.
        """
        path = self.folder / name
        self.cache.pin(path)
        with self.cache.writing(path) as temporary:
            fill(temporary)
            temporary.replace(path)
        sealed: dict[str, Any] = {
            "size": path.stat().st_size,
            "digest": file_digest(path),
            "metadata": dict(metadata or {}),
        }
        self.cache.make_room(0 if sealed["size"] > self.cache.limit_bytes else sealed["size"])
        text = seal_text(**sealed)
        self.objects.upload(path, name)
        self.objects.write(_seal_name(name), text.encode())
        self._keep_seal(path, text)
        return sealed

    def exists(self, name: str) -> bool:
        return self.objects.info(_seal_name(name)) is not None

    def remove(self, name: str) -> None:
        """Removes a file, its seal first, here and there."""
        self._known.pop(name, None)
        path = self.folder / name
        for own in (_seal_name(name), name):
            self.objects.remove(own)
        for file in (seal_path(path), path):
            file.unlink(missing_ok=True)


def _seal_name(name: str) -> str:
    return str(seal_path(Path(name)))


@cache
def _mirror(folder: str) -> Mirror:
    match = _PATTERN.fullmatch(folder)
    assert match is not None, "the caller has looked"
    place = cache_at(Path(match[1]), int(match[2].removeprefix(MIRRORS)))
    return Mirror(Path(folder), unquote(match[3]), place)


def _inside(path: Path) -> tuple[Mirror, str] | None:
    """The mirror that a path is in, and the name there."""
    text = os.fspath(path)
    if MIRRORS not in text or (match := _PATTERN.fullmatch(text)) is None:
        return None
    return _mirror(f"{match[1]}/{match[2]}/{match[3]}"), match[4] or ""


def is_mirrored(path: Path) -> bool:
    """Whether a path stands for one at a URL."""
    return _inside(path) is not None


def told_name(path: Path) -> str:
    """What people call a file: its path, or its URL."""
    found = _inside(path)
    return str(path) if found is None else f"{found[0].url}/{found[1]}"


def fetched(path: Path | str, lasting: bool = False) -> Path:
    """The path, the file being there; raises FileNotFoundError where there is none at the URL.

    Args:
        lasting: it stays until the process ends, not only until pins are released.
    """
    path = Path(path)
    found = _inside(path)
    return path if found is None else found[0].fetched(found[1], lasting)


def exists(path: Path) -> bool:
    """Whether there is a finished file."""
    found = _inside(path)
    return path.exists() if found is None else found[0].exists(found[1])


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    found = _inside(path)
    if found is None:
        path.unlink(missing_ok=True)
    else:
        found[0].remove(found[1])


def write_shared(path: Path, fill: Callable[[Path], None]) -> None:
    """As :func:`moesaic.orchestrator.files.write_atomically`, for all nodes to see."""
    found = _inside(path)
    if found is None:
        write_atomically(path, fill)
    else:
        found[0].write(found[1], fill)


def remove_unfinished(folder: Path) -> None:
    """Removes a folder of unfinished work with all that is in it, if it is there."""
    found = _inside(folder)
    if found is not None:
        mirror, name = found
        for own in mirror.objects.listing(name):
            mirror.objects.remove(own)
    remove_scratch(folder)


class RemoteStore(Store):
    """A store at a URL, seen through the folder that mirrors it on this node.

    Args:
        root: as :func:`mirror_folder` names it.
        make: whether it may be a new one; others must find one there.

    Raises:
        RecipeError: the URL cannot be used.
        RunError: nobody answers there.
    """

    def __init__(self, root: Path, make: bool = False) -> None:
        self.root = root
        found = _inside(root)
        assert found is not None, "the caller has looked"
        self.mirror = found[0]
        self.where = self.mirror.url
        self._seals: dict[str, tuple[str, dict[str, Any]]] = {}
        try:
            if make:
                _made.add(self.where)
                self.mirror.objects.write(_MARK, b'{"moesaic": "store"}\n')
        except Refusal as error:
            raise RecipeError(f"store: {error}") from None

    @property
    def free_bytes(self) -> int | None:
        """Nobody knows what is free at a URL."""
        return None

    def _name(self, kind: str, key: str, suffix: str) -> str:
        return str(self.path(kind, key, suffix).relative_to(self.root))

    def get(self, kind: str, key: str, suffix: str = "safetensors") -> Entry | None:
        """The entry, its size checked against the seal, its bytes when they are fetched; None where
        it must be (re)made."""
        name = self._name(kind, key, suffix)
        sealed = self.mirror.seal(name)
        if sealed is not None:
            info = self.mirror.objects.info(name)
            try:
                check_metadata(kind, sealed["metadata"])
                if info is not None and info["size"] == sealed["size"]:
                    return Entry(self.root / name, sealed["size"], sealed["metadata"])
            except UnfitError as error:
                tell_unfit(f"{self.where}/{_seal_name(name)}", error)
        if sealed is not None or self.mirror.exists(name):
            self.mirror.remove(name)
        return None

    def get_many(
        self, kind: str, keys: Iterable[str], suffix: str = "safetensors"
    ) -> dict[str, Entry]:
        """As :meth:`get` for each; one listing tells what is there."""
        names = {key: self._name(kind, key, suffix) for key in keys}
        if len(names) <= _THREADS:
            found = {key: self.get(kind, key, suffix) for key in names}
            return {key: entry for key, entry in found.items() if entry is not None}
        listed = self.mirror.objects.listing(kind)
        there = {k: n for k, n in names.items() if n in listed and _seal_name(n) in listed}
        versions = {name: version_of(listed[_seal_name(name)]) for name in there.values()}
        new = [n for n, v in versions.items() if self._seals.get(n, ("",))[0] != v]
        sizes = {seal: listed[seal]["size"] for seal in map(_seal_name, new)}
        # Others are looked at one by one, and removed.
        seals = {seal: size for seal, size in sizes.items() if 0 < size <= MOST_BYTES}
        read = self.mirror.objects.read_many(seals)
        for name in new:
            with contextlib.suppress(KeyError, ValueError):
                known = self.mirror.know(name, read[_seal_name(name)])
                check_metadata(kind, known["metadata"])
                self._seals[name] = versions[name], known
        entries = {}
        for key, name in there.items():
            sealed = self._seals[name][1] if name in self._seals else None
            if sealed is not None and sealed["size"] == listed[name]["size"]:
                entries[key] = Entry(self.root / name, sealed["size"], sealed["metadata"])
            elif (entry := self.get(kind, key, suffix)) is not None:  # or it is removed
                entries[key] = entry
        return entries

    def put(
        self,
        kind: str,
        key: str,
        write: Callable[[Path], None],
        metadata: Mapping[str, Any] | None = None,
        suffix: str = "safetensors",
    ) -> Entry:
        """Makes the entry: ``write`` is given the path to fill, and may fill the metadata too."""
        self.check_kind(kind)
        name = self._name(kind, key, suffix)
        sealed = self.mirror.write(name, write, metadata)
        return Entry(self.root / name, sealed["size"], sealed["metadata"])

    def _readable(self, path: Path) -> Path:
        return self.mirror.fetched(str(path.relative_to(self.root)))

    def same_place(self, other: Store) -> bool:
        """Whether another one is at the same URL, whatever caches they have."""
        return self.where == other.where

    def _now(self) -> float:
        """The time by the clock of whoever keeps the files at the URL."""
        name = f"clock-{uuid.uuid4().hex}"
        self.mirror.objects.write(name, b"")
        try:
            info = self.mirror.objects.info(name)
            assert info is not None, "it was just written"
            return self.mirror.objects.modified(name, info)
        finally:
            self.mirror.objects.remove(name)

    def holds_anything(self) -> bool:
        """Whether there is a store at the URL."""
        try:
            return self.mirror.objects.info(_MARK) is not None
        except Refusal as error:
            raise RecipeError(str(error)) from None

    def gc(self, used: Iterable[Path], minimum_age_seconds: float = 3600.0) -> tuple[int, int]:
        """As :meth:`Store.gc`, at the URL; copies on nodes leave when room is needed."""
        keep = {str(path.relative_to(self.root)) for path in used}
        newest = self._now() - minimum_age_seconds
        wanted, size = [], 0
        for name, info in self.mirror.objects.listing().items():
            if not is_own(name):
                continue
            stem = name.removesuffix(SEAL)
            own = (name, name.rpartition("/")[0], f"{stem}.safetensors", f"{stem}.json")
            if keep.isdisjoint(own) and self.mirror.objects.modified(name, info) <= newest:
                wanted.append(name)
                size += info["size"]
        # Seals first: an entry without its file would be taken for a damaged one.
        for group in (
            [n for n in wanted if n.endswith(SEAL)],
            [n for n in wanted if not n.endswith(SEAL)],
        ):
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(self.mirror.objects.remove, group))
        for name in wanted:
            (self.root / name).unlink(missing_ok=True)
        return len(wanted), size


@cache
def _opened(root: str) -> RemoteStore:
    return RemoteStore(Path(root))


def open_store(root: Path | str) -> Store:
    """The store of a folder, or of the URL that the folder mirrors; for who is given its root."""
    return Store(Path(root)) if _inside(Path(root)) is None else _opened(str(root))


def make_store(where: str, place: CachePlace) -> Store:
    """The store at a folder or a URL, made if it is not there.

    Raises:
        RecipeError: it cannot be.
    """
    if not is_url(where):
        return Store(Path(where))
    return RemoteStore(mirror_folder(where, place), make=True)


def found_store(where: str, place: CachePlace) -> Store | None:
    """The store at a folder or a URL; None where there is none.

    Raises:
        RecipeError: it cannot be opened.
    """
    if is_url(where):
        found: Store = RemoteStore(mirror_folder(where, place))
    else:
        # os.path says False of a path that is too long.
        if not os.path.isdir(where):
            return None
        found = Store(Path(where))
    return found if found.holds_anything() else None
