"""Calibration by two workers of one thread each beside one such worker, in turns.

    python tests/benchmarks/workers.py [--runs 5] [--gradients 16]

Each run starts from an empty store with workers that have opened the model and run a few tokens, so
that what is timed is the calibration itself: forward passes, statistics, their sums, the reverse
pass for gradients, and all files written. Start of Python and Ray is left out. Afterwards the
statistics of both are compared: they must be the same bytes.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from common import (
    add_text_options,
    alternate,
    arguments_parser,
    check_inputs,
    median,
    report,
    scratch,
    spread,
    table,
    write_recipe,
)

from moesaic.orchestrator.console import View
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.walk import Walk

CANDIDATE = {"method": "gptq", "bits": 3, "group_size": -1}
# For the run that warms the workers up; its store is not the one that is timed.
WARM_SEQUENCES, WARM_LENGTH = 6, 16


@dataclass(frozen=True)
class Run:
    """Seconds of a calibration, and digests of what it left."""

    seconds: float
    results: tuple[str, ...]


def calibrated(folder: Path, arguments: argparse.Namespace, workers: int) -> Run:
    """One calibration from an empty store."""
    shutil.rmtree(folder, ignore_errors=True)
    compute = {"workers": workers, "cpus_per_worker": 1}
    warm = {"sequences": WARM_SEQUENCES, "length": WARM_LENGTH, "shards": 2}
    timed = {"sequences": arguments.sequences, "length": arguments.length}
    gradients = {"gradient_sequences": arguments.gradients}
    warm["gradient_sequences"] = min(2, arguments.gradients)
    experiments = [
        Experiment(load_recipe(file), folder / file.stem)
        for file in (
            write_recipe(folder / "warm" / "r.yaml", arguments, [CANDIDATE], warm, compute=compute),
            write_recipe(
                folder / "timed" / "r.yaml",
                arguments,
                [CANDIDATE],
                {**timed, **gradients},
                compute=compute,
            ),
        )
    ]
    with View() as view, Pool(experiments[0].recipe.compute) as pool:
        if pool.size != workers:
            raise SystemExit(f"{pool.size} workers instead of {workers}")
        for experiment in experiments:
            _ = experiment.walk  # draws and writes the tokens
            started = time.perf_counter()
            Calibration(experiment, pool, view, {}).run()
            seconds = time.perf_counter() - started
        if pool.replaced:
            raise SystemExit(f"{pool.replaced} worker(s) died meanwhile")
    return Run(seconds, digests(experiments[1], experiments[1].walk))


def digests(experiment: Experiment, walk: Walk) -> tuple[str, ...]:
    """Of all statistics and gradients."""
    store, blocks = experiment.store, range(experiment.model.blocks)
    paths = [store.path("stats", walk.stats_key(block)) for block in blocks]
    if walk.gradients:
        paths += [store.path("gradients", walk.gradients_key(block)) for block in blocks]
    return tuple(file_digest(path) for path in paths)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=16, help="sequences; 0: no reverse pass")
    arguments = parser.parse_args()
    check_inputs(arguments)
    with scratch("workers") as name:
        ways = {
            f"{count} worker(s)": lambda index, c=count: calibrated(Path(name) / "w", arguments, c)
            for count in (1, 2)
        }
        runs: dict[str, list[Run]] = alternate(ways, arguments.runs)
    if len({run.results for found in runs.values() for run in found}) != 1:
        raise SystemExit("the statistics depend on the number of workers")
    seconds = {way: [run.seconds for run in found] for way, found in runs.items()}
    one, two = (median(values) for values in seconds.values())
    tokens = arguments.sequences * arguments.length
    rows = [
        [way, spread(values, 2), f"{tokens / median(values):,.0f}"]
        for way, values in seconds.items()
    ]
    rows.append(["faster by", f"{one / two:.2f} ×", ""])
    text = (
        f"{arguments.model.name}, {arguments.sequences} × {arguments.length} tokens,"
        f" {arguments.gradients} sequences in the reverse pass; workers of one thread;"
        f" {arguments.runs} run(s) each, in turns; medians (least–largest). Both leave the same"
        " bytes. Target: at least 1.7 ×.\n\n"
    )
    body = text + table(["", "calibration, s", "tokens per second"], rows)
    report("Two workers beside one", body, arguments.write)


if __name__ == "__main__":
    main()
