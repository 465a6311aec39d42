"""Content hashes of large files, computed once per version of a file.

Hashing runs at about one gigabyte per second, so digests are remembered on disk under a key of
(real path, size, modification time in ns): resuming a run of a large model starts at once.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/moesaic/digests``, by default below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moesaic" / "digests"


def file_digest(file: Path) -> str:
    """BLAKE2b of the file's content, 32 hex digits; from the cache where the file is unchanged."""
    real = file.resolve()
    state = real.stat()
    version = json.dumps([str(real), state.st_size, state.st_mtime_ns])
    remembered = cache_folder() / hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    if remembered.is_file():
        digest = remembered.read_text()
        if len(digest) == 32:
            return digest
    with open(real, "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
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
