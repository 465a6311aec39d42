"""``RUN/log.txt``: what the driver said and what the workers of all nodes wrote, in one view.

Ray streams everything that workers print or log, warnings and crashes included, to the driver. Here
it goes into the log, each line with the node and the process that wrote it, and not between the
bars on the terminal. A worker that repeats itself is counted instead of copied, and all workers
together may write so many bytes in one run: nobody can fill a disk with warnings.

The file is appended to: an interrupted run and its resumption stand one after the other. Its last
line says how the run ended.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.foreign import printable
from moesaic.orchestrator.redaction import redacted

NAME = "log.txt"
STOPPED = "stopped; run the same command to go on from here"
_WORKER_BYTES = 4 << 20
_LINE_CHARACTERS = 1000
# What Ray puts before the lines of its autoscaler that are meant for people.
_NEWS = ":event_summary:"


class RunLog:
    """A log that is open for appending.

    Args:
        file: made if it is not there.
        worker_bytes: that workers may write in all.
    """

    def __init__(self, file: Path, worker_bytes: int = _WORKER_BYTES) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._descriptor = os.open(file, flags, 0o644)
        self._lock = threading.Lock()
        self._left = worker_bytes
        # Of each worker: its last line, and how often that came again.
        self._last: dict[str, tuple[str, int]] = {}
        self.worker_lines = 0

    def line(self, text: str) -> None:
        """What the driver says, with the time in front of it."""
        with self._lock:
            self._write(text)

    def urgent(self, text: str) -> None:
        """The same from a signal's handler, which may have interrupted :meth:`line`."""
        self._write(text)

    def from_worker(self, data: Mapping[str, Any]) -> None:
        """A batch of lines as Ray gives it: ``lines``, ``ip``, ``pid`` (or who else of Ray)."""
        who = [str(data[key]) for key in ("ip", "pid") if key in data]  # Ray's own have no address
        source, lines = f"[{' '.join(who)}]", data.get("lines", ())
        if data.get("pid") == "autoscaler":  # its report of every five seconds is no news
            lines = [x.removeprefix(_NEWS) for x in lines if x.startswith(_NEWS)]
        with self._lock:
            for line in lines:
                self._from_worker(source, str(line).rstrip())

    def _from_worker(self, source: str, line: str) -> None:
        if not line:
            return
        self.worker_lines += 1
        last, times = self._last.get(source, ("", 0))
        if line == last:
            self._last[source] = last, times + 1
            return
        self._tell_repeats(source)
        self._last[source] = line, 0
        text = f"{source} {line}"
        if self._left > 0:
            self._left -= len(text)
            self._write(text)
            if self._left <= 0:
                self._write("workers have written too much: their further lines are left out")

    def _tell_repeats(self, source: str) -> None:
        line, times = self._last.pop(source, ("", 0))
        if times and self._left > 0:
            self._write(f"{source} {times} times more: {redacted(line)[:80]}")

    def _write(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = redacted(text).splitlines() or [""]
        whole = "".join(f"{now} {printable(line)[:_LINE_CHARACTERS]}\n" for line in lines)
        # A full disk: the run meets it where it matters, and is told why it ended.
        with contextlib.suppress(OSError):
            os.write(self._descriptor, whole.encode())

    def close(self) -> None:
        with self._lock:
            for source in list(self._last):
                self._tell_repeats(source)
            os.close(self._descriptor)


_open: list[RunLog] = []


def note(text: str) -> None:
    """A line of the driver's for the log that is open, if there is one."""
    for log in _open:
        log.line(text)


def urgent(text: str) -> None:
    """As :func:`note`, from a signal's handler."""
    for log in _open:
        log.urgent(text)


def from_worker(data: Mapping[str, Any]) -> None:
    """What Ray calls with lines of workers."""
    for log in _open:
        log.from_worker(data)


@contextmanager
def run_log(folder: Path, verb: str) -> Iterator[RunLog]:
    """The log of a run while this is open; its last line says how the run ended.

    Args:
        folder: of the run.
        verb: of the command line.

    Raises:
        UserError: the file cannot be written.
    """
    file = folder / NAME
    try:
        log = RunLog(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    log.line(f"moesaic {verb}: version {version('moesaic')}, {socket.gethostname()} {os.getpid()}")
    _open.append(log)
    end = "done"
    try:
        yield log
    except KeyboardInterrupt:
        end = STOPPED
        raise
    except UserError as error:
        end = f"error: {error}"
        raise
    except RunError as error:
        end = f"failed: {error}"
        raise
    except BaseException as error:
        end = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        _open.remove(log)
        if log.worker_lines:
            log.line(f"workers wrote {log.worker_lines:,} lines, see above")
        log.line(end)
        log.close()
