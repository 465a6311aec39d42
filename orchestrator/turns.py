"""Locks that processes of a node hold in turn, and whose files say who holds them.

A lock belongs to an open file, so it ends with its process, and threads of one process exclude each
other as processes do. Its file says which process of which host holds it (several may share the
folder), for how many seconds that may show no sign of life, and what for. The time of the file's
last change is the last sign of life. Who waits gives up when there was none for so long, because
the holder hangs or is suspended.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from moesaic.orchestrator.errors import RunError, UserError

_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.001, 0.1
_LONGEST_LINE = 10_000
# What file systems say that have no locks, or whose servers have none.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def turn(
    file: Path, seconds: float, what: str, advice: str, elsewhere: str
) -> Iterator[Callable[[], None]]:
    """Alone among all who take the lock of a file; made if it is not there.

    Args:
        seconds: that this holder may show no sign of life.
        what: it has done for so long, where it hangs.
        advice: for who waited in vain.
        elsewhere: where to put the file, if its file system has no locks.

    Yields:
        shows a sign of life.

    Raises:
        RunError: another one hangs.
        UserError: there are no locks.
    """
    with file.open("a+", encoding="utf-8", errors="replace") as lock:
        try:
            _wait_for(lock, seconds, advice)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{file}: files cannot be locked there, on host {socket.gethostname()}"
                f" ({error.strerror}): {elsewhere}"
            ) from error
        try:
            lock.truncate(0)
            lock.write(f"{socket.gethostname()} {os.getpid()} {seconds} {what}")
            lock.flush()
            yield lambda: os.utime(lock.fileno())
        finally:
            with contextlib.suppress(OSError):
                lock.truncate(0)
            # Not by closing alone: a process that was forked off has the same open file.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _wait_for(lock: IO[str], seconds: float, advice: str) -> None:
    pause, seen, since = _FIRST_LOOK_SECONDS, ("", 0), time.monotonic()
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            found = lock.read(_LONGEST_LINE), os.fstat(lock.fileno()).st_mtime_ns
        if found != seen:
            seen, since = found, time.monotonic()
        host, process, allowed, what = _holder(found[0])
        if time.monotonic() - since > max(seconds, allowed):
            raise RunError(
                f"{lock.name}: process {process} of host {host} has {what} for"
                f" {max(seconds, allowed):.0f} s, and hangs or is suspended: {advice}"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_SECONDS)


def _holder(line: str) -> tuple[str, str, float, str]:
    """What a lock file says; of one that is being written, what can be said without it."""
    try:
        host, process, seconds, what = line.split(" ", 3)
        return host, process, float(seconds), what
    except ValueError:
        return "?", "?", 0.0, "held a lock"
