"""The record of a run in MLflow: params, scores, tables, files, the checkpoint, and failures.

One run per ``moesaic run``; below it a child run per plan, baseline and dense model. MLflow takes
seconds to import, so that happens where it is used.
"""

import errno
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moesaic.methods.base import Event, chain_text
from moesaic.orchestrator import mlflow_text
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.foreign import read_json
from moesaic.orchestrator.mlflow_database import (
    ANSWER_SECONDS,
    make_database,
    open_client,
    try_database,
)
from moesaic.orchestrator.mlflow_text import choice_name, legal_name, numbers, one_line
from moesaic.orchestrator.process import answered
from moesaic.orchestrator.recipe_sections import Tracking
from moesaic.orchestrator.redaction import redacted, redacted_tree
from moesaic.orchestrator.refinement import Refinement
from moesaic.orchestrator.store import disk_errors, disk_is_full, write_text
from moesaic.search.base import Plan

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Metric, Param

_PARENT = "mlflow.parentRunId"
_VERB, _STUDY, _OUTPUT = "moesaic.verb", "moesaic.study", "output"
_NOW = "now."  # before the name of a param, in a tag
_MEMORY = "mlflow_run.json"
# What MLflow takes in one call.
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100


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
        self.place = mlflow_text.place(tracking.uri, output.resolve().parent)
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
        self._experiment_id = ""
        self._client: Any = None
        self._open_children: list[str] = []
        self._scored_children: dict[str, str] = {}
        self._trials: dict[str, tuple[str, int]] = {}  # name → child run, when it was logged
        self._known_children: dict[str, Any] | None = None
        self._scored_at = 0

    @property
    def uri(self) -> str:
        """Where to look, without a password."""
        return self.place.shown

    def __enter__(self) -> "Tracker":
        # A server that is down is found out at once; one that fails later may come back.
        with self._talk(retries=0, timeout_seconds=8):
            if self.place.file is not None:
                make_database(self.place.file)
            elif self.place.database:
                try_database(self.place.uri)
            server = self.place.database and self.place.file is None
            self._client = open_client(self.place.uri, server)
            self._experiment_id = self._experiment()
        with self._talk():
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
            with self._talk():
                for child in self._open_children:
                    self._client.set_terminated(child, status)
                if error is not None:
                    self._client.set_tag(self.run_id, "failure", redacted(_reason(error)))
                self._client.set_terminated(self.run_id, status)
        except RunError as unreachable:
            if error is None:
                raise
            # The error that ended the work is the one to report; this one is said beside it.
            stderr.print(f"the failure is not recorded: {unreachable}", markup=False)

    def belongs_to(self, study: str) -> None:
        """Names the study that the run is of, so that it is found by that when it goes on."""
        with self._talk():
            self._client.set_tag(self.run_id, _STUDY, study)

    def log_scores(
        self, scores: Mapping[str, Mapping[str, Any]], plans: Mapping[str, Plan]
    ) -> None:
        """The plan's scores on the run; on a child run each, scores, choices, predicted loss.

        Args:
            scores: ``dense``, ``plan`` and each baseline → numbers, nested ones as
                ``sources/NAME/kl``.
            plans: of all of them but ``dense``.
        """
        with self._talk():
            known = self._children()
            self._scored_at = _now()
            for name, score in scores.items():
                metrics, params = numbers(score), {}
                if name in plans:
                    metrics["predicted_loss"] = plans[name].loss
                    params = _choice_counts(plans[name])
                child = self._child(name, params, known.get(name))
                self._log(child, metrics)
                self._client.set_terminated(child, "FINISHED")
                self._open_children.remove(child)
                self._scored_children[name] = child
            if "plan" in scores:
                self._log(self.run_id, numbers(scores["plan"]), at=self._scored_at)

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
        began, at = (_now(), _now()) if times is None else (int(1000 * t) for t in times)
        with self._talk():
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
                run = self._client.create_run(self._experiment_id, began, tags, name)
                child = str(run.info.run_id)
            else:
                child = str(earlier.info.run_id)
            points = [Metric(legal_name(key), value, at, 0) for key, value in metrics.items()]
            points += [Metric("kl_so_far", value, at, step) for step, value in steps.items()]
            pairs = [Param(key, value) for key, value in named.items()]
            self._send(child, points, pairs)
            if plan is not None:
                # As one text, and not indented: by log_dict it takes ten times as long.
                self._client.log_text(child, redacted(json.dumps(plan())), "plan.json")
            status = "FAILED" if outcome == "failed" else "FINISHED"
            self._client.set_terminated(child, status, at)
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
        with self._talk(), _default_place(self.place.uri):
            for name, metrics in figures.items():
                child, at = self._trials[name]
                tags = {"plan": f"runs:/{child}/plan.json"}
                title = f"{self.name}-{name}".replace(" ", "-")
                found[name] = self._external_model(child, title, {}, tags)
                self._log(child, dict(metrics), model_id=found[name], at=at)
            self._mark(set(found.values()), found[best])
        return found

    def log_description(self, text: str) -> None:
        """Markdown that MLflow shows at the top of the run's page."""
        with self._talk():
            self._client.set_tag(self.run_id, "mlflow.note.content", redacted(text))

    def log_table(self, frame: "pd.DataFrame") -> None:
        """One row per layer: ``layers.parquet`` to compute with, ``layers.html`` to look at."""
        with self._talk(), tempfile.TemporaryDirectory() as folder:
            frame.to_parquet(Path(folder) / "layers.parquet")
            frame.to_html(Path(folder) / "layers.html", index=False, float_format="{:.4g}".format)
            self._client.log_artifacts(self.run_id, folder)

    def log_files(self, paths: Iterable[Path], child: str | None = None) -> None:
        """Files by their names: recipe, plan, scores, report, pictures.

        Args:
            child: name of the child run that they belong to, of those that :meth:`log_scores` made.
        """
        run_id = self.run_id if child is None else self._scored_children[child]
        with self._talk():
            for path in paths:
                self._client.log_artifact(run_id, str(path))

    def log_events(self, events: Iterable[Event]) -> None:
        """How often each kind happened, ``events.KIND``, and all of them in ``events.json``."""
        listed = list(events)
        counts = Counter(event.kind for event in listed)
        with self._talk():
            self._log(self.run_id, {legal_name(f"events.{kind}"): n for kind, n in counts.items()})
            document = [asdict(event) for event in listed]
            self._client.log_dict(self.run_id, redacted_tree({"events": document}), "events.json")

    def log_stages(self, seconds: Mapping[str, float]) -> None:
        """Wall time of each stage, ``seconds.STAGE``."""
        with self._talk():
            self._log(self.run_id, {legal_name(f"seconds.{s}"): t for s, t in seconds.items()})

    def log_refinement(self, refinement: Refinement, child: str | None = None) -> None:
        """How a plan was refined: ``refine.kl``, each stage's KL, seconds, evaluations, tokens;
        ``refine.best_kl`` by evaluations.

        Args:
            child: name of the child run that it belongs to, of those that :meth:`log_scores` made.
        """
        from mlflow.entities import Metric

        run_id = self.run_id if child is None else self._scored_children[child]
        with self._talk():
            self._log(run_id, refinement.metrics())
            at, before, points = _now(), 0, []
            for stage in refinement.stages:
                points += [
                    Metric("refine.best_kl", moment.kl, at, before + moment.evaluations)
                    for moment in stage.trace
                ]
                before += stage.evaluations
            self._send(run_id, points, [])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Numbers of the run by their names."""
        with self._talk():
            self._log(self.run_id, {legal_name(name): v for name, v in metrics.items()})

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
        with self._talk(), _default_place(self.place.uri):
            model_id = self._external_model(run_id, name, self.params, {"path": path})
            # At the time of log_scores, these are the same points on the run, not second ones.
            at = self._scored_at or _now()
            self._log(run_id, numbers(score), model_id=model_id, at=at)
            if self.tracking.register_as is not None:
                self._register(self.tracking.register_as, run_id, model_id, path)
        return model_id

    def _mark(self, front: set[str], best: str) -> None:
        """Says of the models of all trials whether they are on the front and the best one.

        Args:
            front, best: ids of models.
        """
        trials = {run.info.run_id for run in self._child_runs()}
        models = _pages(partial(self._client.search_logged_models, [self._experiment_id]))
        for model in models:
            if model.source_run_id not in trials or "plan" not in model.tags:
                continue
            true = {"front": model.model_id in front, "best": model.model_id == best}
            tags = {name: str(value).lower() for name, value in true.items()}
            if not tags.items() <= model.tags.items():
                self._client.set_logged_model_tags(model.model_id, tags)

    def _external_model(
        self, run_id: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """Id of a run's model with these tags; made if it is missing."""
        import mlflow
        from mlflow.entities import LoggedModelOutput

        found = self._client.search_logged_models(
            [self._experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        model = next((m for m in found if m.tags.items() >= tags.items()), None)
        if model is None:
            make = partial(
                mlflow.create_external_model,
                # A dot is legal in a run's name but not in a model's.
                name=name.replace(".", "_"),
                source_run_id=run_id,
                params=dict(params),
                tags=dict(tags),
                experiment_id=self._experiment_id,
            )
            model = answered(make, ANSWER_SECONDS)
            outputs = [LoggedModelOutput(model.model_id, step=0)]
            self._client.log_outputs(run_id, models=outputs)
        return str(model.model_id)

    def _register(self, name: str, run_id: str, model_id: str, path: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = _pages(partial(self._client.search_model_versions, f"name = '{name}'"))
        if not any(version.run_id == run_id for version in versions):
            self._client.create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=run_id,
                tags={"path": path},
                model_id=model_id,
            )

    @contextmanager
    def _talk(self, retries: int = 3, timeout_seconds: int = 30) -> Iterator[None]:
        """MLflow imported and quiet; its errors as one line that says where it was.

        What the user has set in the environment stays.
        """
        defaults = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds),
        }
        missing = {key: value for key, value in defaults.items() if key not in os.environ}
        os.environ.update(missing)
        try:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            for chatty in ("mlflow", "alembic"):
                logging.getLogger(chatty).setLevel(logging.ERROR)
            try:
                yield
            except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
                _raise_if_full(error, self.place.file)
                reason = redacted(one_line(error))
                raise RunError(f"tracking: MLflow at {self.uri}: {reason}") from error
        finally:
            for key in missing:
                os.environ.pop(key, None)

    def _experiment(self) -> str:
        """Id of the experiment; made if it is missing."""
        from mlflow.exceptions import MlflowException

        name = self.tracking.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            folder = self.place.artifacts
            try:
                return str(
                    self._client.create_experiment(
                        name,
                        artifact_location=folder.as_uri() if folder else None,
                        tags={"mlflow.experimentKind": "custom_model_development"},
                    )
                )
            except MlflowException as error:
                # Another run of the same moment was faster.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: {name!r} was deleted in {self.uri}: take another name, or"
                f" mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        return str(found.experiment_id)

    def _of_study(self) -> str | None:
        """The last run of the study that is gone on with, running again."""
        if not self.study:
            return None
        wanted = f"tags.`{_STUDY}` = '{self.study}' AND tags.`{_VERB}` = '{self.verb}'"
        found = self._client.search_runs(
            [self._experiment_id],
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
            self._client.delete_tag(found[0].info.run_id, tag)
        for tag, value in {**changed, _OUTPUT: redacted(str(self.output.resolve()))}.items():
            self._client.set_tag(found[0].info.run_id, tag, value)
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
            run = self._client.get_run(run_id)
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
        if info.experiment_id != self._experiment_id or run.data.params != self.params:
            return None
        return self._running(run)

    def _running(self, run: Any) -> str:
        """Id of a run that is gone on with."""
        run_id = str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        if "failure" in run.data.tags:
            self._client.delete_tag(run_id, "failure")
        return run_id

    def _new_run(self) -> str:
        tags = {
            "mlflow.source.name": "moesaic",
            _OUTPUT: redacted(str(self.output.resolve())),
            _VERB: self.verb,
        }
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=self.name)
        run_id = str(run.info.run_id)
        self._log(run_id, {}, self.params)
        for file, text in self._long_params.items():
            self._client.log_text(run_id, text, file)
        return run_id

    def _children(self) -> dict[str, Any]:
        """Child runs by name, the last of each; there are some if an earlier attempt came so
        far."""
        return {run.info.run_name: run for run in self._child_runs()}

    def _child_runs(self) -> Iterator[Any]:
        """All child runs, in the order in which they began."""
        search = partial(
            self._client.search_runs,
            [self._experiment_id],
            filter_string=f"tags.`{_PARENT}` = '{self.run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        return _pages(search)

    def _child(self, name: str, params: Mapping[str, str], earlier: Any) -> str:
        """A running child with these params: the earlier one unless it has others."""
        if earlier is not None and earlier.data.params.items() <= params.items():
            child = str(earlier.info.run_id)
            self._client.update_run(child, status="RUNNING")
        else:
            tags = {_PARENT: self.run_id}
            run = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            child = str(run.info.run_id)
        self._open_children.append(child)
        self._log(child, {}, params)
        return child

    def _log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str] | None = None,
        model_id: str | None = None,
        at: int | None = None,
    ) -> None:
        """Metrics and params in batches; ``at`` in milliseconds since 1970, now by default."""
        from mlflow.entities import Metric, Param

        at = at or _now()
        points = [
            Metric(name, value, at, 0, model_id=model_id, run_id=run_id)
            for name, value in metrics.items()
        ]
        self._send(run_id, points, [Param(name, value) for name, value in (params or {}).items()])

    def _send(self, run_id: str, points: Sequence["Metric"], pairs: Sequence["Param"]) -> None:
        """Metrics and params in as many calls as that takes."""
        for low in range(0, len(points), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=points[low : low + _METRICS_PER_BATCH])
        for low in range(0, len(pairs), _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=pairs[low : low + _PARAMS_PER_BATCH])


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow finds, which it gives a page at a time."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _now() -> int:
    return int(time.time() * 1000)


@contextmanager
def _default_place(uri: str) -> Iterator[None]:
    """For the functions of MLflow that know no other place than the process's default."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _raise_if_full(error: BaseException, file: Path | None) -> None:
    """A full disk is said as the store says it."""
    path = getattr(error, "filename", None) or file or "MLflow"
    if disk_is_full(error) or "database or disk is full" in str(error):
        with disk_errors(Path(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _choice_counts(plan: Plan) -> dict[str, str]:
    counts = Counter(chain_text(chain) for chain in plan.units.values())
    return {legal_name(f"choice.{choice_name(text)}"): str(n) for text, n in counts.items()}


def _reason(error: BaseException) -> str:
    """One line; errors that were written for people speak for themselves."""
    if isinstance(error, (UserError, RunError)):
        return " ".join(str(error).split())[:500]
    return one_line(error)
