"""Scores on a recipe's own measurements: what they need is computed, losses are put into problems.

:func:`check_score` refuses before any work what a recipe cannot compute. :func:`pairs_of` collects
the features that are wanted, for all choices of a problem. :func:`rated` is a problem with the
losses of the recipe's key ``score``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.kernels.discovery import UnknownName
from moesaic.methods.base import Unit, reducing
from moesaic.orchestrator.choices import Choice, choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.plan_losses import Swap, sliced_loss, swap_losses
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.results import Table
from moesaic.orchestrator.score_features import gates_key, read_features, summed
from moesaic.orchestrator.stages import finished_entries
from moesaic.orchestrator.statistics import ranges
from moesaic.orchestrator.worker import plain
from moesaic.search.base import Measurement, Problem, search_module
from moesaic.search.features import (
    FEATURES,
    PIECES,
    ROUTERS,
    SWAPS,
    TABLE,
    Floats,
    Pairs,
    Rule,
    rule_of,
    scores,
)
from moesaic.search.formula import load_formula

# What search: knapsack adds up without a key score, by name: with gradients, and without.
_GRADIENT, _OUTPUT = "gradient", "output"


def rule_in(experiment: Experiment, name: str) -> Rule:
    """A score by name or file.

    Raises:
        RecipeError: there is none, or the recipe cannot compute it.
    """
    try:
        rule = rule_of(name)
    except (UnknownName, ValueError) as error:
        raise RecipeError(f"score: {error}") from None
    reason = obstacle(experiment, rule)
    if reason is not None:
        raise RecipeError(f"score: {reason}")
    return rule


def obstacle(experiment: Experiment, rule: Rule) -> str | None:
    """Why a recipe cannot compute a score, in one line; None if it can."""
    family = experiment.model.family
    if rule.wants_gradients and not experiment.recipe.calibration.gradient_sequences:
        return (
            f"{rule.name} needs gradients: set calibration.gradient_sequences to 16 or more, or"
            f" take {_OUTPUT}"
        )
    if ROUTERS in rule.sources and not any(unit.kind == "bank" for unit in experiment.units):
        return f"{rule.name} is about experts, and there are none to compress: take another one"
    if SWAPS in rule.sources and family.is_encoder:
        return f"{rule.name} measures KL, and {family.model_type} is an encoder: take another one"
    return None


def check_score(experiment: Experiment) -> None:
    """Finds out before any work whether the recipe's key ``score`` can be followed.

    Raises:
        RecipeError: naming what is wrong.
    """
    name = experiment.recipe.score
    if name is None:
        return
    rule = rule_in(experiment, name)
    strategy = experiment.recipe.search
    if hasattr(search_module(strategy), "SHARES_OUT"):
        raise RecipeError(
            f"score: search: {strategy} shares out by a rule of its own: take knapsack, or leave"
            " score out"
        )
    reduces = any(reducing(chain)[0] for chain in experiment.recipe.candidates)
    if reduces and name not in (_GRADIENT, _OUTPUT):
        raise RecipeError(
            f"score: {rule.name} does not tell what fewer or narrower experts, heads or MLPs lose:"
            f" take {_GRADIENT} or {_OUTPUT}, or candidates that reduce nothing"
        )


def is_predicted(recipe: Recipe) -> bool:
    """Whether losses that are searched are other ones than relative errors of outputs."""
    if recipe.score is None:
        return recipe.calibration.gradient_sequences > 0
    return recipe.score != _OUTPUT


def described(recipe: Recipe) -> str | None:
    """What the losses depend on besides the measurements: a score's name, or its formula."""
    if recipe.score is None or not recipe.score.endswith(".json"):
        return recipe.score
    return str(load_formula(Path(recipe.score), FEATURES))


