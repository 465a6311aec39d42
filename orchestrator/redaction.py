"""Secrets taken out of whatever leaves the process: lines, logs, files of a run, MLflow.

Three kinds are known: what addresses hold (``https://user:password@host``, signed queries), what
looks like a token of a well-known service, and the values of environment variables whose names say
that they are secret. :func:`redacted` puts ``***`` in their places; everything else stays as it is.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
# An address up to the last @ that can belong to its user's part. Behind HOST:PORT/ there is none.
_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://"
    r"(?:(?P<user>[^\s/:@\"'<>]*):(?!\d{1,5}[/?#])(?P<password>[^\s\"'<>]*)"
    r"|(?P<token>[^\s/:@?#\"'<>]+))@"
)
# Where a name alone is a token; elsewhere it is a user, a bucket or a container.
_TOKEN_SCHEMES = ("http", "https", "git+https")
# Where the name is half of the secret.
_KEY_SCHEMES = ("s3", "s3a", "s3n", "gs", "gcs", "r2", "oss")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w\-.]*(?:token|secret|password|passwd|signature|credential|api[_-]?key"
    r"|access[_-]?key(?:[_-]?id)?)|sig|key|auth)=)[^&;\s\"'<>#]+"
)
_HEADER = re.compile(r"(?i)(\bbearer\s+|\bauthorization\W{1,5}\w+\s+)[A-Za-z0-9+/=._~\-]{8,}")
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_\-]{20,}"
    r"|sk-[A-Za-z0-9_\-]{20,}|dapi[0-9a-f]{32}|xox[abprs]-[A-Za-z0-9\-]{10,})(?![A-Za-z0-9])"
)
_SECRET_NAMES = re.compile(
    r"(?i)(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY"
    r"|SECRET_?KEY|ACCOUNT_?KEY|CONNECTION_STRING|ACCESS_KEY_ID)(?:_ID)?$"
)
# Shorter ones are ordinary words.
_LEAST_CHARACTERS = 8
_known: set[str] = set()


def redacted(text: str) -> str:
    """The text with ``***`` in place of every secret that is known."""
    return _without(_secrets(), text)


def redacted_tree(value: Any) -> Any:
    """The same of all strings in nested mappings (keys as well), lists and tuples, which become
    lists; secrets are looked up once for all of them."""
    return _cleaned(_secrets(), value)


def _cleaned(secrets: Sequence[str], value: Any) -> Any:
    if isinstance(value, str):
        return _without(secrets, value)
    if isinstance(value, Mapping):
        return {_without(secrets, str(k)): _cleaned(secrets, inner) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(secrets, inner) for inner in value]
    return value


def _secrets() -> list[str]:
    """What is secret whatever it looks like; of two that begin alike the longer one first."""
    return sorted({*_known, *_from_environment()}, key=len, reverse=True)


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _USER.sub(_without_user, text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def keep_secret(address: str | None) -> None:
    """Has the password of an address taken out wherever it turns up from now on, alone as well."""
    for found in _USER.finditer(address or ""):
        secret = found["password"] or (found["token"] if _is_token(found) else None)
        if secret and secret != HIDDEN and len(secret) >= _LEAST_CHARACTERS:
            _known.update((secret, unquote(secret)))


def is_redacted(text: str) -> bool:
    """Whether an address has lost its secret to :func:`redacted`."""
    return f"{HIDDEN}@" in text or f"={HIDDEN}" in text


def _is_token(found: re.Match[str]) -> bool:
    return found["token"] is not None and found["scheme"].lower() in _TOKEN_SCHEMES


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"]
    if found["password"] is not None:
        # Hidden before, or nothing to hide.
        name = HIDDEN if scheme.lower() in _KEY_SCHEMES else user
        return f"{scheme}://{name}:{HIDDEN}@" if found["password"] else found[0]
    return f"{scheme}://{HIDDEN}@" if _is_token(found) else found[0]


def _from_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _LEAST_CHARACTERS and _SECRET_NAMES.search(name)
    }
