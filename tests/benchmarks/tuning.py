"""What each step of a search buys at equal bytes, and what it costs: from uniform to refined plans.

    python tests/benchmarks/tuning.py --model bundled [--bits 2.5 3 4] [--seeds 3] [--trials 60]

KL to the dense model on held-out text, per budget: one chain for all units (the best one that fits,
which may have fewer bytes, and the smallest that has as many bytes as the budget or more, where
there is one), the even plan (as if all weights were equally sensitive), greedy,
knapsack; then what running plans on calibration text makes of the knapsack's: knobs tuned by a
study, `evolve`, `relax`, and these two after the study. Every such search may run its text
``--trials`` times, and none goes beyond that; one after the study comes on top of it. A token whose
slopes are taken counts as four. The table has the tokens of each way, and how often that is the
whole text that plans are judged on.

A real model, in less than an hour on two cores and one seed (each search runs 2,048 tokens twenty
times):

    python tests/benchmarks/tuning.py --model build/smollm2 --bits 2.5 3 --seeds 1 --trials 20 \
        --widths 2 3 4 6 --group-sizes 64 --sequences 32 --judged 8 --heldout-sequences 16 \
        --folder build/benchmarks/tuning_smollm2

Everything is measured once per seed, which draws the calibration text. With ``--folder`` the same
command goes on where it was stopped: what is done is read from there, and rows that an earlier
version of this file did not have are made from what is measured there. Seconds are those of the
search itself, not of measuring, evaluating or assembling.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import (
    ROOT,
    add_text_options,
    arguments_parser,
    check_inputs,
    median,
    progress,
    report,
    table,
    write_recipe,
)
from plans import (
    Measured,
    add_run_options,
    figure,
    folder,
    measured,
    recipe_sections,
    setting,
)

from moesaic.orchestrator import results
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.search import greedy, knapsack, uniform
from moesaic.search.base import Budget, Plan, Problem
from moesaic.search.knobs import EXPONENT, Allocator, Place

BUNDLED = ROOT / "orchestrator" / "demo" / "model"
ONE, EVEN, GREEDY, KNAPSACK = "one chain", "even", "greedy", "knapsack"
TUNED = "knapsack + tuned knobs"
# Way → refiner, and whether it starts from the study's plan.
REFINED = {
    "knapsack + evolve": ("evolve", False),
    "knapsack + relax": ("relax", False),
    f"{TUNED} + evolve": ("evolve", True),
    f"{TUNED} + relax": ("relax", True),
}
WAYS = (ONE, EVEN, GREEDY, KNAPSACK, TUNED, *REFINED)
# A row that is no way to reach a budget. Folders name ways by their places in WAYS: it has none.
NEXT = "one chain, next larger"
ROWS = (ONE, NEXT, *WAYS[1:])
# What the best way is to reach against the even plan, at these budgets.
GOAL, GOAL_AT = 0.7, (2.5, 3.0)
# One way of one seed and budget: kl, bits, seconds, tokens.
Row = Mapping[str, float]
Found = Mapping[tuple[float, str], Sequence[Row]]


def candidates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Entries of a recipe."""
    shared = {"method": "gptq", "bits": arguments.widths, "act_order": True, "clip": "weighted"}
    return [{**shared, "group_size": size} for size in arguments.group_sizes]


def next_larger(problem: Problem) -> Plan | None:
    """The smallest plan with one chain for all units that has the budget's bytes or more, of
    equally large ones that of the least predicted loss; None where all are smaller."""
    plans = [uniform.uniform_plan(problem, chain) for chain in uniform.shared(problem)]
    larger = [plan for plan in plans if plan.bytes >= problem.budget.total_bytes]
    return min(larger, key=lambda plan: (plan.bytes, plan.loss), default=None)


def allocators(problem: Problem, bench: Measured) -> dict[str, Callable[[], Plan]]:
    """Ways that only add up losses."""
    places = {
        choice.name: Place(unit.part, 0.0)
        for unit in bench.experiment.units
        for choice in choices(unit)
    }
    even = Allocator(problem, places)
    larger = next_larger(problem)
    return {
        ONE: lambda: uniform.search(problem),
        **({} if larger is None else {NEXT: lambda: larger}),
        EVEN: lambda: even.plan({EXPONENT: 0.0}),
        GREEDY: lambda: greedy.search(problem),
        KNAPSACK: lambda: knapsack.search(problem),
    }


