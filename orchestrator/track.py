"""The record in MLflow: one run per run, one child run per plan, the checkpoint by reference.

A run is opened before any work is done, so that a server that cannot be reached is found out at
once. Which one it is stands in ``mlflow_run.json`` in the output folder: the same command with the
same parameters continues it, anything else opens a new one.
"""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.store import digest, write_atomically
from moesaic.orchestrator.summary import RunSummary

# MLflow cuts what is longer, without a word; limits of 3.17.
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
_SERVER_SECONDS = 10.0
_PARENT, _NAME = "mlflow.parentRunId", "mlflow.runName"


class Tracker:
    """An open MLflow run; leaving the ``with`` block ends it.

    It ends as FINISHED; as KILLED after Ctrl-C; else as FAILED, with the reason in the tag
    ``failure``.

    Example::

        with Tracker.start(None, Path("runs/mlflow.db"), "moesaic", "demo", params, folder) as t:
            t.metrics({"seconds/calibrate": 12.0})
    """

    def __init__(self, client: Any, uri: str, experiment_id: str, run_id: str) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id
        self.run_id = run_id

    @classmethod
    def start(
        cls,
        uri: str | None,
        database: Path,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        folder: Path,
    ) -> "Tracker":
        """Opens a run, or continues the one that ``folder`` belongs to.

        Args:
            uri: of the tracking server or database; None for sqlite at ``database``.
            database: file of the default database; artifacts lie in ``mlartifacts`` beside it.
            params: what defines the run; values are written as text, long ones to an artifact.
            folder: output of the run.

        Raises:
            UserError: ``uri`` is none that MLflow knows.
            RunError: the server or the database cannot be reached.
        """
        address = uri or f"sqlite:///{database.resolve()}"
        client = _connect(address)
        with _errors(address):
            experiment_id = _experiment(client, address, experiment)
            texts = {key: _text(value) for key, value in params.items()}
            state = folder / "mlflow_run.json"
            mark = {"uri": address, "experiment": experiment_id, "params": digest(texts)}
            run_id = _continued(client, state, mark)
            if run_id is None:
                run_id = client.create_run(experiment_id, run_name=name).info.run_id
            tracker = cls(client, address, experiment_id, run_id)
            tracker._params(texts)
        text = json.dumps({**mark, "run_id": run_id}, indent=1) + "\n"
        write_atomically(state, lambda path: _write(path, text))
        return tracker

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            with _errors(self.uri):
                self.client.set_terminated(self.run_id, "FINISHED")
            return
        killed = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if killed else str(error) or type(error).__name__
        try:
            with _errors(self.uri):
                if len(reason) > _TAG_LENGTH:
                    self.client.log_text(self.run_id, reason, "failure.txt")
                    reason = f"{reason[:1000]} … (all of it in failure.txt)"
                self.client.set_tag(self.run_id, "failure", reason)
                self.client.set_terminated(self.run_id, "KILLED" if killed else "FAILED")
        except RunError as second:  # the first error is what counts
            error.add_note(f"and the failure could not be recorded: {second}")

    def _params(self, texts: Mapping[str, str]) -> None:
        """Logs parameters that the run does not have; long ones become artifacts."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        entities = []
        for key, text in texts.items():
            if len(text) > _PARAM_LENGTH:
                artifact = f"params/{_metric_name(key).replace('/', '_')}.txt"
                self.client.log_text(self.run_id, text, artifact)
                text = f"in artifact {artifact}"
            if key not in known:
                entities.append(Param(_metric_name(key), text))
        for start in range(0, len(entities), _PARAMS_AT_ONCE):
            self.client.log_batch(self.run_id, params=entities[start : start + _PARAMS_AT_ONCE])

    def metrics(
        self,
        values: Mapping[str, float],
        step: int = 0,
        run_id: str | None = None,
        model_id: str | None = None,
    ) -> None:
        """Logs numbers in batches; characters that MLflow does not allow in names become ``_``.

        Args:
            run_id: a child run; None for the run itself.
            model_id: the logged model that the numbers are about.
        """
        from mlflow.entities import Metric

        now, run = int(time.time() * 1000), run_id or self.run_id
        entities = [
            Metric(_metric_name(key), float(value), now, step, model_id=model_id, run_id=run)
            for key, value in values.items()
        ]
        with _errors(self.uri):
            for start in range(0, len(entities), _METRICS_AT_ONCE):
                batch = entities[start : start + _METRICS_AT_ONCE]
                self.client.log_batch(run, metrics=batch)

    def summary(self, summary: RunSummary, files: Iterable[Path]) -> None:
        """Records a finished run: scores, a child run per plan, events, tables and files.

        Args:
            files: what becomes an artifact as it is: report, recipe, plan …; of a folder, its
                files.
        """
        plan = summary.scores.get("plan", {})
        values = _numbers(plan) | {"budget_bytes": summary.budget_bytes}
        values |= {f"dense/{k}": v for k, v in _numbers(summary.scores.get("dense", {})).items()}
        values |= {f"events.{kind}": count for kind, count in summary.event_counts.items()}
        values |= {f"seconds/{stage}": s for stage, s in summary.stage_seconds.items()}
        self.metrics(values)
        for name in summary.plans:
            self._plan(summary, name)
        with _errors(self.uri), tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            summary.table.to_parquet(folder / "units.parquet")
            summary.table.to_csv(folder / "units.csv", index=False)
            _write(folder / "events.jsonl", _event_lines(summary))
            self.client.log_artifacts(self.run_id, str(folder), "tables")
            for path in files:
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), path.name)
                else:
                    self.client.log_artifact(self.run_id, str(path))

    def _plan(self, summary: RunSummary, name: str) -> None:
        """The child run of a plan: its scores, its predicted loss, its choices."""
        plan = summary.plans[name]
        with _errors(self.uri):
            child = self._child(name)
            self.client.log_dict(child, plan.to_json(), "plan.json")
        values = _numbers(summary.scores.get(name, {}))
        self.metrics({**values, "predicted_loss": plan.loss}, run_id=child)
        with _errors(self.uri):
            self.client.set_terminated(child, "FINISHED")

    def _child(self, name: str) -> str:
        """The child run of a name; there is one, however often the run is continued."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{_PARENT}` = '{self.run_id}'", max_results=1000
        )
        for run in found:
            if run.data.tags.get(_NAME) == name:
                return str(run.info.run_id)
        tags = {_PARENT: self.run_id}
        return str(self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id)

    def model(
        self,
        path: Path,
        scores: Mapping[str, Any],
        params: Mapping[str, Any],
        register_as: str | None = None,
    ) -> str:
        """Records the checkpoint at ``path`` without copying it.

        Args:
            scores: numbers about it.
            register_as: name in the model registry; None leaves the registry alone.

        Returns:
            identifier of the logged model.
        """
        import mlflow

        with _errors(self.uri):
            model_id = self._known_model(path)
            if model_id is None:
                texts = {_metric_name(k): _text(v) for k, v in params.items()}
                long = [key for key, text in texts.items() if len(text) > _PARAM_LENGTH]
                if long:
                    raise ValueError(f"parameters too long for a model: {', '.join(long)}")
                model_id = mlflow.create_external_model(
                    name=re.sub(r"[/:.%\"']", "_", path.parent.name),
                    source_run_id=self.run_id,
                    experiment_id=self.experiment_id,
                    params=texts,
                    tags={"path": str(path)},
                ).model_id
        self.metrics(_numbers(scores), model_id=model_id)
        if register_as is not None:
            with _errors(self.uri):
                self._register(register_as, model_id)
        return model_id

    def _known_model(self, path: Path) -> str | None:
        found = self.client.search_logged_models(
            [self.experiment_id], f"source_run_id = '{self.run_id}'"
        )
        return next((m.model_id for m in found if m.tags.get("path") == str(path)), None)

    def _register(self, name: str, model_id: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self.client.search_model_versions(f"run_id = '{self.run_id}'")
        if not any(v.name == name and v.model_id == model_id for v in versions):
            self.client.create_model_version(
                name, f"models:/{model_id}", run_id=self.run_id, model_id=model_id
            )


def _connect(uri: str) -> Any:
    """A client whose server or database was seen to answer."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    if uri.startswith(("http://", "https://")):
        _reach(uri)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    import mlflow
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _errors(uri):
        try:
            mlflow.set_tracking_uri(uri)
            client = mlflow.MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        except UnsupportedModelRegistryStoreURIException:
            raise UserError(
                f"tracking.uri: {uri!r} is no address that MLflow knows; use sqlite:///FILE or"
                " http://HOST:PORT"
            ) from None
    return client


def _reach(uri: str) -> None:
    """Asks a server whether it lives; MLflow's own client would try for minutes."""
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=_SERVER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError) as error:
        raise RunError(f"tracking.uri: the MLflow server {uri} does not answer: {error}") from None


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Errors of MLflow and of its database as one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"MLflow at {uri} failed: {reason}") from error


