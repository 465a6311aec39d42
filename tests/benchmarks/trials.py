"""What a trial of a study costs beside the bare evaluation of its text, and two workers beside one.

    python tests/benchmarks/trials.py [--model build/smollm2] [--trials 40] [--runs 3]

Everything is measured first. A run is then a whole study on a copy of that store: asking for
values, the allocation, putting pieces into the model, running all of the text, telling, the record
in MLflow. Nothing is pruned, plans that come out twice count once. Start of Ray, loading the model
and the dense model's hidden states are left out. Studies of one worker and of two take turns, one
thread each. The bare evaluation is the same text on one of the workers while nothing changes and
nothing is kept between blocks.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

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
from moesaic.orchestrator.experiment import Experiment, plain
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.track import Tracker
from moesaic.orchestrator.tune import StudyOptions, TunedPipeline, rungs

CANDIDATES = [{"method": "gptq", "bits": [2, 3, 4, 5], "group_size": -1}]
BARE = 5  # evaluations of which the median is taken


@dataclass(frozen=True)
class Run:
    """Seconds per plan of a study, of a bare evaluation, and how many plans there were."""

    seconds: float
    bare: float
    plans: int


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
        bare = bare_seconds(pipeline)
        started = time.perf_counter()
        pipeline.search()
        seconds = time.perf_counter() - started
        if pool.replaced:
            raise SystemExit(f"{pool.replaced} worker(s) died meanwhile")
    assert pipeline.study is not None, "made by the search"
    plans = {trial.attributes["plan"] for trial in pipeline.study.trials}
    return Run(seconds / len(plans), bare, len(plans))


def bare_seconds(pipeline: Pipeline) -> float:
    """Median of evaluating the dense model's own blocks; every worker has the model afterwards."""
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
    times = []
    for slot in range(pool.size):
        for turn in range(BARE + 1):
            started = time.perf_counter()
            pool.run([Task("resident:evaluate_plan", arguments, "bare", affinity=slot)])
            if turn:
                times.append(time.perf_counter() - started)
        pool.run([Task("resident:release", {}, "release", affinity=slot)])
    return median(times)


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
            spread([run.bare for run in found], 2),
        ]
        for label, found in runs.items()
    ]
    cost = median([run.seconds / run.bare for run in one])
    faster = median([a.seconds / b.seconds for a, b in zip(one, two, strict=True)])
    body = (
        f"{arguments.trials} trials on {arguments.sequences} × {arguments.length} tokens, medians"
        f" (least–largest) of {arguments.runs} runs.\n\n"
        + table(["study by", "plans", "seconds per plan", "bare evaluation, seconds"], rows)
        + f"\n\nA plan of one worker's study costs {cost:.2f} × the bare evaluation (goal: 1.1)."
        f" Two workers judge {faster:.2f} × the plans of one in the same time (goal: 1.7)."
    )
    report("Trials", body, arguments.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
