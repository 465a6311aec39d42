"""A whole run in a process of its own, and what each of its stages took.

    python -m moesaic.orchestrator.stopwatch RECIPE OUTPUT MARKS

is ``moesaic run RECIPE --output OUTPUT`` that writes, as JSON into the file MARKS, when each stage
was over. Stages follow one another in the order of :data:`STAGES`; what several workers do at a
time counts for the stage that ends last.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.process import collect_rarely, leave

START, SEARCH, REPORT = "start", "search", "report"
STAGES = (START, "calibrate", "gradients", "measure", SEARCH, "evaluate", "assemble", REPORT)
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Taken:
    """What a stage took.

    Attributes:
        seconds: on the clock.
        cores: seconds of the cores of the driver, its workers and what else it started.
    """

    seconds: float
    cores: float


class Watch:
    """Seconds since this process began, and of the cores in it and its workers."""

    def __init__(self) -> None:
        self._began = psutil.Process().create_time()
        self._workers: dict[int, float] = {}
        self.marks: dict[str, tuple[float, float]] = {}

    def mark(self, name: str, again: bool = True) -> None:
        """Notes the time under a name; with ``again`` in place of an earlier one."""
        if again or name not in self.marks:
            self.marks[name] = time.time() - self._began, sum(os.times()[:4]) + self._cores()

    def _cores(self) -> float:
        """Of all workers that there were; those that are gone as they were last seen."""
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::Worker"):
                    self._workers[process.pid] = sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return sum(self._workers.values())


class WatchedView(View):
    """Marks the end of every stage, and that of the search, which is none of its own."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def stage(self, name: str, total: int, done: int = 0) -> None:
        if name == "evaluate":
            self.watch.mark(SEARCH)
        super().stage(name, total, done)

    def advance(self, name: str, steps: int = 1, peak_bytes: int = 0) -> None:
        super().advance(name, steps, peak_bytes)
        self.watch.mark(name)


class WatchedPool(Pool):
    """Marks the first task: all before it was to start."""

    watch: Watch

    def _submit(self, worker: int, task: Task) -> Any:
        self.watch.mark(START, again=False)
        return super()._submit(worker, task)


def timed_run(recipe: Path, output: Path) -> dict[str, Taken]:
    """Runs a recipe from its beginning to the end of its process.

    Returns:
        stage → what it took, in the order of :data:`STAGES`; those that the recipe lacks are not in
        it.

    Raises:
        RunError: the run failed; with the end of what it said.
    """
    marks = output / "marks.json"
    command = [sys.executable, "-m", __spec__.name, *map(str, (recipe, output, marks))]
    started = time.perf_counter()
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if found.returncode != 0:
        raise RunError(f"{recipe}: the run failed:\n{found.stderr[-_TAIL_CHARACTERS:]}")
    left = json.loads(marks.read_text(encoding="utf-8"))
    left[REPORT][0] = seconds  # its process has ended, too
    return dict(_spans(left))


def _spans(marks: Mapping[str, tuple[float, float]]) -> Iterator[tuple[str, Taken]]:
    """Stage → from the end of the one before it to its own."""
    before = (0.0, 0.0)
    for name in STAGES:
        if name in marks:
            seconds, cores = (max(0.0, a - b) for a, b in zip(marks[name], before, strict=True))
            before = (max(before[0], marks[name][0]), max(before[1], marks[name][1]))
            yield name, Taken(seconds, cores)


def _main(recipe: Path, output: Path, marks: Path) -> NoReturn:
    import moesaic.orchestrator.cli  # noqa: F401  what the command imports before it begins
    from moesaic.orchestrator.headstart import head_start

    collect_rarely()
    watch = Watch()
    WatchedPool.watch = watch
    with head_start(recipe, output, "moesaic.orchestrator.run", WatchedPool) as pool:
        from moesaic.orchestrator.run import run_recipe

        view = WatchedView(watch)
        run_recipe(recipe, output, ("evaluate", "assemble", "report"), pool=pool, view=view)
    watch.mark(REPORT)
    marks.write_text(json.dumps(watch.marks), encoding="utf-8")
    leave(0)


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
