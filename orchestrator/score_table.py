"""Which score to believe: rank correlations with measured KL on plans that no score has seen.

What is measured, on calibration text by workers that keep the model: *swaps*, one unit compressed
and all others dense; and *plans*, all units compressed at random near the recipe's budget. Half of
each goes to ``emq``, which evolves a formula; the other half judges all scores, that formula
included. Nothing is compressed for it that ``moesaic measure`` does not compress, and everything
measured is in the store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.table import Table as RichTable
from scipy.sparse import csr_array
from scipy.stats import kendalltau

from moesaic.methods.base import Chain, chain_text, reducing
from moesaic.orchestrator import results
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.files import write_atomically, write_json
from moesaic.orchestrator.pictures import save
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_losses import Swap, judged_rows, plan_losses, swap_losses
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.score_pictures import scatter
from moesaic.orchestrator.scoring import all_rules, obstacle, pairs_of
from moesaic.search.base import Plan, Problem
from moesaic.search.emq import Evolved, Observed, evolve, rank_correlations
from moesaic.search.features import FEATURES, SWAPS, Floats, Pairs, Rule
from moesaic.search.random_plans import random_plans

# What the command leaves in the output folder, besides pictures.
SCORE_FILES = ("score_table.json", "score_points.parquet", "emq.json")
PLANS_KIND, SWAPS_KIND = "plans", "swaps"
# Measurements of a kind, at least: half of them must have a ranking.
FEWEST = 6
EMQ = "emq"


@dataclass(frozen=True)
class ScoreOptions:
    """What the command line says.

    Attributes:
        plans: random plans that are measured.
        swaps: swaps that are measured at most; all, if None.
        seed: of plans, of what is held out, and of the evolution.
    """

    plans: int
    swaps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Plans of one kind that were run.

    Attributes:
        names: of the plans.
        observed: their pairs and KL.
        held_out: which of them judge the scores.
    """

    names: Sequence[str]
    observed: Observed
    held_out: NDArray[np.bool_]

    def part(self, held_out: bool) -> Observed:
        return self.observed.part(np.flatnonzero(self.held_out == held_out))


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of a score with measured KL; None where it ranks nothing."""

    spearman: float | None
    kendall: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"spearman": self.spearman, "kendall": self.kendall}


@dataclass(frozen=True)
class Row:
    """A score with what it predicted for every measured plan.

    Attributes:
        predicted: kind → loss of every plan of that kind.
        agreement: kind → on held-out plans; of ``swap_kl`` not on swaps, which are what it is.
    """

    name: str
    predicted: Mapping[str, Floats]
    agreement: Mapping[str, Agreement]

    def to_json(self) -> dict[str, Any]:
        return {"score": self.name, **{k: a.to_json() for k, a in self.agreement.items()}}

    @property
    def rank(self) -> tuple[float, str]:
        """The smaller the better."""
        value = self.agreement[PLANS_KIND].spearman
        return (2.0 if value is None else -value, self.name)


def check_scores(experiment: Experiment) -> None:
    """Finds out before any work whether there is something to compare.

    Raises:
        RecipeError: naming what is wrong.
    """
    if experiment.recipe.budget.several:
        raise RecipeError("budget: scores are compared near one budget: give one, not a list")
    family = experiment.model.family
    if family.is_encoder:
        raise RecipeError(
            f"model: {family.model_type} is an encoder, and scores are compared by KL"
        )
    space = experiment.space
    only = [o for o, units in space.owners().items() if () not in space.prefixes(units)]
    if only or all(reducing(chain)[0] for chain in experiment.recipe.candidates):
        what = only[0] if only else "anything"
        raise RecipeError(
            f"candidates: none leaves the shape of {what} as it is, and scores tell nothing of"
            " reductions: add one that only compresses"
        )


class ScoredPipeline(Pipeline):
    """The stages up to measuring, then scores instead of a search."""

    def __init__(
        self, experiment: Experiment, pool: Pool, view: View, *, options: ScoreOptions
    ) -> None:
        super().__init__(experiment, pool, view)
        self.options = options

    def compare(self) -> dict[str, Any]:
        """All scores, the best first; writes table, points, formula and pictures.

        Returns:
            what ``score_table.json`` has.

        Raises:
            RunError: too few plans to tell, or none with a finite KL.
        """
        experiment, pool, view = self.experiment, self.pool, self.view
        problem = self._unreduced()
        swaps, complete = self._swaps(problem)
        rules = [r for r in all_rules(experiment, view) if complete or SWAPS not in r.sources]
        plans = random_plans(problem, self.options.plans, self.options.seed)
        swapped = swap_losses(experiment, pool, view, swaps)
        wanted = self._inputs().union(*(rule.needs for rule in rules))
        pairs = pairs_of(experiment, pool, view, self.table, problem, wanted, swapped)
        run = {PLANS_KIND: self._plans(pairs, plans), SWAPS_KIND: self._single(pairs, swapped)}
        kinds = {kind: measured for kind, measured in run.items() if measured is not None}
        if PLANS_KIND not in kinds:
            raise RunError(
                f"fewer than {FEWEST} different plans near the budget could be judged: give more"
                " candidates, or another budget"
            )
        found = self._evolved(pairs, kinds)
        emq = Rule(EMQ, found.formula.inputs, found.formula.losses)
        rows = sorted(
            (_row(rule, pairs, kinds) for rule in [*rules, emq]), key=lambda row: row.rank
        )
        document = self._document(rows, kinds, found)
        self._write(document, rows, kinds)
        return document

    def _unreduced(self) -> Problem:
        """The problem in which no bank and no part is reduced."""
        problem = results.problem(self.experiment, self.table)
        if not problem.banks:
            return problem
        self.view.line("reductions are left out: scores tell nothing of them")
        whole = {b: next(a for a in found if not a.prefix) for b, found in problem.banks.items()}
        return problem.settled(whole)

    def _swaps(self, problem: Problem) -> tuple[list[Swap], bool]:
        """Units with the chains that all of their choices offer, and whether these are all."""
        offered = {n: {m.chain for m in found} for n, found in problem.choices.items()}
        every = [
            (unit.name, chain)
            for unit in self.experiment.units
            for chain in self.experiment.offers[unit.name]
            if all(chain in offered[choice.name] for choice in choices(unit))
        ]
        most = self.options.swaps
        if most is None or most >= len(every):
            return every, True
        drawn = np.random.default_rng(self.options.seed).permutation(len(every))[:most]
        return [every[index] for index in sorted(drawn)], False

    def _inputs(self) -> frozenset[str]:
        """What formulas may be made of: all but what is measured on the very plans."""
        none = np.zeros(0)
        rules = [Rule(name, frozenset({name}), lambda features: none) for name in FEATURES]
        return frozenset(
            rule.name
            for rule in rules
            if FEATURES[rule.name].source != SWAPS and obstacle(self.experiment, rule) is None
        )

    def _plans(self, pairs: Pairs, plans: Sequence[Plan]) -> Measured | None:
        units = {f"plan {number}": plan.units for number, plan in enumerate(plans)}
        kl = plan_losses(self.experiment, self.pool, self.view, PLANS_KIND, units)
        chosen = [list(plan.units.items()) for plan in plans]
        return self._measured(PLANS_KIND, pairs, list(kl), chosen, list(kl.values()))

    def _single(self, pairs: Pairs, swapped: Mapping[Swap, float]) -> Measured | None:
        chosen = [
            [(choice.name, chain) for choice in choices(self.experiment.space.by_name[unit])]
            for unit, chain in swapped
        ]
        names = [f"{unit}: {chain_text(chain)}" for unit, chain in swapped]
        return self._measured(SWAPS_KIND, pairs, names, chosen, list(swapped.values()))

    def _measured(
        self,
        kind: str,
        pairs: Pairs,
        names: Sequence[str],
        chosen: Sequence[Sequence[tuple[str, Chain]]],
        kl: Sequence[float],
    ) -> Measured | None:
        """Plans with a finite KL, half of them held out; None where they are too few."""
        fine = np.flatnonzero(np.isfinite(kl)).tolist()
        if len(fine) < len(kl):
            self.view.line(f"{kind}: {len(kl) - len(fine)} have no finite KL and are left out")
        if len(fine) < FEWEST:
            return None
        place = {pair: column for column, pair in enumerate(pairs.names)}
        columns = [[place[pair] for pair in chosen[index]] for index in fine]
        bounds = np.cumsum([0, *map(len, columns)])
        flat = np.concatenate(columns)
        shape = (len(fine), len(pairs.names))
        members = csr_array((np.ones(len(flat)), flat, bounds), shape=shape)
        held_out = np.ones(len(fine), dtype=bool)
        order = np.random.default_rng(self.options.seed).permutation(len(fine))
        held_out[order[: len(fine) // 2]] = False
        return Measured([names[i] for i in fine], Observed(members, np.array(kl)[fine]), held_out)

    def _evolved(self, pairs: Pairs, kinds: Mapping[str, Measured]) -> Evolved:
        """The formula of emq, from what is not held out."""
        inputs = {name: pairs.features[name] for name in sorted(self._inputs())}
        errors = frozenset(name for name in inputs if FEATURES[name].error)
        training = [measured.part(held_out=False) for measured in kinds.values()]
        self.view.line("emq: evolving a formula")
        try:
            found = evolve(inputs, errors, pairs.changed, training, self.options.seed)
        except ValueError as error:
            raise RunError(str(error)) from None
        self.view.line(f"emq: {found.formula} ({found.tried:,} formulas were tried)")
        return found

    def _document(
        self, rows: Sequence[Row], kinds: Mapping[str, Measured], found: Evolved
    ) -> dict[str, Any]:
        low, high = judged_rows(self.experiment)
        return {
            "recipe": self.experiment.recipe.name,
            "budget_bytes": self.experiment.budget.total_bytes,
            "sequences": high - low,
            "seed": self.options.seed,
            "measured": {kind: len(measured.names) for kind, measured in kinds.items()},
            "held_out": {kind: int(measured.held_out.sum()) for kind, measured in kinds.items()},
            "scores": [row.to_json() for row in rows],
            EMQ: {
                "text": str(found.formula),
                "formula": found.formula.to_json(),
                "fitness": found.fitness,
                "tried": found.tried,
            },
        }

    def _write(
        self, document: Mapping[str, Any], rows: Sequence[Row], kinds: Mapping[str, Measured]
    ) -> None:
        write_json(self.output / SCORE_FILES[0], document)
        about = {key: document[key] for key in ("recipe", "seed", "measured")}
        write_json(self.output / SCORE_FILES[2], {**document[EMQ], **about})
        frames = [
            pd.DataFrame(
                {
                    "kind": kind,
                    "plan": list(measured.names),
                    "held_out": measured.held_out,
                    "kl": measured.observed.losses,
                    **{row.name: row.predicted[kind] for row in rows},
                }
            )
            for kind, measured in kinds.items()
        ]
        points = pd.concat(frames, ignore_index=True)
        write_atomically(self.output / SCORE_FILES[1], lambda path: points.to_parquet(path))
        spearman = {row.name: row.agreement[PLANS_KIND].spearman for row in rows}
        pictures = {
            f"score_{name}": partial(scatter, points, name, value)
            for name, value in spearman.items()
        }
        save(pictures, self.output / "pictures")


def _row(rule: Rule, pairs: Pairs, kinds: Mapping[str, Measured]) -> Row:
    try:
        losses = pairs.losses(rule)
    except ValueError as error:
        raise RunError(str(error)) from None
    predicted = {kind: measured.observed.predicted(losses) for kind, measured in kinds.items()}
    agreement = {
        kind: agreed(predicted[kind][m.held_out], m.observed.losses[m.held_out])
        for kind, m in kinds.items()
    }
    if SWAPS in rule.sources and SWAPS_KIND in agreement:
        agreement[SWAPS_KIND] = Agreement(None, None)
    return Row(rule.name, predicted, agreement)


def agreed(predicted: Floats, losses: Floats) -> Agreement:
    """Rank correlations of predicted and measured losses."""
    spearman = float(rank_correlations(predicted[None], losses)[0])
    kendall = float(kendalltau(predicted, losses).statistic)
    return Agreement(*(value if np.isfinite(value) else None for value in (spearman, kendall)))


def shown(document: Mapping[str, Any]) -> RichTable:
    """``score_table.json`` for people."""
    held_out = document["held_out"]
    table = RichTable(title=None, caption=f"emq: {document[EMQ]['text']}")
    table.add_column("score")
    for kind, count in held_out.items():
        name = "unseen plans" if kind == PLANS_KIND else "swaps of one unit"
        table.add_column(f"{name} ({count})\nSpearman", justify="right")
        table.add_column("\nKendall", justify="right")
    for row in document["scores"]:
        figures = [row[kind][name] for kind in held_out for name in ("spearman", "kendall")]
        texts = ("–" if figure is None else f"{figure:.3f}" for figure in figures)
        table.add_row(row["score"], *texts)
    return table


def metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """``score_table.json`` for MLflow: ``spearman.plans.SCORE`` and so on."""
    return {
        f"{name}.{kind}.{row['score']}": row[kind][name]
        for row in document["scores"]
        for kind in document["held_out"]
        for name in ("spearman", "kendall")
        if row[kind][name] is not None
    }
