"""The loop of a study: asks for values, has workers judge the plans that come of them, tells.

As many trials are in flight as there are workers, also where some join later; each sees more and
more of the text, and one that has fallen behind the others is given up before it has seen all (not
with several objectives). While workers are busy the next plan is made, and what was told is put on
record.

Different values often lead to the same plan. It is judged once: its KL is in the store under what
it consists of, and a trial whose plan another one is just being judged with waits for that.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.mixtures import Mixtures
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.redaction import redacted
from moesaic.orchestrator.refine import release
from moesaic.orchestrator.resident import Rows, trial_key
from moesaic.orchestrator.stages import remember_dense
from moesaic.orchestrator.study import Asked, Study, Told
from moesaic.orchestrator.study_terms import limits, rungs, section
from moesaic.orchestrator.trial_failures import NO_PLAN, NOT_FINITE, Failures
from moesaic.orchestrator.trial_plans import TrialPlans, plan_key
from moesaic.orchestrator.trial_record import Made, TrialRecord
from moesaic.orchestrator.trial_view import TrialView
from moesaic.orchestrator.worker import plain
from moesaic.search.base import Infeasible, Plan
from moesaic.search.knobs import Allocator

if TYPE_CHECKING:
    from moesaic.orchestrator.tune import TunedPipeline

# Finished trials that may wait to be put on record while plans are made for idle workers.
_MOST_WAITING = 16


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
    mixtures: Mixtures
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

    def __init__(self, pipeline: "TunedPipeline", study: Study, allocator: Allocator) -> None:
        self.pipeline = pipeline
        self.experiment = pipeline.experiment
        self.options = pipeline.options
        self.view = pipeline.view
        self.study = study
        self.plans = TrialPlans(pipeline, allocator)
        self.rungs = rungs(self.experiment)
        self.tokens = self.experiment.calibration.ids.shape[1] - 1
        self.flying: dict[str, _Job] = {}
        # Workers that trials in flight belong to.
        self.slots: set[int] = set()
        # The trial that the next idle worker takes.
        self.prepared: _Job | None = None
        self.record = TrialRecord(pipeline.tracker, self.experiment.store, self._made)
        study.is_new = self.plans.is_new
        self.failures = Failures()
        self.timed = section(self.experiment).timed
        self.limits = limits(self.experiment)
        self.shown = TrialView(self.view, self.limits, self.failures)
        # Of plans that were timed before, by their keys.
        self.latencies: dict[str, float] = {}
        # What follows from results, in their order, and is done once workers have something to do.
        self._later: list[Callable[[], None]] = []

    def run(self) -> None:
        """Trials until there are as many as wanted, or time is up."""
        known = self.study.told()
        for trial in known:
            self.plans.known.add(str(trial.attributes.get("plan")))
            self.record.add(trial)
            self._remember(trial)
            self.failures.planned |= "plan" in trial.attributes
        self.record.write()
        self.begun = len(known)
        self.shown.open(self.options.trials, known, self._front(known))
        if self.begun >= self.options.trials:
            self.shown.close()
            return
        pool, judge = self.pipeline.pool, self.experiment.calibration_judge
        remember_dense(pool, self.view, judge, self.rungs)
        self.started = time.monotonic()
        self.shown.begin(self.options.timeout)
        try:
            tasks = self._begin()
            self.study.get_ready()
            pool.run(tasks, self.shown.tick, self._meanwhile, self._more)
        except (Exception, KeyboardInterrupt):
            for finish in (self._settle, self.study.give_back, self.record.write):
                with suppress(RunError, OSError):  # what came first is what is told
                    finish()
            raise
        self._settle()
        self.study.give_back()  # what was prepared when time was up
        self.prepared = None
        self.record.write()
        self.shown.close()
        release(pool)

    def _made(self, told: Told) -> Made:
        plan = self.plans.of_told(told)
        return plan, *self.pipeline.planned.of(plan.units)

    # From trial to trial

    def _begin(self, done: int | None = None) -> list[Task]:
        """The first tasks of as many trials as can begin now.

        There are as many in flight as workers, or as ``--jobs`` says. Workers that have joined get
        theirs when one of the others is done with something.

        Args:
            done: the worker whose trial has come to its end.
        """
        if done is not None:
            self.slots.discard(done)
        workers = self.pipeline.pool.workers
        # Whoever is just done is idle; and where there is none at the moment, one is to come.
        idle = sorted(workers - self.slots, key=lambda worker: (worker != done, worker))
        most = max(1, min(self.options.jobs or len(workers), len(workers)))
        tasks: list[Task] = []
        for slot in idle or [done or 0]:
            if len(self.slots) >= most:
                break
            task = self._next(slot)
            if task is None:
                break
            self.slots.add(slot)
            tasks.append(task)
        return tasks

    def _more(self) -> bool:
        """Whether further workers would get a trial."""
        jobs, left = self.options.jobs, self.begun < self.options.trials
        wanted = jobs is None or len(self.slots) < jobs
        return wanted and (left or self.prepared is not None) and not self._late()

    def _next(self, slot: int) -> Task | None:
        """The first task of the next trial that needs one; None when there are enough."""
        while (job := self._prepared()) is not None:
            self.prepared = None
            job.started = time.monotonic()
            if job.key in self.flying:
                self._settle()  # it may have landed
            if job.key in self.flying:
                self.flying[job.key].followers.append(job.asked)
                continue
            self.flying[job.key] = job
            task = self._go_on(job, slot)
            if task is not None:
                return task
        return None

    def _prepared(self) -> _Job | None:
        """The next trial, asked and with its plan; None when there are enough, or time is up."""
        if self._late():
            return None
        while self.prepared is None and self.begun < self.options.trials:
            self._settle()  # the sampler is to know all there is
            asked = self.study.ask()
            self.begun += 1
            try:
                plan = self.plans.of_asked(asked)
            except (RecipeError, Infeasible, ValueError) as error:
                self._fail([asked], NO_PLAN, str(error))
                continue
            self.failures.planned = True
            pieces, mixtures = self.pipeline.planned.of(plan.units)
            key, size = plan_key(plan), self.pipeline.piece_bytes(pieces, mixtures)
            notes = {"plan": key, "bytes": size, "predicted_loss": plan.loss}
            self.study.note(asked, {**notes, "fits": self.pipeline.fits(plan, size)})
            self.plans.known.add(key)
            self.prepared = _Job(asked, plan, pieces, mixtures, size, key)
        return self.prepared

    def _meanwhile(self) -> bool:
        """A step of what no worker waits for: what follows from results, the next trial's plan, the
        record of finished ones. Whether there may be more."""
        self._settle()
        if self.prepared is None and self.record.waiting < _MOST_WAITING and self._prepared():
            return True
        self.record.write(1)
        return self.record.waiting > 0

    def _settle(self) -> None:
        """Does what was left for later."""
        while self._later:
            self._later.pop(0)()

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
        self._later.append(partial(self._finish, job, self._mean(job), pruned=False))
        return None

    def _timing_task(self, job: _Job, slot: int) -> Task:
        """What is left to do of a plan whose KL is known."""

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.shown.worked(result["peak_bytes"])
            job.latency = self.latencies[job.key] = result["milliseconds"]
            self._later.append(partial(self._finish, job, self._mean(job), pruned=False))
            return self._begin(done=slot)

        arguments = {
            "judge": plain(self.experiment.calibration_judge),
            "pieces": dict(job.pieces),
            "mixtures": dict(job.mixtures),
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
            self.shown.worked(result["peak_bytes"])
            self._later.append(
                partial(self._keep, trial_key(judge, rows, job.pieces), result["kl"])
            )
            task = None if self._seen(job, rows, result["kl"]) else self._go_on(job, slot)
            return self._begin(done=slot) if task is None else [task, *self._begin()]

        arguments = {
            "judge": plain(judge),
            "rows": rows,
            "pieces": dict(job.pieces),
            "mixtures": dict(job.mixtures),
            "total": self.rungs[-1][1],
            "sparing": True,
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

    def _keep(self, key: str, kl: list[float]) -> None:
        self.experiment.store.put_json("scores", key, kl)

    def _failed(self, job: _Job, slot: int, kind: str, reason: str) -> Iterable[Task]:
        del self.flying[job.key]
        self._fail(job.members, kind, reason)
        return self._begin(done=slot)

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
            self._fail(job.members, NOT_FINITE, f"its KL is {mean}")
            return True
        pruned = False
        if len(self.rungs) > 1:
            self._settle()  # it is compared with all that ended before
            pruned = self.study.behind(job.asked, len(job.kl), mean) and not last
        if not pruned and (not last or self.timed):
            return False
        self._later.append(partial(self._finish, job, mean, pruned))
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
        self._settle()
        text = " ".join(redacted(f"{kind}: {reason}").split())[:500]
        for asked in failing:
            self.study.tell_failed(asked, text)
            self.failures.reasons[text] += 1
            self.view.line(f"trial {asked.number} failed: {text}")
            self._count(asked, None)
        self.failures.happened(kind, text, drawn=failing[0].start is None)

    def _count(self, asked: Asked, job: _Job | None) -> None:
        """A trial was told; one that failed without its job."""
        if job is not None:
            self.failures.succeeded()
        every = self.study.told()
        told = next(trial for trial in reversed(every) if trial.number == asked.number)
        self.record.add(told, None if job is None else (job.plan, job.pieces, job.mixtures))
        self._remember(told)
        complete = told.state == "complete"
        self.shown.told(told, self._front(every) if complete else self.shown.front)

    def _front(self, told: Sequence[Told]) -> list[Told]:
        """What none of these trials beats; nothing with one objective."""
        if len(self.study.objectives) == 1:
            return []
        members = set(self.study.front())
        return [trial for trial in told if trial.number in members]

    def _remember(self, told: Told) -> None:
        """How long a token takes under a plan, where that was measured."""
        if "latency" in told.attributes:
            self.latencies.setdefault(told.attributes["plan"], told.attributes["latency"])
