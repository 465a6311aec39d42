"""A run from recipe to checkpoint: the order of the stages, and the files that they leave.

OUTPUT/recipe.yaml           the recipe as resolved
OUTPUT/measurements.parquet  every unit under every candidate
OUTPUT/plan.json             unit → list of specs, bytes, budget
OUTPUT/refine.json           how the plan was refined, where it was
OUTPUT/scores.json           dense model, baselines and plan on held-out text
OUTPUT/front.json            bytes against predicted loss, and the plans that there are
OUTPUT/model/                the checkpoint
OUTPUT/report.html           all of it to look at, pictures beside it

Where the recipe has a list of budgets, see :mod:`moesaic.orchestrator.budgets`.
"""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from moesaic.methods.base import Chain, Event, reducing
from moesaic.orchestrator import finalists, fronts, results, stages
from moesaic.orchestrator.assemble import folder_bytes
from moesaic.orchestrator.cache import release_pins
from moesaic.orchestrator.card import model_card
from moesaic.orchestrator.choices import chains_of
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.expert_layers import expert_layers
from moesaic.orchestrator.files import write_json, write_text
from moesaic.orchestrator.finished_model import finish_model
from moesaic.orchestrator.fronts import FrontPoint
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.measurement_table import write_measurements
from moesaic.orchestrator.mixtures import Mixtures
from moesaic.orchestrator.plan_losses import sliced_loss
from moesaic.orchestrator.plan_pieces import PlanPieces, plan_pieces
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.propagate import Propagation
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_values import portable
from moesaic.orchestrator.refine import Refining
from moesaic.orchestrator.refinement import Refinement
from moesaic.orchestrator.router_training import RouterTraining, Trained
from moesaic.orchestrator.scoring import rated
from moesaic.orchestrator.slice_stage import Slicing
from moesaic.orchestrator.slicing import dropped_share, slicing_events
from moesaic.orchestrator.summary import RunSummary
from moesaic.orchestrator.walk import Walk
from moesaic.search.alternatives import solve
from moesaic.search.base import Infeasible, Plan, Problem
from moesaic.search.front import Front

# A budget in bytes may stay unused by this share, and is searched again so often at most.
_SPARE, _REFINEMENTS = 0.001, 6
# Added to the name of a plan for its scores before the routers learnt.
BEFORE = " before router calibration"
# What a sliced model is called that is compressed no further.
_SLICED = "sliced"


