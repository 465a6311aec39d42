"""Files of unfinished work have no seal: one that cannot be read is removed, and so made anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.shared import remove


class DamagedFile(RunError):
    """It was cut off or altered, and is removed now."""


@contextmanager
def damage_removed(path: Path) -> Iterator[None]:
    """Around the reading of a safetensors file.

    Raises:
        DamagedFile: it is none; a file that the system could not read stays, as it may be whole.
    """
    try:
        yield
    except SafetensorError as error:
        if "os error" in str(error):
            raise
        remove(path)
        raise DamagedFile(
            f"{path}: was damaged, and is removed: run the same command again, which makes it anew"
        ) from error