def rated(
    experiment: Experiment, pool: Pool, view: View, table: Table, problem: Problem
) -> Problem:
    """The problem with the losses of the recipe's score; as it is, where the recipe has none."""
    name = experiment.recipe.score
    if name is None or name == _GRADIENT:
        return problem
    if name == _OUTPUT:
        return _by_output(table, problem)
    rule = rule_in(experiment, name)
    pairs = pairs_of(experiment, pool, view, table, problem, rule.needs)
    try:
        losses = pairs.losses(rule)
    except ValueError as error:
        raise RunError(f"{error}: take another score") from None
    known = dict(zip(pairs.names, losses.tolist(), strict=True))

    def scored(found: Mapping[str, Sequence[Measurement]]) -> dict[str, list[Measurement]]:
        return {
            choice: [replace(m, score=known[choice, m.chain]) for m in measured]
            for choice, measured in found.items()
        }

    return replace(problem, choices=scored(problem.choices))


def _by_output(table: Table, problem: Problem) -> Problem:
    """The problem with relative errors of outputs as losses, those of reductions too."""

    def scored(found: Mapping[str, Sequence[Measurement]]) -> dict[str, list[Measurement]]:
        return {n: [replace(m, score=None) for m in measured] for n, measured in found.items()}

    banks = {
        bank: [
            replace(
                a,
                choices=scored(a.choices),
                loss=table.reductions[bank, a.prefix].error if a.prefix else 0.0,
            )
            for a in alternatives
        ]
        for bank, alternatives in problem.banks.items()
    }
    return replace(problem, choices=scored(problem.choices), banks=banks)


def all_rules(experiment: Experiment, view: View) -> list[Rule]:
    """Every score that a recipe can compute; of the others a line is shown."""
    found = []
    for name in scores():
        rule = rule_of(name)
        reason = obstacle(experiment, rule)
        if reason is None:
            found.append(rule)
        else:
            view.line(f"left out: {reason}")
    return found


# Features of all pairs


def pairs_of(
    experiment: Experiment,
    pool: Pool,
    view: View,
    table: Table,
    problem: Problem,
    wanted: Iterable[str],
    swapped: Mapping[Swap, float] | None = None,
) -> Pairs:
    """The pairs of a problem without alternatives, with the features that are wanted.

    Args:
        swapped: KL of all swaps, where that is known.
    """
    names = {
        source: [name for name in wanted if FEATURES[name].source == source]
        for source in (TABLE, PIECES, ROUTERS, SWAPS)
    }
    places = {choice.name: (unit, choice) for unit in experiment.units for choice in choices(unit)}
    rows = [(*places[choice], m) for choice, found in problem.choices.items() for m in found]
    features: dict[str, Floats] = {}
    for name in names[TABLE]:
        values = [_of_table(name, unit, choice, m, table) for unit, choice, m in rows]
        features[name] = np.array(values, dtype=np.float64)
    swaps = list(dict.fromkeys((unit.name, m.chain) for unit, _, m in rows if m.chain))
    if names[PIECES]:
        features |= _of_pieces(experiment, pool, view, rows, swaps, names[PIECES])
    if names[ROUTERS]:
        features |= _of_routers(experiment, pool, view, rows)
    if names[SWAPS]:
        kl = swap_losses(experiment, pool, view, swaps) if swapped is None else swapped
        # KL is to the original: what slicing has lost of that is in each of them, and no swap's.
        lost = sliced_loss(experiment, pool, view)
        features["swap_kl"] = _shared_out(rows, {s: max(kl[s] - lost, 0.0) for s in swaps})
    return Pairs([(m.unit, m.chain) for _, _, m in rows], features)


Row = tuple[Unit, Choice, Measurement]


def _of_table(name: str, unit: Unit, choice: Choice, m: Measurement, table: Table) -> float:
    if name == "parameters":
        return float(math.prod(unit.shapes[choice.member][-2:]))
    if name == "influence":
        return table.influence[unit.block]
    if name == "gradient":
        assert m.score is not None, "scores that want gradients are refused where there are none"
        return m.score
    assert name == "error", f"{name} is in no table"
    return m.error


