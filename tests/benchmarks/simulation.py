"""Calibration and measuring of well-known models on many GPUs, simulated.

    python tests/benchmarks/simulation.py [--gpu H100] [--bench FILE] [--gpus 1 8 64 512]

The real loop hands out the real tasks on a calculated clock; what each takes is worked out from
shapes (tests/benchmarks/shapes has the configurations, no weights) and speeds: those of a file of
``moesaic bench`` for the GPU and the files, where one is given; otherwise the GPU's data sheet, and
what is assumed below. Nodes have 8 GPUs. Efficiency is the work of one GPU over GPUs × time.
"""

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from common import arguments_parser, progress, report, scratch, table, write_recipe

from moesaic.orchestrator.bench import bench_speeds, read_bench
from moesaic.orchestrator.blueprint import PlannedExperiment
from moesaic.orchestrator.datasheet import Host, sheet_speeds
from moesaic.orchestrator.fleet import STORE_BYTES, Cluster, Group, read_cluster
from moesaic.orchestrator.memory import Sizes, predict_memory
from moesaic.orchestrator.outlook import CALL_SECONDS, planned, simulated
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.simulate import Outcome
from moesaic.orchestrator.timing import Clock, SpeedSource

SHAPES = Path(__file__).parent / "shapes"
MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3", "kimi-k2")
STUDIED = "qwen3-235b-a22b"
WALKERS = (1, 4, 8)
BITS = {"method": "gptq", "act_order": True, "clip": "weighted"}
# Bytes per second of one worker that reads, writes, takes digests and adds on the processor, and
# seconds for a small file: a node of a cluster with a parallel file system.
HOST = Host(read=2e9, write=1e-3, entry=1e-3, save=2e9, digest=0.8e9, host_add=5e9)
FILES = (
    f"a worker reads {HOST.read / 1e9:g} and writes {HOST.save / 1e9:g} GB/s (assumed), digests at"
    f" {HOST.digest / 1e9:g}, adds at {HOST.host_add / 1e9:g} GB/s"
)
FAST = Host(read=8e9, write=1e-3, entry=1e-3, save=8e9, digest=0.8e9, host_add=5e9)


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        walkers: workers that share the walk; None: all, if there are shards enough.
        walk: joint or ahead; None: as the number of workers decides.
        memory: of a node; None: the usual.
        bits, groups: candidates.
    """

    model: str
    gpus: int
    shards: int
    source: SpeedSource
    walkers: int | None = None
    walk: str | None = None
    store: int = STORE_BYTES
    memory: int | None = None
    bits: tuple[int, ...] = (2, 3, 4, 8)
    groups: tuple[int, ...] = (64, 128)


def nodes(case: Case, gpu: str) -> Cluster:
    """As few nodes of at most 8 GPUs as there must be."""
    whole, rest = divmod(case.gpus, 8)
    groups = [Group(count=whole, gpus=8, gpu=gpu, memory=case.memory)] if whole else []
    groups += [Group(gpus=rest, gpu=gpu, memory=case.memory)] if rest else []
    return Cluster(nodes=groups, store=case.store)


@cache
def experiment_of(case: Case, gpu: str, sequences: int, folder: Path) -> PlannedExperiment:
    """What is the same for any number of GPUs and walkers."""
    candidate = {**BITS, "bits": list(case.bits), "group_size": list(case.groups)}
    text = folder / "text.txt"
    text.write_text("not read", encoding="utf-8")
    about = argparse.Namespace(model=SHAPES / case.model, text=[text], heldout=[text])
    calibration = {"sequences": sequences, "length": 2048, "shards": case.shards}
    calibration |= {"gradient_sequences": 64}
    file = write_recipe(folder / "simulation.yaml", about, [candidate], calibration)
    return planned(load_recipe(file), folder / "out", nodes(case, gpu))


def run(case: Case, arguments: argparse.Namespace, folder: Path) -> tuple[Outcome, Any]:
    """One simulated run, and the memory of its workers while they calibrate."""
    progress(f"{case.model}, {case.gpus} GPU(s), {case.shards} shards, {case.walkers} walkers")
    alike = Case(case.model, 1, case.shards, case.source, bits=case.bits, groups=case.groups)
    same = experiment_of(alike, arguments.gpu, arguments.sequences, folder)
    compute = same.recipe.compute.model_copy(update={"walkers": case.walkers, "walk": case.walk})
    recipe = same.recipe.model_copy(update={"compute": compute})
    experiment, cluster = same.under(recipe, same.output), nodes(case, arguments.gpu)
    crew = cluster.crew(compute)
    found = simulated(experiment, cluster, Clock(experiment, crew, case.source), CALL_SECONDS)
    return found, predict_memory(Sizes(experiment, crew))["calibrate"]


def best(case: Case, arguments: argparse.Namespace, folder: Path) -> tuple[Case, Outcome, Any]:
    """With as many walkers as are fastest."""
    tried = []
    for walkers in (count for count in WALKERS if count <= min(case.gpus, case.shards)):
        with_them = replace(case, walkers=walkers)
        tried.append((with_them, *run(with_them, arguments, folder)))
    return min(tried, key=lambda found: found[1].makespan)


def hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def row(case: Case, found: Outcome, alone: float, memory: Any, there: int) -> list[str]:
    walking = memory["weights"] + memory["statistics"] + memory.get("activations", 0)
    size = f"{walking / 1e9:.0f} GB"
    return [
        case.model,
        str(case.gpus),
        str(case.walkers or min(case.gpus, case.shards)),
        "ahead" if Compute(walk=case.walk).ahead(case.gpus) else "joint",
        hours(found.makespan),
        f"{alone / (case.gpus * found.makespan):.0%}",
        hours(found.critical),
        found.limit(),
        f"{found.busy / (case.gpus * found.makespan):.0%}",
        f"{found.store_full / found.makespan:.0%}",
        f"{found.driver / found.makespan:.1%}",
        f"{(found.read + found.written) / 1e12:.1f} TB",
        size if walking <= there else f"**{size}**",
    ]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--sequences", type=int, default=512, help="of 2048 tokens")
    parser.add_argument("--bench", type=Path, help="unit costs (moesaic bench --output)")
    arguments = parser.parse_args()
    there = read_cluster(f"1x{arguments.gpu}").gpu_memory
    source, told = sheet_speeds(arguments.gpu, HOST), f"data sheet of the {arguments.gpu}; {FILES}"
    if arguments.bench is not None:
        found = read_bench(arguments.bench)
        device = next(d for n, d in found["devices"].items() if arguments.gpu in n)
        source, told = bench_speeds(found, device, str(arguments.bench)), str(arguments.bench)
    head = ["model", "GPUs", "walkers", "walk", "time", "efficiency", "longest chain", "limit"]
    head += ["busy", "store full", "driver", "moved", "GPU memory"]
    rows, studied = [], []
    with scratch("simulation") as name:
        folder = Path(name)
        for model in MODELS:
            alone, walkers = 0.0, None
            for gpus in arguments.gpus:
                case = Case(model, gpus, 8, source, walkers)
                if walkers == max(WALKERS):  # more GPUs do not make fewer of them faster
                    outcome, memory = run(case, arguments, folder)
                else:
                    case, outcome, memory = best(case, arguments, folder)
                walkers = case.walkers
                alone = alone or outcome.work * (gpus == 1)
                rows.append(row(case, outcome, alone, memory, there))
        changes: dict[str, dict[str, Any]] = {
            "as above": {},
            "4 walkers": {"walkers": 4},
            "2 shards": {"shards": 2},
            "4 shards": {"shards": 4},
            "16 shards": {"shards": 16},
            "nodes keep nothing that was read": {"memory": 1},
            "joint walk": {"walk": "joint"},
            "joint walk, 4 walkers": {"walk": "joint", "walkers": 4},
            "18 candidates instead of 8": {"bits": (2, 3, 4, 5, 6, 8), "groups": (32, 64, 128)},
            "files four times as fast": {"source": sheet_speeds(arguments.gpu, FAST)},
            "and a store of 80 GB/s, 16 shards": {
                "source": sheet_speeds(arguments.gpu, FAST),
                "store": 4 * STORE_BYTES,
                "shards": 16,
            },
        }
        for label, change in changes.items():
            base: dict[str, Any] = {"model": STUDIED, "shards": 8, "source": source, **change}
            one, _ = run(Case(gpus=1, **{**base, "walkers": 1}), arguments, folder)
            case = Case(gpus=64, **base)
            outcome, memory = run(case, arguments, folder)
            studied.append([label, *row(case, outcome, one.work, memory, there)[2:]])
    report(
        "Many GPUs, simulated",
        f"{arguments.sequences} × 2048 tokens, 64 sequences back, 8 candidates for every unit, 8"
        " shards unless said."
        f" Speeds: {told}. Store: {STORE_BYTES / 1e9:.0f} GB/s for all. Bold: more than the GPU's"
        f" {there / 1e9:.0f} GB; the time is that of a GPU that had it. Longest chain: of tasks"
        " that wait for one another, as if nothing that was read stayed in the nodes; it may be"
        f" longer than the run.\n\n{table(head, rows)}\n\n"
        f"## {STUDIED} on 64 GPUs\n\n{table(['', *head[2:]], studied)}",
        arguments.write,
    )


if __name__ == "__main__":
    main()
