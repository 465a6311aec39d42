"""Merging the experts of a 12-layer model by two workers of one thread beside one, in turns.

    python tests/benchmarks/clustering.py [--runs 3]

A random model (12 layers of 64 experts, hidden 256, width 192) is calibrated once. Each run then
clusters and merges every layer by every method given and rounds it to 4 bits, from that
calibration, with warm workers and no finished reductions. Both must leave the same bytes.
"""

import argparse
import shutil
import time
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
from random_moe import make_random_moe

from moesaic.orchestrator.console import View
from moesaic.orchestrator.digests import file_digest
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.stages import Calibration

KINDS = ("reductions", "pieces", "errors")
FOUR = {"method": "rtn", "bits": 4, "group_size": -1}
LAYERS, EXPERTS, HIDDEN, WIDTH = 12, 64, 256, 192


def merged(folder: Path, arguments: argparse.Namespace, workers: int) -> tuple[float, str]:
    """Seconds, and a digest of what was left."""
    recipe = write_recipe(
        folder / "recipe.yaml",
        arguments,
        [FOUR, *([{"method": name, "keep": 0.5}, FOUR] for name in arguments.methods)],
        {"sequences": 16, "length": 128, "expert_tokens": 2048},
        compute={"workers": workers, "cpus_per_worker": 1},
        budget={"bits_per_weight": 8.0},
    )
    for kind in KINDS:
        shutil.rmtree(folder / "store" / kind, ignore_errors=True)
    experiment = Experiment(load_recipe(recipe), folder / "run")
    with View() as view, Pool(experiment.recipe.compute) as pool:
        Calibration(experiment, pool, view, {}).run()
        linears = [unit for unit in experiment.units if unit.kind == "linear"]
        warm = {unit.name: experiment.offers[unit.name] for unit in linears}
        Calibration(experiment, pool, view, warm).run()
        banks = {u.name: experiment.offers[u.name] for u in experiment.units if u.kind == "bank"}
        started = time.perf_counter()
        Calibration(experiment, pool, view, banks).run()
        seconds = time.perf_counter() - started
    files = sorted((folder / "store" / "reductions").rglob("*.safetensors"))
    return seconds, " ".join(file_digest(file) for file in files)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--methods", nargs="+", default=["hc_smoe", "sub_moe", "merge_moe"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with scratch("clustering") as name:
        folder = Path(name)
        arguments.model = folder / "model"
        each = EXPERTS * 3 * HIDDEN * WIDTH * 2
        make_random_moe(arguments.model, LAYERS * each * 1.03 / 1e9, HIDDEN, EXPERTS, WIDTH)
        check_inputs(arguments)
        ways = {
            f"{count} worker(s)": lambda index, c=count: merged(folder / "runs", arguments, c)
            for count in (1, 2)
        }
        runs = alternate(ways, arguments.runs)
    if len({digest for found in runs.values() for _, digest in found}) != 1:
        raise SystemExit("the reductions depend on the number of workers")
    seconds = {way: [run[0] for run in found] for way, found in runs.items()}
    one, two = (median(values) for values in seconds.values())
    rows = [[way, spread(values, 2)] for way, values in seconds.items()]
    rows.append(["faster by", f"{one / two:.2f} ×"])
    text = (
        f"Random model, about {LAYERS} layers of {EXPERTS} experts, hidden {HIDDEN}, width {WIDTH};"
        f" {', '.join(arguments.methods)}; workers of one thread; {arguments.runs} run(s) each, in"
        " turns; medians (least–largest). Both leave the same bytes. Target: at least 1.7 ×.\n\n"
    )
    report("Two workers merge", text + table(["", "s"], rows), arguments.write)


if __name__ == "__main__":
    main()
