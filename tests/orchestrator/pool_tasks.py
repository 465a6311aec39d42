"""Functions that the tests of the pool let workers call."""

import logging
import os
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import ray

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.worker import WorkerState


def note(state: WorkerState, file: str, text: str, seconds: float = 0.0) -> tuple[str, int]:
    """Appends a line to a file; returns it with the worker's process."""
    time.sleep(seconds)
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(f"{text}\n")
    return text, os.getpid()


def speak(state: WorkerState) -> None:
    """Prints, warns and logs."""
    print("printed by a worker", flush=True)
    warnings.warn("warned by a worker", stacklevel=1)
    logging.getLogger("somewhere").warning("logged by a worker")


def betray(state: WorkerState, name: str, value: str) -> None:
    """Prints, in pieces, and raises what its own environment says is secret."""
    os.environ[name] = value
    print("it is", value, "here", flush=True)
    logging.getLogger("somewhere").warning("known: %s", value)
    raise ValueError(f"wrong: {value}")


def remember(state: WorkerState, value: int) -> int:
    """Keeps a value in the worker; returns the process."""
    state.put("value", value)
    return os.getpid()


def recall(state: WorkerState) -> Any:
    """What :func:`remember` kept."""
    return state.take("value")


def die(state: WorkerState, file: str, times: int) -> int:
    """Kills its own process the first ``times`` times."""
    path = Path(file)
    died = len(path.read_text()) if path.exists() else 0
    if died < times:
        path.write_text("x" * (died + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return died


def blame(state: WorkerState) -> None:
    """The user did something wrong."""
    raise UserError("recipe.yaml: model: tensor x has NaN values")


def fail(state: WorkerState) -> None:
    """A mistake of our own."""
    raise ValueError("shapes do not fit")


def environment(state: WorkerState, name: str) -> str | None:
    """An environment variable of the worker."""
    return os.environ.get(name)


def gorge(state: WorkerState, file: str, more_bytes: int) -> None:
    """Fills memory that it may not have: beyond a limit that is set for its process."""
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()}\n")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes // 2, before[1]))
    try:
        bytearray(more_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def host(state: WorkerState, seconds: float) -> str:
    """The node that the worker is on."""
    time.sleep(seconds)
    node: str = ray.get_runtime_context().get_node_id()
    return node


def weights(state: WorkerState, model: str) -> dict[str, Any]:
    """Sums of all tensors of a model, where its files are on this node, and who says so."""
    checkpoint = state.open(model, "float32", False).checkpoint
    sums = {name: float(checkpoint.read(name).double().sum()) for name in checkpoint.names()}
    node = ray.get_runtime_context().get_node_id()
    return {"sums": sums, "path": str(checkpoint.path), "node": node}
