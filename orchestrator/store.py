"""The content-addressed folder of finished pieces.

An entry is a file named by the hash of everything that went into it, and beside it a small JSON
*seal* with the file's size and digest. The seal is written last, so an entry without one does not
exist; an entry whose file does not match its seal is removed and made again. Files are written
under a temporary name in the same folder and renamed: any number of writers on one file system may
make the same entry at the same time, and the last rename wins with the same bytes. Entries are not
flushed to disk one by one: what a power failure leaves of them does not match its seal.

    STORE/<kind>/<first two digits>/<key>.<suffix>
    STORE/<kind>/<first two digits>/<key>.seal.json
    STORE/scratch/<key>/         unfinished work
    STORE/models/<key>/          a model folder of entries, see stored_model.py

Whoever shares the store may have put links into it. None of these folders may be one.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moesaic.orchestrator.digests import TICK_NS
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.files import TEMPORARY, disk_errors, fill, make_folder, write_atomically
from moesaic.orchestrator.foreign import read_json, shown
from moesaic.orchestrator.own_folders import own_folder
from moesaic.orchestrator.seals import (
    UnfitError,
    check_metadata,
    read_seal,
    seal_text,
    tell_unfit,
)

_CHUNK = 1 << 20
SEAL = ".seal.json"
SCRATCH = "scratch"
# Model folders of entries.
MODELS = "models"
# Beginning of the name of a folder that mirrors stores at URLs; see shared.py.
MIRRORS = "moesaic-store@"
# Entries are looked at in parts. Where one of a part took longer than a turn of a thread, some more
# parts are given to several: small files that lie near are read sooner than they are handed over.
_TOGETHER, _TURN_SECONDS = 64, 1e-3
_THREADS, _AT_ONCE = 4, 16
KINDS = (
    "ids",
    "stats",
    "gradients",
    "reductions",
    "pieces",
    "errors",
    "mosaics",
    "cuts",
    "routers",
    "hidden",
    "scores",
    "bases",
    "sliced",
    "features",
)
# Names below the root of what a store may remove.
_OWN = re.compile(
    rf"(?:(?:{'|'.join(KINDS)})/([0-9a-f]{{2}})/\1[0-9a-f]{{38}}"
    rf"|(?:{SCRATCH}|{MODELS})/[0-9a-f]{{40}}/[^/]+?)"
    rf"\.(?:safetensors|json|seal\.json)(?:{re.escape(TEMPORARY)}[0-9a-f]+)?"
)


def is_own(name: str) -> bool:
    """Whether a name below a store's root is one that a store gives its files."""
    return _OWN.fullmatch(name) is not None


def digest(value: Any) -> str:
    """40 hex digits of the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def file_digest(path: Path | str) -> str:
    """40 hex digits of a file's bytes; ValueError for what is no file, such as a pipe."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: is no regular file")
    state = hashlib.blake2b(digest_size=20)
    length = min(_CHUNK, found.st_size + 1)  # a small file comes in one piece
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(length):
            state.update(chunk)
    return state.hexdigest()


# Size, time of modification in ns, and number of a file: another triple where it was altered.
Version = tuple[int, int, int]


def version(path: Path | str) -> Version:
    """What tells a file from an altered one, without reading it; see :func:`_are_settled`."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ino


def _versions(*paths: Path | str) -> tuple[Version, ...] | None:
    """Those of all; None where one is not there."""
    try:
        return tuple(map(version, paths))
    except FileNotFoundError:
        return None


def _are_settled(*versions: Version) -> bool:
    """Whether the files were written so long ago that their times change when they are altered."""
    return time.time_ns() - max(modified for _, modified, _ in versions) > TICK_NS


# Path → its version and digest, as far as this process has looked.
_digests: dict[str, tuple[Version, str]] = {}


def checked_digest(path: Path) -> str:
    """:func:`file_digest`, computed once by a process while the file's version stays."""
    found = version(path)
    known = _digests.get(str(path))
    if known is not None and known[0] == found:
        return known[1]
    value = file_digest(path)
    if _are_settled(found):
        _digests[str(path)] = found, value
    return value


@cache
def code_digest(*folders_or_files: str) -> str:
    """Digest of source files (relative to the package): results of older code are not reused."""
    import moesaic.kernels
    import moesaic.methods
    import moesaic.orchestrator

    roots = {
        "kernels": Path(next(iter(moesaic.kernels.__path__))),
        "methods": Path(next(iter(moesaic.methods.__path__))),
        "orchestrator": Path(next(iter(moesaic.orchestrator.__path__))),
    }
    sources: list[tuple[str, str]] = []
    for name in folders_or_files:
        top, _, inside = name.partition("/")
        root = roots[top]
        paths = sorted(root.glob("*.py")) if not inside else [root / inside]
        sources += [(f"{top}/{path.name}", file_digest(path)) for path in paths]
    return digest(sources)


