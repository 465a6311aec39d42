"""What a study is about: the knobs of a recipe, what trials must keep to, the text they see."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moesaic.methods.base import Unit, chain_text
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.measure import piece_key
from moesaic.orchestrator.recipe_sections import Tune
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.resident import Rows
from moesaic.orchestrator.scoring import described, is_predicted
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.study_journal import (
    CALIBRATION,
    CANDIDATES,
    MODEL,
    MODEL_NAME,
    TEXT,
    VERSION,
)
from moesaic.orchestrator.widening import check_added
from moesaic.search._sources import SOURCE
from moesaic.search.base import Layer, Measurement, search_module
from moesaic.search.knobs import Allocator, Knob, Place, narrowed

# The budget where that is an objective.
BITS = "bits_per_weight"
_BITS_STEPS = 1000  # per bit, which its lower end is rounded up to
# Shares of the text after which trials are compared.
_RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def section(experiment: Experiment) -> Tune:
    """The recipe's section ``tune``, or its defaults."""
    return experiment.recipe.tune or Tune()


def check_tune(experiment: Experiment) -> None:
    """Finds out before any work whether a recipe can be tuned, and has the knobs that it names.

    Raises:
        RecipeError: naming what is wrong.
    """
    recipe = experiment.recipe
    if recipe.budget.several:
        raise RecipeError(
            "budget: a study is made under one budget: give one, or explore all of them with"
            " tune.objectives: [bytes, kl]"
        )
    strategy = search_module(recipe.search)
    if hasattr(strategy, "smallest_bytes") or hasattr(strategy, "SHARES_OUT"):
        raise RecipeError(
            f"search: {recipe.search} does not add up losses, so there is nothing to tune: take"
            " knapsack"
        )
    if not recipe.candidates:
        raise RecipeError("candidates: there are none, so there is nothing to tune")
    if experiment.model.family.is_encoder:
        raise RecipeError(
            f"model: {experiment.model.family.model_type} is an encoder, and studies compare KL:"
            " moesaic run searches its plans by predicted distance"
        )
    if section(experiment).timed and recipe.serve != "moesaic":
        raise RecipeError(
            f"tune: latency is measured with the modules of serve: moesaic, and says nothing of"
            f" {recipe.serve}: leave it out, or change serve"
        )
    groups = section(experiment).groups
    kinds = {unit.part for unit in experiment.units}
    for name, pattern in groups.items():
        if name in kinds:
            raise RecipeError(
                f"tune.groups.{name}: {name} is a kind of part, with a weight of its own: give the"
                " group another name"
            )
        if not any(re.search(pattern, unit.name) for unit in experiment.units):
            raise RecipeError(f"tune.groups.{name}: {pattern!r} matches no unit")
    check_added(experiment)
    allocator = sized_allocator(experiment)
    check_plans(experiment, allocator, knobs_of(experiment, allocator))


def check_plans(experiment: Experiment, allocator: Allocator, knobs: Sequence[Knob]) -> None:
    """Finds out whether the knobs as the recipe wants them leave a plan within the budget, and
    within ``tune.constraints.bytes``.

    Raises:
        RecipeError: they leave none.
    """
    most, size = experiment.budget.total_bytes, experiment.sizes.size
    deciding = [knob for knob in knobs if knob.choices or knob.name == BITS]
    wishes = ", ".join(k.name for k in deciding if k.name in section(experiment).knobs)
    for knob in deciding:
        if knob.name == BITS:
            most = min(most, size.fixed_bytes + math.ceil(knob.high * size.weights / 8))
    try:
        smallest = allocator.smallest_bytes(knobs)
    except ValueError as error:
        raise RecipeError(f"tune.knobs: {wishes} leave no plan: {error}") from None
    if smallest > most:
        raise RecipeError(
            f"tune.knobs: with {wishes} as they are fixed the smallest plan has {smallest:,} bytes,"
            f" the budget is {most:,} bytes: allow more values, or give a larger budget"
        )
    # Headers are reckoned at their bound, and limited is what files really have.
    limit = limits(experiment).limits.get("bytes", math.inf)
    if smallest - size.header_bytes > limit:
        fixed = f"with {wishes} as they are fixed " if wishes else ""
        raise RecipeError(
            f"tune.constraints.bytes: {fixed}the smallest plan has {smallest:,} bytes,"
            f" {limit:,.0f} are allowed: allow more"
        )
    _check_bits(experiment, knobs)


def _check_bits(experiment: Experiment, knobs: Sequence[Knob]) -> None:
    """Refuses a range of the budget that begins beyond the recipe's own."""
    wanted = _bits(experiment, experiment.budget.total_bytes)
    for knob in knobs:
        asked = knob.name == BITS and BITS in section(experiment).knobs
        if asked and knob.low > wanted + 1 / _BITS_STEPS:
            raise RecipeError(
                f"tune.knobs.{BITS}: from {knob.low:g} on, but the budget is {wanted:.4g} bits per"
                f" weight, and the plan that is taken has to fit it: begin at {wanted:.4g} or"
                " below, or give a larger budget"
            )


def _bits(experiment: Experiment, total_bytes: int) -> float:
    """Bits per weight of the units of so many bytes in all."""
    size = experiment.sizes.size
    return (total_bytes - size.fixed_bytes) * 8 / size.weights


