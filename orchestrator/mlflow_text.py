"""What MLflow can hold: addresses, names, params and metrics, made legal without losing anything.

Metric and param names allow letters, digits and ``_ - . : /`` and the space, 250 characters, and
must be normal as paths. A param's value holds 6,000 characters; MLflow cuts longer ones off.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.redaction import is_redacted, keep_secret, redacted

VALUE_CHARACTERS = 6000
_NAME_CHARACTERS = 250
_SQLITE = "sqlite:///"
_SERVERS = ("http", "https", "databricks")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Place:
    """Where the record is kept.

    Attributes:
        uri: MLflow's tracking URI; the path of a sqlite file is absolute.
        shown: the same without a password.
        database: whether MLflow opens a database itself, rather than asking a server.
        artifacts: folder for files; None where a server decides.
        file: of an sqlite database.
    """

    uri: str
    shown: str
    database: bool
    artifacts: Path | None
    file: Path | None = None


def place(uri: str | None, beside: Path) -> Place:
    """What a recipe's ``tracking.uri`` means.

    Args:
        uri: None for sqlite in the folder ``beside``.
        beside: folder for the default database, and for the files of a database elsewhere.

    Raises:
        UserError: MLflow has no such store.
    """
    uri = uri if uri is not None else f"{_SQLITE}{beside.resolve() / 'mlflow.db'}"
    keep_secret(uri)
    if is_redacted(uri):
        raise UserError(
            f"tracking.uri: {uri!r}: its secret was taken out: put it in, or leave it"
            " to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    scheme = re.split(r"[:+]", uri, maxsplit=1)[0]
    if uri.startswith(_SQLITE) and uri != _SQLITE:
        file = Path(uri.removeprefix(_SQLITE)).resolve()
        address = f"{_SQLITE}{file}"
        return Place(address, address, True, file.parent / "mlartifacts", file)
    if "://" in uri and scheme in _DATABASES and scheme != "sqlite":
        return Place(uri, redacted(uri), True, beside.resolve() / "mlartifacts")
    if uri == "databricks" or ("://" in uri and scheme in _SERVERS):
        return Place(uri, redacted(uri), False, None)
    reason = "is a folder of files, which MLflow no longer writes" if _is_folder(uri) else "is none"
    raise UserError(
        f"tracking.uri: {redacted(uri)!r} {reason}: write sqlite:///FILE.db,"
        f" http://HOST:PORT or another database ({', '.join(_DATABASES[1:])})"
    )


def _is_folder(uri: str) -> bool:
    return uri.startswith("file:") or "://" not in uri


def legal_name(name: str) -> str:
    """``name`` where it is allowed; else what is allowed of it, with a digest to keep it apart.

    Secrets in it are taken out first.
    """
    name = redacted(name)
    clean = "/".join(_legal_part(part, r"[^A-Za-z0-9_\-. :]") for part in name.split("/"))
    if len(clean) <= _NAME_CHARACTERS:
        return clean
    return f"{clean[: _NAME_CHARACTERS - 7]}-{_short_digest(name)}"


def _legal_part(part: str, illegal: str) -> str:
    """One step of a path: legal characters, not empty, no way to another folder."""
    clean = re.sub(rf"{illegal}|^\.\.|^\.?$", "_", part)
    return clean if clean == part else f"{clean}-{_short_digest(part)}"


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def choice_name(text: str) -> str:
    """A chain's text as part of a name: ``gptq bits:3 group_size:32``."""
    plain = text.replace("=", ":").replace(" → ", " / ")
    return legal_name(" ".join(re.sub(r"[(),]", " ", plain).split()))


def flat(value: Mapping[str, Any], prefix: str = "", separator: str = ".") -> Iterator[Any]:
    """Leaves of nested mappings as pairs (``outer.inner``, leaf)."""
    for key, leaf in value.items():
        if isinstance(leaf, Mapping):
            yield from flat(leaf, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", leaf


def numbers(value: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in nested mappings by legal name, ``sources/NAME/kl``; other leaves are left."""
    return {
        legal_name(name): float(leaf)
        for name, leaf in flat(value, separator="/")
        if isinstance(leaf, (int, float))
    }


def safe_params(params: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Nested params as MLflow takes them, and the texts that are too long for it.

    Returns:
        name → value, ``outer.inner`` for nested ones, without those that are None; and file name →
        text, to be kept as artifacts that the values name (with a digest: two different texts
        never look the same).
    """
    values: dict[str, str] = {}
    texts: dict[str, str] = {}
    for name, leaf in flat(params):
        if leaf is None:
            continue
        value = leaf if isinstance(leaf, str) else json.dumps(leaf, ensure_ascii=False, default=str)
        name = legal_name(name)
        if len(value) > VALUE_CHARACTERS:
            file = f"params/{_legal_part(name, r'[^A-Za-z0-9_.-]')}.txt"
            texts[file] = value
            digest = hashlib.blake2b(value.encode(), digest_size=8).hexdigest()
            value = f"{len(value):,} characters, see artifact {file} (blake2b {digest})"
        values[name] = value
    return values, texts


def one_line(error: BaseException) -> str:
    """Type and message of an error in at most 500 characters, without secrets: of one that is cut
    nobody would know the rest."""
    text = " ".join(redacted(str(error)).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
