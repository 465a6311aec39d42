"""Content hashes of large files, computed once per version of a file.

Hashing runs at about one gigabyte per second, so digests are remembered on disk under a key of
(real path, size, number, times of modification and change in ns): resuming a run of a large model
starts at once. Models of one shape have files of one size, and who unpacks or copies them may set
the time of modification; that of the change nobody can set.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

# A file that was written so long ago at least shows a change by its times.
TICK_NS = 2 * 10**9


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/moesaic/digests``, by default below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moesaic" / "digests"


def file_digest(file: Path, own: bool = False) -> str:
    """BLAKE2b of the file's content, 32 hex digits; from the cache where the file is unchanged.

    Args:
        own: a copy that nobody else writes, and whose time of access is set when it is used, which
            counts as a change.
    """
    real = file.resolve()
    state = real.stat()
    times = [state.st_mtime_ns] if own else [state.st_mtime_ns, state.st_ctime_ns]
    version = json.dumps([str(real), state.st_size, state.st_ino, *times])
    remembered = cache_folder() / hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    if remembered.is_file():
        digest = remembered.read_bytes().decode("ascii", "replace")
        if re.fullmatch("[0-9a-f]{32}", digest):
            return digest
    settled = time.time_ns() - max(times) > TICK_NS
    with open(real, "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if own or settled:
        _remember(remembered, digest)
    return digest


def _remember(file: Path, digest: str) -> None:
    """Writes atomically; a cache that cannot be written costs time at the next start, no more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
            stream.write(digest)
        os.replace(stream.name, file)
    except OSError:
        return
