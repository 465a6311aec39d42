"""Logged models of MLflow: checkpoints and plans that stay where they are, known by their tags."""

from collections.abc import Mapping
from functools import partial

from moesaic.orchestrator.mlflow_connection import Connection, pages
from moesaic.orchestrator.mlflow_database import ANSWER_SECONDS
from moesaic.orchestrator.process import answered


def mark_models(connection: Connection, trials: set[str], front: set[str], best: str) -> None:
    """Says of the models of all trials whether they are on the front and the best one.

    Args:
        trials: ids of their runs.
        front, best: ids of models.
    """
    models = pages(partial(connection.client.search_logged_models, [connection.experiment_id]))
    for model in models:
        if model.source_run_id not in trials or "plan" not in model.tags:
            continue
        true = {"front": model.model_id in front, "best": model.model_id == best}
        tags = {name: str(value).lower() for name, value in true.items()}
        if not tags.items() <= model.tags.items():
            connection.client.set_logged_model_tags(model.model_id, tags)


def external_model(
    connection: Connection,
    run_id: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """Id of a run's model with these tags; made if it is missing."""
    import mlflow
    from mlflow.entities import LoggedModelOutput

    found = connection.client.search_logged_models(
        [connection.experiment_id], filter_string=f"source_run_id = '{run_id}'"
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
            experiment_id=connection.experiment_id,
        )
        model = answered(make, ANSWER_SECONDS)
        outputs = [LoggedModelOutput(model.model_id, step=0)]
        connection.client.log_outputs(run_id, models=outputs)
    return str(model.model_id)


def register(connection: Connection, name: str, run_id: str, model_id: str, path: str) -> None:
    """A version of a model in the registry, which points to a folder; none where the run has
    one."""
    from mlflow.exceptions import MlflowException

    try:
        connection.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = pages(partial(connection.client.search_model_versions, f"name = '{name}'"))
    if not any(version.run_id == run_id for version in versions):
        connection.client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            tags={"path": path},
            model_id=model_id,
        )
