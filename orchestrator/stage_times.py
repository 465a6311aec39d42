"""How long the stages of a run will take: their work, shared by workers, and what comes besides.

Work is costed by :class:`~moesaic.orchestrator.timing.Clock`. Besides it processes start and import
what they need, every function is called for a first time, a model is reloaded, pictures are drawn,
a record is kept. That hardly depends on the model: it is what the stages of a tiny run take beyond
the costs of its work (:mod:`moesaic.orchestrator.overheads`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.methods.base import Chain
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import Crew
from moesaic.orchestrator.memory import predict_store, sites
from moesaic.orchestrator.timing import Clock, SpeedSource

# Seconds of each stage that do not depend on the model, by moesaic bench on two cores of an
# AMD EPYC, November 2026.
OVERHEADS: Mapping[str, float] = {
    "start": 12.0,
    "calibrate": 3.0,
    "gradients": 0.1,
    "measure": 0.2,
    "search": 0.1,
    "evaluate": 0.1,
    "assemble": 4.7,
    "report": 1.3,
}
# Tokens that a written model is compared on; see pipeline.py.
_VERIFIED_TOKENS = 128

METHOD = (
    "operations counted from shapes, over the speeds of this machine measured just now, as if it"
    " were idle; how long it takes to start, and the like, is what two cores took"
    " (moesaic bench measures it here)"
)


@dataclass(frozen=True)
class Left:
    """What an earlier run did not finish.

    Attributes:
        blocks: whose statistics lack.
        gradients: number of blocks whose gradients lack.
        pairs: unit → chains that lack.
    """

    blocks: list[int]
    gradients: int
    pairs: Mapping[str, list[Chain]]


def predict_seconds(
    experiment: Experiment,
    crew: Crew,
    left: Left,
    source: SpeedSource | None = None,
    overheads: Mapping[str, float] = OVERHEADS,
) -> dict[str, float]:
    """Stage → seconds of what is left to do with the crew's workers; ``total`` is their sum.

    Args:
        source: of a worker's speeds; by default they are measured, on this machine.
        overheads: stage → seconds that do not depend on the model.
    """
    clock = Clock(experiment, crew, source)
    jobs = len(sites([experiment.space.by_name[name] for name in left.pairs]))
    work = {
        "calibrate": clock.walked(left.blocks),
        "gradients": clock.gradients(left.gradients) / clock.walkers,
        "measure": clock.measure(left.pairs) / max(1, min(crew.workers, jobs)),
    }
    # Of stages that have nothing left, nothing is called either.
    found = {
        "start": overheads["start"],
        **{name: seconds and seconds + overheads[name] for name, seconds in work.items()},
        **closing(clock, overheads),
    }
    if experiment.recipe.propagate:
        found["propagate"] = _propagate(clock)
    return {**found, "total": sum(found.values())}


def closing(clock: Clock, overheads: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the stages that follow when all is measured."""
    work = {
        "search": searching(clock),
        "evaluate": clock.evaluate() / clock.evaluators(),
        "assemble": assembling(clock),
        "report": 0.0,
    }
    return {name: seconds + overheads[name] for name, seconds in work.items()}


def searching(clock: Clock) -> float:
    """What was measured is looked up and its bytes are checked; the search itself is quick."""
    store, speeds = predict_store(clock.sizes), clock.speeds
    pairs = sum(len(chains) for chains in clock.experiment.offers.values())
    return 2 * pairs * speeds.entry + (store["pieces"] + store["errors"]) / speeds.digest


def assembling(clock: Clock) -> float:
    """The files of the plans, and both sides of their comparison with what they stand for.

    Each side reads the model, or the plan, makes its weights dense in float32 and runs some tokens.
    """
    experiment, speeds = clock.experiment, clock.speeds
    dense = max((speed.dense for speed in speeds.compress.values()), default=0.0)
    weights, total = experiment.sizes.size.weights, experiment.sizes.size.dense_bytes
    blocks = range(clock.model.blocks)
    run = sum(clock.linears(b, _VERIFIED_TOKENS) + clock.calls(b, 1) for b in blocks)
    sides = 2 * (run + weights * (dense + speeds.wide) + _VERIFIED_TOKENS * speeds.head)
    return sum(
        plan.total_bytes / speeds.save + (total + plan.total_bytes) / speeds.read + sides
        for plan in experiment.budgets.values()
    )


def _propagate(clock: Clock) -> float:
    """Every plan solved again from front to back: two passes per block, one chain per unit."""
    experiment = clock.experiment
    plans = len(experiment.recipe.baselines) + len(experiment.recipe.budget.each)
    passes = 2 * clock.walked(list(range(experiment.model.blocks)))
    first = {name: chains[:1] for name, chains in experiment.offers.items()}
    return plans * (passes + clock.measure(first) / clock.crew.workers)
