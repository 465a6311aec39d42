"""What ``moesaic check`` predicts beside what calibration and measuring then take, three sizes.

    python tests/benchmarks/prediction.py [--workers 1] [--runs 1]

Random Mixture-of-Experts checkpoints are written, predicted (speeds are measured just before), and
calibrated and measured from an empty store by workers that are warm. Measuring runs after the
calibration, not beside it, so that each stage has a time of its own. Predictions are for an idle
machine. On one that is not, look at the workers' processor time: it leaves out only waiting for
files.
"""

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import arguments_parser, median, progress, report, scratch, table, write_recipe
from memory import random_text
from random_moe import make_random_moe

from moesaic.orchestrator import timing
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration

CANDIDATES = [
    {"method": "gptq", "bits": [3, 4], "group_size": 64, "act_order": True, "clip": "weighted"},
    {"method": "rtn", "bits": 4, "group_size": 64},
]
STAGES = ("calibrate", "gradients", "measure")
CHARACTERS = 400_000
Times = tuple[float, float, float]


@dataclass(frozen=True)
class Size:
    """A model and how much text it is calibrated on."""

    gigabytes: float
    hidden: int
    experts: int
    width: int
    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.gigabytes:g} GB, hidden {self.hidden}, {self.experts} experts"


SIZES = (
    Size(0.02, 256, 16, 128, 32, 256),
    Size(0.1, 512, 32, 256, 32, 256),
    Size(0.4, 1024, 32, 512, 16, 512),
)


def recipe(folder: Path, arguments: argparse.Namespace, size: Size, sequences: int) -> Path:
    calibration = {"sequences": sequences, "length": size.length, "shards": 4}
    calibration |= {"gradient_sequences": max(4, sequences // 4)}
    compute = {"workers": arguments.workers, "cpus_per_worker": 1}
    return write_recipe(folder / "r.yaml", arguments, CANDIDATES, calibration, compute=compute)


class Clocked(View):
    """Knows when each stage came to its last step, on the clock and in the workers' cores."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, tuple[float, float]] = {}

    def advance(self, name: str, steps: int = 1, peak_bytes: int = 0) -> None:
        super().advance(name, steps, peak_bytes)
        self.ended[name] = now()


def now() -> tuple[float, float]:
    """Seconds on the clock, and of the cores in all workers."""
    workers = [p for p in psutil.Process().children(recursive=True) if "ray::" in p.name()]
    return time.perf_counter(), sum(sum(p.cpu_times()[:2]) for p in workers)


def once(folder: Path, arguments: argparse.Namespace, size: Size) -> dict[str, Times]:
    """Stage → predicted seconds, measured ones, and those of a worker's cores."""
    shutil.rmtree(folder, ignore_errors=True)
    warm = Experiment(
        load_recipe(recipe(folder / "warm", arguments, size, 4)), folder / "warm" / "out"
    )
    timed = Experiment(
        load_recipe(recipe(folder / "timed", arguments, size, size.sequences)),
        folder / "timed" / "out",
    )
    blocks = timed.model.blocks
    with Pool(timed.recipe.compute) as pool:
        few = dict(list(warm.offers.items())[:6])
        with View() as view:
            Calibration(warm, pool, view, few).run()
        left = timing.Left(list(range(blocks)), blocks, timed.offers)
        predicted = timing.predict_seconds(timed, crew(timed.recipe.compute), left)
        marks = [now()]
        with Clocked() as seen:
            Calibration(timed, pool, seen, {}).run()
        marks += [seen.ended["calibrate"], seen.ended["gradients"], now()]
        with View() as view:
            Calibration(timed, pool, view, timed.offers).run()
        marks.append(now())
    spans = dict(zip(STAGES, ((0, 1), (1, 2), (3, 4)), strict=True))
    return {
        stage: (
            predicted[stage],
            marks[end][0] - marks[start][0],
            (marks[end][1] - marks[start][1]) / arguments.workers,
        )
        for stage, (start, end) in spans.items()
    }


def own_times(run: dict[str, Times], stage: str) -> Times:
    """Those of a stage, or of all together."""
    if stage in run:
        return run[stage]
    predicted, measured, cores = (sum(values) for values in zip(*run.values(), strict=True))
    return predicted, measured, cores


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="of one thread each")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of them")
    arguments = parser.parse_args()
    head = ["model", "stage", "predicted, s", "measured, s", "of it cores, s"]
    head += ["predicted / measured", "predicted / cores"]
    rows = []
    with scratch("prediction") as name:
        folder = Path(name)
        arguments.text = arguments.heldout = [random_text(folder / "text.txt", CHARACTERS)]
        for number, size in enumerate(SIZES[: arguments.sizes]):
            arguments.model = folder / f"model-{number}"
            make_random_moe(arguments.model, size.gigabytes, size.hidden, size.experts, size.width)
            runs = []
            for index in range(arguments.runs):
                progress(f"{size}: run {index + 1} of {arguments.runs}")
                runs.append(once(folder / "run", arguments, size))
            for stage in (*STAGES, "total"):
                own = [own_times(run, stage) for run in runs]
                expected, taken, cores = (median(values) for values in zip(*own, strict=True))
                label = str(size) if stage == STAGES[0] else ""
                seconds = [f"{value:.1f}" for value in (expected, taken, cores)]
                ratios = [f"{expected / taken:.2f}", f"{expected / cores:.2f}"]
                rows.append([label, stage, *seconds, *ratios])
            shutil.rmtree(arguments.model)
    body = (
        f"{arguments.workers} worker(s) of one thread, {arguments.runs} run(s), medians; load of"
        f" the machine at the end: {os.getloadavg()[0]:.1f}. Target: within 25 %.\n\n"
        + table(head, rows)
    )
    report("Prediction and reality", body, arguments.write)


if __name__ == "__main__":
    main()
