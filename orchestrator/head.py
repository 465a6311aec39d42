"""The head of a Ray cluster: whether it answers, and what becomes of a run when it no longer does.

Ray itself waits for a head that takes connections and never answers for a quarter of an hour, and
says nothing. A driver whose head is gone it ends after a minute, in the middle of whatever that is
at: no line in the log, and a run that MLflow takes for running for ever. So the head is asked
before Ray is, with a bound, and again and again while the run lasts.

Asking is Ray's own call for it (``CheckAlive`` of its control service, GCS), on a channel made as
Ray makes its own (TLS, tokens).
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.process import NoAnswer, answered

T = TypeVar("T")

# Who joins a cluster says so after the first, and gives up after the second.
_SILENT_SECONDS, _JOIN_SECONDS = 3.0, 15.0
# After how long without its head Ray ends a process, by default and if the user says so.
_RAY_SECONDS, _RAY_VARIABLE = 60.0, "RAY_gcs_rpc_server_reconnect_timeout_s"
# Shares of that after which the run is told to stop, and after which it is ended if it did not.
_STOP, _END = 0.6, 0.85
# That any call of Ray's may take, at least.
_CALL_SECONDS = 120.0
_ASK_SECONDS, _BETWEEN_SECONDS, _TELL_SECONDS = 5.0, 2.0, 10.0
# By default this signal does nothing, and nothing else in a run has a use for it.
_SIGNAL = signal.SIGURG


def ask(address: str) -> None:
    """Returns when the head answers.

    Args:
        address: ``HOST:PORT`` of the head.

    Raises:
        OSError: nobody is there, or does not answer in time.
        AuthenticationError: it wants a token, or another one.
    """
    channel = _channel(address)
    try:
        answer = _asked(channel, _JOIN_SECONDS)
        try:
            answer.result(timeout=_SILENT_SECONDS)
        except grpc.FutureTimeoutError:
            stderr.print(f"waiting for the Ray cluster at {address} to answer", markup=False)
            answer.result()
    except grpc.RpcError as error:
        code, text = error.code(), str(error.details())
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(f"connected, but no answer within {_JOIN_SECONDS:g} s") from error
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise AuthenticationError(text) from error
        if code == grpc.StatusCode.UNAVAILABLE:
            raise ConnectionError(text) from error
        # Somebody answers; what is wrong with them Ray can say better.
    finally:
        channel.close()


def _channel(address: str) -> Any:
    """As Ray makes its own, but one that tries again every second: gRPC would pause for minutes."""
    options = [*GLOBAL_GRPC_OPTIONS, ("grpc.max_reconnect_backoff_ms", 1000)]
    return init_grpc_channel(address, options=options)


def _asked(channel: Any, seconds: float) -> Any:
    """The answer that is to come."""
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    return stub.CheckAlive.future(gcs_service_pb2.CheckAliveRequest(), timeout=seconds)


def interruptible(call: Callable[[], T]) -> T:
    """``call()`` of Ray's, on a thread: where it waits for a head that is gone, no signal gets
    through.

    Raises:
        RunError: the watch, if there is one, should have ended the run long ago.
    """
    seconds = max(_CALL_SECONDS, 2 * _ray_seconds())
    try:
        return answered(call, seconds)
    except NoAnswer as error:
        raise RunError(
            f"Ray gave no answer within {seconds:.0f} s; finished work is kept: see whether its"
            " head is there, and run the same command again"
        ) from error


def _ray_seconds() -> float:
    return float(os.environ.get(_RAY_VARIABLE) or _RAY_SECONDS)


class Watch:
    """Asks the head every few seconds, and stops the run before Ray ends the process.

    The main thread gets a :class:`KeyboardInterrupt` wherever it is (it is the only exception that
    passes through Ray); who has the watch looks at :attr:`lost` then. If it does not come out of
    something in time, the process ends from here, with the same line.

    Args:
        place: where the head is, for people.

    Attributes:
        lost: whether the run was told to stop.
    """

    def __init__(self, address: str, place: str) -> None:
        self.lost = False
        self._address, self._place = address, place
        limit = _ray_seconds()
        self._stop_after, self._end_after = _STOP * limit, _END * limit
        self._within = min(_ASK_SECONDS, limit / 10)
        self._between = min(_BETWEEN_SECONDS, limit / 10)
        self._channel = _channel(address)
        self._over = threading.Event()
        self._before = signal.signal(_SIGNAL, self._interrupt)
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="head")
        self._thread.start()

    @property
    def line(self) -> str:
        """What is told when the head is gone."""
        return (
            f"the head of Ray at {self._place} does not answer any more; finished work is kept:"
            " run the same command again"
        )

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()
        self._thread.join()
        self._channel.close()
        signal.signal(_SIGNAL, self._before or signal.SIG_DFL)
        if self.lost:
            atexit.unregister(ray.shutdown)  # it would ask the head for seconds

    def _watch(self) -> None:
        silent, told = 0.0, False
        while not self._over.wait(self._between):
            began = time.monotonic()
            if not self._joined():
                return  # somebody left the cluster without us
            if self._answers():
                if told and not self.lost:
                    stderr.print(f"the head of Ray at {self._place} answers again", markup=False)
                silent, told = 0.0, False
                continue
            # A machine that slept did not ask meanwhile.
            silent += min(time.monotonic() - began, 2 * self._within) + self._between
            if silent > _TELL_SECONDS and not told:
                told = True
                stderr.print(f"waiting for the head of Ray at {self._place}", markup=False)
            if silent > self._end_after:
                self._end()
            if silent > self._stop_after and not self.lost:
                self.lost = True
                signal.pthread_kill(self._main, _SIGNAL)

    def _joined(self) -> bool:
        """Whether this process still is part of the cluster."""
        if not ray.is_initialized():
            return False
        return bool(ray.get_runtime_context().gcs_address == self._address)

    def _answers(self) -> bool:
        try:
            _asked(self._channel, self._within).result()
        except grpc.RpcError as error:
            gone = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
            return error.code() not in gone
        return True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.lost and not self._over.is_set():
            raise KeyboardInterrupt(self.line)

    def _end(self) -> None:
        """Ends the process; what it was in the middle of is done again by the next start."""
        stderr.print(f"failed: {self.line}", markup=False)
        sys.stdout.flush()
        os._exit(1)


def watch_head(place: str) -> Watch | None:
    """A watch over the cluster that this process is part of; None where it cannot be had.

    That is behind a ``ray://`` proxy, which tells of a lost head itself, and outside of the main
    thread, which alone may have signals.
    """
    if ray.util.client.ray.is_connected():
        return None
    if threading.current_thread() is not threading.main_thread():
        return None
    return Watch(ray.get_runtime_context().gcs_address, place)
