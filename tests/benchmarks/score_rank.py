"""Does the predicted loss rank plans as the measured KL does?

    python tests/benchmarks/score_rank.py recipes/demo.yaml --output runs/demo [--plans 40]

Measures the KL of changes of a single unit and of random mixed plans and prints Spearman's rank
correlation with what was predicted for them: the gradient-weighted error that searches use, and the
plain output error and the size for comparison. Nothing is compressed anew: plans are drawn from
finished pieces.
"""

import random
import statistics
from pathlib import Path

from common import arguments_parser, report, table
from scipy.stats import spearmanr

from moesaic.methods.base import Unit
from moesaic.orchestrator import stages
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.run import open_experiment
from moesaic.search.base import Measurement

# Choice → what is chosen there.
Picked = dict[str, Measurement]
Offers = dict[str, list[Measurement]]


def mixed_plans(offers: Offers, count: int, seed: int) -> dict[str, Picked]:
    """Every choice at random around a random level, so that plans differ in size."""
    generator = random.Random(seed)
    plans = {}
    for number in range(count):
        level = generator.random()
        plans[f"mixed {number}"] = {
            name: found[min(int(len(found) * abs(generator.gauss(level, 0.15))), len(found) - 1)]
            for name, found in offers.items()
        }
    return plans


def single_changes(units: list[Unit], offers: Offers, count: int, seed: int) -> dict[str, Picked]:
    """Plans in which one unit is compressed by one chain and all others stay dense."""
    pairs = []
    for unit in units:
        names = [choice.name for choice in choices(unit)]
        pairs += [
            {name: next(m for m in offers[name] if m.chain == first.chain) for name in names}
            for first in offers[names[0]]
        ]
    drawn = random.Random(seed).sample(pairs, min(count, len(pairs)))
    return {f"single {number}": picked for number, picked in enumerate(drawn)}


def row(kind: str, plans: dict[str, Picked], kl: dict[str, float]) -> list[str]:
    """Rank correlations of one kind of plans, and predicted KL over measured KL."""
    measured = [kl[name] for name in plans]
    losses = [sum(m.loss for m in plan.values()) for plan in plans.values()]
    errors = [sum(m.error for m in plan.values()) for plan in plans.values()]
    sizes = [-sum(m.bytes for m in plan.values()) for plan in plans.values()]
    ranks = [f"{spearmanr(p, measured).statistic:.3f}" for p in (losses, errors, sizes)]
    ratios = sorted(p / m for p, m in zip(losses, measured, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    return [kind, str(len(plans)), *ranks, spread]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, help="folder of a run, to use what it finished")
    parser.add_argument("--plans", type=int, default=40, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    experiment = open_experiment(arguments.recipe, arguments.output)
    with View() as view, Pool(experiment.recipe.compute) as pool:
        pipeline = Pipeline(experiment, pool, view)
        pipeline.measure()
        offers: Offers = {}
        for measurement in pipeline.table.measurements:
            if measurement.chain:
                offers.setdefault(measurement.unit, []).append(measurement)
        for found in offers.values():
            found.sort(key=lambda m: m.bytes)
        kinds = {
            "one unit": single_changes(experiment.units, offers, arguments.plans, arguments.seed),
            "all units": mixed_plans(offers, arguments.plans, arguments.seed),
        }
        pieces = {
            name: plan_pieces(
                experiment, experiment.walk, {choice: m.chain for choice, m in picked.items()}
            )
            for plans in kinds.values()
            for name, picked in plans.items()
        }
        scores = stages.evaluated(experiment, pool, view, pieces)
    kl = {name: score["kl"] for name, score in scores.items()}
    headers = ["changed", "plans", "gradient × error", "output error", "fewer bytes"]
    body = table([*headers, "predicted / measured KL"], [row(k, p, kl) for k, p in kinds.items()])
    text = f"{arguments.recipe.name}: Spearman's rank correlation with the measured KL.\n\n{body}"
    report("Predicted loss against measured KL", text, arguments.write)


if __name__ == "__main__":
    main()
