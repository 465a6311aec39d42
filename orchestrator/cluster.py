"""Joining a Ray cluster, or starting Ray on this machine; what to say where that fails."""

import functools
import logging
import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._private import parameter, ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.exceptions import AuthenticationError, RayError

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.head import ask, interruptible
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.runlog import from_worker

_CONNECT_SECONDS = 10.0
# What Ray says where no token, or another one, was sent.
_TOKEN_WORDS = ("authentication token", "unauthenticated", "auth token")


def connect(compute: Compute) -> bool:
    """Joins the cluster the recipe or RAY_ADDRESS names, or starts Ray on this machine.

    Returns:
        whether a local Ray was started (and should be stopped at the end).

    Raises:
        RunError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    key, address = cluster_address(compute)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if not address:
            start_local()
            return True
        try_address(address)
        with _own_sigterm():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
        _collect_lines()
        return False
    except (OSError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if not address:
            reason = reason[:300].rstrip(".")
            raise RunError(f"Ray could not be started on this machine: {reason}") from error
        raise RunError(f"{key}: the Ray cluster at {address} {refusal(key, error)}") from error


def refusal(key: str, error: BaseException) -> str:
    """Why a cluster could not be joined, and what to do about it."""
    text = " ".join(redacted(str(error)).split())
    found = re.findall(r"Ray: (\S+) Python: (\S+)", text)
    if "Version mismatch" in text and len(found) == 2:
        (ray_there, python_there), (ray_here, python_here) = found
        return (
            f"runs Ray {ray_there} on Python {python_there}, this process has Ray {ray_here} on"
            f" Python {python_here}: use the same versions on all machines"
        )
    if _is_about_tokens(error):
        return (
            "refuses the token of this process: set RAY_AUTH_MODE=token, and put the cluster's"
            " token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    reason = text[:300].rstrip(".")
    return (
        f"cannot be reached ({reason}): start it (ray start --head), correct {key}, or leave it"
        " out to use this machine alone"
    )


def _is_about_tokens(error: BaseException) -> bool:
    """Whether a failure, or one that it comes from, is that of a token."""
    found: BaseException | None = error
    while found is not None:
        text = " ".join(str(found).split()).lower()
        if isinstance(found, AuthenticationError) or any(w in text for w in _TOKEN_WORDS):
            return True
        found = found.__cause__ or found.__context__
    return False


def cluster_address(compute: Compute) -> tuple[str, str | None]:
    """Where the address of a cluster was given, and the address; None for a Ray of our own."""
    key, address = "compute.address", compute.address
    if not address:
        key, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    return key, None if address in ("", "local") else address


def processor_only(compute: Compute) -> bool:
    """Whether all the work is done by the processor of this machine."""
    gpus = compute.gpus_per_worker != 0 and torch.cuda.device_count() > 0
    return not gpus and cluster_address(compute)[1] is None


def has_16_bit_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def start_local(**options: Any) -> None:
    """Starts Ray for this process alone; all of it listens on 127.0.0.1.

    Args:
        options: more of ``ray.init``.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": True}
    with _loopback_only(), _frugal(), _own_sigterm():
        ray.init(address="local", **quiet, **options)
    _collect_lines()


def end_local() -> None:
    """Ends the processes of a Ray of our own whose head is gone; ``ray.shutdown`` would ask it."""
    node = ray._private.worker._global_node
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def _collect_lines() -> None:
    """What workers print goes into the log, and what Ray tells of nodes and workers that died.

    Ray would print it between our lines, and on stdout, where the result is.
    """
    for name in ("ray_print_logs", "moesaic"):
        global_worker_stdstream_dispatcher.remove_handler(name)
    global_worker_stdstream_dispatcher.add_handler("moesaic", from_worker)
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: from_worker(data)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's switch for machines without clusters, in this process and those it starts meanwhile.

    Ray reads it from the environment when it is imported, and somebody may have done that already.
    Afterwards all is as before: who joins a cluster must not have it. What the user set counts for
    clusters alone, for here nobody is asked for a token.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, clusters = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _frugal() -> Iterator[None]:
    """What ``ray.init`` has no options for: Ray's agent takes a free port, and nothing looks for
    more machines.

    Beside another Ray on this machine the agent would try for its usual port, and everything wait,
    for four seconds. The autoscaler's process would take a second of a core.
    """
    made = parameter.RayParams
    parameter.RayParams = functools.partial(made, dashboard_agent_listen_port=0, no_monitor=True)
    try:
        yield
    finally:
        parameter.RayParams = made


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM; Ray puts two of its own over it.

    The first exits as soon as it can, the second prints a stack of C++ and aborts.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def try_address(address: str) -> None:
    """Asks whether a cluster answers; Ray itself would try for minutes and print its own.

    Args:
        address: ``HOST:PORT``, ``ray://HOST:PORT`` (where only a listener is looked for; Ray waits
            half a minute for more) or ``auto``.

    Raises:
        OSError: nobody is there, or does not answer in time.
        AuthenticationError: it wants a token, or another one.
    """
    if address == "auto":
        address = services.canonicalize_bootstrap_address(address) or ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        if not address.startswith("ray://"):
            ask(address)


def place(compute: Compute) -> str:
    """Where the cluster is, for people."""
    address = cluster_address(compute)[1]
    if address == "auto":
        return f"{ray.get_runtime_context().gcs_address} (auto)"
    return address or "this machine"


def free() -> str:
    """What nobody uses at the moment."""
    free = interruptible(ray.available_resources)
    total = interruptible(ray.cluster_resources)
    parts = [f"{free.get(n, 0):g} of {total.get(n, 0):g} {n}" for n in ("CPU", "GPU")]
    return f"free now: {', '.join(parts)}"
