"""The database that MLflow keeps its record in: tried, and made where it is a file of ours."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from moesaic.orchestrator.process import answered

# A database is made in seconds: what is older than this was left by one who was killed.
_LEFTOVER_SECONDS = 3600.0


# What a server may take for one thing that it is asked for: its tables are made at the first, and
# files of a run are copied, which is asked for as all else is.
_TRY_SECONDS, ANSWER_SECONDS, _LONG_SECONDS = 15.0, 120.0, 3600.0
_LONG = ("log_artifact", "log_artifacts")


def try_database(uri: str) -> None:
    """Opens a database once; MLflow would try for a minute before it says that it cannot.

    Raises:
        TimeoutError: somebody takes the connection and does not answer.
    """
    import sqlalchemy

    def work() -> None:
        engine = sqlalchemy.create_engine(uri)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()

    answered(work, _TRY_SECONDS)


def open_client(uri: str, of_server: bool) -> Any:
    """MLflow's client.

    Args:
        of_server: it asks a database server itself. Drivers wait for one without end, each in its
            own way, so that every call is given a bound here; those of HTTP have one.
    """
    from mlflow import MlflowClient

    if not of_server:
        return MlflowClient(uri)
    return _Bounded(answered(lambda: MlflowClient(uri), _LONG_SECONDS))


class _Bounded:
    """A client each of whose methods ends in time, or raises TimeoutError."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        seconds = _LONG_SECONDS if name in _LONG else ANSWER_SECONDS

        @wraps(method)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return answered(lambda: method(*args, **kwargs), seconds)

        return bounded


def make_database(file: Path) -> None:
    """An sqlite database with MLflow's tables, if there is none at ``file``.

    Making the tables takes seconds, and MLflow cannot go on where it was killed. So that happens in
    a folder beside it, and the complete file gets its name in one step; the first of several
    makers wins.

    Raises:
        RunError: the disk is full.
        Exception: as MLflow or sqlite raise it.
    """
    if file.exists():
        try_database(f"sqlite:///{file}")
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{file.name}.tmp-"
    for old in file.parent.iterdir():
        with suppress(OSError):
            age = time.time() - old.stat().st_mtime
            if old.name.startswith(prefix) and age > _LEFTOVER_SECONDS:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=file.parent, ignore_cleanup_errors=True
    ) as folder:
        made = Path(folder) / file.name
        try_database(f"sqlite:///{made}")
        store = SqlAlchemyStore(f"sqlite:///{made}", (file.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            _name_once(made, file)


def _name_once(made: Path, file: Path) -> None:
    """Gives a file its name unless that is taken.

    Raises:
        FileExistsError: it is taken.
    """
    try:
        os.link(made, file)
    except FileExistsError:
        raise
    except OSError:  # this file system knows no second names
        if not file.exists():
            made.rename(file)
