"""Calibration and measuring on one, two and three local nodes of one core each.

    python tests/benchmarks/nodes.py [--model FOLDER] [--runs 3] [--nodes 1 2 3]

Every node has a raylet of its own (``ray.cluster_utils.Cluster``) and carries one worker of one
thread. A cluster is started, its workers load their libraries on a small run, then an empty store
is filled. What all of them leave must be the same bytes. On two cores the third node shows that it
is right, not that it is fast.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"})

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from moesaic.orchestrator.console import View  # noqa: E402
from moesaic.orchestrator.digests import file_digest  # noqa: E402
from moesaic.orchestrator.experiment import Experiment  # noqa: E402
from moesaic.orchestrator.pool import Pool  # noqa: E402
from moesaic.orchestrator.recipe import load_recipe  # noqa: E402
from moesaic.orchestrator.stages import Calibration  # noqa: E402

CANDIDATES = [
    {"method": "gptq", "bits": [3, 4], "group_size": -1},
    {"method": "rtn", "bits": 8, "group_size": -1},
]
GOALS = {2: 1.7, 3: 2.5}


@dataclass(frozen=True)
class Run:
    """Seconds of calibrating and measuring, and digests of what they left."""

    seconds: float
    results: tuple[str, ...]


@contextmanager
def nodes(count: int) -> Iterator[str]:
    """Address of a cluster of so many nodes of one core."""
    with TemporaryDirectory(prefix="nd", dir="/tmp", ignore_cleanup_errors=True) as short:
        os.environ["RAY_TMPDIR"] = short
        head = {"num_cpus": 1, "include_dashboard": False}
        cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(count - 1):
                cluster.add_node(num_cpus=1)
            yield cluster.address
        finally:
            ray.shutdown()
            cluster.shutdown()


def measured(folder: Path, arguments: argparse.Namespace, count: int) -> Run:
    """One run from an empty store."""
    shutil.rmtree(folder, ignore_errors=True)
    with nodes(count) as address:
        compute = {"address": address, "workers": count, "cpus_per_worker": 1}
        sizes = {
            "warm": {"sequences": 6, "length": 16, "shards": 3, "gradient_sequences": 3},
            "timed": {
                "sequences": arguments.sequences,
                "length": arguments.length,
                "shards": arguments.shards,
                "gradient_sequences": arguments.gradients,
            },
        }
        experiments = []
        for name, size in sizes.items():
            file = folder / name / "r.yaml"
            write_recipe(file, arguments, CANDIDATES, size, compute=compute)
            experiments.append(Experiment(load_recipe(file), folder / name / "run"))
        with View() as view, Pool(experiments[0].recipe.compute) as pool:
            warm, timed = experiments
            Calibration(warm, pool, view, {}).run()
            if len(pool.roster.alive()) != count:
                raise SystemExit(f"{len(pool.roster.alive())} workers instead of {count}")
            _ = timed.walk  # draws and writes the tokens
            started = time.perf_counter()
            Calibration(timed, pool, view, timed.offers).run()
            seconds = time.perf_counter() - started
            if pool.replaced:
                raise SystemExit(f"{pool.replaced} worker(s) died meanwhile")
    left = sorted((folder / "timed" / "store").glob("[pseg]*/*/*.safetensors"))
    return Run(seconds, tuple(f"{path.name} {file_digest(path)}" for path in left))


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--gradients", type=int, default=12, help="sequences; 0: no reverse pass")
    arguments = parser.parse_args()
    check_inputs(arguments)
    with scratch("nodes") as name:
        ways = {
            f"{count} node(s)": lambda index, c=count: measured(Path(name) / "n", arguments, c)
            for count in arguments.nodes
        }
        runs: dict[str, list[Run]] = alternate(ways, arguments.runs)
    if len({run.results for found in runs.values() for run in found}) != 1:
        raise SystemExit("what is left depends on the number of nodes")
    seconds = {way: [run.seconds for run in found] for way, found in runs.items()}
    one = median(next(iter(seconds.values())))
    rows = []
    for count, (way, values) in zip(arguments.nodes, seconds.items(), strict=True):
        goal = f"{GOALS[count]:g} ×" if count in GOALS else ""
        rows.append([way, spread(values, 1), f"{one / median(values):.2f} ×", goal])
    files = len(next(iter(runs.values()))[0].results)
    text = (
        f"{arguments.model.name}, {arguments.sequences} × {arguments.length} tokens in"
        f" {arguments.shards} shards, {arguments.gradients} sequences in the reverse pass, three"
        f" candidates; nodes of one core; {arguments.runs} run(s) each, in turns; medians"
        f" (least–largest). All leave the same bytes in {files} files. Goals are for machines with"
        " a core for every node.\n\n"
    )
    body = text + table(["", "calibrate and measure, s", "faster by", "goal"], rows)
    report("Local nodes", body, arguments.write)


if __name__ == "__main__":
    main()
