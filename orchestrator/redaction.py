"""Secrets taken out of whatever leaves the process: lines, logs, files of a run, MLflow.

Three kinds are known: what addresses hold (``https://user:password@host``, signed queries), what
looks like a token of a well-known service, and the values of environment variables whose names say
that they are secret, however they are written. :func:`redacted` puts ``***`` in their places;
everything else stays as it is. An environment is known to its own process alone: workers clean what
they print before it leaves them (:func:`clean_streams`), and what they raise.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any, TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
# What an address may consist of.
_WORD = re.compile(r"[^\s\"'<>]+")
# An address up to the last @ that can belong to its user's part. Behind HOST:PORT/ there is none.
# Of a scheme that is longer than any, the end is enough.
_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]{0,31})://"
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
# Some are written in one word: PGPASSWORD, SSHPASS.
_SECRET_NAMES = re.compile(
    r"(?i)(?:(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY"
    r"|SECRET_?KEY|ACCOUNT_?KEY|PRIVATE_?KEY|CONNECTION_STRING|ACCESS_KEY_ID)(?:_ID)?"
    r"|_PASS|_PWD|^SSHPASS)$"
)
# Shorter ones are ordinary words.
_LEAST_CHARACTERS = 8
# Under this key of a document stand names of a model's parts and choices for them, which are read
# again: data, and no words of anybody.
_DATA = "units"
_known: set[str] = set()


def redacted(text: str) -> str:
    """The text with ``***`` in place of every secret that is known."""
    return _without(_secrets(), text)


def redacted_tree(value: Any) -> Any:
    """The same of all strings in nested mappings (keys as well), lists and tuples, which become
    lists; secrets are looked up once for all of them. What a plan chose stays as it is."""
    return _cleaned(_secrets(), value)


def _cleaned(secrets: Sequence[str], value: Any) -> Any:
    if isinstance(value, str):
        return _without(secrets, value)
    if isinstance(value, Mapping):
        return {
            _without(secrets, str(key)): inner if key == _DATA else _cleaned(secrets, inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_cleaned(secrets, inner) for inner in value]
    return value


def _secrets() -> list[str]:
    """What is secret whatever it looks like; of two that begin alike the longer one first."""
    secrets = {*_known, *_from_environment()}
    forms = {form for secret in secrets for form in _forms(secret)}
    return sorted(forms, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _forms(secret: str) -> frozenset[str]:
    """A secret, and each of its lines, as they stand in text, JSON, YAML, HTML and addresses."""
    lines = [line.strip() for line in secret.splitlines()]
    plain = {secret, *(line for line in lines if len(line) >= _LEAST_CHARACTERS)}
    quoted = {form for text in plain for form in _quoted(text)}
    html = {form for text in quoted for form in (escape(text), escape(text, quote=False))}
    # Jinja writes the two quotation marks in its own way.
    jinja = {text.replace("&quot;", "&#34;").replace("&#x27;", "&#39;") for text in html}
    return frozenset(quoted | html | jinja)


def _quoted(text: str) -> set[str]:
    """As it is, and between the quotation marks of JSON, Python and YAML, and in an address."""
    json_forms = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    address_forms = {quote(text), quote(text, safe="")}
    return {text, repr(text)[1:-1], text.replace("'", "''"), *address_forms, *json_forms}


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _WORD.sub(_without_users, text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def clean_streams() -> None:
    """Has whatever this process prints from now on cleaned, line by line."""
    for stream in (sys.stdout, sys.stderr):
        _CleanLines(stream)


class _CleanLines:
    """Takes the place of a stream's own ``write``, also for those that have the stream already."""

    def __init__(self, stream: TextIO) -> None:
        self._write, self._flush = stream.write, stream.flush
        self._begun = ""
        self._lock = threading.RLock()
        names = {"write": self.write, "writelines": self.writelines, "flush": self.flush}
        vars(stream).update(names)

    def write(self, text: str) -> int:
        """Lines that are whole; ``print`` comes with one piece after another."""
        with self._lock:
            whole, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                self._write(redacted(whole) + newline)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """All of them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """The line that is begun as well."""
        with self._lock:
            begun, self._begun = self._begun, ""
            if begun:
                self._write(redacted(begun))
            self._flush()


def clean_error(error: BaseException) -> None:
    """Takes secrets out of what an error says."""
    error.args = tuple(redacted(a) if isinstance(a, str) else a for a in error.args)


def keep_secret(address: str | None) -> None:
    """Has the password of an address taken out wherever it turns up from now on, alone as well."""
    words = [word[0] for word in _WORD.finditer(address or "")]
    for found in (found for word in words for found in _USER.finditer(_up_to_at(word))):
        secret = found["password"] or (found["token"] if _is_token(found) else None)
        if secret and secret != HIDDEN and len(secret) >= _LEAST_CHARACTERS:
            _known.update((secret, unquote(secret)))


def is_redacted(text: str) -> bool:
    """Whether an address has lost its secret to :func:`redacted`."""
    return f"{HIDDEN}@" in text or f"={HIDDEN}" in text


def _is_token(found: re.Match[str]) -> bool:
    return found["token"] is not None and found["scheme"].lower() in _TOKEN_SCHEMES


def _up_to_at(word: str) -> str:
    """What of a word can be a user's part: behind its last @ every search for one is in vain, and
    in a long word there may be many."""
    return word[: word.rfind("@") + 1]


def _without_users(found: re.Match[str]) -> str:
    head = _up_to_at(found[0])
    return _USER.sub(_without_user, head) + found[0][len(head) :]


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
