"""Writing files whole or not at all; what a full or read-only disk says in one line."""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.redaction import redacted, redacted_tree

# In the names of files that are being written.
TEMPORARY = ".tmp-"
# Where the disk is full.
_ADVICE = "free space (moesaic store gc STORE --keep RUN removes what RUN does not need)"


def disk_is_full(error: BaseException) -> bool:
    """Whether the system refused for want of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = _ADVICE) -> Iterator[None]:
    """A full or read-only disk as one line that names the path; everything finished is kept.

    Args:
        advice: what to do where it is full, before the same command is run again.
    """
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise RunError(
                f"{path}: the disk is full; {advice} and run the same command again, finished work"
                " is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        raise
    except SafetensorError as error:
        # Its message is all that it keeps of the system's error.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        with disk_errors(path, advice):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_atomically(path: Path, write: Callable[[Path], None], flush: bool = True) -> None:
    """Lets ``write`` fill a temporary file, flushes it to disk and renames it to ``path``.

    Args:
        flush: False where whoever reads the file can tell whether it is whole.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
        try:
            write(temporary)
            if flush:
                with temporary.open("rb+") as stream:
                    os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(path: Path, what: str, advice: str = _ADVICE) -> None:
    """Makes a folder that files can be written into, if it is not there.

    Args:
        what: key of the recipe, or option of the command line, that names it.
        advice: see :func:`disk_errors`.

    Raises:
        RecipeError: it cannot be made or written.
        RunError: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{TEMPORARY}{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)  # to who cleans up there, it is a leftover
    except (FileExistsError, NotADirectoryError):
        raise RecipeError(f"{what}: {path} must be a folder: a file is in its place") from None
    except OSError as error:
        if disk_is_full(error):
            with disk_errors(path, advice):
                raise
        shown = str(path) if len(str(path)) < 300 else f"{str(path)[:300]} …"
        raise RecipeError(
            f"{what}: {shown} cannot be written ({error.strerror}): name a folder that can be"
        ) from None


def fill(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    path.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """A whole text file in UTF-8, as :func:`write_atomically` does it, without secrets."""
    clean = redacted(text)
    write_atomically(path, lambda temporary: fill(temporary, clean))


def write_json(path: Path, value: Any) -> None:
    """Atomically, without secrets, the same bytes for the same value."""
    text = json.dumps(redacted_tree(value), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: fill(temporary, text))
