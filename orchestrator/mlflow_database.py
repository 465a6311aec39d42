"""The database that MLflow keeps its record in: tried, and made where it is a file of ours."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# A database is made in seconds: what is older than this was left by one who was killed.
_LEFTOVER_SECONDS = 3600.0


def try_database(uri: str) -> None:
    """Opens a database once; MLflow would try for a minute before it says that it cannot."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


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
