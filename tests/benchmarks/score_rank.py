"""Does the predicted loss rank plans as the measured KL does?

    python tests/benchmarks/score_rank.py recipes/demo.yaml --plans 40

Measures the KL of single-unit changes and of random mixed plans and prints Spearman's rank
correlation with what was predicted for them: the gradient-weighted error that searches use, and the
plain output error for comparison. Nothing is recompressed: plans are drawn from finished pieces.
"""

import argparse
import random
from pathlib import Path

from scipy.stats import spearmanr

from moesaic.methods.base import Chain
from moesaic.orchestrator import stages
from moesaic.orchestrator.console import View
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.run import open_experiment
from moesaic.search.base import Measurement


def draw_plans(
    table: dict[str, list[Measurement]], count: int, seed: int
) -> dict[str, dict[str, Measurement]]:
    """Mixed plans: every unit at random around a random level, so that plans differ in size."""
    generator = random.Random(seed)
    plans = {}
    for number in range(count):
        level = generator.random()
        plans[f"mixed-{number}"] = {
            unit: offers[min(int(len(offers) * abs(generator.gauss(level, 0.15))), len(offers) - 1)]
            for unit, offers in table.items()
        }
    return plans


def single_swaps(
    table: dict[str, list[Measurement]], count: int, seed: int
) -> dict[str, dict[str, Measurement]]:
    """Plans in which one unit is compressed and all others stay dense."""
    generator = random.Random(seed)
    pairs = [m for offers in table.values() for m in offers]
    return {
        f"single-{number}": {m.unit: m}
        for number, m in enumerate(generator.sample(pairs, min(count, len(pairs))))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    experiment = open_experiment(arguments.recipe, arguments.output)
    with View() as view, Pool(experiment.recipe.compute) as pool:
        pipeline = Pipeline(experiment, pool, view)
        pipeline.measure()
        table: dict[str, list[Measurement]] = {}
        for measurement in pipeline.table.measurements:
            if measurement.chain:
                table.setdefault(measurement.unit, []).append(measurement)
        for offers in table.values():
            offers.sort(key=lambda m: m.bytes)
        kinds = {
            "single units": single_swaps(table, arguments.plans, arguments.seed),
            "mixed plans": draw_plans(table, arguments.plans, arguments.seed),
        }
        choices: dict[str, dict[str, Chain]] = {
            name: {unit: m.chain for unit, m in plan.items()}
            for plans in kinds.values()
            for name, plan in plans.items()
        }
        pieces = {
            name: plan_pieces(experiment, experiment.walk, choice)
            for name, choice in choices.items()
        }
        scores = stages.evaluated(experiment, pool, view, pieces)
    print("| | plans | predicted loss (gradient × error) | output error | bytes |")
    print("|---|---:|---:|---:|---:|")
    for kind, plans in kinds.items():
        measured = [scores[name]["kl"] for name in plans]
        predictions = [
            [sum(m.loss for m in plan.values()) for plan in plans.values()],
            [sum(m.error for m in plan.values()) for plan in plans.values()],
            [-sum(m.bytes for m in plan.values()) for plan in plans.values()],
        ]
        figures = " | ".join(f"{spearmanr(p, measured).statistic:.3f}" for p in predictions)
        print(f"| {kind} | {len(plans)} | {figures} |")


if __name__ == "__main__":
    main()
