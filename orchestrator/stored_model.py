"""A model folder whose files of weights are entries of a store.

    STORE/models/<key>/config.json, model.safetensors.index.json

In a store that is a folder, the files of weights are links to the entries, so that any tool reads
the model. At a URL there are no links: ``entries.json`` says which entries they are, and
:class:`StoredCheckpoint` reads them through the folder that mirrors the store, each when a tensor
in it is wanted. The header alone is read first, which no seal tells anything of: where it cannot
be, the whole file is fetched and compared with its seal; where it can, it is compared with the
file's when that is here.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from moesaic.orchestrator.checkpoint import INDEX, Checkpoint, Entry, entries_of, read_object
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.foreign import MAX_HEADER_BYTES
from moesaic.orchestrator.objects import Objects
from moesaic.orchestrator.own_folders import own_folder
from moesaic.orchestrator.shared import (
    RemoteStore,
    exists,
    fetched,
    is_mirrored,
    open_store,
    remove,
    write_shared,
)
from moesaic.orchestrator.store import MODELS

# Kind of the entries.
KIND = "sliced"
# Shard → key of its entry.
_KEYS = "entries.json"
# A header is mostly shorter: one request instead of two.
_FIRST_BYTES = 1 << 20


def model_folder(root: Path, key: str) -> Path:
    """Where a store has a model.

    Raises:
        UserError: it is a symbolic link, or lies in one.
    """
    return own_folder(root, MODELS, key)


def shard_file(folder: Path, shard: str, key: str) -> Path:
    """What is opened to read a file of weights: a link in the folder, or the entry in a mirror.

    Args:
        folder: as :func:`model_folder` has it.
        key: of the entry.
    """
    root = folder.parents[1]
    return open_store(root).path(KIND, key) if is_mirrored(root) else folder / shard


def write_stored(
    folder: Path, config: Mapping[str, Any], index: Mapping[str, Any], keys: Mapping[str, str]
) -> None:
    """Makes the folder of a model; its entries may be still to come.

    Args:
        folder: as :func:`model_folder` has it.
        keys: shard → key of its entry.
    """
    root = folder.parents[1]
    remote = is_mirrored(root)
    _write_once(folder / "config.json", config)
    _write_once(folder / INDEX, index)
    if remote:
        _write_once(folder / _KEYS, keys)
        return
    for shard, key in keys.items():
        target = open_store(root).path(KIND, key)
        with contextlib.suppress(FileExistsError):
            (folder / shard).symlink_to(os.path.relpath(target, folder))


def _write_once(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"

    def fill(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    if not exists(file) or fetched(file).read_text(encoding="utf-8") != text:
        write_shared(file, fill)
    fetched(file, lasting=True)  # transformers opens it when it likes


def is_stored(folder: Path) -> bool:
    """Whether a path is that of a model in a store at a URL."""
    return folder.parent.name == MODELS and is_mirrored(folder)


class StoredCheckpoint(Checkpoint):
    """A model in a store at a URL.

    Args:
        path: as :func:`model_folder` has it.

    Raises:
        RunError: a part of it is not there, or damaged; later ones as well.
        UserError: as :class:`Checkpoint`; or the list of entries is none.
    """

    def __init__(self, path: Path) -> None:
        store = open_store(path.parents[1])
        assert isinstance(store, RemoteStore), "is_stored says so"
        self._objects, self._root = store.mirror.objects, store.root
        for name in ("config.json", INDEX, _KEYS):
            self._fetched(path / name, lasting=True)
        keys = _keys(path / _KEYS)
        self._places = {shard: store.path(KIND, key) for shard, key in keys.items()}
        found = store.get_many(KIND, keys.values())
        self._sizes = {entry.path: entry.size for entry in found.values()}
        for place in self._places.values():
            if place not in self._sizes:
                raise self._gone(place)
        # Files whose own headers are those that were read at the URL.
        self._compared: set[Path] = set()
        super().__init__(path)

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _url(self, file: Path) -> str:
        return f"{self._objects.url}/{self._name(file)}"

    def _gone(self, file: Path) -> RunError:
        return RunError(f"{self._url(file)}: is gone; run the same command again")

    def _fetched(self, file: Path, lasting: bool = False) -> Path:
        try:
            return fetched(file, lasting)
        except FileNotFoundError:
            raise self._gone(file) from None

    def _file(self, shard: str) -> Path:
        return self._places.get(shard, self.path / shard)

    def _is_there(self, file: Path) -> bool:
        return file in self._sizes

    @cached_property
    def _promised(self) -> dict[Path, set[str]]:
        """File → tensors that the index says are in it."""
        found: dict[Path, set[str]] = {}
        promised = read_object(self.path / INDEX).get("weight_map")
        for name, shard in promised.items() if isinstance(promised, dict) else ():
            if isinstance(shard, str):
                found.setdefault(self._file(shard), set()).add(name)
        return found

    def _header(self, file: Path) -> dict[str, Entry]:
        if file not in self._promised:
            raise UserError(f"{self.path / INDEX}: names no tensor in {self._url(file)}")
        with contextlib.suppress(UserError, _ReadInPart):
            try:
                found = header_at(self._objects, self._name(file), self._sizes[file], file)
            except FileNotFoundError:
                raise self._gone(file) from None
            if found.keys() == self._promised[file]:
                return found
        self._fetched(file)  # or it is removed, as what does not match its seal
        try:
            found, reason = super()._header(file), "has other tensors than its index says"
        except UserError as error:
            found, reason = {}, str(error).removeprefix(f"{file}: ")
        if found.keys() != self._promised[file]:
            remove(file)
            raise RunError(
                f"{self._url(file)}: {reason}: it is removed; run the same command again, it is"
                " made anew"
            )
        return found

    def _readable(self, file: Path) -> Path:
        self._fetched(file)
        if file not in self._compared:
            own = super()._header(file)
            if any(self._entries.get(name) != entry for name, entry in own.items()):
                raise RunError(
                    f"{self._url(file)}: its header was read wrong; run the same command again"
                )
            self._compared.add(file)
        return file

    @property
    def file_bytes(self) -> int:
        return sum(self._sizes[file] for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """The key, which says all that the content follows from."""
        return self.path.name


def _keys(file: Path) -> dict[str, str]:
    """Shard → key; a key that is none could lead out of the store."""
    found = read_object(file)
    keys = found.values()
    if all(isinstance(key, str) and re.fullmatch(r"[0-9a-f]{40}", key) for key in keys):
        return found
    raise UserError(f"{file}: names what no entry is called")


class _ReadInPart(RunError):
    """Fewer bytes came than were asked for."""


def header_at(objects: Objects, name: str, size: int, file: Path) -> dict[str, Entry]:
    """Entries of a safetensors file at a URL, of which only the header is read.

    Args:
        name: of the file there.
        size: of it, in bytes.
        file: where its copy will lie.

    Raises:
        UserError: it is none; told by its URL.
        RunError: not all of the header came.
        FileNotFoundError: it is gone.
    """
    where = f"{objects.url}/{name}"
    raw = objects.read_range(name, 0, min(size, _FIRST_BYTES))
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + length <= min(size, 8 + MAX_HEADER_BYTES):
        raw = objects.read_range(name, 0, 8 + length)
    if len(raw) < min(8 + length, size) and length <= MAX_HEADER_BYTES:
        raise _ReadInPart(f"{where}: was read only in part; run the same command again")
    return entries_of(file, size, io.BytesIO(raw).read, where)
