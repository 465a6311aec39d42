"""Bytes against loss: the whole predicted front, what was evaluated beside it, and front.json.

Predicted points come from the table of measurements (:mod:`moesaic.search.front`): every one is a
plan that a budget of its size would get, none of them was run. Evaluated points are plans that were
run on held-out text. The two are never mixed: a predicted loss is a second-order estimate, and
says which plan is better rather than how good it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.orchestrator import results
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.files import write_json
from moesaic.search.base import Plan, search_module
from moesaic.search.front import Front, predicted_front

FRONT = "front.json"
# Predicted points that are told; a front may have as many as there are choices.
_MOST_POINTS = 200


@dataclass(frozen=True)
class FrontPoint:
    """A plan's size and loss.

    Attributes:
        bytes: of its files.
        bits_per_weight: stored per compressible weight.
        loss: predicted.
    """

    bytes: int
    bits_per_weight: float
    loss: float


def front_of(experiment: Experiment, table: results.Table) -> Front | None:
    """The front of everything that the recipe's search may choose; None for searches whose plans
    are no choice of least total loss, and for scores in units of their own."""
    strategy = search_module(experiment.recipe.search)
    adds_up = not hasattr(strategy, "smallest_bytes") and not hasattr(strategy, "SHARES_OUT")
    own_units = experiment.recipe.score not in (None, "gradient")
    if not experiment.recipe.candidates or not adds_up or own_units:
        return None
    (budget, *_) = experiment.budgets.values()
    return predicted_front(results.problem(experiment, table, budget=budget))


def predicted_points(front: Front | None, around: int, weights: int) -> list[FrontPoint]:
    """Some points of a front, evenly spread over the bytes.

    Args:
        around: bytes of a plan's files besides its units.
        weights: number of weights in the units.
    """
    if front is None:
        return []
    fixed = front.problem.budget.fixed_bytes
    sizes = [(point, int(front.bytes[point]) - fixed) for point in front.spread(_MOST_POINTS)]
    return [
        FrontPoint(size + around, size * 8 / weights, float(front.loss[point]))
        for point, size in sizes
    ]


def write_front(
    file: Path,
    predicted: Sequence[FrontPoint],
    plans: Mapping[str, Plan],
    sizes: Mapping[str, float],
    scores: Mapping[str, Mapping[str, Any]],
    loss: str,
    predicted_loss: str,
) -> None:
    """Writes ``front.json``: ``predicted`` points, and the ``plans`` that there are.

    Args:
        plans: the baselines and what was searched, by name.
        sizes: bits per weight of each.
        scores: of those that were evaluated; the others have no loss but the predicted one.
        loss, predicted_loss: keys of the measured loss and of the predicted one.
    """
    found = []
    for name, plan in plans.items():
        entry: dict[str, Any] = {
            "plan": name,
            "bytes": plan.bytes,
            "bits_per_weight": sizes[name],
            predicted_loss: plan.loss,
        }
        if name in scores:
            entry[loss] = scores[name][loss]
        found.append(entry)
    points = [
        {"bytes": p.bytes, "bits_per_weight": p.bits_per_weight, predicted_loss: p.loss}
        for p in predicted
    ]
    write_json(file, {"predicted": points, "plans": found})