def allocated(bench: Measured, bits: float) -> dict[str, Row]:
    """Every allocator at one budget."""
    experiment = bench.experiment
    budget = Budget(int(round(bits * bench.weights / 8, 3)), 0)
    pipeline = Pipeline(experiment, bench.pool, bench.view)
    problem = results.problem(experiment, pipeline.table, True, budget)
    plans, seconds = {}, {}
    for way, search in allocators(problem, bench).items():
        started = time.perf_counter()
        plans[way] = search()
        seconds[way] = time.perf_counter() - started
    found = bench.outcomes(plans)
    return {
        way: {"kl": o.kl, "bits": o.bits, "seconds": seconds[way], "tokens": 0.0}
        for way, o in found.items()
    }


class Runs:
    """The command line over one seed's store."""

    def __init__(self, arguments: argparse.Namespace, place: Path, seed: int) -> None:
        self.arguments = arguments
        self.place = place / str(seed)
        self.seed = seed

    def recipe(self, name: str, bits: float, **more: Any) -> Path:
        """A recipe whose name is that of its study."""
        sections = recipe_sections(self.arguments, self.seed)
        budget = {"bits_per_weight": bits}
        own = candidates(self.arguments)
        file = self.place / f"{name}.yaml"
        return write_recipe(
            file, self.arguments, own, search="knapsack", budget=budget, **sections, **more
        )

    def row(self, way: str, bits: float) -> Row:
        """What a way reaches; of an earlier run where that finished."""
        output = self.place / "runs" / f"{bits:g}-{WAYS.index(way)}"
        done = output / "done.json"
        if not done.exists():
            row = self._made(way, bits, output)
            done.write_text(json.dumps(row), encoding="utf-8")
        found: Row = json.loads(done.read_text(encoding="utf-8"))
        return found

    def _made(self, way: str, bits: float, output: Path) -> Row:
        arguments = self.arguments
        method, studied = REFINED.get(way, ("", True))
        sequences = min(arguments.judged, arguments.sequences)
        more: dict[str, Any] = {}
        if method:
            more["refine"] = {
                "method": method,
                "sequences": sequences,
                "generations": 10**6,
                "steps": 10**6,
                "passes": float(arguments.trials),
                "seed": self.seed,
            }
        if studied:
            more["tune"] = {"sequences": sequences, "prune": False, "seed": self.seed}
        # The study goes by the name of the recipe's file, the same for all that go on from it.
        recipe = self.recipe(f"tuned-{bits:g}" if studied else f"refined-{bits:g}", bits, **more)
        command = [sys.executable, "-m", "moesaic.orchestrator.cli"]
        command += ["tune" if studied else "evaluate", str(recipe), "--json"]
        command += ["--output", str(output)]
        if studied:
            command += ["--trials", str(arguments.trials)]
            command += ["--storage", str(self.place / f"{bits:g}.log")]
        run = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise SystemExit(run.stdout)
        scores = json.loads(run.stdout)["scores"]["plan"]
        row = {"kl": scores["kl"], "bits": scores["bits_per_weight"], "seconds": 0.0, "tokens": 0.0}
        if studied:
            trials = pd.read_parquet(output / "trials.parquet")
            ran = trials[trials["state"] == "complete"]
            if "same_as" in ran:
                ran = ran[ran["same_as"].isna()]
            row["seconds"] += float(ran["seconds"].sum()) / arguments.workers
            row["tokens"] += float(ran["sequences"].sum()) * (arguments.length - 1)
        if method:
            stage = json.loads((output / "refine.json").read_text(encoding="utf-8"))["stages"][0]
            row["seconds"] += stage["seconds"]
            row["tokens"] += stage["tokens"]
        return row


