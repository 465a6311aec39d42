"""A study of plans: knobs are turned, plans come out, workers that keep the model judge them.

One trial is: values for the knobs of the allocator (:mod:`moesaic.search.knobs`), the plan that
comes of them within the budget, and its KL to the dense model on calibration text. Pieces are there
already, so a trial costs what running the text costs (:mod:`moesaic.orchestrator.trials`). Held-out
text plays no part: the best plan is evaluated on it afterwards, assembled and reported as by
``moesaic run``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.methods.base import Event
from moesaic.orchestrator import results
from moesaic.orchestrator.budgets import STUDY_FILES
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View, stderr
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.files import write_atomically, write_json
from moesaic.orchestrator.kept_limits import KeptLimits
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.study import JOURNAL, Study, Told, facts
from moesaic.orchestrator.study_baselines import judged_baselines
from moesaic.orchestrator.study_journal import ASIDE, KNOBS, MEASUREMENTS, check_journal
from moesaic.orchestrator.study_terms import (
    BITS,
    all_knobs,
    check_plans,
    check_tune,
    knobs_of,
    limits,
    made_of,
    place,
    section,
    sized_allocator,
    sources,
)
from moesaic.orchestrator.summary import RunSummary, StudySummary
from moesaic.orchestrator.track import Tracker
from moesaic.orchestrator.trial_failures import why_none
from moesaic.orchestrator.trial_plans import is_plan_of
from moesaic.orchestrator.trial_record import trial_name
from moesaic.orchestrator.trials import Trials
from moesaic.orchestrator.widening import added_text
from moesaic.search._starts import within
from moesaic.search.base import Plan
from moesaic.search.knobs import PREDICTED, Allocator, Knob, Value


@dataclass(frozen=True)
class StudyOptions:
    """What the command line says of a study.

    Attributes:
        trials: that the study is to have in the end, those of earlier runs included.
        timeout: seconds after which no new trial begins, from when the first one may.
        jobs: trials in flight; as many as there are workers, if None.
        storage: the journal; OUTPUT/journal.log, if None.
        resume: whether a study that is there already may be gone on with.
    """

    trials: int
    timeout: float | None = None
    jobs: int | None = None
    storage: Path | None = None
    resume: bool = True


def check_study(experiment: Experiment, options: StudyOptions) -> None:
    """Finds out before any work whether a recipe can be tuned and its study begun or gone on with;
    changes nothing.

    Raises:
        UserError: naming what is wrong.
    """
    check_tune(experiment)
    name, objectives = experiment.recipe.name, section(experiment).objectives
    knobs = knobs_of(experiment, sized_allocator(experiment))
    journal = options.storage or experiment.output / JOURNAL
    # Where layers are still to share out their experts, other options are there afterwards.
    unknown = (MEASUREMENTS, KNOBS) if experiment.space.open_specs() else (MEASUREMENTS,)
    wanted = facts(made_of(experiment), knobs, objectives)
    doubt = check_journal(journal, name, wanted, options.resume, unknown)
    if doubt is not None:
        stderr.print(doubt, markup=False)


def study_id(experiment: Experiment, options: StudyOptions) -> str:
    """Names a study on record: by its journal, its name there, and what it is made of.

    What it measures is left out, which is not known from the start and the same where it goes on,
    and what may then be something else.
    """
    journal = (options.storage or experiment.output / JOURNAL).resolve()
    facts = {name: fact for name, fact in made_of(experiment).items() if name not in ASIDE}
    objectives = section(experiment).objectives
    return digest([str(journal), experiment.recipe.name, facts, objectives])


class TunedPipeline(Pipeline):
    """The stages of a recipe, with the best plan of a study in the place of the searched one."""

    studies = True

    def __init__(
        self,
        experiment: Experiment,
        pool: Pool,
        view: View,
        *,
        options: StudyOptions,
        tracker: Tracker,
    ) -> None:
        super().__init__(experiment, pool, view)
        self.options = options
        self.tracker = tracker
        self.study: StudySummary | None = None
        self.best: Told | None = None
        self.refining_events: list[Event] = []

    def measure(self) -> None:
        more = added_text(self.experiment)
        if more is not None:
            self.view.line(more)
        super().measure()

    def _searched(self) -> Plan:
        allocator = self._allocator()
        knobs = knobs_of(self.experiment, allocator)
        check_plans(self.experiment, allocator, knobs)
        tune = section(self.experiment)
        with Study(
            self.options.storage or self.output / JOURNAL,
            self.experiment.recipe.name,
            knobs,
            tune.objectives,
            tune.sampler,
            tune.seed,
            {**made_of(self.experiment), MEASUREMENTS: digest(allocator.measured())},
            self._starts(allocator, knobs),
            self.options.resume,
        ) as study:
            trials = Trials(self, study, allocator)
            trials.run()
            self.best = best = self._best(study.told())
            told = results.problem(self.experiment, self.table)
            plan = told.plan(trials.plans.of_told(best).units)
            if not is_plan_of(best, plan):
                raise RunError(
                    f"trial {best.number}: its knobs lead to another plan now than when it was"
                    f" judged: remove {study.journal} to begin anew"
                )
            self.study = self._summary(study, best)
            self._write()
            table = study.table()
            write_atomically(self.output / STUDY_FILES[1], lambda path: table.to_parquet(path))
            if len(study.objectives) > 1:
                self.study = replace(self.study, baselines=judged_baselines(self))
                self._write()
            numbers = dict.fromkeys([*self.study.front, best.number])
            figures = {trial_name(number): self.study.trial(number).figures for number in numbers}
            self.tracker.log_trial_models(figures, trial_name(best.number))
        return plan

    def _refined(self, start: Plan) -> Plan:
        """What refiners make of the study's plan within what the study keeps to."""
        if self.experiment.recipe.refine is None:
            return start
        assert self.best is not None, "its plan is refined"
        kept = KeptLimits(self, limits(self.experiment), self.best)
        plan = self._refine(start, kept.keeps, kept.most_bytes)
        kept.release()
        self.refining_events = kept.events(plan.units == start.units)
        self.view.events(self.refining_events)
        return plan

    def events(self) -> list[Event]:
        return [*super().events(), *self.refining_events]

    def _allocator(self) -> Allocator:
        experiment = self.experiment
        places = {
            choice.name: place(experiment, unit)
            for unit in experiment.units
            for choice in choices(unit)
        }
        given = self.rated(results.problem(experiment, self.table))
        return Allocator(given, places, experiment.recipe.search, sources(experiment))

    def _starts(self, allocator: Allocator, knobs: list[Knob]) -> dict[str, Mapping[str, Value]]:
        """Values to try first; where the budget is a knob, those as predicted at other sizes."""
        starts: dict[str, Mapping[str, Value]] = dict(allocator.starts())
        for knob in knobs:
            if knob.name == BITS and not knob.fixed:
                middle = float(knob.default)
                for bits in ((knob.low + middle) / 2, (middle + knob.high) / 2):
                    starts[f"{PREDICTED}, {bits:.3g} bits"] = {BITS: bits}
        return within(starts, all_knobs(self.experiment, allocator), knobs)

    def _best(self, told: list[Told]) -> Told:
        """The best trial within the recipe's budget and the constraints.

        Raises:
            RunError: none succeeded.
        """
        best = limits(self.experiment).best(told)
        if best is None:
            why = why_none(told, limits(self.experiment), self.options.timeout)
            raise RunError(f"no trial within the budget succeeded: {why}")
        return best

    def _summary(self, study: Study, best: Told) -> StudySummary:
        found = study.importances(BITS)
        return StudySummary(
            journal=study.journal,
            objectives=tuple(study.objectives),
            sampler=study.sampler,
            knobs=tuple(study.knobs),
            trials=tuple(study.told()),
            best=best.number,
            front=tuple(study.front()) if len(study.objectives) > 1 else (),
            importances=found.shares,
            untold=found.untold,
            constraints=limits(self.experiment).limits,
        )

    def _write(self) -> None:
        assert self.study is not None, "made before"
        write_json(self.output / STUDY_FILES[0], self.study.to_json())

    def summary(self, scores: Mapping[str, Mapping[str, Any]]) -> RunSummary:
        return replace(super().summary(scores), study=self.study)