class Pipeline:
    """The stages of one recipe; each does what is missing and takes the rest from the store.

    Attributes:
        studies: whether its plan comes of a study.
    """

    studies = False

    def __init__(self, experiment: Experiment, pool: Pool, view: View) -> None:
        self.experiment = experiment
        self.pool = pool
        self.view = view
        self.output = experiment.output
        self.walks: dict[str, Walk] = {}
        self.trained: dict[str, Trained | None] = {}
        self.finalists: dict[str, float] = {}
        self.refinement: Refinement | None = None
        write_text(self.output / "recipe.yaml", experiment.recipe.to_yaml())

    def under(self, recipe: Recipe, output: Path) -> "Pipeline":
        """The same for one budget of the list, once everything is measured."""
        other = Pipeline(self.experiment.under(recipe, output), self.pool, self.view)
        other.table, other.front = self.table, self.front
        return other

    def slice(self) -> None:
        """The narrower model that all other stages start from, where the recipe asks for one; and
        what is not offered."""
        for reason, count in self.experiment.space.unloadable.items():
            self.view.line(f"not offered on {count} unit(s): {reason}")
        cut, model = self.experiment.cut, self.experiment.model
        if cut is None:
            return
        Slicing(cut, self.pool, self.view).run()
        dropped = dropped_share(cut)
        size, before = (m.checkpoint.file_bytes for m in (model, self.experiment.original))
        self.view.line(
            f"slice: hidden size {self.experiment.original.hidden_size} → {cut.width},"
            f" {dropped or 0:.2%} of the residual stream is cut away; {before:,} → {size:,} bytes"
        )
        self.view.events(slicing_events(cut))

    def calibrate(self) -> None:
        """Statistics of all blocks, and gradients."""
        stages.Calibration(self.experiment, self.pool, self.view, {}).run()
        _, events = results.expert_load(self.experiment, self.experiment.walk)
        self.view.events(events)

    def measure(self) -> None:
        """Every unit under every candidate, while calibration goes on; writes the table."""
        if not self.experiment.recipe.chains():
            self._write_table()
            return
        if self.experiment.space.open_specs():
            stages.Calibration(self.experiment, self.pool, self.view, {}).run()
            self.experiment.space.close(self.experiment.walk)
        stages.Calibration(self.experiment, self.pool, self.view, self.experiment.offers).run()
        self.view.events(self.table.events)
        self._write_table()

    @cached_property
    def table(self) -> results.Table:
        return results.measurements(self.experiment)

    def _write_table(self) -> None:
        write_measurements(self.experiment, self.table, self.output / "measurements.parquet")

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """The baselines and, last, ``plan``; their bytes are those of the files, exactly."""
        found = self.baseline_plans()
        found["plan"] = self._refined(self._searched())
        return {name: replace(p, bytes=self.file_bytes(p)) for name, p in found.items()}

    def baseline_plans(self) -> dict[str, Plan]:
        """The baselines, by name."""
        everything = results.problem(self.experiment, self.table, candidates_only=False)
        return {
            name: everything.plan(self.experiment.space.everywhere(chain))
            for name, chain in self.experiment.recipe.baselines.items()
        }

    def _searched(self) -> Plan:
        """The best plan whose files fit the budget.

        Where experts may be reduced or corrections are offered it is the best of some finalists
        (see :mod:`moesaic.orchestrator.finalists`), else that of the least predicted loss.
        """
        experiment = self.experiment
        given = results.problem(experiment, self.table)
        plans: dict[str, Plan] = {}
        for name, problem in finalists.variants(self.rated(given)).items():
            try:
                plan = given.plan(self.fitted(problem).units)
            except (RecipeError, ValueError):
                if not plans:
                    raise
                continue  # no plan, or none in so few bytes, of what is left
            if plan.units not in [other.units for other in plans.values()]:
                plans[name] = plan
        if len(plans) == 1:
            return next(iter(plans.values()))
        pieces = {
            name: plan_pieces(experiment, experiment.walk, plan.units)
            for name, plan in plans.items()
        }
        losses = finalists.divergences(experiment, self.pool, self.view, pieces)
        self.finalists = {name: fmean(values) for name, values in losses.items()}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.finalists.items())
        figure = experiment.model.family.yardstick.loss.name
        name = finalists.taken(plans, losses)
        self.view.line(f"finalists, {figure} on calibration text: {shown}; taken: {name}")
        return plans[name]

    def _refined(self, start: Plan) -> Plan:
        """What the recipe's refiners make of a plan; the plan itself where it names none."""
        return start if self.experiment.recipe.refine is None else self._refine(start, self.fits)

    def _refine(
        self, start: Plan, fits: Callable[[Plan], bool], most_bytes: int | None = None
    ) -> Plan:
        """As :meth:`Refining.run`; writes how it was come by."""
        given = results.problem(self.experiment, self.table)
        refining = Refining(self.experiment, self.pool, self.view, self.rated(given))
        lost = sliced_loss(self.experiment, self.pool, self.view, refining.text.blocks)
        plan, self.refinement = refining.run(start, fits, most_bytes, lost)
        write_json(self.output / "refine.json", self.refinement.to_json())
        return given.plan(plan.units)  # with losses as they are told, whatever was searched by

    def fits(self, plan: Plan, size: int | None = None) -> bool:
        """Whether a plan's files keep to a budget in bytes; one in bits limits the units alone.

        Args:
            size: bytes of the files, where they are known.
        """
        if self.experiment.recipe.budget.bytes is None:
            size = plan.bytes
        elif size is None:
            size = self.file_bytes(plan)
        return size <= self.experiment.budget.total_bytes

    def rated(self, given: Problem) -> Problem:
        """A problem with the losses of the score that the recipe wants."""
        return rated(self.experiment, self.pool, self.view, self.table, given)

    def fitted(self, given: Problem, search: str | None = None) -> Plan:
        """The plan of least predicted loss whose files fit the budget.

        Args:
            search: instead of the recipe's strategy.

        Headers of the files are first reckoned at their bound. Where that matters (small models), a
        budget in bytes is then spent to the end: the next search gets what the last plan's headers
        did not need, as long as the files still fit.
        """
        experiment = self.experiment
        strategy = search or experiment.recipe.search
        try:
            plan = solve(given, strategy)
            if experiment.recipe.budget.bytes is None:
                return plan
            trial, total = plan, given.budget.total_bytes
            for _ in range(_REFINEMENTS):
                size = self.file_bytes(trial)
                if size <= total and trial.loss <= plan.loss:
                    plan = trial
                    if total - size < _SPARE * total:
                        break
                around = size - (trial.bytes - given.budget.fixed_bytes)
                budget = replace(given.budget, fixed_bytes=around)
                trial = given.plan(solve(replace(given, budget=budget), strategy).units)
        except Infeasible as error:
            raise RecipeError(f"budget: {error}") from None
        return plan

    def file_bytes(self, plan: Plan) -> int:
        """Bytes of the safetensors files of a plan, headers included, exactly."""
        return self.piece_bytes(*self.planned.of(plan.units))

    def piece_bytes(self, pieces: Mapping[str, str], mixtures: Mixtures) -> int:
        """The same of a plan's pieces, as :attr:`planned` gives them."""
        headers = self.planned.headers(pieces, mixtures)
        release_pins()  # their headers are all that was wanted
        return folder_bytes(self.experiment.model, headers, self.experiment.recipe.serve)

    @cached_property
    def planned(self) -> PlanPieces:
        """The pieces of any plan over the dense model's statistics, mixtures not written."""
        return PlanPieces(self.experiment, self.experiment.walk)

    def search(self) -> dict[str, Any]:
        """The plan as ``plan.json`` has it; writes it."""
        plan = self.plans["plan"]
        document = {
            **plan.to_json(),
            "budget_bytes": self.budget_bytes,
            "bits_per_weight": self.bits_per_weight("plan"),
            "search": self.experiment.recipe.search,
            "serve": self.experiment.recipe.serve,
        }
        if self.finalists:
            document["finalists"] = self.finalists
        if self.refinement is not None:
            document["refined"] = self.refinement.in_plan()
        write_json(self.output / "plan.json", document)
        self._write_front({})
        return document

    @cached_property
    def front(self) -> Front | None:
        """The predicted front of all budgets."""
        return fronts.front_of(self.experiment, self.table)

    @cached_property
    def predicted_points(self) -> list[FrontPoint]:
        """Some of it, in bytes of files that hold as much around their units as the plan's."""
        around = self.plans["plan"].bytes - self._unit_bytes("plan")
        return fronts.predicted_points(self.front, around, self.experiment.sizes.size.weights)

    @property
    def predicted_loss(self) -> str:
        """What the sums that a search makes small are called."""
        scored = all(m.score is not None for m in self.table.measurements)
        yardstick = self.experiment.model.family.yardstick
        return yardstick.predicted if scored else "relative_error"

    def _write_front(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        fronts.write_front(
            self.output / fronts.FRONT,
            self.predicted_points,
            self.plans,
            {name: self.bits_per_weight(name) for name in self.plans},
            scores,
            self.experiment.model.family.yardstick.loss.key,
            self.predicted_loss,
        )

    def propagate(self) -> None:
        """With ``propagate``, every plan solved again on its own compressed predecessors."""
        for name, plan in self.plans.items():
            if self.experiment.recipe.propagate:
                walk = Propagation(self.experiment, self.pool, self.view, name, plan.units).run()
            else:
                walk = self.experiment.walk
            self.walks[name] = walk

    def pieces(self, name: str) -> dict[str, str]:
        """Unit → file of its piece in a plan; units that stay dense are left out."""
        if name not in self.trained:
            self.trained[name] = self._trained(name)
        trained = self.trained[name]
        return self._untrained(name) if trained is None else trained.pieces

    def _untrained(self, name: str) -> dict[str, str]:
        if name not in self.walks:
            self.propagate()
        return plan_pieces(self.experiment, self.walks[name], self.plans[name].units)

    def _trained(self, name: str) -> Trained | None:
        """What router calibration made of a plan; None where it was not asked for."""
        options, units = self.experiment.recipe.router_calibration, self.experiment.space.by_name
        if options is None or not any(owner in units for owner, _ in self.reduced(name)):
            return None
        pieces = self._untrained(name)
        training = RouterTraining(self.experiment, self.pool, self.view, name, pieces, options)
        return training.run()

    def judged(self) -> dict[str, dict[str, str]]:
        """All plans as they are evaluated, and those whose routers learnt as they were before."""
        judged = {name: self.pieces(name) for name in self.plans}
        if self.experiment.cut is not None and self.experiment.recipe.candidates:
            judged = {_SLICED: {}, **judged}
        before = {
            f"{name}{BEFORE}": self._untrained(name)
            for name, trained in self.trained.items()
            if trained is not None
        }
        return {**judged, **before}

    @property
    def budget_bytes(self) -> int:
        """The limit for the plan's files. One in bits per weight limits the units: around them the
        files may hold what they do hold."""
        budget = self.experiment.budget
        if self.experiment.recipe.budget.bytes is not None:
            return budget.total_bytes
        return self.plans["plan"].bytes - self._unit_bytes("plan") + budget.unit_bytes

    def _unit_bytes(self, name: str) -> int:
        units = self.plans[name].units
        size = sum(m.bytes for m in self.table.measurements if units.get(m.unit) == m.chain)
        return size + sum(self.table.reductions[key].bytes for key in self.reduced(name))

    def reduced(self, name: str) -> list[tuple[str, Chain]]:
        """(bank or part, reducers) of what a plan reduces."""
        units, found = self.plans[name].units, {}
        for unit in self.experiment.units:
            owner = self.experiment.shaping.owners.get(unit.name)
            prefix = reducing(chains_of(unit, units)[0])[0]
            if owner is not None and prefix:
                found[owner] = prefix
        return list(found.items())

    def bits_per_weight(self, name: str) -> float:
        """Stored bits per compressible weight of a plan, or of ``dense``."""
        experiment = self.experiment
        dense = sum(experiment.sizes.dense_bytes(unit) for unit in experiment.units)
        size = dense if name in ("dense", _SLICED) else self._unit_bytes(name)
        return size * 8 / experiment.sizes.size.weights

    def bytes_of(self, name: str) -> int:
        """Bytes of the safetensors files of a plan, or of ``dense``, headers included."""
        if name == _SLICED:
            return folder_bytes(self.experiment.model, {}, self.experiment.recipe.serve)
        return self.experiment.sizes.size.dense_bytes if name == "dense" else self.plans[name].bytes

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Scores of the dense model, the baselines and the plan; writes them."""
        return self.scored(stages.evaluated(self.experiment, self.pool, self.view, self.judged()))

    def scored(self, found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Writes what an evaluation of :meth:`judged` gave, with sizes."""
        scores = self._sized(found)
        write_json(self.output / "scores.json", scores)
        self._write_front(scores)
        return scores

    def _sized(self, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Scores with the sizes they were reached at, and what they were before the routers
        learnt."""
        sized = {
            name: {
                "bytes": self.bytes_of(name),
                "bits_per_weight": self.bits_per_weight(name),
                **score,
            }
            for name, score in scores.items()
            if not name.endswith(BEFORE)
        }
        for name, score in scores.items():
            if name.endswith(BEFORE):
                figures = {key: score[key] for key in ("perplexity", "kl", "accuracy")}
                sized[name.removesuffix(BEFORE)]["before_router_calibration"] = figures
        return sized

    def assemble(self, scores: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """The checkpoint, reloaded and compared before it takes the place of an earlier one.

        Args:
            scores: for its card; those of an earlier evaluation if left out, where there are any.

        Raises:
            RunError: what was written does not compute what the pieces say; it is removed.
        """
        experiment, folder = self.experiment, self.output / "model"
        pieces = {unit: Path(path) for unit, path in self.pieces("plan").items()}
        if scores is None:
            scores = self._sized(stages.known_scores(experiment, self.judged()) or {})
        self.view.events(self._plan_events())
        card = model_card(experiment, self.plans["plan"], scores or None)
        # Nothing comes after this that needs workers.
        finish_model(experiment, self.view, pieces, card, folder, self.pool.close)
        return folder

    def summary(self, scores: Mapping[str, Mapping[str, Any]]) -> RunSummary:
        """Everything that the run has to tell."""
        experiment, recipe = self.experiment, self.experiment.recipe
        plans = dict(self.plans)
        return RunSummary(
            name=recipe.name,
            model=Path(portable(recipe.model)).name,
            created=time.strftime("%Y-%m-%d %H:%M"),
            command=shlex.join(["moesaic", *sys.argv[1:]]),
            machine=describe_machine(),
            serve=recipe.serve,
            recipe=recipe.to_yaml(),
            units=experiment.units,
            dense_unit_bytes=experiment.sizes.original_bytes(),
            dense_bytes=self.bytes_of("dense"),
            budget_bytes=self.budget_bytes,
            plan=plans.pop("plan"),
            baselines=plans,
            measurements=self.table.measurements,
            reductions=self.table.reductions,
            owners=experiment.shaping.owners,
            scores=scores,
            expert_load=self.table.load,
            experts=expert_layers(
                experiment, self.walks["plan"], self.plans["plan"].units, self.pieces("plan")
            ),
            events=self.events(),
            stage_seconds=self.view.seconds,
            yardstick=experiment.model.family.yardstick,
            refinement=self.refinement,
            predicted=self.predicted_points,
        )

    def report(self, scores: Mapping[str, Mapping[str, Any]]) -> Path:
        """``report.html`` with its pictures beside it."""
        from moesaic.orchestrator.report import write_report  # and matplotlib

        return write_report(self.summary(scores), self.output)

    def events(self) -> list[Event]:
        """What happened in calibration and to the pieces of the plan."""
        cut, trained = self.experiment.cut, self.trained.get("plan")
        before = [*(slicing_events(cut) if cut is not None else ()), *self.table.events]
        after = trained.events if trained is not None else []
        return [*before, *self._plan_events(), *after]

    def _plan_events(self) -> list[Event]:
        """What happened to the pieces of the plan."""
        events: list[Event] = []
        experiment, chosen = self.experiment, self.plans["plan"].units
        for unit in experiment.units:
            for chain in filter(None, chains_of(unit, chosen)):
                key = experiment.key(unit.name, chain, self.walks["plan"])
                entry = experiment.store.get("pieces", key)
                if entry is None:
                    raise RunError(f"{unit.name}: its piece is gone; run the same command again")
                events += [Event(**event) for event in entry.metadata["events"]]
        for owner, prefix in self.reduced("plan"):
            unit = experiment.shaping.units_of(owner)[0]
            key = experiment.reduction_key(unit.name, prefix, self.walks["plan"])
            entry = experiment.store.get("reductions", key)
            if entry is not None:
                events += [Event(**event) for event in entry.metadata["events"]]
        return events
