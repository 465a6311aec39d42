"""Real processes that a user would start, killed on the way: commands with a Ray of their own."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

MOESAIC = [sys.executable, "-m", "moesaic.orchestrator.cli"]
TIMEOUT = 280  # for every wait; a test has several
# Most of a start is importing. Drivers that are to be killed are forked from a process that has
# imported everything already, once for all of them.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["moesaic.orchestrator.cli", "moesaic.orchestrator.run"])
RUN = ("run",)


def start(recipe: Path, output: Path) -> subprocess.Popen[str]:
    command = [*MOESAIC, *_arguments(RUN, recipe, output)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=output.parent
    )


def _arguments(verb: Sequence[str], recipe: Path, output: Path) -> list[str]:
    return [verb[0], str(recipe), "--output", str(output), *verb[1:], "--json"]


def _drive(verb: Sequence[str], recipe: Path, output: Path) -> None:
    """In a process of its own: the command that :func:`start` starts, or another one."""
    from moesaic.orchestrator import cli

    os.chdir(output.parent)
    for stream, file in zip((1, 2), logs(output), strict=True):
        with file.open("w") as log:
            os.dup2(log.fileno(), stream)
    sys.argv = ["moesaic", *_arguments(verb, recipe, output)]
    cli.main()


def logs(output: Path) -> tuple[Path, Path]:
    """Where a forked driver's stdout and stderr are."""
    return output.parent / "stdout.log", output.parent / "stderr.log"


@contextlib.contextmanager
def forked(recipe: Path, output: Path, verb: Sequence[str] = RUN) -> Iterator[BaseProcess]:
    """A driver; what is left of it when the block ends is killed.

    Args:
        verb: of the command, with what comes after recipe and output.
    """
    process = FORKED.Process(target=_drive, args=(verb, recipe, output))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def doomed(recipe: Path, output: Path, verb: Sequence[str] = RUN) -> Iterator[BaseProcess]:
    """A driver that runs until the block ends, which is when ``kill -9`` comes."""
    with forked(recipe, output, verb) as process:
        yield process
        assert process.is_alive()
    assert process.exitcode == -signal.SIGKILL
    assert not any("Traceback" in log.read_text() for log in logs(output))


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, stderr
    assert stdout.count("\n") == 1, stdout
    result: dict[str, object] = json.loads(stdout)
    return result


def wait_until(happened: Callable[[], object], process: BaseProcess) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_workers(process: BaseProcess) -> list[psutil.Process]:
    wait_until(lambda: len(children(process, "ray::Worker")) == 2, process)
    return children(process, "ray::Worker")


def children(process: BaseProcess, name: str = "") -> list[psutil.Process]:
    found = []
    assert process.pid is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]
