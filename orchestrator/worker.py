"""What runs inside a Ray actor: a process that keeps what is expensive to load."""

import gc
import importlib
import socket
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.orchestrator.process import collect_rarely
from moesaic.orchestrator.redaction import clean_error, clean_streams

if TYPE_CHECKING:
    from moesaic.orchestrator.model_source import ModelSource


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as keyword arguments for a function that a worker calls."""
    return asdict(value)


class WorkerState:
    """Kept between calls: the skeleton of the model, and what functions put aside for later ones.

    Everything put aside can be made again from files.

    Args:
        cpus: threads.
        gpus: that the worker was given.
        beside: workers that its node has room for, itself included.
        memory_bytes: what the recipe lets a worker take of its device; None for what there is.
        source: of the driver's model, for nodes that do not have its folder.
    """

    def __init__(
        self,
        cpus: int,
        gpus: float = 0.0,
        beside: int = 1,
        memory_bytes: int | None = None,
        source: "ModelSource | None" = None,
    ) -> None:
        import torch

        torch.set_num_threads(cpus)
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpus, self.beside, self.memory_bytes = gpus, beside, memory_bytes
        self.source = source
        self._models: dict[tuple[str, str, bool], Any] = {}
        self._cache: dict[Any, Any] = {}

    def model(self, path: str, dtype: str, trust_remote_code: bool) -> Any:
        """The :class:`StreamedModel` at ``path``, opened once; the one before is let go."""
        key = (path, dtype, trust_remote_code)
        if key not in self._models:
            self._models.clear()
            self._models[key] = self.open(*key)
        return self._models[key]

    def open(self, path: str, dtype: str, trust_remote_code: bool) -> Any:
        """The :class:`StreamedModel` at ``path``, opened anew for who keeps it."""
        from moesaic.orchestrator.remote_model import open_checkpoint
        from moesaic.orchestrator.streaming import StreamedModel, dtype_named

        checkpoint = open_checkpoint(Path(path), self.source, trust_remote_code)
        return StreamedModel(checkpoint, dtype_named(dtype), self.device, trust_remote_code)

    @property
    def room(self) -> int:
        """Bytes of the device that a block may take; see :mod:`moesaic.orchestrator.room`."""
        from moesaic.orchestrator.room import own_room

        return own_room(self.device, self.gpus, self.beside, self.memory_bytes)

    def take(self, key: Any) -> Any | None:
        """Removes and returns what :meth:`put` kept, or None."""
        return self._cache.pop(key, None)

    def put(self, key: Any, value: Any) -> None:
        self._cache[key] = value

    def discard(self, wanted: Callable[[Any], bool]) -> None:
        """Lets go of what :meth:`put` kept under keys that ``wanted`` says True of."""
        for key in [key for key in self._cache if wanted(key)]:
            del self._cache[key]

    def forget(self) -> None:
        """Lets go of everything."""
        self._cache.clear()
        self._models.clear()


class Worker:
    """The actor: calls a named function with its state."""

    def __init__(self, *given: Any) -> None:
        collect_rarely()
        clean_streams()
        self.state = WorkerState(*given)

    def ready(self) -> dict[str, Any]:
        """Who answers: the node's id and host, whether it fetches the driver's model, and what is
        installed there.

        Raises:
            RunError: it has another model in the same folder.
        """
        import ray

        own, source = ray.get_runtime_context().get_node_id(), self.state.source
        fetches = source is not None and source.is_needed()
        return {"node": own, "host": socket.gethostname(), "fetches": fetches, **installed()}

    def forget(self) -> None:
        """Makes room in memory for a task on another worker of the node."""
        self.state.forget()
        gc.collect()

    def call(self, function: str, arguments: dict[str, Any]) -> Any:
        """``module:name``, called with the state and ``arguments``.

        A module without a dot is one of ``moesaic.orchestrator``.
        """
        from moesaic.orchestrator.cache import release_pins

        try:
            return resolve(function)(self.state, **arguments)
        except Exception as error:
            clean_error(error)
            raise
        finally:
            release_pins()


def installed() -> dict[str, str]:
    """Versions of the package and of what decides about numbers, and digest of the sources."""
    from moesaic.orchestrator.store import code_digest

    return {
        "moesaic": version("moesaic"),
        "code": code_digest("kernels", "methods", "orchestrator"),
        # What it was built for may differ: the driver needs no GPU.
        "torch": version("torch").partition("+")[0],
        "transformers": version("transformers"),
    }


def resolve(function: str) -> Callable[..., Any]:
    """The function that ``module:name`` names."""
    module, _, name = function.partition(":")
    path = module if "." in module else f"moesaic.orchestrator.{module}"
    target: Callable[..., Any] = getattr(importlib.import_module(path), name)
    return target


def peak_memory_bytes() -> int:
    """Largest resident size that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
