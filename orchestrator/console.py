"""What a person sees on stderr while a run works: bars on a terminal, lines in a log."""

import errno
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Task as BarTask
from rich.table import Column, Table
from rich.text import Text

from moesaic.orchestrator import runlog
from moesaic.orchestrator.process import lead_nowhere
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.yardsticks import LANGUAGE, yardstick_of

if TYPE_CHECKING:
    from moesaic.methods.base import Event


# Of a pipe, or a terminal, that nobody has open any more.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Stderr:
    """What ``sys.stderr`` is at the moment. A run goes on where nobody reads any more what it says
    there, or the disk takes no more of it: it stands in the run's log."""

    @property
    def _stream(self) -> TextIO:
        stream: TextIO = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        return stream

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _tried(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in _GONE:  # for others that write there, too
                lead_nowhere(self._stream)


class Lines(Console):
    """A console whose texts hold no secrets and stand in the log of the run, too."""

    def print(self, *objects: Any, **options: Any) -> None:
        clean = [redacted(o) if isinstance(o, str) else o for o in objects]
        super().print(*clean, **options)
        for text in clean:
            if isinstance(text, str):
                runlog.note(text)


stderr = Lines(file=cast(TextIO, _Stderr()), highlight=False, soft_wrap=True)
_LOG_SECONDS = 15.0
_LOG_WIDTH = 200
# Of many things that are being worked on, those that are named.
_SHOWN = 4
# Rates and times left are those of the last minutes: a stage may have waited for another one.
_RATE_SECONDS = 120.0


class _TimeLeft(ProgressColumn):
    """As rich's, but for a stage that has a limit no more than what is left of that."""

    max_refresh = 0.5

    def render(self, task: BarTask) -> Text:
        seconds = _left(task)
        text = "-:--:--" if seconds is None else str(timedelta(seconds=math.ceil(seconds)))
        return Text(text, style="progress.remaining")


class View:
    """Progress of named stages; use as a context manager.

    On a terminal every stage is a bar with done / total, rate, time left, what is being worked on
    and the largest worker's memory. Elsewhere a line is printed every few seconds instead.
    """

    def __init__(self, console: Console = stderr) -> None:
        self.console = console
        self._bars: dict[str, TaskID] = {}
        self._last_line = time.monotonic()
        self._peak_bytes = 0
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._earlier: dict[str, float] = {}  # seconds of stages of that name that are over
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            _TimeLeft(),
            # A long note goes on in further lines of its column.
            TextColumn("{task.fields[note]}", style="dim", table_column=Column(ratio=1)),
            console=console,
            disable=not console.is_terminal,
            get_time=lambda: time.monotonic(),
            speed_estimate_period=_RATE_SECONDS,
        )

    def __enter__(self) -> "View":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Opens a stage of ``total`` steps, ``done`` of which were finished by an earlier run.

        One of the same name is over then, and their seconds add up.
        """
        if name in self._bars:
            self._complete(name)
        self._bars[name] = self.progress.add_task(
            name, total=total, completed=done, note="", rate="", until=None
        )
        # Rates count from here: those of two steps that end together would be beyond all bounds.
        self.progress.advance(self._bars[name], 0)
        self._started[name] = time.monotonic()
        self._earlier[name] = self.seconds.setdefault(name, 0.0)
        if done:
            self.line(f"{name}: {done} of {total} were finished before")

    def limit(self, name: str, seconds: float) -> None:
        """A stage will end after that time, if it has not before."""
        self.progress.update(self._bars[name], until=time.monotonic() + seconds)

    def advance(self, name: str, steps: int = 1, peak_bytes: int = 0) -> None:
        """Counts finished steps."""
        self._peak_bytes = max(self._peak_bytes, peak_bytes)
        bar = self._bars[name]
        self.progress.advance(bar, steps)
        self._clock(name)

    def finish(self, name: str, told: Iterable[str] | None = None) -> None:
        """Ends a stage with the steps that were done; nothing if it is over or never began.

        Args:
            told: what its bar goes on to say, instead of what it said last.
        """
        if name in self._bars:
            self._clock(name)
            if told is not None:
                self.progress.update(self._bars[name], note=self._note(told))
            self._complete(name)

    def _clock(self, name: str) -> None:
        self.seconds[name] = self._earlier[name] + time.monotonic() - self._started[name]

    def _complete(self, name: str) -> None:
        bar = self._bars.pop(name)
        done = next(task.completed for task in self.progress.tasks if task.id == bar)
        self.progress.update(bar, total=done)

    def tick(self, running: Iterable[str]) -> None:
        """Shows what is being worked on, or what a stage has to say; for :meth:`Pool.run`.

        On a terminal it goes on below a bar where the line is too short.
        """
        note = self._note(running)
        for task in self.progress.tasks:
            if not task.finished:
                self.progress.update(task.id, note=note, rate=_rate(task.speed))
        if self.console.is_terminal or time.monotonic() - self._last_line < _LOG_SECONDS:
            return
        self._last_line = time.monotonic()
        for task in self.progress.tasks:
            if not task.finished and task.total:
                seconds = _left(task)
                left = "" if seconds is None else f"{seconds:.0f} s left"
                self.line(
                    f"{task.description}: {task.completed:.0f}/{task.total:.0f}"
                    f"  {task.fields['rate']}  {left}  {note}"
                )

    def _note(self, told: Iterable[str]) -> str:
        shown = list(told)
        if len(shown) > _SHOWN:
            shown[_SHOWN:] = [f"{len(shown) - _SHOWN} more"]
        note = ", ".join(shown)
        return note + (f"  peak {self._peak_bytes / 1e9:.1f} GB/worker" if self._peak_bytes else "")

    def line(self, text: str) -> None:
        """One line for the log."""
        self.console.print(text, markup=False)

    def events(self, events: Iterable["Event"]) -> None:
        """The first events of every kind, and how many there are."""
        by_kind: dict[str, list[Event]] = {}
        for event in events:
            by_kind.setdefault(event.kind, []).append(event)
        for kind, group in by_kind.items():
            self.line(f"event {kind} ×{len(group)}: {group[0].unit}: {group[0].message}")


def _left(task: BarTask) -> float | None:
    """Seconds that a stage will still take, as far as that is known."""
    until = task.fields["until"]
    limit = None if until is None or task.finished else max(0.0, until - time.monotonic())
    known = [seconds for seconds in (task.time_remaining, limit) if seconds is not None]
    return min(known, default=None)


def _rate(speed: float | None) -> str:
    """Steps per second, or per minute where they are few, in words."""
    if not speed:
        return ""
    return f"{speed:.1f}/s" if speed >= 0.1 else f"{60 * speed:.1f}/min"


def show_scores(
    scores: Mapping[str, Mapping[str, Any]], searched: Iterable[str] = ("plan",)
) -> None:
    """Prints :func:`score_table`, whole where it goes into a file: a log has no width."""
    wide = Console(file=stderr.file, width=_LOG_WIDTH, highlight=False)
    (stderr if stderr.is_terminal else wide).print(score_table(scores, searched))


def score_table(
    scores: Mapping[str, Mapping[str, Any]], searched: Iterable[str] = ("plan",)
) -> Table:
    """Dense, baselines and plan: bytes, bits per weight, what they were judged by; and the KL
    before routers learnt, where some did.

    Args:
        searched: names of plans that are no baselines.
    """
    ours = set(searched)
    table = Table(title=None)
    first = next(iter(scores.values()), None)
    figures = (LANGUAGE if first is None else yardstick_of(first)).everything
    for name in ("", "bytes", "bits/weight", *(figure.heading for figure in figures)):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    trained = any("before_router_calibration" in score for score in scores.values())
    kl = LANGUAGE.loss
    if trained:
        table.add_column(f"{kl.name} before routers learnt", justify="right")
    for name, score in scores.items():
        before = score.get("before_router_calibration")
        table.add_row(
            name,
            f"{score['bytes']:,}",
            f"{score['bits_per_weight']:.3f}",
            *(figure.text(score[figure.key]) for figure in figures),
            *([kl.text(before[kl.key]) if before else ""] if trained else []),
            style="bold" if name in ours else None,
        )
    return table