def seed_rows(
    arguments: argparse.Namespace, place: Path, seed: int
) -> dict[tuple[float, str], Row]:
    """Every budget and way of one seed."""
    runs = Runs(arguments, place, seed)
    found: dict[tuple[float, str], Row] = {}
    recipe = runs.recipe("measure", max(arguments.bits))
    with measured(recipe, runs.place / "runs" / "measure") as bench:
        for bits in arguments.bits:
            found |= {(bits, way): row for way, row in allocated(bench, bits).items()}
    for bits in arguments.bits:
        for way in (way for way in WAYS[4:] if way in arguments.ways):
            progress(f"seed {seed + 1} of {arguments.seeds}, {bits:g} bits: {way}")
            found[bits, way] = runs.row(way, bits)
    return found


def above(found: Found, bits: float, way: str) -> str:
    """How a way stands to the uniform plan that has the budget's bytes or more, in a sentence."""
    larger, own = found.get((bits, NEXT)), found.get((bits, way))
    if not larger or not own:
        return ""
    ratio = median([row["kl"] / other["kl"] for row, other in zip(own, larger, strict=True)])
    size = median([row["bits"] for row in larger])
    return f" Against {NEXT} ({size:.3f} bits per weight) it has {ratio:.3f} × the KL."


def body(arguments: argparse.Namespace, found: Found, seeds: int) -> str:
    """The report."""
    judged = min(arguments.judged, arguments.sequences)
    once = judged * (arguments.length - 1)  # tokens of the text that plans are judged on
    lines, verdicts = [], []
    for bits in arguments.bits:
        even = [row["kl"] for row in found[bits, EVEN]]
        best = ("", 1.0)
        for way in (way for way in ROWS if (bits, way) in found):
            rows = found[bits, way]
            ratios = [row["kl"] / other for row, other in zip(rows, even, strict=True)]
            if way in WAYS:  # the other one may have more bytes
                best = min(best, (way, median(ratios)), key=lambda pair: pair[1])
            tokens = median([row["tokens"] for row in rows])
            lines.append(
                [
                    f"{bits:g}",
                    way,
                    f"{median([row['bits'] for row in rows]):.3f}",
                    figure([row["kl"] for row in rows]),
                    figure(ratios),
                    f"{tokens:,.0f}" if tokens else "–",
                    f"{tokens / once:.2f}" if tokens else "–",
                    figure([row["seconds"] for row in rows]),
                ]
            )
        if bits in GOAL_AT:
            reached = "reached" if best[1] <= GOAL else "**not reached**"
            verdicts.append(
                f"{bits:g} bits: {best[0]} has {best[1]:.3f} × the KL of the even plan; at most"
                f" {GOAL} was the goal: {reached}.{above(found, bits, best[0])}"
            )
    headers = ["budget", "way", "bits per weight", "KL", "KL / even", "tokens run", "× text", "s"]
    widths = ", ".join(map(str, arguments.widths))
    sizes = ", ".join(map(str, arguments.group_sizes))
    text = (
        f"{setting(arguments, seeds)}. Candidates: gptq with {widths} bits in groups of {sizes}"
        f" (-1: a row). Plans are judged on {judged} of the calibration sequences; each search may"
        f" run them {arguments.trials} times. {arguments.workers} workers. Median (least–largest)"
        " over seeds."
    )
    parts = [text, table(headers, lines), "\n".join(f"- {line}" for line in verdicts)]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    add_run_options(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.0], help="budgets")
    parser.add_argument("--trials", type=int, default=60, help="times a search may run its text")
    parser.add_argument("--judged", type=int, default=64, help="sequences plans are judged on")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[-1, 32])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.set_defaults(model=BUNDLED)
    arguments = parser.parse_args()
    if str(arguments.model) == "bundled":
        arguments.model = BUNDLED
    check_inputs(arguments)
    found: dict[tuple[float, str], list[Row]] = {}
    with folder(arguments, "tuning") as place:
        for seed in range(arguments.seeds):
            for case, row in seed_rows(arguments, Path(place), seed).items():
                found.setdefault(case, []).append(row)
            # After each seed: what is done is not lost if the rest takes too long.
            report("Steps of a search", body(arguments, found, seed + 1), arguments.write)


if __name__ == "__main__":
    main()
