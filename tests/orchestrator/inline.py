"""A stand-in for the pool: the same tasks in this process, without Ray."""

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import cache, finished_model, report, run, score_table
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.score_table import ScoreOptions
from moesaic.orchestrator.summary import RunSummary
from moesaic.orchestrator.tune import StudyOptions
from moesaic.orchestrator.verify import verify
from moesaic.orchestrator.worker import WorkerState, resolve
from tests.orchestrator.projects import make_recipe

STAGES = ("evaluate", "assemble")


class Killed(BaseException):
    """Stands for ``kill -9``: nothing of the package catches it."""


class InlinePool:
    """Runs tasks one after another, each with the state of one of ``size`` workers.

    Attributes:
        calls: how often each function was called.
        judged: arguments of the calls that judged a plan of a study.
        kill_at: number of the call that is not made, from 1; a driver dies there.
    """

    def __init__(self, size: int = 1, kill_at: int | None = None) -> None:
        self.size = size
        self.kill_at = kill_at
        self.states = [WorkerState(1) for _ in range(size)]
        self.calls: Counter[str] = Counter()
        self.judged: list[dict[str, Any]] = []

    @property
    def workers(self) -> set[int]:
        return set(range(self.size))

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *failure: object) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """There is nothing to end."""

    def run(
        self,
        tasks: Iterable[Task],
        tick: Callable[[list[str]], None] | None = None,
        meanwhile: Callable[[], bool] | None = None,
        more: Callable[[], bool] = lambda: False,
    ) -> None:
        """As :meth:`Pool.run`; tasks without affinity go round."""
        order = itertools.count()
        waiting = [(task.priority, next(order), task) for task in tasks]
        heapq.heapify(waiting)
        while waiting:
            _, number, task = heapq.heappop(waiting)
            worker = number % self.size if task.affinity is None else task.affinity
            if self.calls.total() + 1 == self.kill_at:
                raise Killed
            self.calls[task.function] += 1
            if task.function == "resident:evaluate_plan":
                self.judged.append(dict(task.arguments))
            if tick is not None:
                tick([task.label])
            while meanwhile is not None and meanwhile():
                pass
            call = resolve(task.function)
            try:
                result: Any = call(self.states[worker], **dict(task.arguments))
            except Exception as error:
                if task.failed is None:
                    raise
                following = task.failed(type(error).__name__, str(error))
            else:
                following = task.done(result)
            finally:
                cache.release_pins()  # as a worker does after a task
            for new in following:
                heapq.heappush(waiting, (new.priority, next(order), new))


class InlineVerifier:
    """As the process of its own, in this one."""

    verify = staticmethod(verify)

    def __enter__(self) -> "InlineVerifier":
        return self

    def __exit__(self, *failure: object) -> None:
        """There is nothing to end."""


class InlineTracker:
    """Stands for MLflow: remembers the trials that it is told, nothing else."""

    uri = "nowhere"

    def __init__(self, trials: list[tuple[Any, ...]]) -> None:
        self.trials = trials

    def __enter__(self) -> "InlineTracker":
        return self

    def __exit__(self, *failure: object) -> None:
        """There is nothing to end."""

    def log_trial(self, *trial: Any) -> None:
        self.trials.append(trial)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class Project:
    """A folder with a recipe that is run in this process."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.patch = folder, model, patch
        self.output = folder / "runs" / "small"
        self.calls: Counter[str] = Counter()

    def write(self, **changes: Any) -> Path:
        return make_recipe(self.folder, self.model, **changes)

    def run(
        self, size: int = 1, kill_at: int | None = None, stages: tuple[str, ...] = STAGES
    ) -> tuple[dict[str, Any], Counter[str]]:
        """What the run returns, and how often each function was called on a worker."""
        pool = InlinePool(size, kill_at)
        self.calls = pool.calls
        self.patch.setattr(run, "Pool", lambda *given: pool)
        self.patch.setattr(finished_model, "VerifierProcess", InlineVerifier)
        result = run.run_recipe(self.folder / "recipe.yaml", self.output, stages)
        return dict(result), pool.calls

    def tune(
        self,
        trials: int,
        size: int = 1,
        kill_at: int | None = None,
        assemble: bool = False,
        **options: Any,
    ) -> tuple[dict[str, Any], Counter[str]]:
        """As :meth:`run`, for a study; without MLflow and pictures, and the checkpoint where it
        is not asked for."""
        pool = InlinePool(size, kill_at)
        self.calls, self.judged = pool.calls, pool.judged
        self.tracked: list[tuple[Any, ...]] = []
        self.patch.setattr(run, "Pool", lambda *given: pool)
        self.patch.setattr(run, "Tracker", lambda *about: InlineTracker(self.tracked))
        self.patch.setattr(finished_model, "VerifierProcess", InlineVerifier)
        self.patch.setattr(report, "write_report", self._report)
        if not assemble:
            self.patch.setattr(Pipeline, "assemble", lambda this, scores: self.output / "model")
        study = StudyOptions(trials, **options)
        result = run.tune_recipe(self.folder / "recipe.yaml", self.output, study)
        return dict(result), pool.calls

    def scores(
        self,
        plans: int,
        size: int = 1,
        kill_at: int | None = None,
        pictures: bool = False,
        **options: Any,
    ) -> tuple[dict[str, Any], Counter[str]]:
        """As :meth:`run`, for a comparison of scores; without MLflow, and pictures where they are
        not asked for."""
        pool = InlinePool(size, kill_at)
        self.calls, self.judged = pool.calls, pool.judged
        self.patch.setattr(run, "Pool", lambda *given: pool)
        self.patch.setattr(run, "Tracker", lambda *about: InlineTracker([]))
        if not pictures:
            self.patch.setattr(score_table, "save", lambda wanted, folder: {})
        chosen = ScoreOptions(plans, **options)
        result = run.score_recipe(self.folder / "recipe.yaml", self.output, chosen)
        return dict(result), pool.calls

    def _report(self, summary: RunSummary, folder: Path) -> Path:
        self.summary = summary
        return folder / "report.html"

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text(encoding="utf-8"))

    def left(self) -> dict[str, bytes]:
        """Plan and checkpoint. The model card tells the scores, and these how fast it went."""
        files = [self.output / "plan.json", *(self.output / "model").iterdir()]
        return {path.name: path.read_bytes() for path in files}


def stored(experiment: Experiment, *kinds: str) -> dict[str, bytes]:
    """The tensors of all entries of these kinds, by kind and name."""
    return {
        f"{kind}/{path.name}": path.read_bytes()
        for kind in kinds
        for path in sorted((experiment.store.root / kind).glob("*/*.safetensors"))
    }


def measured_store(folder: Path, model: Path, **recipe: Any) -> Path:
    """A store in which everything is measured and no plan was judged yet."""
    with pytest.MonkeyPatch.context() as patch:
        project = Project(folder, model, patch)
        project.write(**recipe)
        project.run(stages=("measure",))
    return folder / "store"
