"""A model folder that only the driver's node has: the others read it through Ray.

A *source* is an actor on the driver's node that reads parts of the folder's files. Workers of nodes
without the folder keep copies of what they need, as of a model at a URL (see
:mod:`moesaic.orchestrator.remote_model`); to them the source is one more place that files come
from. A node that has the folder reads its own, once names, sizes and samples of the content were
compared: what is measured must be of one model.

Ray's object store holds no more than two parts per reader at a time. The source ends with the
driver; Ray starts it anew where it dies earlier.
"""

import hashlib
import os
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import ray
from fsspec import AbstractFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.process import SLEEPING_THREADS
from moesaic.orchestrator.shared import CachePlace

# What a model consists of; as for models of the hub, no code.
SMALL_FILES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab"})
WEIGHTS = ".safetensors"
# One answer, and how many of them are under way for one file.
_PART_BYTES, _PARTS = 8 << 20, 2
_ANSWER_SECONDS = 60.0
_READERS = 8
# Of a file that two nodes have.
_SAMPLES, _SAMPLE_BYTES = 5, 1 << 16


@dataclass(frozen=True)
class ModelPlace:
    """Where a run's model is.

    Attributes:
        folder: of the driver's node.
        cache: where other nodes keep copies.
    """

    folder: Path
    cache: CachePlace


@dataclass(frozen=True)
class ModelSource:
    """What workers know of the driver's model.

    Attributes:
        place: where it is.
        host: name of the driver's machine.
        node: id of its node.
        files: name → what is known of it, as of a file at a URL, and ``sample``: a digest of parts.
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

    def is_needed(self) -> bool:
        """Whether this node, that of a worker, has to fetch the model.

        Raises:
            RunError: it has another one in the same folder.
        """
        if ray.get_runtime_context().get_node_id() == self.node:
            return False
        own = {}
        for name in self.files:
            try:
                own[name] = _about(self.place.folder / name)
            except OSError:
                return True
        for name, about in own.items():
            there = self.files[name]
            if about["size"] != there["size"]:
                raise self._other(name, f"{about['size']:,} bytes, not {there['size']:,}")
            if _sample(self.place.folder / name, about["size"]) != there["sample"]:
                raise self._other(name, f"the same {about['size']:,} bytes in number only")
        return False

    def _other(self, name: str, what: str) -> RunError:
        return RunError(
            f"{self.place.folder / name}: is another file on node {socket.gethostname()} ({what})"
            f" than on the driver's ({self.host}): remove the folder there, or give all nodes the"
            " same"
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
    node = ray.get_runtime_context().get_node_id()
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
        .remote(place.folder)
    )
    return ModelSource(place, socket.gethostname(), node, model_files(place.folder), actor)


def model_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a model folder, by name; see :attr:`ModelSource.files`."""
    found = {}
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(at) / name for name in names):
            name = file.relative_to(folder).as_posix()
            if _is_of_model(name) and file.is_file():
                about = _about(file)
                found[name] = {**about, "sample": _sample(file, about["size"])}
    return found


def _is_of_model(name: str) -> bool:
    pure = PurePosixPath(name)
    return (
        pure.suffix in SMALL_FILES | {WEIGHTS}
        and not pure.is_absolute()
        and not any(part == ".." or part.startswith(".") for part in pure.parts)
    )


def _about(file: Path) -> dict[str, Any]:
    state = file.stat()
    return {
        "name": file.name,
        "type": "file",
        "size": state.st_size,
        "ETag": f"{state.st_mtime_ns:x}-{state.st_ino:x}",
    }


def _sample(file: Path, size: int) -> str:
    """Digest of some parts of a file, spread evenly over all of it; of all where it is small."""
    found = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()


class FolderReader:
    """The actor: reads the files of one model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, name: str) -> Path:
        if not _is_of_model(name):
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