def _of_pieces(
    experiment: Experiment,
    pool: Pool,
    view: View,
    rows: Sequence[Row],
    swaps: Sequence[Swap],
    wanted: Sequence[str],
) -> dict[str, Floats]:
    """Features of finished pieces; those that lack are computed. 0 for what is left as it is."""
    keys = {swap: experiment.features_key(*swap) for swap in swaps}
    entries = finished_entries(experiment, "features", keys.values())
    missing: dict[str, list[tuple[str, str]]] = {}
    walk = experiment.walk
    for (name, chain), key in keys.items():
        if key not in entries:
            missing.setdefault(name, []).append((experiment.key(name, chain, walk), key))
    view.stage("features", len(swaps), len(swaps) - sum(map(len, missing.values())))

    def task(unit: str, pairs: list[tuple[str, str]]) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            view.advance("features", len(pairs), result["peak_bytes"])
            return ()

        job = _feature_job(experiment, unit, pairs)
        return Task("score_features:unit_features", {"job": job}, unit, done=done)

    pool.run([task(unit, pairs) for unit, pairs in missing.items()], view.tick)
    read = {
        swap: read_features(experiment.store.path("features", key)) for swap, key in keys.items()
    }
    values = np.zeros((len(wanted), len(rows)))
    for column, (unit, choice, m) in enumerate(rows):
        if m.chain:
            own = read[unit.name, m.chain]
            at = () if choice.expert is None else choice.expert
            values[:, column] = [float(own[name][choice.member][at]) for name in wanted]
    return dict(zip(wanted, values, strict=True))


def _feature_job(experiment: Experiment, unit: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    walk, store = experiment.walk, experiment.store
    block = experiment.space.by_name[unit].block
    gradients = store.path("gradients", walk.gradients_key(block)) if walk.gradients else None
    return {
        "model": walk.model,
        "dtype": walk.dtype,
        "trust_remote_code": walk.trust_remote_code,
        "unit": unit,
        "pairs": pairs,
        "stats": str(store.path("stats", walk.stats_key(block))),
        "gradients": None if gradients is None else str(gradients),
        "samples": experiment.gradient_samples(),
        "store": walk.store,
    }


def _of_routers(
    experiment: Experiment, pool: Pool, view: View, rows: Sequence[Row]
) -> dict[str, Floats]:
    """Share of tokens and mean gate of every expert; 1 for what is none."""
    walk, store = experiment.walk, experiment.store
    shards = range(walk.shards)
    parts: dict[int, Any] = {
        shard: store.get_json("scores", gates_key(walk, shard)) for shard in shards
    }
    missing = [shard for shard in shards if parts[shard] is None]
    view.stage("routers", walk.shards, walk.shards - len(missing))

    def task(own: list[int]) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            parts.update(result["found"])
            view.advance("routers", len(own), result["peak_bytes"])
            return ()

        arguments = {"walk": plain(walk), "shards": own}
        return Task("score_features:gates", arguments, f"routers {own[0]}", done=done)

    spans = ranges(len(missing), pool.size) if missing else []
    pool.run([task(missing[low:high]) for low, high in spans], view.tick)
    sums = summed([parts[shard] for shard in shards])
    tokens = experiment.calibration.ids.size
    found = {"frequency": np.ones(len(rows)), "gate": np.ones(len(rows))}
    for column, (unit, choice, _) in enumerate(rows):
        if choice.expert is not None:
            own = sums[unit.block]
            found["frequency"][column] = float(own["tokens"][choice.expert]) / tokens
            found["gate"][column] = float(own["gates"][choice.expert]) / tokens
    return found


def _shared_out(rows: Sequence[Row], kl: Mapping[Swap, float]) -> Floats:
    """What was measured of a unit, for its choices: in proportion to what is predicted."""
    parts: dict[Swap, dict[int, float]] = {}
    for index, (unit, _, m) in enumerate(rows):
        if m.chain:
            share = m.error * (m.norm or 0.0) if m.score is None else m.score
            parts.setdefault((unit.name, m.chain), {})[index] = share
    found = np.zeros(len(rows))
    for swap, own in parts.items():
        total = sum(own.values())
        for index, share in own.items():
            found[index] = kl[swap] * (share / total if total > 0 else 1 / len(own))
    return found
