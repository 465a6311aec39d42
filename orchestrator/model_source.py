"""A model folder that only the driver's node has: the others read it through Ray.

A *source* is an actor on the driver's node that reads parts of the folder's files. Workers of nodes
without the folder keep copies of what they need, as of a model at a URL (see
:mod:`moesaic.orchestrator.remote_model`); to them the source is one more place that files come
from. A node that has the files reads its own, and each of them is compared with the driver's before
it is first read: what is measured must be of one model. Files of a shared folder are known by their
inode and time, others are read once for their digest.

Ray's object store holds no more than two small parts per reader at a time. The source ends with the
driver; Ray starts it anew where it dies earlier.
"""

import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ray
from fsspec import AbstractFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moesaic.orchestrator.companions import COMPANIONS
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.process import SLEEPING_THREADS
from moesaic.orchestrator.shared import CachePlace

CONFIG = "config.json"
# One answer, and how many of them are under way for one file.
_PART_BYTES, _PARTS = 2 << 20, 2
_ANSWER_SECONDS = 60.0
_READERS = 8


@dataclass(frozen=True)
class ModelPlace:
    """Where a run's model is.

    Attributes:
        folder: of the driver's node.
        cache: where other nodes keep copies.
        weights: names of its files of weights.
        code: whether what the model's folder has of Python belongs to it.
    """

    folder: Path
    cache: CachePlace
    weights: Sequence[str]
    code: bool = False


@dataclass(frozen=True)
class ModelSource:
    """What workers know of the driver's model.

    Attributes:
        place: where it is.
        host: name of the driver's machine.
        node: id of its node.
        files: name → what is known of it, as of a file at a URL; of weights and configuration
            their digests, too.
        actor: reads the files.
    """

    place: ModelPlace
    host: str
    node: str
    files: Mapping[str, Mapping[str, Any]]
    actor: Any

    @property
    def url(self) -> str:
        """Names the folder in errors, and the copies."""
        return f"driver://{self.host}{self.place.folder}"

    def is_here(self) -> bool:
        """Whether this node, that of a worker, is the driver's."""
        return bool(ray.get_runtime_context().get_node_id() == self.node)

    def is_needed(self) -> bool:
        """Whether this node has to fetch the model.

        Raises:
            RunError: its files are others, as far as their sizes tell.
        """
        if self.is_here():
            return False
        own = {}
        for name in (CONFIG, *self.place.weights):
            try:
                own[name] = os.stat(self.place.folder / name).st_size
            except OSError:
                return True
        for name, size in own.items():
            if size != self.files[name]["size"]:
                raise self._other(name)
        return False

    def compare(self, name: str) -> None:
        """Compares this node's file of weights, or configuration, with the driver's.

        Raises:
            RunError: it is another one.
        """
        path, there = self.place.folder / name, self.files[name]
        own = _about(path)
        if (own["size"], own["ETag"]) == (there["size"], there["ETag"]):
            return  # the same one, in a shared folder
        if own["size"] != there["size"] or file_digest(path) != there["digest"]:
            raise self._other(name)

    def _other(self, name: str) -> RunError:
        return RunError(
            f"{self.place.folder / name}: is another file on node {socket.gethostname()} than on"
            f" the driver's ({self.host}): give all nodes the same, or remove it there, to have it"
            " fetched"
        )

    def close(self) -> None:
        """Ends the actor."""
        ray.kill(self.actor)


def offer_model(place: ModelPlace) -> ModelSource | None:
    """Offers the driver's model to the workers of the cluster that it has joined.

    Returns:
        None where the driver is no part of the cluster (``ray://``): no actor could be beside it.
    """
    if ray.util.client.ray.is_connected():
        return None
    node, files = ray.get_runtime_context().get_node_id(), model_files(place)
    environment = {**SLEEPING_THREADS, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    actor = (
        ray.remote(FolderReader)
        .options(
            num_cpus=0,
            max_concurrency=_READERS,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": environment},
        )
        .remote(place.folder, list(files))
    )
    return ModelSource(place, socket.gethostname(), node, files, actor)


def model_files(place: ModelPlace) -> dict[str, dict[str, Any]]:
    """What belongs to a model in its folder, by name; see :attr:`ModelSource.files`.

    Others may write there, too: runs, for instance.
    """
    suffixes = COMPANIONS | ({".py"} if place.code else set())
    small = [path.name for path in place.folder.iterdir() if path.suffix in suffixes]
    found = {name: _about(place.folder / name) for name in sorted({*small, *place.weights})}
    for name in (CONFIG, *place.weights):
        found[name]["digest"] = file_digest(place.folder / name)
    return found


def _about(file: Path) -> dict[str, Any]:
    state = file.stat()
    return {
        "name": file.name,
        "type": "file",
        "size": state.st_size,
        "ETag": f"{state.st_mtime_ns:x}-{state.st_ino:x}",
    }


class FolderReader:
    """The actor: reads files of one folder.

    Args:
        folder: that they are in.
        names: of those that may be read.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, frozenset(names)

    def _file(self, name: str) -> Path:
        if name not in self.names:
            raise FileNotFoundError(2, "no file of the model", name)
        return self.folder / name

    def about(self, name: str) -> dict[str, Any]:
        """What is known of a file now. Raises FileNotFoundError."""
        return _about(self._file(name))

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` … ``stop - 1`` of a file, fewer where it ends."""
        with open(self._file(name), "rb") as stream:
            stream.seek(start)
            return stream.read(max(0, stop - start))


class DriverFiles(AbstractFileSystem):  # type: ignore[misc]
    """The files of a source, as :class:`~moesaic.orchestrator.objects.Objects` asks for them."""

    protocol = "driver"
    cachable = False

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.source = source

    def _name(self, path: str) -> str:
        return path.lstrip("/")

    def find(self, path: str, **_: Any) -> dict[str, Mapping[str, Any]]:
        """All files, as the driver found them at its start."""
        return {f"/{name}": about for name, about in self.source.files.items()}

    def info(self, path: str, **_: Any) -> Mapping[str, Any]:
        """What is known of a file now."""
        found: Mapping[str, Any] = self._answer(self.source.actor.about.remote(self._name(path)))
        return found

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a small file, or a few of a larger one."""
        stop = self.info(path)["size"] if end is None else end
        part = self.source.actor.part.remote(self._name(path), start or 0, stop)
        found: bytes = self._answer(part)
        return found

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copies a file to ``lpath``."""
        size, name = self.info(rpath)["size"], self._name(rpath)
        starts = iter(range(0, size, _PART_BYTES))
        with open(lpath, "wb") as stream:
            self._copy(name, starts, stream)

    def _copy(self, name: str, starts: Any, stream: IO[bytes]) -> None:
        under_way: deque[Any] = deque()
        while True:
            while len(under_way) < _PARTS and (start := next(starts, None)) is not None:
                part = self.source.actor.part.remote(name, start, start + _PART_BYTES)
                under_way.append(part)
            if not under_way:
                return
            stream.write(self._answer(under_way.popleft()))

    def _answer(self, handle: Any) -> Any:
        return ray.get(handle, timeout=_ANSWER_SECONDS)
