"""What a trial of a study costs beside the bare evaluation of its text, and two workers beside one.

    python tests/benchmarks/trials.py [--model build/smollm2] [--trials 40] [--runs 3]

Everything is measured first. A run is then a whole study on a copy of that store: asking for
values, the allocation, putting pieces into the model, running all of the text, telling, the record
in MLflow. Nothing is pruned, plans that come out twice count once. Start of Ray, loading the model
and the dense model's hidden states are left out. Studies of one worker and of two take turns, one
thread each. The bare evaluation is the same text on one of the workers while nothing changes and
nothing is kept between blocks; on all workers at once it shows what the machine allows at most.
CPU seconds tell what of a plan's cost is the command's own work, and what the workers'.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import (
    ROOT,
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
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.process import collect_rarely
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.study_terms import rungs
from moesaic.orchestrator.track import Tracker
from moesaic.orchestrator.tune import StudyOptions, TunedPipeline
from moesaic.orchestrator.worker import plain

CANDIDATES = [{"method": "gptq", "bits": [2, 3, 4, 5], "group_size": -1}]
BARE = 5  # evaluations of which the median is taken


@dataclass(frozen=True)
class Run:
    """One study.

    Attributes:
        seconds: per plan.
        bare: seconds of a bare evaluation, on one worker.
        together: of one on each worker, all at once.
        plans: how many there were.
        command_cpu, workers_cpu: CPU seconds per plan of this process, and of those that it
            started.
    """

    seconds: float
    bare: float
    together: float
    plans: int
    command_cpu: float
    workers_cpu: float


def recipe_in(folder: Path, arguments: argparse.Namespace, workers: int) -> Recipe:
    return load_recipe(
        write_recipe(
            folder / "r.yaml",
            arguments,
            CANDIDATES,
            {
                "sequences": arguments.sequences,
                "length": arguments.length,
                "gradient_sequences": arguments.sequences // 2,
            },
            budget={"bits_per_weight": 3.0},
            search="knapsack",
            tune={"prune": False, "sequences": arguments.sequences},
            compute={"workers": workers, "cpus_per_worker": 1, "dtype": "float32"},
        )
    )


def study(measured: Path, folder: Path, arguments: argparse.Namespace, workers: int) -> Run:
    """One study on a copy of what was measured."""
    shutil.copytree(measured / "store", folder / "store")
    recipe = recipe_in(folder, arguments, workers)
    experiment = Experiment(recipe, folder / "run")
    options = StudyOptions(arguments.trials)
    with (
        View() as view,
        Pool(recipe.compute) as pool,
        Tracker(recipe.tracking, recipe.name, experiment.output, {}) as tracker,
    ):
        if pool.size != workers:
            raise SystemExit(f"{pool.size} workers instead of {workers}")
        pipeline = TunedPipeline(experiment, pool, view, options=options, tracker=tracker)
        pipeline.measure()
        bare, together = bare_seconds(pipeline)
        before, started = cpu_seconds(), time.perf_counter()
        pipeline.search()
        seconds, after = time.perf_counter() - started, cpu_seconds()
        if pool.replaced:
            raise SystemExit(f"{pool.replaced} worker(s) died meanwhile")
    assert pipeline.study is not None, "made by the search"
    plans = {trial.attributes["plan"] for trial in pipeline.study.trials}
    own, others = ((now - then) / len(plans) for now, then in zip(after, before, strict=True))
    return Run(seconds / len(plans), bare, together, len(plans), own, others)


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far of this process, and of all that it started and that still live."""
    this = psutil.Process()
    own, *others = (p.cpu_times() for p in (this, *this.children(recursive=True)))
    return own.user + own.system, sum(times.user + times.system for times in others)


def bare_seconds(pipeline: Pipeline) -> tuple[float, float]:
    """Medians of evaluating the dense model's own blocks, on one worker and on all at once; every
    worker has the model afterwards."""
    experiment, pool = pipeline.experiment, pipeline.pool
    judge, (rows,) = experiment.calibration_judge, rungs(experiment)
    remember_dense(pool, pipeline.view, judge, [rows])
    pieces = plan_pieces(experiment, experiment.walk, {})
    arguments = {
        "judge": plain(judge),
        "rows": list(rows),
        "pieces": pieces,
        "total": rows[1],
        "hidden_bytes": 0,
    }
    slots = range(pool.size)

    def timed(*asked: int) -> float:
        started = time.perf_counter()
        pool.run(Task("resident:evaluate_plan", arguments, "bare", affinity=s) for s in asked)
        return time.perf_counter() - started

    timed(*slots)  # loads the model
    alone = median([timed(slot) for slot in slots for _ in range(BARE)])
    together = median([timed(*slots) for _ in range(BARE)])
    pool.run(Task("resident:release", {}, "release", affinity=slot) for slot in slots)
    return alone, together


def main() -> int:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.set_defaults(model=ROOT / "orchestrator" / "demo" / "model")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    check_inputs(arguments)
    collect_rarely()  # as the command does
    with scratch("trials") as name:
        folder = Path(name)
        recipe = recipe_in(folder / "measured", arguments, 2)
        with View() as view, Pool(recipe.compute) as pool:
            Pipeline(Experiment(recipe, folder / "measured" / "run"), pool, view).measure()
        runs = alternate(
            {
                f"{workers} worker(s)": lambda index, workers=workers: study(
                    folder / "measured", folder / f"study-{workers}-{index}", arguments, workers
                )
                for workers in (1, 2)
            },
            arguments.runs,
        )
    one, two = runs.values()
    rows = [
        [
            label,
            str(found[0].plans),
            spread([run.seconds for run in found], 2),
            *(
                spread([getattr(run, name) for run in found], 2)
                for name in ("bare", "together", "command_cpu", "workers_cpu")
            ),
        ]
        for label, found in runs.items()
    ]
    cost = median([run.seconds / run.bare for run in one])
    faster = median([a.seconds / b.seconds for a, b in zip(one, two, strict=True)])
    ceiling = median([2 * run.bare / run.together for run in two])
    headers = ["study by", "plans", "seconds per plan", "bare evaluation, s", "on all at once, s"]
    headers += ["the command's CPU s per plan", "the workers' CPU s per plan"]
    body = (
        f"{arguments.trials} trials on {arguments.sequences} × {arguments.length} tokens, medians"
        f" (least–largest) of {arguments.runs} runs.\n\n"
        + table(headers, rows)
        + f"\n\nA plan of one worker's study costs {cost:.2f} × the bare evaluation (goal: 1.1)."
        f" Two workers judge {faster:.2f} × the plans of one in the same time (goal: 1.7); with"
        f" bare evaluations, which nothing else runs beside, it is {ceiling:.2f} ×."
    )
    report("Trials", body, arguments.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
