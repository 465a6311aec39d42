"""Whether somebody is there where a recipe sends Ray and MLflow: found out in seconds.

What can only be told by doing it (a cluster with room, an MLflow behind the server) is not told.
"""

import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError

from moesaic.orchestrator import mlflow_text
from moesaic.orchestrator.cluster import cluster_address, connect, refusal, try_address
from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.files import make_folder
from moesaic.orchestrator.recipe_sections import Compute, Tracking

_SECONDS = 5.0
_SQLITE_MAGIC = b"SQLite format 3\0"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_cluster(compute: Compute) -> None:
    """Raises a RecipeError where the recipe or RAY_ADDRESS names no cluster that answers."""
    key, address = cluster_address(compute)
    if address is None:
        return
    if address == "auto":
        _check_auto(key, compute)
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise RecipeError(
            f"{key}: {address!r} is no address: write HOST:PORT, ray://HOST:PORT or auto"
        )
    try:
        try_address(address)
    except AuthenticationError as error:
        raise RecipeError(f"{key}: the Ray cluster at {address} {refusal(key, error)}") from None
    except (OSError, UnicodeError) as error:
        raise RecipeError(
            f"{key}: no Ray cluster answers at {address} ({error}): start one there"
            " (ray start --head), or leave the key out for this machine"
        ) from None


def _check_auto(key: str, compute: Compute) -> None:
    """Joins the cluster that runs on this machine, if there is one, and leaves it again."""
    if ray.is_initialized():
        return
    try:
        connect(compute)
    except RunError:
        raise RecipeError(
            f"{key}: auto: no Ray cluster runs on this machine: start one (ray start --head), or"
            " leave the key out"
        ) from None
    ray.shutdown()


def check_tracking(tracking: Tracking, beside: Path) -> None:
    """Raises a RecipeError where MLflow cannot keep its record as the recipe says.

    Args:
        beside: folder of the default database.
    """
    try:
        place = mlflow_text.place(tracking.uri, beside)
    except UserError as error:
        raise RecipeError(*error.args) from None
    if place.uri.startswith("sqlite:"):
        _check_sqlite(Path(place.uri.removeprefix("sqlite:///")))
    elif place.uri != "databricks" and not place.uri.startswith("databricks:"):
        _check_server(place)


def _check_sqlite(file: Path) -> None:
    make_folder(file.parent, "tracking.uri")
    try:
        with file.open("rb") as stream:
            begin = stream.read(len(_SQLITE_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecipeError(
            f"tracking.uri: {file} cannot be read ({error.strerror}): name another file"
        ) from None
    if begin and begin != _SQLITE_MAGIC:
        raise RecipeError(f"tracking.uri: {file} is no sqlite database: name another file")


def _check_server(place: mlflow_text.Place) -> None:
    try:
        url = urlsplit(place.uri)
        kind = url.scheme.partition("+")[0]
        port = url.port or _PORTS.get(kind, 0)
    except ValueError as error:
        raise RecipeError(f"tracking.uri: {place.shown!r} is no address: {error}") from None
    if not url.hostname:
        raise RecipeError(f"tracking.uri: {place.shown!r} names no host: write http://HOST:PORT")
    try:
        if place.database:
            socket.create_connection((url.hostname, port), timeout=_SECONDS).close()
        else:
            urllib.request.urlopen(place.uri, timeout=_SECONDS).close()
    except (urllib.error.HTTPError, ssl.SSLError):
        return  # somebody is there
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        raise RecipeError(
            f"tracking.uri: nobody answers at {place.shown} ({reason}): start the server"
            " (mlflow server), or leave the key out for a file beside the run"
        ) from None
