"""What ``moesaic check`` predicts beside what calibration and measuring then take, three sizes.

    python tests/benchmarks/prediction.py [--workers 1] [--runs 1]

Random Mixture-of-Experts checkpoints are written, predicted (speeds are measured just before), and
calibrated and measured from an empty store by workers that are warm. Measuring runs after the
calibration, not beside it, so that each stage has a time of its own.
"""

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

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


def once(folder: Path, arguments: argparse.Namespace, size: Size) -> dict[str, tuple[float, float]]:
    """Stage → predicted and measured seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    warm = Experiment(
        load_recipe(recipe(folder / "warm", arguments, size, 4)), folder / "warm" / "out"
    )
    timed = Experiment(
        load_recipe(recipe(folder / "timed", arguments, size, size.sequences)),
        folder / "timed" / "out",
    )
    blocks = timed.model.blocks
    with View() as view, Pool(timed.recipe.compute) as pool:
        few = dict(list(warm.offers.items())[:6])
        Calibration(warm, pool, view, few).run()
        left = timing.Left(list(range(blocks)), blocks, timed.offers)
        predicted = timing.predict_seconds(timed, crew(timed.recipe.compute), left)
        seen = View()
        with seen:
            Calibration(timed, pool, seen, {}).run()
        forward = seen.seconds["calibrate"]
        measured = {"calibrate": forward, "gradients": seen.seconds["gradients"] - forward}
        started = time.perf_counter()
        Calibration(timed, pool, view, timed.offers).run()
        measured["measure"] = time.perf_counter() - started
    return {stage: (predicted[stage], measured[stage]) for stage in STAGES}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="of one thread each")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of them")
    arguments = parser.parse_args()
    head = ["model", "stage", "predicted, s", "measured, s", "predicted / measured"]
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
            for run in runs:
                run["total"] = tuple(map(sum, zip(*run.values(), strict=True)))  # type: ignore[assignment]
            for stage in (*STAGES, "total"):
                expected = median([run[stage][0] for run in runs])
                taken = median([run[stage][1] for run in runs])
                ratio = f"{expected / taken:.2f}"
                label = str(size) if stage == STAGES[0] else ""
                rows.append([label, stage, f"{expected:.1f}", f"{taken:.1f}", ratio])
            shutil.rmtree(arguments.model)
    body = (
        f"{arguments.workers} worker(s) of one thread, {arguments.runs} run(s), medians; load of"
        f" the machine at the end: {os.getloadavg()[0]:.1f}. Target: within 25 %.\n\n"
        + table(head, rows)
    )
    report("Prediction and reality", body, arguments.write)


if __name__ == "__main__":
    main()