def sized_allocator(experiment: Experiment) -> Allocator:
    """The study's allocator as far as it is known before any work: sizes, knobs, no losses."""
    sizes = experiment.sizes
    given = replace(sizes.sized_problem(sizes.size.fixed_bytes), budget=experiment.budget)
    if is_predicted(experiment.recipe):

        def scored(
            choices: Mapping[str, Sequence[Measurement]],
        ) -> dict[str, list[Measurement]]:
            return {name: [m.scored(0.0) for m in found] for name, found in choices.items()}

        banks = {
            bank: [replace(a, choices=scored(a.choices)) for a in found]
            for bank, found in given.banks.items()
        }
        given = replace(given, choices=scored(given.choices), banks=banks)
    members = [(unit, member) for unit in experiment.units for member in unit.shapes]
    places = {f"{unit.name}.{member}": place(experiment, unit) for unit, member in members}
    layers = {f"{u.name}.{member}": Layer(math.prod(u.shapes[member])) for u, member in members}
    given = replace(given, layers=layers)
    return Allocator(given, places, experiment.recipe.search, sources(experiment))


def made_of(experiment: Experiment) -> dict[str, Any]:
    """What the plans of trials and their losses depend on, besides measurements and knobs."""
    recipe, judge, tune = experiment.recipe, experiment.calibration_judge, section(experiment)
    budget = recipe.budget
    size = f"{budget.bits_per_weight} bits per weight"
    return {
        MODEL: judge.fingerprint,
        MODEL_NAME: redacted(recipe.model),
        "dtype": judge.dtype,
        TEXT: judge.ids_digest,
        "sequences": [list(rows) for rows in rungs(experiment)],
        "budget": size if budget.bytes is None else f"{budget.bytes:,} bytes",
        CANDIDATES: list(map(chain_text, recipe.candidates)),
        "kept units": recipe.keep,
        "search": recipe.search,
        "score": described(recipe),
        "serve": recipe.serve,
        CALIBRATION: _calibrated(experiment),
        VERSION: _version(experiment),
        "groups": tune.groups,
        **({"constraints": tune.constraints} if tune.constraints else {}),
        **({"timed on": describe_machine()} if tune.timed else {}),
    }


def _calibrated(experiment: Experiment) -> dict[str, Any]:
    """What measurements follow from besides model, text and candidates, as far as it matters."""
    section, walk = experiment.recipe.calibration, experiment.walk
    gradients = experiment.gradient_tokens() // section.length
    banks = any(unit.kind == "bank" for unit in experiment.model.units())
    return {
        "shards": walk.shards,
        "gradient_sequences": gradients,
        "per_source": section.per_source,
        **({"seed": walk.seed} if gradients else {}),
        **({"experts": walk.experts} if banks else {}),
        **({"expert_tokens": walk.sampled} if walk.sampled else {}),
    }


def _version(experiment: Experiment) -> str:
    """Names the code that statistics and pieces are made by: their keys, but for all else."""
    drawn: dict[str, Any] = {"fingerprint": "", "dtype": "", "ids_digest": ""}
    asked: dict[str, Any] = {"sequences": 0, "shards": 1, "batch": 1, "needs": (), "sampled": 0}
    split: dict[str, Any] = {"experts": "routed", "sources": (), "by_source": ()}
    walk = replace(experiment.walk, **drawn, **asked, **split)
    return digest([walk.key, piece_key("", "", (), "")])


def place(experiment: Experiment, unit: Unit) -> Place:
    """Where a unit stands, and which of the recipe's groups it belongs to."""
    groups = section(experiment).groups
    inside = tuple(name for name, pattern in groups.items() if re.search(pattern, unit.name))
    return Place(unit.part, unit.block / max(experiment.model.blocks - 1, 1), inside)


def sources(experiment: Experiment) -> dict[str, int]:
    """Text source → sequences of it, where measurements tell sources apart."""
    if not experiment.recipe.calibration.per_source:
        return {}
    counts = np.bincount(experiment.calibration.source).tolist()
    return dict(zip(experiment.calibration.labels, counts, strict=False))


def all_knobs(experiment: Experiment, allocator: Allocator) -> list[Knob]:
    """What there is to vary, before the recipe fixes, narrows or widens any."""
    knobs = list(allocator.knobs)
    if "bytes" in section(experiment).objectives:
        size = experiment.sizes.size
        totals = experiment.budget.total_bytes, size.smallest_bytes, size.dense_bytes
        wanted, smallest, dense = (_bits(experiment, total) for total in totals)
        low = math.ceil(smallest * _BITS_STEPS) / _BITS_STEPS
        meaning = "the budget: stored bits per weight"
        knobs.append(Knob(BITS, meaning, max(wanted, low), low, max(min(2 * wanted, dense), low)))
    return knobs


def knobs_of(experiment: Experiment, allocator: Allocator) -> list[Knob]:
    """What the study varies, as the recipe wants it."""
    tune, knobs = section(experiment), all_knobs(experiment, allocator)
    wished = [name for name in tune.knobs if name.startswith(SOURCE)]
    if wished and not experiment.recipe.calibration.per_source:
        raise RecipeError(
            f"tune.knobs.{wished[0]}: texts are told apart with calibration.per_source: true only"
        )
    try:
        return narrowed(knobs, tune.knobs)
    except ValueError as error:
        raise RecipeError(*(f"tune.knobs.{part}" for part in str(error).split("; "))) from None


def limits(experiment: Experiment) -> Limits:
    """What trials must keep to."""
    tune = section(experiment)
    return Limits(tune.objectives, {str(name): most for name, most in tune.constraints.items()})


def rungs(experiment: Experiment) -> list[Rows]:
    """Rows of the calibration text, one range after the other."""
    tune = section(experiment)
    total = min(tune.sequences, len(experiment.calibration.ids))
    if not tune.prunes:
        return [(0, total)]
    ends = sorted({math.ceil(total * share) for share in _RUNGS})
    return list(zip([0, *ends], ends, strict=False))
