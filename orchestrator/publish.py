"""A finished checkpoint, copied to a URL once it is verified."""

import json
from pathlib import Path

from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.foreign import MAX_JSON_BYTES, parse_json
from moesaic.orchestrator.objects import Objects
from moesaic.orchestrator.store import file_digest

# Written last: a folder without it is not complete. File → size and digest, as the store has them.
MARK = "moesaic-published.json"


def check_publish(url: str) -> None:
    """Raises a :class:`RecipeError` where a URL needs a package that is not there."""
    Objects(url, "publish")


def publish(folder: Path, url: str) -> bool:
    """Copies a model folder; what is there already, whole and the same, is left.

    Returns:
        whether anything had to be copied.

    Raises:
        RunError: the place cannot be written; what was there does not count as complete any more.
    """
    place = Objects(url, "publish")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in files.items() if path.is_file()}
    wanted = {
        name: {"size": path.stat().st_size, "digest": file_digest(path)}
        for name, path in files.items()
    }
    try:
        if _published(place) == wanted:
            return False
        place.remove(MARK)
        for name, path in files.items():
            place.upload(path, name)
        text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
        place.write(MARK, text.encode())
    except RunError as error:
        raise RunError(f"publish: {error}; the checkpoint itself is in {folder}") from error
    return True


def _published(place: Objects) -> object:
    """What the mark says that is there; None where nothing is complete."""
    try:
        return parse_json(place.read(MARK, MAX_JSON_BYTES))
    except (FileNotFoundError, ValueError):
        return None