def _experiment(client: Any, uri: str, name: str) -> str:
    """Identifier of the experiment; a local one keeps its artifacts beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        local = uri.startswith("sqlite:///")
        database = Path(uri.removeprefix("sqlite:///"))
        artifacts = (database.resolve().parent / "mlartifacts").as_uri() if local else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:  # another run was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: {name!r} was deleted at {uri}: restore it or take another name"
        )
    return str(found.experiment_id)


def _continued(client: Any, state: Path, mark: Mapping[str, str]) -> str | None:
    """The run that ``state`` names, open again; None if it is gone or was another one."""
    from mlflow.exceptions import MlflowException

    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if {key: known.get(key) for key in mark} != dict(mark):
        return None
    try:
        run = client.get_run(known["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run.info.run_id, status="RUNNING")
    if "failure" in run.data.tags:
        client.delete_tag(run.info.run_id, "failure")
    return str(run.info.run_id)


def _metric_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _numbers(score: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a score; those of text sources as ``sources/NAME/kl``."""
    flat = {key: value for key, value in score.items() if key != "sources"}
    for source, values in score.get("sources", {}).items():
        flat |= {f"sources/{source}/{key}": value for key, value in values.items()}
    return {key: value for key, value in flat.items() if math.isfinite(value)}


def _event_lines(summary: RunSummary) -> str:
    rows = [
        {"kind": e.kind, "unit": e.unit, "message": e.message, "value": e.value}
        for e in summary.events
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
