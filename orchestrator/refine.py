"""Refining a plan on resident models: what a refiner asks for is work for the workers.

A refiner (:mod:`moesaic.search.refining`) says which plans it wants run on which part of the
calibration text. Every answer is in the store, under what the plan consists of and the rows, before
the refiner sees it. What it asks next depends on the answers alone, in their order; so a run that
was killed goes the same way again, reading what it knows, and comes to the same plan, whatever the
number of workers. Held-out text plays no part.

The plan that comes out is never worse on that text than the one that went in, and fits the budget
as that did.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.methods.base import Chain, Unit, reducing
from moesaic.orchestrator.choices import choices_in
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.mixtures import Mixture
from moesaic.orchestrator.plan_pieces import PlanPieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.refinement import Refinement, Stage, Watch
from moesaic.orchestrator.resident import trial_key
from moesaic.orchestrator.slopes import DENSE
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import code_digest, digest
from moesaic.orchestrator.worker import plain
from moesaic.search.base import Budget, Plan, Problem
from moesaic.search.refining import (
    Answer,
    Batch,
    Effort,
    Judged,
    Request,
    Rows,
    cut,
    refiner,
)

# Blocks that the text is cut into.
BLOCKS = 8
# Plans that are looked at, the best first, for one whose files fit a budget in bytes.
_FINALISTS = 20


def check_refine(experiment: Experiment) -> None:
    """Finds out before any work whether plans can be refined, where the recipe wants that.

    Raises:
        RecipeError: naming what is wrong.
    """
    if experiment.recipe.refine is None:
        return
    if not experiment.recipe.candidates:
        raise RecipeError("refine: there are no candidates, so there is nothing to refine")
    if experiment.model.family.is_encoder:
        raise RecipeError(
            f"refine: {experiment.model.family.model_type} is an encoder, and plans are refined by"
            " KL, which encoders have not: take the section out"
        )


def release(pool: Pool) -> None:
    """Has all workers forget the plans that they hold."""
    slots = range(pool.size)
    pool.run([Task("resident:release", {}, "release", affinity=slot) for slot in slots])


class Refining:
    """Refines plans of a recipe that has a section ``refine``."""

    def __init__(self, experiment: Experiment, pool: Pool, view: View, problem: Problem) -> None:
        assert experiment.recipe.refine is not None, "asked for where there is the section"
        self.experiment = experiment
        self.pool = pool
        self.view = view
        self.problem = problem
        self.section = experiment.recipe.refine
        sequences, length = experiment.calibration.ids.shape
        self.text = cut(min(self.section.sequences, int(sequences)), BLOCKS)
        self.tokens = int(length) - 1
        self.files = PlanFiles(experiment, problem)
        self.working = False

    def run(
        self,
        start: Plan,
        fits: Callable[[Plan], bool],
        most_bytes: int | None = None,
        lost: float = 0.0,
    ) -> tuple[Plan, Refinement]:
        """The refined plan, and how it was come by.

        Args:
            fits: tells of a plan whether it may be taken: its files keep to the budget.
            most_bytes: that a plan may have, where that is less than the problem's budget.
            lost: see :class:`moesaic.search.refining.Text`.
        """
        self.text = replace(self.text, lost=lost)
        budget = self.problem.budget
        most = budget.total_bytes if most_bytes is None else min(budget.total_bytes, most_bytes)
        # A plan may have got the bytes that headers did not need (see ``Pipeline.fitted``).
        total = max(most, start.bytes)
        given = replace(self.problem, budget=Budget(total, budget.fixed_bytes))
        plan, stages = start, []
        for name in self.section.method:
            found, stage = self._stage(name, given, plan)
            # What the refiner decided for comes first; the others are for where it does not fit.
            better = [] if found[0].plan.units == plan.units else found[:_FINALISTS]
            fitting = (j for j in better if j.kl < stage.start_kl and fits(j.plan))
            taken = next(fitting, Judged(plan, stage.start_kl))
            plan = taken.plan
            stages.append(replace(stage, kl=taken.kl))
            stage = stages[-1]
            self.view.line(stage.text())
        if self.working:
            release(self.pool)
        return plan, Refinement(self.text.total, self.tokens, tuple(stages))

    def _stage(self, name: str, problem: Problem, start: Plan) -> tuple[list[Judged], Stage]:
        section = self.section
        effort = Effort(**section.model_dump(exclude={"method", "sequences"}))
        watch = Watch(name, self.view, self.text, self.tokens, effort.passes)
        search = refiner(name).refine(problem, start, self.text, effort)
        try:
            batch = next(search)
            while True:
                watch.asked(batch)
                answers = self._answers(batch, watch)
                watch.told(batch, answers)
                if not math.isfinite(watch.start_kl):
                    raise RunError(
                        f"{name}: the KL of the plan to start from is not finite: the budget ruins"
                        " the model: give more"
                    )
                if watch.start_kl <= 0:  # only experts that no token reached are others
                    return [Judged(start, watch.start_kl)], watch.stage(watch.start_kl, begun=False)
                batch = search.send(answers)
        except StopIteration as end:
            found: list[Judged] = end.value
        return found, watch.stage(found[0].kl)

    # Answering

    def _answers(self, batch: Batch, watch: Watch) -> list[Answer]:
        """What the workers find, and what is known already, in the order of the requests."""
        works = [_Work(self, request) for request in batch.requests]
        missing = [work for work in works if work.result is None]
        if missing:
            if not self.working:
                self.working = True
                judge = self.experiment.calibration_judge
                remember_dense(self.pool, self.view, judge, self.text.blocks)
                _ = self.pool.size  # starts the workers, which is no time of the search's
                watch.started = time.monotonic()
            # The same plan by another way: asked for once.
            first = {work.key: work for work in missing}
            self.pool.run([work.task(watch) for work in first.values()], self.view.tick)
            for work in missing:
                work.result = first[work.key].result
        return [work.answer() for work in works]


class _Work:
    """A request on its way.

    Attributes:
        key: of its result in the store.
        result: what a worker found; None while it is not known.
    """

    def __init__(self, refining: Refining, request: Request) -> None:
        self.refining = refining
        self.request = request
        self.rows: Rows = refining.text.blocks[request.block]
        files, judge = refining.files, refining.experiment.calibration_judge
        self.pieces, self.mixtures = files.of(request.plan)
        self.key = trial_key(judge, self.rows, self.pieces)
        self.candidates: Mapping[str, Sequence[str]] = {}
        if request.slopes:
            self.candidates = files.candidates(request.plan)
            stems = {u: [Path(path).stem for path in paths] for u, paths in self.candidates.items()}
            code = code_digest("orchestrator/slopes.py")
            self.key = digest(["slopes", self.key, stems, code])
        self.result: Any = refining.experiment.store.get_json("scores", self.key)

    def task(self, watch: Watch) -> Task:
        """For a worker."""
        refining, plan = self.refining, self.request.plan
        arguments: dict[str, Any] = {
            "judge": plain(refining.experiment.calibration_judge),
            "rows": self.rows,
            "pieces": dict(self.pieces),
            "mixtures": dict(self.mixtures),
        }

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.result = result["kl"]
            if self.request.slopes:
                slopes = refining.files.by_choice(plan, result["slopes"])
                self.result = {"kl": result["kl"], "slopes": slopes}
            refining.experiment.store.put_json("scores", self.key, self.result)
            watch.worked(result["peak_bytes"])
            return ()

        if self.request.slopes:
            arguments["candidates"] = dict(self.candidates)
            return Task("slopes:plan_slopes", arguments, "slopes", done=done)
        arguments["total"] = refining.text.total
        return Task("resident:evaluate_plan", arguments, "plan", done=done)

    def answer(self) -> Answer:
        """In nats per token."""
        tokens, low_high = self.refining.tokens, self.rows
        if not self.request.slopes:
            return Answer([value / tokens for value in self.result])
        count = (low_high[1] - low_high[0]) * tokens
        slopes = {
            choice: [value / count for value in values]
            for choice, values in self.result["slopes"].items()
        }
        answer = Answer([value / tokens for value in self.result["kl"]], slopes)
        if not answer.steady:
            self.refining.view.line("relax: a plan whose slopes are not finite is left out")
        return answer


class PlanFiles:
    """The pieces of plans, and of what they can change to, for workers."""

    def __init__(self, experiment: Experiment, problem: Problem) -> None:
        self.experiment = experiment
        self.problem = problem
        self._pieces = PlanPieces(experiment, experiment.walk)

    def of(self, plan: Plan) -> tuple[dict[str, str], dict[str, Mixture]]:
        """Unit → file of its piece, dense ones left out, and what those are that are no files."""
        return self._pieces.of(plan.units)

    def candidates(self, plan: Plan) -> dict[str, list[str]]:
        """Unit → files of all candidates that it can change to on a straight line."""
        return {
            unit.name: [
                self._pieces.whole(unit, chain) or DENSE for chain in self._chains(unit, plan)
            ]
            for unit in self.experiment.units
        }

    def by_choice(
        self, plan: Plan, slopes: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    ) -> dict[str, list[float]]:
        """Slopes as workers give them (unit → member → candidate → expert) by choice, of each in
        the order of its measurements in the problem."""
        found: dict[str, list[float]] = {}
        for unit in self.experiment.units:
            place = {chain: n for n, chain in enumerate(self._chains(unit, plan))}
            for choice in choices_in(unit, plan.units):
                own = slopes[unit.name][choice.member]
                found[choice.name] = [
                    own[place[chain]][choice.expert or 0]
                    for chain in self._offered(choice.name, plan)
                ]
        return found

    def _chains(self, unit: Unit, plan: Plan) -> list[Chain]:
        names = [choice.name for choice in choices_in(unit, plan.units)]
        return list(dict.fromkeys(chain for name in names for chain in self._offered(name, plan)))

    def _offered(self, name: str, plan: Plan) -> list[Chain]:
        """Chains of a choice after the prefix that the plan gives it, prefix included."""
        prefix = reducing(plan.units[name])[0]
        if name in self.problem.choices:
            return [m.chain for m in self.problem.choices[name]]
        alternatives = self.problem.banks[self.experiment.shaping.owners[self._unit(name)]]
        own = next(a for a in alternatives if a.prefix == prefix)
        return [prefix + m.chain for m in own.choices[name]]

    def _unit(self, choice: str) -> str:
        """The unit of a choice."""
        if choice in self.experiment.space.by_name:
            return choice
        return choice.rsplit(".", 2)[0]
