"""The record of a run in MLflow: params, scores, tables, files, the checkpoint, and failures.

One run per ``moesaic run``; below it a child run per plan, baseline and dense model. MLflow takes
seconds to import, so that happens where it is used.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moesaic.methods.base import Event, chain_text
from moesaic.orchestrator import mlflow_text
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.files import write_text
from moesaic.orchestrator.foreign import read_json
from moesaic.orchestrator.mlflow_connection import Connection, default_place, now_ms, pages
from moesaic.orchestrator.mlflow_models import external_model, mark_models, register
from moesaic.orchestrator.mlflow_text import choice_name, legal_name, numbers, one_line
from moesaic.orchestrator.recipe_sections import Tracking
from moesaic.orchestrator.redaction import redacted, redacted_tree
from moesaic.orchestrator.refinement import Refinement
from moesaic.search.base import Plan

if TYPE_CHECKING:
    import pandas as pd

_PARENT = "mlflow.parentRunId"
_VERB, _STUDY, _OUTPUT = "moesaic.verb", "moesaic.study", "output"
_NOW = "now."  # before the name of a param, in a tag
_MEMORY = "mlflow_run.json"


class Tracker:
    """One run in MLflow; use as a context manager around the work.

    Leaving the block ends the run as FINISHED, or as KILLED (Ctrl-C, SIGTERM) or FAILED with the
    reason in the tag ``failure``. ``OUTPUT/mlflow_run.json`` remembers the run: with the same
    verb and params, an unfinished one is continued. A study's run is found by the study, whatever
    params are others now: MLflow keeps a run's params as they were, so those stand in tags
    ``now.PARAM``. Every method logs one thing and is called once.

    Args:
        tracking: where, and under which names.
        name: of the run.
        output: folder of the run; the default database lies beside it.
        params: what distinguishes this run from others; nested mappings become ``outer.inner``.
        verb: of moesaic that this is a run of, the tag ``moesaic.verb``; another one goes on with
            no run of this one.
        study: names the study that is gone on with, whose run is gone on with also where it had
            finished; empty where there is none yet (see :meth:`belongs_to`).

    Raises:
        UserError: the recipe names what MLflow cannot have.
        RunError: MLflow cannot be reached, now or later.
    """

    def __init__(
        self,
        tracking: Tracking,
        name: str,
        output: Path,
        params: Mapping[str, Any],
        verb: str = "run",
        study: str = "",
    ) -> None:
        self.mlflow = Connection(tracking, output.resolve().parent)
        model = tracking.register_as
        if model is not None and (not model.strip() or set(model) & set("/:'")):
            raise UserError(
                f"tracking.register_as: {model!r} is no name for a model (not empty, no / : ')"
            )
        self.tracking = tracking
        self.name = name
        self.output = output
        self.verb = verb
        self.study = study
        self.params, self._long_params = mlflow_text.safe_params(redacted_tree(params))
        self.run_id = ""
        self._open_children: list[str] = []
        self._scored_children: dict[str, str] = {}
        self._trials: dict[str, tuple[str, int]] = {}  # name → child run, when it was logged
        self._known_children: dict[str, Any] | None = None
        self._scored_at = 0

    @property
    def uri(self) -> str:
        """Where to look, without a password."""
        return self.mlflow.uri

    def __enter__(self) -> "Tracker":
        self.mlflow.open()
        with self.mlflow.talk():
            self.run_id = self._of_study() or self._earlier() or self._new_run()
        memory = json.dumps({"run_id": self.run_id, "uri": self.uri}) + "\n"
        write_text(self.output / _MEMORY, memory)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = "FINISHED"
        if error is not None:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            with self.mlflow.talk():
                for child in self._open_children:
                    self.mlflow.client.set_terminated(child, status)
                if error is not None:
                    self.mlflow.client.set_tag(self.run_id, "failure", redacted(_reason(error)))
                self.mlflow.client.set_terminated(self.run_id, status)
        except RunError as unreachable:
            if error is None:
                raise
            # The error that ended the work is the one to report; this one is said beside it.
            stderr.print(f"the failure is not recorded: {unreachable}", markup=False)

    def belongs_to(self, study: str) -> None:
        """Names the study that the run is of, so that it is found by that when it goes on."""
        with self.mlflow.talk():
            self.mlflow.client.set_tag(self.run_id, _STUDY, study)

    def log_scores(
        self, scores: Mapping[str, Mapping[str, Any]], plans: Mapping[str, Plan]
    ) -> None:
        """The plan's scores on the run; on a child run each, scores, choices, predicted loss.

        Args:
            scores: ``dense``, ``plan`` and each baseline → numbers, nested ones as
                ``sources/NAME/kl``.
            plans: of all of them but ``dense``.
        """
        with self.mlflow.talk():
            known = self._children()
            self._scored_at = now_ms()
            for name, score in scores.items():
                metrics, params = numbers(score), {}
                if name in plans:
                    metrics["predicted_loss"] = plans[name].loss
                    params = _choice_counts(plans[name])
                child = self._child(name, params, known.get(name))
                self.mlflow.log(child, metrics)
                self.mlflow.client.set_terminated(child, "FINISHED")
                self._open_children.remove(child)
                self._scored_children[name] = child
            if "plan" in scores:
                self.mlflow.log(self.run_id, numbers(scores["plan"]), at=self._scored_at)

    def log_trial(
        self,
        name: str,
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        steps: Mapping[int, float],
        outcome: str,
        reason: str = "",
        plan: Callable[[], Mapping[str, Any]] | None = None,
        times: tuple[float, float] | None = None,
    ) -> None:
        """A child run for a trial of a study; nothing if an earlier attempt logged it, with the
        same params.

        Args:
            params: knobs.
            metrics: numbers.
            steps: sequences seen → KL so far, ``kl_so_far``.
            outcome: ``complete``, ``pruned`` or ``failed``, a tag.
            reason: why it failed, a tag.
            plan: makes what becomes the child's ``plan.json``.
            times: when it began and ended, seconds since 1970; now, if None.
        """
        began, at = (now_ms(), now_ms()) if times is None else (int(1000 * t) for t in times)
        with self.mlflow.talk():
            from mlflow.entities import Metric, Param

            if self._known_children is None:
                self._known_children = self._children()
            earlier = self._known_children.get(name)
            named = {legal_name(key): value for key, value in params.items()}
            if earlier is not None and not earlier.data.params.items() <= named.items():
                earlier = None  # the trial of a study that was begun anew
            if earlier is not None and earlier.info.status in ("FINISHED", "FAILED"):
                self._trials[name] = str(earlier.info.run_id), at
                return
            if earlier is None:
                tags = {_PARENT: self.run_id, "outcome": outcome}
                tags |= {"failure": redacted(reason)[:500]} if reason else {}
                run = self.mlflow.client.create_run(self.mlflow.experiment_id, began, tags, name)
                child = str(run.info.run_id)
            else:
                child = str(earlier.info.run_id)
            points = [Metric(legal_name(key), value, at, 0) for key, value in metrics.items()]
            points += [Metric("kl_so_far", value, at, step) for step, value in steps.items()]
            pairs = [Param(key, value) for key, value in named.items()]
            self.mlflow.send(child, points, pairs)
            if plan is not None:
                # As one text, and not indented: by log_dict it takes ten times as long.
                text = json.dumps(redacted_tree(plan()))
                self.mlflow.client.log_text(child, text, "plan.json")
            status = "FAILED" if outcome == "failed" else "FINISHED"
            self.mlflow.client.set_terminated(child, status, at)
            self._trials[name] = child, at

    def log_trial_models(
        self, figures: Mapping[str, Mapping[str, float]], best: str
    ) -> dict[str, str]:
        """The plans of trials that were logged before as logged models: no checkpoints, but what
        these would be made of, which the tag ``plan`` leads to.

        Tags ``front`` and ``best`` say of all models of this study's trials, those of earlier
        fronts as well, whether they are among these, and the plan that is taken.

        Args:
            figures: name of a trial → numbers; the front, and the best one.
            best: its name.

        Returns:
            name → the model's id.
        """
        found = {}
        with self.mlflow.talk(), default_place(self.mlflow.place.uri):
            for name, metrics in figures.items():
                child, at = self._trials[name]
                tags = {"plan": f"runs:/{child}/plan.json"}
                title = f"{self.name}-{name}".replace(" ", "-")
                found[name] = external_model(self.mlflow, child, title, {}, tags)
                self.mlflow.log(child, dict(metrics), model_id=found[name], at=at)
            trials = {str(run.info.run_id) for run in self._child_runs()}
            mark_models(self.mlflow, trials, set(found.values()), found[best])
        return found

    def log_description(self, text: str) -> None:
        """Markdown that MLflow shows at the top of the run's page."""
        with self.mlflow.talk():
            self.mlflow.client.set_tag(self.run_id, "mlflow.note.content", redacted(text))

    def log_table(self, frame: "pd.DataFrame") -> None:
        """One row per layer: ``layers.parquet`` to compute with, ``layers.html`` to look at."""
        with self.mlflow.talk(), tempfile.TemporaryDirectory() as folder:
            frame.to_parquet(Path(folder) / "layers.parquet")
            frame.to_html(Path(folder) / "layers.html", index=False, float_format="{:.4g}".format)
            self.mlflow.client.log_artifacts(self.run_id, folder)

    def log_files(self, paths: Iterable[Path], child: str | None = None) -> None:
        """Files by their names: recipe, plan, scores, report, pictures.

        Args:
            child: name of the child run that they belong to, of those that :meth:`log_scores` made.
        """
        run_id = self.run_id if child is None else self._scored_children[child]
        with self.mlflow.talk():
            for path in paths:
                self.mlflow.client.log_artifact(run_id, str(path))

    def log_events(self, events: Iterable[Event]) -> None:
        """How often each kind happened, ``events.KIND``, and all of them in ``events.json``."""
        listed = list(events)
        counts = Counter(event.kind for event in listed)
        metrics = {legal_name(f"events.{kind}"): n for kind, n in counts.items()}
        document = redacted_tree({"events": [asdict(event) for event in listed]})
        with self.mlflow.talk():
            self.mlflow.log(self.run_id, metrics)
            self.mlflow.client.log_dict(self.run_id, document, "events.json")

    def log_stages(self, seconds: Mapping[str, float]) -> None:
        """Wall time of each stage, ``seconds.STAGE``."""
        with self.mlflow.talk():
            self.mlflow.log(
                self.run_id, {legal_name(f"seconds.{s}"): t for s, t in seconds.items()}
            )

    def log_refinement(self, refinement: Refinement, child: str | None = None) -> None:
        """How a plan was refined: ``refine.kl``, each stage's KL, seconds, evaluations, tokens;
        ``refine.best_kl`` by evaluations.

        Args:
            child: name of the child run that it belongs to, of those that :meth:`log_scores` made.
        """
        from mlflow.entities import Metric

        run_id = self.run_id if child is None else self._scored_children[child]
        with self.mlflow.talk():
            self.mlflow.log(run_id, refinement.metrics())
            at, before, points = now_ms(), 0, []
            for stage in refinement.stages:
                points += [
                    Metric("refine.best_kl", moment.kl, at, before + moment.evaluations)
                    for moment in stage.trace
                ]
                before += stage.evaluations
            self.mlflow.send(run_id, points, [])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Numbers of the run by their names."""
        with self.mlflow.talk():
            self.mlflow.log(self.run_id, {legal_name(name): v for name, v in metrics.items()})

    def log_model(self, folder: Path, score: Mapping[str, Any], child: str | None = None) -> str:
        """The checkpoint as a logged model that points to its folder; nothing is copied.

        With ``tracking.register_as`` it becomes a version in the registry.

        Args:
            child: name of the child run that it belongs to, of those that :meth:`log_scores` made.

        Returns:
            the model's id.
        """
        path = redacted(str(folder.resolve()))
        run_id = self.run_id if child is None else self._scored_children[child]
        name = self.name if child is None else f"{self.name}-{child}"
        with self.mlflow.talk(), default_place(self.mlflow.place.uri):
            model_id = external_model(self.mlflow, run_id, name, self.params, {"path": path})
            # At the time of log_scores, these are the same points on the run, not second ones.
            at = self._scored_at or now_ms()
            self.mlflow.log(run_id, numbers(score), model_id=model_id, at=at)
            if self.tracking.register_as is not None:
                register(self.mlflow, self.tracking.register_as, run_id, model_id, path)
        return model_id

    def _of_study(self) -> str | None:
        """The last run of the study that is gone on with, running again."""
        if not self.study:
            return None
        wanted = f"tags.`{_STUDY}` = '{self.study}' AND tags.`{_VERB}` = '{self.verb}'"
        found = self.mlflow.client.search_runs(
            [self.mlflow.experiment_id],
            wanted,
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not found:
            return None
        before, now, tags = found[0].data.params, self.params, found[0].data.tags
        changed = {
            _NOW + key: now.get(key, "none")
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key)
        }
        for tag in (tag for tag in tags if tag.startswith(_NOW) and tag not in changed):
            self.mlflow.client.delete_tag(found[0].info.run_id, tag)
        for tag, value in {**changed, _OUTPUT: redacted(str(self.output.resolve()))}.items():
            self.mlflow.client.set_tag(found[0].info.run_id, tag, value)
        return self._running(found[0])

    def _earlier(self) -> str | None:
        """The run that an earlier attempt at the same has left, running again."""
        from mlflow.exceptions import MlflowException

        file = self.output / _MEMORY
        if not file.is_file():
            return None
        try:
            memory = read_json(file)
            run_id, uri = str(memory["run_id"]), memory["uri"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: is damaged; remove it") from None
        if uri != self.uri:
            return None
        try:
            run = self.mlflow.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        info = run.info
        if info.lifecycle_stage != "active":
            return None
        if info.status == "FINISHED" and not self.study:
            return None
        if run.data.tags.get(_VERB, "run") != self.verb:
            return None
        if info.experiment_id != self.mlflow.experiment_id or run.data.params != self.params:
            return None
        return self._running(run)

    def _running(self, run: Any) -> str:
        """Id of a run that is gone on with."""
        run_id = str(run.info.run_id)
        self.mlflow.client.update_run(run_id, status="RUNNING")
        if "failure" in run.data.tags:
            self.mlflow.client.delete_tag(run_id, "failure")
        return run_id

    def _new_run(self) -> str:
        tags = {
            "mlflow.source.name": "moesaic",
            _OUTPUT: redacted(str(self.output.resolve())),
            _VERB: self.verb,
        }
        run = self.mlflow.client.create_run(
            self.mlflow.experiment_id, tags=tags, run_name=self.name
        )
        run_id = str(run.info.run_id)
        self.mlflow.log(run_id, {}, self.params)
        for file, text in self._long_params.items():
            self.mlflow.client.log_text(run_id, text, file)
        return run_id

    def _children(self) -> dict[str, Any]:
        """Child runs by name, the last of each; there are some if an earlier attempt came so
        far."""
        return {run.info.run_name: run for run in self._child_runs()}

    def _child_runs(self) -> Iterator[Any]:
        """All child runs, in the order in which they began."""
        search = partial(
            self.mlflow.client.search_runs,
            [self.mlflow.experiment_id],
            filter_string=f"tags.`{_PARENT}` = '{self.run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        return pages(search)

    def _child(self, name: str, params: Mapping[str, str], earlier: Any) -> str:
        """A running child with these params: the earlier one unless it has others."""
        if earlier is not None and earlier.data.params.items() <= params.items():
            child = str(earlier.info.run_id)
            self.mlflow.client.update_run(child, status="RUNNING")
        else:
            tags = {_PARENT: self.run_id}
            run = self.mlflow.client.create_run(self.mlflow.experiment_id, tags=tags, run_name=name)
            child = str(run.info.run_id)
        self._open_children.append(child)
        self.mlflow.log(child, {}, params)
        return child


def _choice_counts(plan: Plan) -> dict[str, str]:
    counts = Counter(chain_text(chain) for chain in plan.units.values())
    return {legal_name(f"choice.{choice_name(text)}"): str(n) for text, n in counts.items()}


def _reason(error: BaseException) -> str:
    """One line; errors that were written for people speak for themselves."""
    if isinstance(error, (UserError, RunError)):
        return " ".join(redacted(str(error)).split())[:500]
    return one_line(error)
