"""A study of plans: knobs are turned, plans come out, workers that keep the model judge them.

One trial is: values for the knobs of the allocator (:mod:`moesaic.search.knobs`), the plan that
comes of them within the budget, and its KL to the dense model on calibration text. Pieces are there
already, so a trial costs what running the text costs. As many trials are in flight as there are
workers; each sees more and more of the text, and one that has fallen behind the others is given up
before it has seen all (not with several objectives). Held-out text plays no part: the best plan is
evaluated on it afterwards, assembled and reported as by ``moesaic run``.

Different values often lead to the same plan. It is judged once: its KL is in the store under what
it consists of, and a trial whose plan another one is just being judged with waits for that.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.methods.base import Unit
from moesaic.orchestrator import results
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.experiment import Experiment, plain
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.loop import WORKER_DIED
from moesaic.orchestrator.machine import describe_machine
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe import Tune
from moesaic.orchestrator.resident import Rows, trial_key
from moesaic.orchestrator.scoring import described, is_predicted
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.store import digest, write_atomically, write_json
from moesaic.orchestrator.study import JOURNAL, Asked, Study, Told
from moesaic.orchestrator.summary import RunSummary, StudySummary
from moesaic.orchestrator.track import Tracker
from moesaic.search._sources import SOURCE
from moesaic.search.alternatives import solve
from moesaic.search.base import Budget, Infeasible, Layer, Plan, search_module
from moesaic.search.knobs import GREEDY, Allocator, Knob, Place, Value, narrowed

# What a study leaves in the output folder, besides the journal.
STUDY_FILES = ("study.json", "trials.parquet")
# The budget where that is an objective.
BITS = "bits_per_weight"
# Shares of the text after which trials are compared.
_RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# Failures of one kind, one after another, that end a study.
_STREAK = 3
_NO_PLAN = "no plan"
_ADVICE = {
    WORKER_DIED: "it probably ran out of memory: fewer workers (compute.workers), or fewer"
    " sequences (calibration.length, tune.sequences)",
    "MemoryError": "fewer workers (compute.workers), or fewer sequences (tune.sequences)",
    "OutOfMemoryError": "fewer workers per GPU, or fewer sequences (tune.sequences)",
    "not finite": "the budget ruins the model: give more, or fix a knob (tune.knobs)",
}


@dataclass(frozen=True)
class StudyOptions:
    """What the command line says of a study.

    Attributes:
        trials: that the study is to have in the end, those of earlier runs included.
        timeout: seconds after which no new trial begins.
        jobs: trials in flight; as many as there are workers, if None.
        storage: the journal; OUTPUT/journal.log, if None.
        resume: whether a study that is there already may be gone on with.
    """

    trials: int
    timeout: float | None = None
    jobs: int | None = None
    storage: Path | None = None
    resume: bool = True


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
    scored = is_predicted(recipe)
    given = experiment.sized_problem(experiment.size.fixed_bytes)
    if scored:
        offers = {n: [replace(m, score=0.0) for m in ms] for n, ms in given.choices.items()}
        banks = {
            bank: [
                replace(
                    a,
                    choices={n: [replace(m, score=0.0) for m in ms] for n, ms in a.choices.items()},
                )
                for a in found
            ]
            for bank, found in given.banks.items()
        }
        given = replace(given, choices=offers, banks=banks)
    if section(experiment).timed and recipe.serve != "moesaic":
        raise RecipeError(
            f"tune: latency is measured with the modules of serve: moesaic, and says nothing of"
            f" {recipe.serve}: leave it out, or change serve"
        )
    groups = section(experiment).groups
    for name, pattern in groups.items():
        if not any(re.search(pattern, unit.name) for unit in experiment.units):
            raise RecipeError(f"tune.groups.{name}: {pattern!r} matches no unit")
    members = [(unit, member) for unit in experiment.units for member in unit.shapes]
    places = {f"{unit.name}.{member}": _place(experiment, unit) for unit, member in members}
    layers = {f"{u.name}.{member}": Layer(math.prod(u.shapes[member])) for u, member in members}
    given = replace(given, layers=layers)
    _knobs(experiment, Allocator(given, places, recipe.search, _sources(experiment)))


def _place(experiment: Experiment, unit: Unit) -> Place:
    groups = section(experiment).groups
    inside = tuple(name for name, pattern in groups.items() if re.search(pattern, unit.name))
    return Place(unit.part, unit.block / max(experiment.model.blocks - 1, 1), inside)


def _sources(experiment: Experiment) -> dict[str, int]:
    """Text source → sequences of it, where measurements tell sources apart."""
    if not experiment.recipe.calibration.per_source:
        return {}
    counts = np.bincount(experiment.calibration.source).tolist()
    return dict(zip(experiment.calibration.labels, counts, strict=False))


def _knobs(experiment: Experiment, allocator: Allocator) -> list[Knob]:
    """What the study varies, as the recipe wants it."""
    tune = section(experiment)
    knobs = list(allocator.knobs)
    if "bytes" in tune.objectives:
        size = experiment.size
        wanted, smallest, dense = (
            (total - size.fixed_bytes) * 8 / size.weights
            for total in (experiment.budget.total_bytes, size.smallest_bytes, size.dense_bytes)
        )
        low = math.ceil(smallest * 1000) / 1000
        meaning = "the budget: stored bits per weight"
        knobs.append(Knob(BITS, meaning, max(wanted, low), low, max(min(2 * wanted, dense), low)))
    sources = [name for name in tune.knobs if name.startswith(SOURCE)]
    if sources and not experiment.recipe.calibration.per_source:
        raise RecipeError(
            f"tune.knobs.{sources[0]}: texts are told apart with calibration.per_source: true only"
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
    # Whether a trial keeps to its constraints is known when it is done.
    if not tune.prune or len(tune.objectives) > 1 or tune.constraints:
        return [(0, total)]
    ends = sorted({math.ceil(total * share) for share in _RUNGS})
    return list(zip([0, *ends], ends, strict=False))


class TunedPipeline(Pipeline):
    """The stages of a recipe, with the best plan of a study in the place of the searched one."""

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

    def _searched(self) -> Plan:
        allocator = self._allocator()
        knobs = _knobs(self.experiment, allocator)
        tune = section(self.experiment)
        with Study(
            self.options.storage or self.output / JOURNAL,
            self.experiment.recipe.name,
            knobs,
            tune.objectives,
            tune.sampler,
            tune.seed,
            self._made_of(allocator),
            self._starts(allocator, knobs),
            self.options.resume,
        ) as study:
            trials = Trials(self, study, allocator)
            trials.run()
            best = self._best(study.told())
            told = results.problem(self.experiment, self.table)
            plan = told.plan(trials.plan_of(best).units)
            if trials.key(plan) != best.attributes["plan"]:
                raise RunError(
                    f"trial {best.number}: its knobs lead to another plan now than when it was"
                    f" judged: remove {study.journal} to begin anew"
                )
            self.study = self._summary(study, best)
            self._write(study)
            for number in dict.fromkeys([*self.study.front, best.number]):
                trial = self.study.trial(number)
                name, chosen = _name(number), number == best.number
                self.tracker.log_trial_model(name, trial.figures, chosen)
        return plan

    def _allocator(self) -> Allocator:
        experiment = self.experiment
        places = {
            choice.name: _place(experiment, unit)
            for unit in experiment.units
            for choice in choices(unit)
        }
        given = self.rated(results.problem(experiment, self.table))
        return Allocator(given, places, experiment.recipe.search, _sources(experiment))

    def _starts(self, allocator: Allocator, knobs: list[Knob]) -> dict[str, Mapping[str, Value]]:
        """Values to try first; where the budget is a knob, those as predicted at other sizes."""
        starts: dict[str, Mapping[str, Value]] = dict(allocator.starts())
        for knob in knobs:
            if knob.name == BITS and not knob.fixed:
                middle = float(knob.default)
                for bits in ((knob.low + middle) / 2, (middle + knob.high) / 2):
                    starts[f"as predicted, {bits:.3g} bits"] = {BITS: bits}
        return starts

    def _made_of(self, allocator: Allocator) -> dict[str, Any]:
        """What the plans of trials and their losses depend on."""
        experiment = self.experiment
        recipe, judge = experiment.recipe, experiment.calibration_judge
        constraints = section(experiment).constraints
        return {
            "model": judge.fingerprint,
            "dtype": judge.dtype,
            "calibration text": judge.ids_digest,
            "sequences": [list(rows) for rows in rungs(experiment)],
            "budget in bytes": experiment.budget.total_bytes,
            "candidates": digest([list(map(str, chain)) for chain in recipe.candidates]),
            "kept units": recipe.keep,
            "search": recipe.search,
            "score": described(recipe),
            "serve": recipe.serve,
            "groups": section(experiment).groups,
            "measurements": digest(allocator.measured()),
            **({"constraints": constraints} if constraints else {}),
            **({"timed on": describe_machine()} if section(experiment).timed else {}),
        }

    def _best(self, told: list[Told]) -> Told:
        """The best trial within the recipe's budget and the constraints.

        Raises:
            RunError: none succeeded.
        """
        best = limits(self.experiment).best(told)
        if best is None:
            reasons = dict.fromkeys(str(t.attributes.get("reason", t.state)) for t in told)
            near = limits(self.experiment).nearest(told)
            why = near or "; ".join(list(reasons)[:3]) or "none was made"
            raise RunError(f"no trial within the budget succeeded: {why}: ask for more (--trials)")
        return best

    def _summary(self, study: Study, best: Told) -> StudySummary:
        return StudySummary(
            journal=study.journal,
            objectives=tuple(study.objectives),
            sampler=study.sampler,
            knobs=tuple(study.knobs),
            trials=tuple(study.told()),
            best=best.number,
            front=tuple(study.front()) if len(study.objectives) > 1 else (),
            importances=study.importances(),
            constraints=limits(self.experiment).limits,
        )

    def _write(self, study: Study) -> None:
        assert self.study is not None, "made before"
        write_json(self.output / STUDY_FILES[0], self.study.to_json())
        table = study.table()
        write_atomically(self.output / STUDY_FILES[1], lambda path: table.to_parquet(path))

    def summary(self, scores: Mapping[str, Mapping[str, Any]]) -> RunSummary:
        return replace(super().summary(scores), study=self.study)


def _name(number: int) -> str:
    """What a trial is called on record."""
    return f"trial {number}"


def _key(pieces: Mapping[str, str]) -> str:
    """Names what a plan consists of; ``pieces`` is unit → file."""
    return digest({unit: Path(path).stem for unit, path in pieces.items()})


def _shown(told: Told) -> str:
    """A complete trial in a few words."""
    start = told.attributes.get("start")
    figures = told.figures
    timed = f", {figures['latency']:.4g} ms/token" if "latency" in figures else ""
    name = f" ({start})" if start else ""
    size = int(figures["bytes"])
    return f"trial {told.number}{name}: KL {told.kl:.4g}, {size:,} bytes{timed}"


@dataclass
class _Job:
    """A trial with its plan, while it is judged.

    Attributes:
        kl: of the sequences seen so far, nats each.
        latency: milliseconds per token, once it was timed.
        followers: trials with the same plan, told what this one is told.
    """

    asked: Asked
    plan: Plan
    pieces: Mapping[str, str]
    size: int
    key: str
    started: float = 0.0
    kl: list[float] = field(default_factory=list)
    latency: float | None = None
    followers: list[Asked] = field(default_factory=list)

    @property
    def members(self) -> list[Asked]:
        return [self.asked, *self.followers]


class Trials:
    """The loop of a study: asks, lets workers judge, tells."""

    def __init__(self, pipeline: TunedPipeline, study: Study, allocator: Allocator) -> None:
        self.pipeline = pipeline
        self.experiment = pipeline.experiment
        self.options = pipeline.options
        self.view = pipeline.view
        self.study = study
        self.allocator = allocator
        self.rungs = rungs(self.experiment)
        self.tokens = self.experiment.calibration.ids.shape[1] - 1
        self.flying: dict[str, _Job] = {}
        # The trial that the next idle worker takes, and those that are told but not on record yet.
        self.prepared: _Job | None = None
        self.unrecorded: list[tuple[Told, _Job | None]] = []
        self.finished = self.failed = self.front = 0
        self.reasons: Counter[str] = Counter()
        self.streak: list[str] = []
        self.timed = section(self.experiment).timed
        self.limits = limits(self.experiment)
        self.best: Told | None = None
        # Of plans that were timed before, by what they consist of.
        self.latencies: dict[str, float] = {}

    def run(self) -> None:
        """Trials until there are as many as wanted, or time is up."""
        known = self.study.told()
        for trial in known:
            self._track(trial)
            self._rank(trial)
        self.begun = len(known)
        self.view.stage("trials", self.options.trials, self.begun)
        if self.begun >= self.options.trials:
            return
        pool, judge = self.pipeline.pool, self.experiment.calibration_judge
        remember_dense(pool, self.view, judge, self.rungs)
        slots = range(min(self.options.jobs or pool.size, pool.size))
        self.started = time.monotonic()
        tasks = [task for slot in slots for task in self._next(slot)]
        try:
            pool.run(tasks, self._tick, self._meanwhile)
        except BaseException:
            with suppress(RunError):  # of the record: what came first is what is told
                self._record()
            raise
        self._record()
        self.view.finish("trials")
        pool.run(Task("resident:release", {}, "release", affinity=slot) for slot in slots)
        shown = "" if self.best is None else f", best {_shown(self.best)}"
        self.view.line(f"trials: {self._pace()}{shown}")
        for reason, count in self.reasons.most_common():
            self.view.line(f"failed ×{count}: {reason}")

    def plan(self, values: Mapping[str, Value], start: str | None) -> Plan:
        """The plan of some values, by the recipe's strategy unless the trial is the greedy start.

        Raises:
            RecipeError, Infeasible, ValueError: there is none.
        """
        given = self.allocator.reweighted({k: v for k, v in values.items() if k != BITS})
        search = GREEDY if start == GREEDY else self.experiment.recipe.search
        if BITS not in values:
            return self.allocator.problem.plan(self.pipeline.fitted(given, search).units)
        size = self.experiment.size
        total = size.fixed_bytes + int(float(values[BITS]) * size.weights / 8)
        given = replace(given, budget=Budget(total, size.fixed_bytes))
        found = solve(given, search)
        return self.allocator.problem.plan(found.units)

    def plan_of(self, told: Told) -> Plan:
        """The plan of a finished trial, made again."""
        return self.plan(told.values, told.attributes.get("start"))

    def key(self, plan: Plan) -> str:
        """Names what a plan consists of."""
        return _key(self._pieces(plan))

    def _pieces(self, plan: Plan) -> dict[str, str]:
        """Unit → file of its piece."""
        return plan_pieces(self.experiment, self.experiment.walk, plan.units)

    # From trial to trial

    def _next(self, slot: int) -> Iterable[Task]:
        """The first task of the next trial that needs one; nothing when there are enough."""
        while (job := self._prepared()) is not None:
            self.prepared = None
            job.started = time.monotonic()
            if job.key in self.flying:
                self.flying[job.key].followers.append(job.asked)
                continue
            self.flying[job.key] = job
            task = self._go_on(job, slot)
            if task is not None:
                return [task]
        return ()

    def _prepared(self) -> _Job | None:
        """The next trial, asked and with its plan; None when there are enough, or time is up."""
        if self._late():
            return None
        while self.prepared is None and self.begun < self.options.trials:
            asked = self.study.ask()
            self.begun += 1
            try:
                plan = self.plan(asked.values, asked.start)
            except (RecipeError, Infeasible, ValueError) as error:
                self._fail([asked], _NO_PLAN, str(error))
                continue
            pieces = self._pieces(plan)
            key, size = _key(pieces), self.pipeline.piece_bytes(pieces)
            notes = {"plan": key, "bytes": size, "predicted_loss": plan.loss}
            self.study.note(asked, {**notes, "fits": self.pipeline.fits(plan, size)})
            self.prepared = _Job(asked, plan, pieces, size, key)
        return self.prepared

    def _meanwhile(self) -> None:
        """What no worker waits for: the next trial's plan, and the record of finished ones."""
        self._prepared()
        self._record()

    def _record(self) -> None:
        """Puts trials that were told on record."""
        while self.unrecorded:
            self._track(*self.unrecorded[0])
            del self.unrecorded[0]

    def _late(self) -> bool:
        limit = self.options.timeout
        return limit is not None and time.monotonic() - self.started >= limit

    def _go_on(self, job: _Job, slot: int) -> Task | None:
        """The next piece of work of a trial; None once it is told."""
        store, judge = self.experiment.store, self.experiment.calibration_judge
        for rows in self.rungs:
            if rows[1] <= len(job.kl):
                continue
            known = store.get_json("scores", trial_key(judge, rows, job.pieces))
            if known is None:
                return self._task(job, rows, slot)
            if self._seen(job, rows, known):
                return None
        job.latency = self.latencies.get(job.key)
        if job.latency is None:
            return self._timing_task(job, slot)
        self._finish(job, self._mean(job), pruned=False)
        return None

    def _timing_task(self, job: _Job, slot: int) -> Task:
        """What is left to do of a plan whose KL is known."""

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.view.advance("trials", 0, result["peak_bytes"])
            job.latency = self.latencies[job.key] = result["milliseconds"]
            self._finish(job, self._mean(job), pruned=False)
            return self._next(slot)

        arguments = {
            "judge": plain(self.experiment.calibration_judge),
            "pieces": dict(job.pieces),
        }
        label = f"timing of trial {job.asked.number}"
        return Task(
            "latency:measure_plan",
            arguments,
            label,
            affinity=slot,
            done=done,
            failed=partial(self._failed, job, slot),
        )

    def _task(self, job: _Job, rows: Rows, slot: int) -> Task:
        judge = self.experiment.calibration_judge

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.view.advance("trials", 0, result["peak_bytes"])
            key = trial_key(judge, rows, job.pieces)
            self.experiment.store.put_json("scores", key, result["kl"])
            task = None if self._seen(job, rows, result["kl"]) else self._go_on(job, slot)
            return self._next(slot) if task is None else [task]

        arguments = {
            "judge": plain(judge),
            "rows": rows,
            "pieces": dict(job.pieces),
            "total": self.rungs[-1][1],
        }
        label = f"trial {job.asked.number}"
        return Task(
            "resident:evaluate_plan",
            arguments,
            label,
            affinity=slot,
            done=done,
            failed=partial(self._failed, job, slot),
        )

    def _failed(self, job: _Job, slot: int, kind: str, reason: str) -> Iterable[Task]:
        del self.flying[job.key]
        self._fail(job.members, kind, reason)
        return self._next(slot)

    def _mean(self, job: _Job) -> float:
        """KL in nats per token, of what was seen."""
        return math.fsum(job.kl) / int(len(job.kl) * self.tokens)

    def _seen(self, job: _Job, rows: Rows, kl: list[float]) -> bool:
        """Takes the KL of some more sequences; whether the trial has come to its end."""
        job.kl += kl
        mean = self._mean(job)
        last = rows == self.rungs[-1]
        if not math.isfinite(mean):
            del self.flying[job.key]
            self._fail(job.members, "not finite", f"its KL is {mean}")
            return True
        pruned = False
        if len(self.rungs) > 1:
            pruned = self.study.behind(job.asked, len(job.kl), mean) and not last
        if not pruned and (not last or self.timed):
            return False
        self._finish(job, mean, pruned)
        return True

    def _finish(self, job: _Job, mean: float, pruned: bool) -> None:
        """Tells a trial, and those with the same plan."""
        del self.flying[job.key]
        figures = {"kl": mean, "bytes": float(job.size)}
        if job.latency is not None:
            figures["latency"] = job.latency
        notes = {
            **({} if job.latency is None else {"latency": job.latency}),
            "sequences": len(job.kl),
            "seconds": round(time.monotonic() - job.started, 3),
        }
        for asked in job.members:
            same = {} if asked is job.asked else {"same_as": job.asked.number}
            if same and len(self.rungs) > 1:
                self.study.behind(asked, len(job.kl), mean)
            self.study.note(asked, {**notes, **same})
            if pruned:
                self.study.tell_pruned(asked)
            else:
                self.study.tell(asked, figures, self.limits.excess(figures))
            self._count(asked, job)

    def _fail(self, failing: list[Asked], kind: str, reason: str) -> None:
        """Puts failures on record.

        Raises:
            RunError: there were several of the same kind one after another.
        """
        text = " ".join(f"{kind}: {reason}".split())[:500]
        for asked in failing:
            self.study.tell_failed(asked, text)
            self.failed += 1
            self.reasons[text] += 1
            self.view.line(f"trial {asked.number} failed: {text}")
            self._count(asked, None)
        if kind == _NO_PLAN:
            return
        self.streak = [*(k for k in self.streak if k == kind), kind]
        if len(self.streak) >= _STREAK:
            advice = _ADVICE.get(kind, "--debug shows more; finished trials are kept")
            raise RunError(f"{_STREAK} trials in a row failed: {text}: {advice}")

    def _count(self, asked: Asked, job: _Job | None) -> None:
        """A trial was told; one that failed without its job."""
        self.finished += 1
        self.streak = self.streak if job is None else []
        self.view.advance("trials")
        told = next(t for t in reversed(self.study.told()) if t.number == asked.number)
        if told.state == "complete" and len(self.study.objectives) > 1:
            self.front = len(self.study.front())
        self.unrecorded.append((told, job))
        if self._rank(told):
            self.view.line(f"{_shown(told)}, the best so far; {self._pace()}")

    def _rank(self, told: Told) -> bool:
        """Whether a trial is the best so far, within the recipe's budget."""
        if "latency" in told.attributes:
            self.latencies.setdefault(told.attributes["plan"], told.attributes["latency"])
        if not self.limits.better(told, self.best):
            return False
        self.best = told
        return True

    # What people see

    def _pace(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.finished / max(minutes, 1e-9):.1f} trials/min{failed}"

    def _tick(self, running: list[str]) -> None:
        told = [] if self.best is None else [f"best {self.best.kl:.4g} (trial {self.best.number})"]
        if len(self.study.objectives) > 1:
            told.append(f"front {self.front}")
        self.view.tick([*told, self._pace()])

    def _track(self, told: Told, job: _Job | None = None) -> None:
        """Puts a trial on record, with its plan, which is made again if its job is not given."""
        notes = told.attributes
        metrics = {name: float(v) for name, v in notes.items() if isinstance(v, int | float)}
        if told.kl is not None:
            metrics["kl"] = told.kl
        params = {name: str(value) for name, value in told.values.items()}
        params |= {name: str(notes[name]) for name in ("plan", "start") if name in notes}
        reason = str(notes.get("reason", ""))
        self.pipeline.tracker.log_trial(
            _name(told.number),
            params,
            metrics,
            told.steps,
            told.state,
            reason,
            partial(self._document, told, job) if told.state == "complete" else None,
        )

    def _document(self, told: Told, job: _Job | None) -> dict[str, Any]:
        """A trial's plan as ``plan.json`` has it, and the files of its pieces in the store."""
        plan = job.plan if job else self.plan_of(told)
        pieces = job.pieces if job else self._pieces(plan)
        root = self.experiment.store.root
        return {
            **plan.to_json(),
            "file_bytes": told.attributes["bytes"],
            "store": self.experiment.store.where,
            "pieces": {unit: str(Path(path).relative_to(root)) for unit, path in pieces.items()},
        }
