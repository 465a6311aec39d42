"""What ``moesaic check`` predicts beside what ``moesaic run`` then takes, three sizes.

    python tests/benchmarks/prediction.py [--workers 1] [--runs 1] [--own NAME=FOLDER ...]

Random Mixture-of-Experts checkpoints are written. First the seconds of a run that no model changes
are measured, as ``moesaic bench`` does. Then each model is predicted (its speeds are measured just
before; with ``--bench FILE`` all comes from that file) and run from an empty store in a process of
its own, from its start to its end; ``--own`` adds model folders. Predictions are for an idle
machine. On one that is not, look at the cores' time: it leaves out waiting for others, but includes
what two processes do at a time. Five minutes on two cores.
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import arguments_parser, median, progress, report, scratch, table, write_recipe
from memory import random_text
from random_moe import make_random_moe

from moesaic.orchestrator.bench import bench_source, read_bench
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.overheads import measure_overheads
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stage_times import Left, predict_seconds
from moesaic.orchestrator.stopwatch import STAGES, timed_run

CANDIDATES = [
    {"method": "gptq", "bits": 4, "group_size": 64, "act_order": True, "clip": "weighted"},
    {"method": "rtn", "bits": 4, "group_size": 64},
]
CHARACTERS = 400_000
# Tolerance of the aim, either way.
AIM = 0.25
# Predicted, measured, and of it the cores' seconds.
Times = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """A model, and how much text it is calibrated on; sizes are those of a random one.

    Attributes:
        folder: of a model that is there; None for a random one.
    """

    name: str
    sequences: int
    length: int
    gigabytes: float = 0.0
    hidden: int = 0
    experts: int = 0
    width: int = 0
    folder: Path | None = None


def random_case(gigabytes: float, hidden: int, experts: int, width: int, sequences: int) -> Case:
    name = f"{gigabytes:g} GB, hidden {hidden}, {experts} experts of {width}"
    return Case(name, sequences, 256, gigabytes, hidden, experts, width)


CASES = (
    random_case(0.02, 256, 16, 128, 32),
    random_case(0.1, 512, 32, 256, 32),
    random_case(0.3, 1024, 32, 512, 32),
)


def recipe(folder: Path, arguments: argparse.Namespace, case: Case) -> Path:
    calibration = {"sequences": case.sequences, "length": case.length, "shards": 4}
    calibration |= {"gradient_sequences": max(4, case.sequences // 4)}
    texts = [{"file": str(path)} for path in arguments.heldout]
    return write_recipe(
        folder / "r.yaml",
        arguments,
        CANDIDATES,
        calibration,
        search="knapsack",
        budget={"bits_per_weight": 4.3},
        baselines={"rtn": CANDIDATES[1]},
        evaluation={"texts": texts, "sequences": 16, "length": 256},
        compute={"workers": arguments.workers, "cpus_per_worker": 1},
    )


def once(
    folder: Path, arguments: argparse.Namespace, case: Case, overheads: Mapping[str, float]
) -> dict[str, Times]:
    """Stage → its times; and ``total``."""
    shutil.rmtree(folder, ignore_errors=True)
    file = recipe(folder, arguments, case)
    experiment = Experiment(load_recipe(file), folder / "out")
    blocks = list(range(experiment.model.blocks))
    left = Left(blocks, len(blocks), experiment.offers)
    team = crew(experiment.recipe.compute, experiment.workers_per_gpu)
    source = None if arguments.bench is None else bench_source(arguments.bench, "cpu")
    predicted = predict_seconds(experiment, team, left, source, overheads)
    shutil.rmtree(folder / "store", ignore_errors=True)
    taken = timed_run(file, folder / "out")
    found = {
        name: (predicted[name], taken[name].seconds, taken[name].cores)
        for name in STAGES
        if name in taken
    }
    seconds, cores = (sum(each[index] for each in found.values()) for index in (1, 2))
    return {**found, "total": (predicted["total"], seconds, cores)}


def rows_of(case: Case, runs: list[dict[str, Times]]) -> list[list[str]]:
    rows = []
    for stage in runs[0]:
        columns = zip(*(run[stage] for run in runs), strict=True)
        expected, taken, cores = (median(values) for values in columns)
        ratio = expected / max(taken, 1e-9)
        rows.append(
            [
                case.name if stage == STAGES[0] else "",
                f"**{stage}**" if stage == "total" else stage,
                *(f"{value:.1f}" for value in (expected, taken, cores)),
                f"**{ratio:.2f}**" if stage == "total" else f"{ratio:.2f}",
            ]
        )
    return rows


def own_case(text: str) -> Case:
    name, _, folder = text.partition("=")
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text}: write NAME=FOLDER, a folder with a model")
    return Case(name, 32, 256, folder=Path(folder))


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="of one thread each")
    parser.add_argument("--runs", type=int, default=1, help="of each model; medians are told")
    parser.add_argument("--sizes", type=int, default=len(CASES), help="how many of the three")
    parser.add_argument("--bench", type=Path, help="unit costs (moesaic bench --output)")
    parser.add_argument("--own", type=own_case, nargs="*", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    totals = []
    with scratch("prediction") as name:
        folder = Path(name)
        arguments.text = arguments.heldout = [random_text(folder / "text.txt", CHARACTERS)]
        if arguments.bench is None:
            progress("what no model changes")
            overheads = measure_overheads(1, folder)
        else:
            overheads = read_bench(arguments.bench)["host"]["overheads"]
        for case in (*CASES[: arguments.sizes], *arguments.own):
            arguments.model = case.folder or folder / "model"
            if case.folder is None:
                shape = (case.gigabytes, case.hidden, case.experts, case.width)
                make_random_moe(arguments.model, *shape)
            runs = []
            for index in range(arguments.runs):
                progress(f"{case.name}: run {index + 1} of {arguments.runs}")
                runs.append(once(folder / "run", arguments, case, overheads))
            rows += rows_of(case, runs)
            expected, taken, _ = (median([run["total"][k] for run in runs]) for k in range(3))
            totals.append(expected / taken)
            if case.folder is None:
                shutil.rmtree(arguments.model)
    met = sum(abs(ratio - 1) <= AIM for ratio in totals)
    besides = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in overheads.items())
    head = ["model", "stage", "predicted, s", "measured, s", "of it cores, s"]
    head += ["predicted / measured"]
    body = (
        f"{arguments.workers} worker(s) of one thread, {arguments.runs} run(s), medians; load of"
        f" the machine at the end: {os.getloadavg()[0]:.1f}. Aim: the total within {AIM:.0%};"
        f" {met} of {len(totals)} are. Seconds of a run that no model changes, which are in the"
        f" predictions: {besides}.\n\n" + table(head, rows)
    )
    report("Prediction and reality", body, arguments.write)


if __name__ == "__main__":
    main()
