"""A model folder at a URL, or on the driver's node alone, copied to the nodes that read it, file by
file.

Every node has a folder of copies; its name, as that of a store's mirror (see
:mod:`moesaic.orchestrator.shared`), says where they come from:

    CACHE/moesaic-model@BYTES/QUOTED-URL/...

Configuration and tokenizer are there from the start. Of a file of weights only the header is read,
until a tensor in it is wanted; so a node that works on a few blocks has the shards of these. A copy
counts as long as its size, its digest, and the version that the place told (ETag or time) stay.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from moesaic.orchestrator.cache import cache_at
from moesaic.orchestrator.checkpoint import Checkpoint, Entry
from moesaic.orchestrator.companions import COMPANIONS, is_companion
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.foreign import shown
from moesaic.orchestrator.model_source import CONFIG, DriverFiles, ModelSource
from moesaic.orchestrator.objects import Objects, OtherSizeError, Refusal, version_of
from moesaic.orchestrator.shared import LONGEST_NAME, READS, CachePlace
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.stored_model import StoredCheckpoint, header_at, is_stored

_COPIES = "moesaic-model@"
_PATTERN = re.compile(rf"(/.*?)/{_COPIES}(\d+)/([^/]+)")
# What a model consists of besides weights: one file, larger ones are others'; and all of them.
_SMALL_BYTES, _ALL_SMALL_BYTES = 200_000_000, 1_000_000_000
# Beside a copy: what is known of it.
_NOTE = ".copy"
# Characters of a long name that are left of it.
_SHOWN = 100


def copies_folder(url: str, place: CachePlace) -> Path:
    """The folder on every node that takes copies of the files at a URL.

    Raises:
        RecipeError: it would have too long a name.
    """
    name = quote(url.rstrip("/"), safe="")
    if len(name) > LONGEST_NAME:
        raise RecipeError(f"model: {url[:80]} … is too long: at most {LONGEST_NAME} characters")
    return _copies(place, name)


def _copies(place: CachePlace, name: str) -> Path:
    return place.folder / f"{_COPIES}{place.limit_bytes}" / name


def open_checkpoint(
    folder: Path, source: ModelSource | None = None, code: bool = False
) -> Checkpoint:
    """The model in a folder, at the URL that the folder takes copies of, or in a store at one.

    Args:
        source: in a worker: of the driver's model, for nodes that do not have its folder.
        code: whether what a URL has of Python beside the model is copied, too.
    """
    if is_stored(folder):
        return StoredCheckpoint(folder)
    if found := _PATTERN.fullmatch(str(folder)):
        place = CachePlace(Path(found[1]), int(found[2]))
        small = COMPANIONS | {".py"} if code else COMPANIONS
        return RemoteCheckpoint(folder, place, Objects(unquote(found[3]), "model"), small)
    if source is None or folder != source.place.folder or source.is_here():
        return Checkpoint(folder)
    return FetchedCheckpoint(source) if source.is_needed() else ComparedCheckpoint(source)


class ComparedCheckpoint(Checkpoint):
    """A worker's own files of the driver's model, each compared before it is first read.

    Raises:
        RunError: a file is another one than the driver's; later, too.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._same: set[Path] = set()
        source.compare(CONFIG)
        super().__init__(source.place.folder)

    def _readable(self, file: Path) -> Path:
        if file not in self._same:
            self._source.compare(file.relative_to(self.path).as_posix())
            self._same.add(file)
        return file


