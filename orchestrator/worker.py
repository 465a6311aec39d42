"""What runs inside a Ray actor: a process that keeps what is expensive to load."""

import importlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


class WorkerState:
    """Kept between calls: the skeleton of the model, and what functions put into ``cache``.

    ``cache`` is bounded: the entry used longest ago goes first. Everything in it can be made again
    from files.
    """

    def __init__(self, cpus: int) -> None:
        import torch

        torch.set_num_threads(cpus)
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._models: dict[tuple[str, str, bool], Any] = {}
        self._cache: OrderedDict[Any, Any] = OrderedDict()

    def model(self, path: str, dtype: str, trust_remote_code: bool) -> Any:
        """The :class:`StreamedModel` at ``path``, opened once."""
        import torch

        from moesaic.orchestrator.checkpoint import Checkpoint
        from moesaic.orchestrator.streaming import StreamedModel

        key = (path, dtype, trust_remote_code)
        if key not in self._models:
            self._models.clear()
            self._models[key] = StreamedModel(
                Checkpoint(Path(path)),
                dtype=None if dtype == "auto" else getattr(torch, dtype),
                device=self.device,
                trust_remote_code=trust_remote_code,
            )
        return self._models[key]

    def remembered(self, key: Any, make: Callable[[], Any], limit: int) -> Any:
        """``make()``, remembered; at most ``limit`` entries share the kind ``key[0]``."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        same = [k for k in self._cache if k[0] == key[0]]
        for old in same[: max(0, len(same) - limit + 1)]:
            del self._cache[old]
        self._cache[key] = make()
        return self._cache[key]

    def take(self, key: Any) -> Any | None:
        """Removes and returns a remembered value, or None."""
        return self._cache.pop(key, None)

    def put(self, key: Any, value: Any) -> None:
        self._cache[key] = value


class Worker:
    """The actor: calls a named function with its state."""

    def __init__(self, cpus: int) -> None:
        self.state = WorkerState(cpus)

    def ready(self) -> bool:
        return True

    def call(self, function: str, arguments: dict[str, Any]) -> Any:
        """``module:name`` of ``moesaic.orchestrator``, called with the state and ``arguments``."""
        module, _, name = function.partition(":")
        target = getattr(importlib.import_module(f"moesaic.orchestrator.{module}"), name)
        return target(self.state, **arguments)


def peak_memory_bytes() -> int:
    """Largest resident size that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident size of this process now."""
    return int(psutil.Process().memory_info().rss)
