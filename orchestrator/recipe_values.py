"""What the values of a recipe's keys may be: sizes, paths, names, patterns."""

import re
import reprlib
import unicodedata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moesaic.orchestrator.objects import check_url, is_url

DEMO = Path(__file__).parent / "demo"
_TEXTS = DEMO / "text"
BUILTIN = "builtin:"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {unit + "i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_MOST_BYTES = 10**18
# What a path may have on Linux, and a folder's name with room for what is put around it.
PATH_CHARACTERS, NAME_CHARACTERS = 4096, 100
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


def shown_value(value: Any) -> str:
    """A value of the user's in a message, cut where it is long."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a value that is too long to show"


def parse_bytes(value: Any) -> int:
    """``1.5 GB``, ``800 MiB`` or a number: bytes. Raises ValueError on anything else."""
    try:
        match = re.fullmatch(r"\s*([0-9.]+)\s*((?:[kmgt]i?)?)b?\s*", str(value).lower())
        number = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        number = 0.0
    if number < 1:
        raise ValueError(f"{shown_value(value)} is not a size: write bytes, '800 MB' or '1.5 GiB'")
    if number > _MOST_BYTES:
        raise ValueError(f"{shown_value(value)} is more than {_MOST_BYTES:,} bytes")
    return int(number)


def resolve(name: str, relative_to: Path) -> str:
    """``builtin:`` names and relative paths as absolute paths; other names unchanged."""
    if name.startswith(BUILTIN):
        paths = {"demo": DEMO / "model", **{p.name: p for p in sorted(_TEXTS.glob("*.txt"))}}
        path = paths.get(name.removeprefix(BUILTIN))
        if path is None:
            known = ", ".join(BUILTIN + inside for inside in paths)
            raise ValueError(f"no {shown_value(name)}: there are {known}")
        return str(path)
    if is_url(name):
        return local_or_url(name)
    absolute = absolute_path(name, relative_to)
    try:
        return str(absolute.resolve()) if absolute.exists() else name
    except OSError as error:
        raise ValueError(f"{name[:200]!r} cannot be looked up: {error.strerror}") from None


def local_or_url(name: str) -> str:
    """A URL, checked; the path of one that begins with ``file://``."""
    check_url(name)
    if not name.startswith("file://"):
        return name.rstrip("/")
    path = unquote(name.removeprefix("file://"))
    if not path.startswith("/"):
        raise ValueError(f"{name[:80]!r}: file:// is followed by an absolute path")
    return str(Path(path).resolve())


def absolute_path(name: str, relative_to: Path) -> Path:
    """The path with ``~`` expanded; raises ValueError where there is no such home."""
    try:
        return relative_to / Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name[:80]!r}: {error}") from None


def portable(path: str) -> str:
    """The ``builtin:`` name of a path that belongs to the package; other names unchanged."""
    if Path(path) == DEMO / "model":
        return BUILTIN + "demo"
    return BUILTIN + Path(path).name if Path(path).parent == _TEXTS else path


def _writable(text: str) -> str:
    """Control characters and halves of surrogate pairs belong into no path and no name."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"holds the character {character!r}: take it out")
    return text


Text = Annotated[str, Field(max_length=PATH_CHARACTERS), AfterValidator(_writable)]


def model_name(name: str) -> str:
    """A name that MLflow's registry takes; raises ValueError for another one."""
    if not name.strip() or set(name) & set("/:'"):
        raise ValueError(f"{name!r} is no name for a model (not empty, no / : ')")
    return name


class Section(BaseModel):
    """A mapping of keys, unknown ones forbidden, that does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# What a key may be that takes one value or a list: how mistakes in it are told apart.
ONE, LIST = "one value", "list of values"


def one_or_list(value: Any) -> str:
    """Which of both a value is."""
    return LIST if isinstance(value, list | tuple) else ONE


def check_patterns(patterns: list[str]) -> list[str]:
    """The patterns; raises ValueError for those that are no regular expressions."""
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{pattern!r} is no regular expression: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return patterns