class RemoteCheckpoint(Checkpoint):
    """A model at a URL.

    Args:
        path: folder of the copies.
        place: the cache that the folder is in.
        objects: the model's files.
        small: suffixes of those that are copied at once.

    Raises:
        UserError: as :class:`Checkpoint`; or there is no model.
        RunError: nobody answers there.
    """

    def __init__(
        self,
        path: Path,
        place: CachePlace,
        objects: Objects,
        small: Container[str] = COMPANIONS,
    ) -> None:
        self.url, self.folder, self.objects, self.small = objects.url, path, objects, small
        self.cache = cache_at(place.folder, place.limit_bytes)
        try:
            found = self.objects.listing()
        except Refusal as error:
            raise RecipeError(f"model: {error}") from None
        # A name that leads out of the folder is nobody's file.
        self.remote = {name: info for name, info in found.items() if _is_inside(name)}
        if "config.json" not in self.remote:
            raise UserError(f"{self.url}: no model folder: there is no config.json")
        for name in self._companions():
            self._copied(name, lasting=True)
        super().__init__(path)

    def _companions(self) -> list[str]:
        """Names of the files that every node has a copy of.

        Raises:
            UserError: they would fill it.
        """
        sizes = {
            name: int(info["size"])
            for name, info in self.remote.items()
            if is_companion(name, self.small) and info["size"] <= _SMALL_BYTES
        }
        if (total := sum(sizes.values())) > _ALL_SMALL_BYTES:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            raise UserError(
                f"{self.url}: the files beside the weights have {total:,} bytes, limit"
                f" {_ALL_SMALL_BYTES:,} bytes: keep what is not the model's elsewhere (largest:"
                f" {shown(', '.join(largest))})"
            )
        return list(sizes)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _is_there(self, file: Path) -> bool:
        return self._name(file) in self.remote

    def _header(self, file: Path) -> dict[str, Entry]:
        name = self._name(file)
        return header_at(self.objects, name, int(self.remote[name]["size"]), file)

    def _readable(self, file: Path) -> Path:
        return self._copied(self._name(file))

    @property
    def file_bytes(self) -> int:
        return sum(int(self.remote[self._name(file)]["size"]) for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """As that of the same files in a local folder."""
        digest = hashlib.blake2b(digest_size=16)
        for file in [self.folder / "config.json", *self.files]:
            name = self._name(file)
            known = self._note(name) or {}
            if known.get("version") != version_of(self.remote[name]):
                self._copied(name)
                known = self._note(name) or {}
            digest.update(json.dumps([file.name, known["digest"]]).encode())
            self.cache.release()  # or the whole model would have to fit
        return digest.hexdigest()

    def _note(self, name: str) -> dict[str, Any] | None:
        """What was written down of a copy; None where there is nothing, or it was altered."""
        try:
            found = json.loads((self.folder / f"{name}{_NOTE}").read_bytes())
            return found if {"version", "size", "digest"} <= found.keys() else None
        except (FileNotFoundError, ValueError, AttributeError):
            return None

    def _copied(self, name: str, lasting: bool = False) -> Path:
        """The copy of a file, made if it is not there; in use until pins are released.

        Args:
            lasting: for as long as the process lives: transformers opens it when it likes.
        """
        path, info = self.folder / name, self.remote[name]
        self.cache.pin(path, lasting)
        if self._is_whole(path, self._note(name), info):
            self.cache.used(path)
            self.cache.used(path.with_name(f"{path.name}{_NOTE}"))
            return path
        for _ in range(READS):
            with self.cache.fetching(path, int(info["size"])) as begins:
                # Another process may have fetched it meanwhile.
                if self._is_whole(path, self._note(name), info):
                    return path
                if self._downloaded(name, path, info, begins):
                    return path
        raise RunError(
            f"{self.url}/{name}: has {info['size']:,} bytes, of which {READS} times not all came;"
            " run the same command again"
        )

    def _is_whole(
        self, path: Path, note: Mapping[str, Any] | None, info: Mapping[str, Any]
    ) -> bool:
        if note is None or note["version"] != version_of(info):
            return False
        with contextlib.suppress(FileNotFoundError):
            whole = (
                path.stat().st_size == note["size"]
                and file_digest(path, own=True) == note["digest"]
            )
            return bool(whole)
        return False

    def _downloaded(
        self, name: str, path: Path, info: Mapping[str, Any], begins: Callable[[], None]
    ) -> bool:
        """Whether all of a file came; only then is it kept."""
        self.cache.make_room(int(info["size"]))
        with self.cache.writing(path) as temporary:
            try:
                self.objects.download(name, temporary, int(info["size"]), begins)
            except FileNotFoundError:
                text = f"{self.url}/{name}: was removed while the model was read"
                raise RunError(text) from None
            except OtherSizeError:
                raise RunError(f"{self.url}/{name}: changed while the model was read") from None
            begins()  # as much as an attempt may take
            after = self.objects.info(name)
            if after is None or version_of(after) != version_of(info):
                raise RunError(f"{self.url}/{name}: changed while the model was read")
            if temporary.stat().st_size != info["size"]:
                return False
            temporary.replace(path)
            note = {
                "version": version_of(info),
                "size": info["size"],
                "digest": file_digest(path, own=True),
            }
        note_path = path.with_name(f"{path.name}{_NOTE}")
        with self.cache.writing(note_path) as temporary:
            temporary.write_text(json.dumps(note), encoding="utf-8")
            temporary.replace(note_path)
        return True


class FetchedCheckpoint(RemoteCheckpoint):
    """The driver's model, copied from its node."""

    def __init__(self, source: ModelSource) -> None:
        place, url = source.place.cache, source.url
        # A name that fits, however long the folder's is.
        name = f"{quote(url, safe='')[:_SHOWN]}-{digest(url)}"
        small = COMPANIONS | {".py"}  # which is only offered where it belongs to the model
        super().__init__(
            _copies(place, name), place, Objects(url, "model", DriverFiles(source)), small
        )


def _is_inside(name: str) -> bool:
    """Whether a name stays in the folder that it is put into."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)
