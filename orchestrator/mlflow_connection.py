"""The connection of a run to MLflow: where it is, its experiment, and errors as one line."""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.orchestrator import mlflow_text
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.files import disk_errors, disk_is_full
from moesaic.orchestrator.mlflow_database import make_database, open_client, try_database
from moesaic.orchestrator.mlflow_text import one_line
from moesaic.orchestrator.recipe_sections import Tracking
from moesaic.orchestrator.redaction import redacted

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param

# What MLflow takes in one call.
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100


class Connection:
    """MLflow as a recipe names it.

    Args:
        tracking: where, and the experiment's name.
        folder: where the default database lies.

    Attributes:
        client: MLflow's, once it is open.
        experiment_id: of the experiment.

    Raises:
        UserError: the recipe names what MLflow cannot have.
    """

    def __init__(self, tracking: Tracking, folder: Path) -> None:
        self.place = mlflow_text.place(tracking.uri, folder)
        self.tracking = tracking
        self.client: Any = None
        self.experiment_id = ""

    @property
    def uri(self) -> str:
        """Where to look, without a password."""
        return self.place.shown

    def open(self) -> None:
        """Raises RunError where MLflow cannot be reached, UserError for a deleted experiment."""
        # A server that is down is found out at once; one that fails later may come back.
        with self.talk(retries=0, timeout_seconds=8):
            if self.place.file is not None:
                make_database(self.place.file)
            elif self.place.database:
                try_database(self.place.uri)
            server = self.place.database and self.place.file is None
            self.client = open_client(self.place.uri, server)
            self.experiment_id = self._experiment()

    @contextmanager
    def talk(self, retries: int = 3, timeout_seconds: int = 30) -> Iterator[None]:
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
        found = self.client.get_experiment_by_name(name)
        if found is None:
            folder = self.place.artifacts
            try:
                return str(
                    self.client.create_experiment(
                        name,
                        artifact_location=folder.as_uri() if folder else None,
                        tags={"mlflow.experimentKind": "custom_model_development"},
                    )
                )
            except MlflowException as error:
                # Another run of the same moment was faster.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: {name!r} was deleted in {self.uri}: take another name, or"
                f" mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        return str(found.experiment_id)

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str] | None = None,
        model_id: str | None = None,
        at: int | None = None,
    ) -> None:
        """Metrics and params in batches; ``at`` in milliseconds since 1970, now by default."""
        from mlflow.entities import Metric, Param

        at = at or now_ms()
        points = [
            Metric(name, value, at, 0, model_id=model_id, run_id=run_id)
            for name, value in metrics.items()
        ]
        self.send(run_id, points, [Param(name, value) for name, value in (params or {}).items()])

    def send(self, run_id: str, points: Sequence["Metric"], pairs: Sequence["Param"]) -> None:
        """Metrics and params in as many calls as that takes."""
        for low in range(0, len(points), _METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=points[low : low + _METRICS_PER_BATCH])
        for low in range(0, len(pairs), _PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=pairs[low : low + _PARAMS_PER_BATCH])


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow finds, which it gives a page at a time."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def now_ms() -> int:
    return int(time.time() * 1000)


@contextmanager
def default_place(uri: str) -> Iterator[None]:
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