@dataclass(frozen=True)
class Entry:
    """A finished piece: where it lies and what its seal says of it."""

    path: Path
    size: int
    metadata: Mapping[str, Any]


class Store:
    """Entries of several kinds under one folder; see the module's docstring.

    Attributes:
        root: the folder.
        where: the same, as people name it.
    """

    def __init__(self, root: Path) -> None:
        if MIRRORS in str(root):
            raise ValueError(f"{root} stands for a URL: shared.open_store opens it")
        self.root, self.where = root, str(root)
        # Entries that were read once, with the versions of file and seal that they were read from.
        self._checked: dict[str, tuple[tuple[Version, ...], Entry]] = {}
        self._own: set[tuple[str, str]] = set()  # folders that were looked at: they are no links
        make_folder(root, "store")

    @property
    def free_bytes(self) -> int | None:
        """What the disk has left."""
        return shutil.disk_usage(self.root).free

    def same_place(self, other: "Store") -> bool:
        """Whether another one has the same entries."""
        return self.root.resolve() == other.root.resolve()

    def holds_anything(self) -> bool:
        """Whether something was put into it, ever."""
        # Those of os.path say False of a path that is too long, too.
        return any(os.path.isdir(self.root / kind) for kind in ("pieces", "stats", "ids"))

    def path(self, kind: str, key: str, suffix: str = "safetensors") -> Path:
        """Where the entry lies, or will lie."""
        # In one piece: pathlib takes longer to join three than the system to find the file.
        return Path(f"{self.root}/{kind}/{key[:2]}/{key}.{suffix}")

    def get(self, kind: str, key: str, suffix: str = "safetensors") -> Entry | None:
        """The entry, its bytes checked against the seal; None where it must be (re)made.

        A truncated or altered entry is removed; so is one whose metadata is not that of its kind,
        which is told. Bytes are read once by a store that is kept, as
        long as size and time of modification of file and seal stay what they were.

        Raises:
            UserError: it lies in a folder that is a symbolic link.
        """
        stem = f"{self.root}/{kind}/{key[:2]}/{key}"
        file, seal = f"{stem}.{suffix}", f"{stem}{SEAL}"
        versions = _versions(file, seal)
        if versions is None:  # never finished, or another process is removing it
            return None
        known = self._checked.get(file)
        if known is not None and known[0] == versions:
            return known[1]
        if (folder := (kind, key[:2])) not in self._own:
            own_folder(self.root, *folder)
            self._own.add(folder)
        try:
            sealed, size = read_seal(seal), os.stat(file).st_size
            check_metadata(kind, sealed["metadata"])
            if size == sealed["size"] and file_digest(file) == sealed["digest"]:
                entry = Entry(Path(file), size, sealed["metadata"])
                if _are_settled(*versions):
                    self._checked[file] = versions, entry
                return entry
        except FileNotFoundError:
            return None
        except UnfitError as error:
            tell_unfit(seal, error)
        except ValueError:
            pass  # the seal itself was altered
        for altered in (seal, file):
            Path(altered).unlink(missing_ok=True)
        return None

    def get_many(
        self, kind: str, keys: Iterable[str], suffix: str = "safetensors"
    ) -> dict[str, Entry]:
        """Finished entries by key, as :meth:`get` has them; where files are large, or far away,
        several are checked at a time."""
        wanted = list(keys)
        parts = [wanted[low : low + _TOGETHER] for low in range(0, len(wanted), _TOGETHER)]

        def get(part: list[str]) -> list[Entry | None]:
            return [self.get(kind, key, suffix) for key in part]

        found: list[Entry | None] = []
        while parts:
            started = time.perf_counter()
            found += get(part := parts.pop(0))
            if parts and time.perf_counter() - started > len(part) * _TURN_SECONDS:
                together, parts = parts[:_AT_ONCE], parts[_AT_ONCE:]
                with ThreadPoolExecutor(_THREADS) as threads:
                    found += itertools.chain.from_iterable(threads.map(get, together))
        return {k: entry for k, entry in zip(wanted, found, strict=True) if entry is not None}

    def check_kind(self, kind: str) -> None:
        """Raises ValueError for a kind that :meth:`gc` would not know."""
        if kind not in KINDS:
            raise ValueError(f"no kind of entry {kind!r}: there are {', '.join(KINDS)}")

    def put(
        self,
        kind: str,
        key: str,
        write: Callable[[Path], None],
        metadata: Mapping[str, Any] | None = None,
        suffix: str = "safetensors",
    ) -> Entry:
        """Makes the entry: ``write`` is given the path to fill, and may fill the metadata too.

        Raises:
            UserError: it would lie in a folder that is a symbolic link.
        """
        self.check_kind(kind)
        own_folder(self.root, kind, key[:2])
        path = self.path(kind, key, suffix)
        size, own = 0, ""

        def write_and_measure(temporary: Path) -> None:
            nonlocal size, own
            write(temporary)
            size, own = temporary.stat().st_size, file_digest(temporary)

        write_atomically(path, write_and_measure, flush=False)
        metadata = dict(metadata or {})
        text = seal_text(size, own, metadata)
        write_atomically(seal_path(path), lambda p: fill(p, text), flush=False)
        return Entry(path, size, metadata)

    def put_json(self, kind: str, key: str, value: Any) -> Entry:
        """An entry that holds JSON; read back by :meth:`get_json`."""
        return self.put(kind, key, lambda p: fill(p, json.dumps(value)), suffix="json")

    def _readable(self, path: Path) -> Path:
        """The file of an entry, where this node can read it."""
        return path

    def get_json(self, kind: str, key: str) -> Any | None:
        """The JSON of an entry made by :meth:`put_json`, or None.

        Raises:
            RunError: it is none, although its seal fits.
        """
        entry = self.get(kind, key, suffix="json")
        if entry is None:
            return None
        try:
            return read_json(self._readable(entry.path))
        except ValueError as error:
            raise RunError(f"{entry.path}: {shown(error)}: remove it and run again") from None

    def gc(self, used: Iterable[Path], minimum_age_seconds: float = 3600.0) -> tuple[int, int]:
        """Removes entries that ``used`` does not name, and temporary files of dead writers.

        Files younger than ``minimum_age_seconds`` are kept: another run may be about to use them.
        Files that are not the store's, by their names, are never touched, wherever it lies.

        Args:
            used: files of entries, or folders of unfinished work.

        Returns:
            (number of files removed, bytes freed).

        Raises:
            UserError: a folder of the store is a symbolic link; nothing is removed.
        """
        keep = {path.resolve() for path in used}
        newest = self._now() - minimum_age_seconds
        removed = freed = 0
        folders = self._folders()
        for path in self._files(folders):
            owner = path.with_name(path.name.removesuffix(SEAL))
            sealed = [owner.with_name(f"{owner.name}.{s}") for s in ("safetensors", "json")]
            if any(p.resolve() in keep for p in (path, path.parent, *sealed)):
                continue
            with contextlib.suppress(FileNotFoundError):  # its writer finished or removed it
                state = path.lstat()  # links of models are no second copies
                if state.st_mtime > newest:
                    continue
                path.unlink()
                freed += state.st_size
                removed += 1
        for folder in folders:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        return removed, freed

    def _now(self) -> float:
        """The time by the clock that the files' own times are of, which need not be this node's."""
        probe = self.root / f"{TEMPORARY}{uuid.uuid4().hex}"
        with disk_errors(probe):
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink()

    def _folders(self) -> list[Path]:
        """Folders that hold files of the store; raises UserError for links."""
        found = []
        for kind in (*KINDS, SCRATCH, MODELS):
            folder = own_folder(self.root, kind)
            digits = 2 if kind in KINDS else 40
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if re.fullmatch(f"[0-9a-f]{{{digits}}}", name):
                    found.append(own_folder(self.root, kind, name))
        return [folder for folder in found if folder.is_dir()]

    def _files(self, folders: Iterable[Path]) -> list[Path]:
        """Every file of the store, temporary ones included."""
        inside = (path for folder in folders for path in folder.iterdir() if _is_own_file(path))
        tops = self.root.glob(f"{TEMPORARY}*")
        left = (path for path in tops if re.fullmatch(f"{TEMPORARY}[0-9a-f]+", path.name))
        # Links of models may lead to what is not made yet, or no more.
        return sorted(p for p in (*inside, *left) if p.is_file() or p.is_symlink())


def _is_own_file(path: Path) -> bool:
    return is_own("/".join(path.parts[-3:]))


def scratch_folder(root: Path, key: str) -> Path:
    """Where unfinished work of one key lies; it is there once something was written into it.

    Raises:
        UserError: it is a symbolic link, or lies in one.
    """
    return own_folder(root, SCRATCH, key)


def remove_scratch(folder: Path) -> None:
    """Removes a scratch folder with all that the store put into it, if it is there.

    Raises:
        UserError: it is a symbolic link, or lies in one.
    """
    scratch_folder(folder.parents[1], folder.name)
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if _is_own_file(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a worker of a run that was killed writes into it
            folder.rmdir()


def seal_path(path: Path) -> Path:
    return path.with_name(path.stem + SEAL)
