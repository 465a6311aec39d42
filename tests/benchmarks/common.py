"""What the benchmarks share: watching a command, alternating runs, a Markdown report.

Resident memory is read from the kernel's own high-water mark of every process, so that a peak
between two looks counts as well. It includes pages of mapped files, as ``top`` shows them.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "benchmarks"
SMOLLM2 = ROOT / "build" / "smollm2"
_TEXT = ROOT / "orchestrator" / "demo" / "text"
_LOOK_SECONDS = 0.05
# Looking for new processes reads all of /proc and is the dear part.
_LOOKS_PER_SEARCH = 4
_TAIL_CHARACTERS = 2000
# The caller's own choice of threads must not decide between two programs.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: wall time from its start to its end, start of the interpreter included.
        peak_bytes: largest resident size of any one of its processes.
        process: name of that process.
        processes: how many processes it had, itself included.
    """

    seconds: float
    peak_bytes: int
    process: str
    processes: int


class Tree:
    """A process and everything it ever started, also what has lost its parent since."""

    def __init__(self, root: psutil.Process) -> None:
        self.known: dict[int, psutil.Process] = {root.pid: root}
        self.peaks: dict[int, tuple[int, str]] = {}

    def search(self) -> None:
        """Takes up children of known processes; a dead parent's children were taken up before."""
        by_parent: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter(["ppid"]):
            by_parent.setdefault(process.info["ppid"], []).append(process)
        open_pids = list(self.known)
        while open_pids:
            for child in by_parent.get(open_pids.pop(), []):
                if child.pid not in self.known:
                    self.known[child.pid] = child
                    open_pids.append(child.pid)

    def look(self) -> None:
        """Reads the high-water mark of every process that still lives."""
        for pid in self.known:
            found = high_water(pid)
            if found is not None and found[0] > self.peaks.get(pid, (0, ""))[0]:
                self.peaks[pid] = found

    def kill(self) -> None:
        """Ends whatever still lives."""
        for process in self.known.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def high_water(pid: int) -> tuple[int, str] | None:
    """Largest resident size that a process has had, in bytes, and its name; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in fields:  # it has ended and waits for its parent
        return None
    return int(fields["VmHWM"].split()[0]) * 1024, fields["Name"].strip()


def watch(
    command: Sequence[str],
    log: Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Usage:
    """Runs a command to its end, its output into ``log``, and looks at its processes meanwhile.

    Raises:
        SystemExit: the command failed; with the end of its output.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**kept, **(environment or {})},
        )
        tree = Tree(psutil.Process(child.pid))
        try:
            looks = 0
            while child.poll() is None:
                if looks % _LOOKS_PER_SEARCH == 0:
                    tree.search()
                tree.look()
                looks += 1
                time.sleep(_LOOK_SECONDS)
            seconds = time.perf_counter() - started
        finally:
            tree.kill()
            child.wait()
    if child.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
        shown = " ".join(command)
        raise SystemExit(f"{tail.rstrip()}\nexit status {child.returncode}: {shown}")
    peak_bytes, process = max(tree.peaks.values(), default=(0, "none seen"))
    return Usage(seconds, peak_bytes, process, len(tree.known))


def alternate(ways: Mapping[str, Callable[[int], Any]], runs: int) -> dict[str, list[Any]]:
    """Runs the ways in turn, ``runs`` times each (each is given the number of the run)."""
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for index in range(runs):
        for name, way in ways.items():
            progress(f"{name}: run {index + 1} of {runs}")
            results[name].append(way(index))
    return results


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and least and largest in brackets."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (median, min, max))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def progress(text: str) -> None:
    """A line for the person who waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """Processor, cores, memory."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [list(map(str, headers)), ["---", *["---:"] * (len(headers) - 1)]]
    lines += [list(map(str, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the report there as well")
    return parser


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--text``, ``--heldout``."""
    parser.add_argument(
        "--model", type=Path, default=SMOLLM2, help="model folder (default: make smollm2's)"
    )
    calibration = sorted(_TEXT.glob("calibration.*.txt"))
    heldout = sorted(_TEXT.glob("heldout.*.txt"))
    parser.add_argument(
        "--text", type=Path, nargs="+", default=calibration, help="calibration text files"
    )
    parser.add_argument("--heldout", type=Path, nargs="+", default=heldout, help="held-out files")


def check_inputs(arguments: argparse.Namespace) -> None:
    """Raises SystemExit where the model or a text is missing."""
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"{arguments.model}: no model there; make smollm2 makes build/smollm2")
    for name in ("text", "heldout"):
        files = getattr(arguments, name)
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise SystemExit(f"--{name}: no such file: {', '.join(missing) or _TEXT}")


def report(title: str, body: str, write: Path | None) -> None:
    """Prints the report, with command, machine and date, and writes it where asked."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    versions = f"Python {platform.python_version()}"
    head = f"# {title}\n\n`{command}`\n\n{machine()}, {versions}, {date.today().isoformat()}\n"
    text = f"{head}\n{body.strip()}\n"
    print(text, flush=True)
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(text, encoding="utf-8")


def end_in_order() -> None:
    """Makes SIGTERM an exit: started processes and scratch folders go with the benchmark."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def scratch(name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder under build/ that goes when its ``with`` ends, also when the benchmark is ended."""
    end_in_order()
    BUILD.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=BUILD)


def write_recipe(
    file: Path,
    arguments: argparse.Namespace,
    candidates: Sequence[Any],
    calibration: Mapping[str, Any],
    **more: Any,
) -> Path:
    """A recipe over ``--model``, ``--text`` and ``--heldout`` with a store of its own beside it."""
    recipe: dict[str, Any] = {
        "name": file.stem,
        "model": str(arguments.model.resolve()),
        "serve": "moesaic",
        "search": "uniform",
        "budget": {"bits_per_weight": 8.0},
        "calibration": {
            "texts": [{"file": str(path.resolve())} for path in arguments.text],
            "gradient_sequences": 0,
            **calibration,
        },
        "candidates": json.loads(json.dumps(candidates)),  # copies: no anchors in the YAML
        "evaluation": {
            "texts": [{"file": str(path.resolve())} for path in arguments.heldout],
            "sequences": 8,
            "length": 64,
        },
        "store": "store",
        **more,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file
