"""How the processes of a run are set up: the driver, its workers, and the one that verifies."""

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NoReturn, TextIO, TypeVar

T = TypeVar("T")


class NoAnswer(TimeoutError):
    """What was asked for took longer than it may."""


# Threads that sleep instead of spinning: with another process busy, spinning threads make a
# process several times slower.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def collect_rarely() -> None:
    """Has Python look for garbage in cycles less often.

    Importing torch and transformers makes millions of objects that stay; looking through them every
    700 takes a fifth of the time. Large things in cycles are collected by name where they end.
    """
    gc.set_threshold(20_000, 20, 20)


def open_streams() -> None:
    """Has the standard streams lead nowhere that whoever started the process has closed: the next
    file to be opened would take the number, and get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def lead_nowhere(stream: TextIO) -> None:
    """Has whatever is still written into a standard stream, by whomever, vanish."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


def answered(call: Callable[[], T], seconds: float) -> T:
    """``call()`` on a thread of its own, so that signals get through, for so many seconds.

    Raises:
        NoAnswer: it takes longer; the thread goes on, and does not keep the process from ending.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # also who interrupts, for the one that waits
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # just so, or the call's own
            return answer.result()
        raise NoAnswer(f"no answer within {seconds:g} s") from None


def leave(status: int) -> NoReturn:
    """Ends the process once everything is written and all that asked for it is told.

    Taking thousands of modules apart object by object, as Python would, takes up to two seconds.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
            stream.flush()
    os._exit(status)
