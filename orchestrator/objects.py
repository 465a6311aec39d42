"""Files at a URL: what fsspec reaches, with patience and with errors that people can read.

Network and servers fail for a moment and come back. Every operation is tried again, after pauses
that grow, unless the answer is one that does not change by asking again (no permission, no such
bucket, no credentials). After that it is one line that names the URL and the reason.

Few drivers have a time-out of their own. So every operation runs in a thread that is waited for as
long as its bytes may take; one that gives no answer counts as failed, and its thread is left alone.

Credentials come from where each service's own tools find them (environment, files, the machine's
role); a URL that holds a password is refused, because URLs are written into logs and recipes.
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moesaic.orchestrator.errors import RecipeError, RunError, UserError
from moesaic.orchestrator.files import disk_is_full
from moesaic.orchestrator.process import answered
from moesaic.orchestrator.redaction import redacted

T = TypeVar("T")

# Attempts at one operation, and the pause after the first; the next ones are twice as long each.
ATTEMPTS, PAUSE_SECONDS = 6, 0.5
# An answer takes so long at most, of which many are needed for many files; and bytes take this.
ANSWER_SECONDS, FILES_PER_SECOND, BYTES_PER_SECOND = 120.0, 10.0, 1e6
# A listing of millions of files, which come in parts of a thousand.
LISTING_SECONDS = 1800.0
# Protocol → what to install for it.
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "pip install 'moesaic[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "pip install 'moesaic[gcs]'"),
    "hdfs": "pip install pyarrow, Java (JAVA_HOME says where), and Hadoop's native client libhdfs"
    " (HADOOP_HOME)",
}
# Libraries that a driver looks for when it starts: an OSError, and no ImportError, names them.
_LIBRARIES = ("libjvm", "libhdfs")
# Protocol → what its driver is told. Attempts are ours to count.
_OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("s3", "s3a"), {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 10}}
)
# What drivers call the time of the last change.
_TIMES = ("LastModified", "mtime", "updated", "last_modified", "created")
# Names of errors that the drivers do not translate, and of codes in the text of those they do.
_REFUSALS = (
    "NoCredentials",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "InvalidBucketName",
    "InvalidToken",
    "ExpiredToken",
)


def longest_silence(size: int) -> float:
    """Seconds from the begin of one attempt at a file of ``size`` bytes to that of the next at
    most, or to the end of what is asked of the place about it afterwards."""
    longest_pause = 1.5 * PAUSE_SECONDS * 2.0 ** (ATTEMPTS - 2)
    return ATTEMPTS * (ANSWER_SECONDS + longest_pause) + size / BYTES_PER_SECOND


class OtherSizeError(RunError):
    """A file has not the size that it had."""


class Refusal(RunError):
    """The place says no, and would say so again."""


def is_url(name: str) -> bool:
    """Whether a name is one that fsspec is asked about, and no path."""
    return "://" in name


def check_url(url: str) -> None:
    """Raises ValueError for what no URL of a folder can be."""
    parts = urlsplit(url)
    if parts.password:
        raise ValueError("a URL must not hold a password: give it by the environment")
    if "#" in url or "?" in url or "::" in url:
        raise ValueError(f"{url[:80]!r} is no URL of a folder: it must not hold '#', '?' or '::'")
    if parts.scheme == "memory":
        raise ValueError(
            f"{url[:80]!r} lives in the memory of one process, and workers are others: give a"
            " folder, or the URL of a server"
        )
    if "//" in parts.path.rstrip("/"):
        raise ValueError(f"{url[:80]!r} is no URL of a folder: a folder in it has no name ('//')")
    if not (parts.netloc or parts.path.strip("/")):
        raise ValueError(f"{url[:80]!r} names no folder: write PROTOCOL://BUCKET/FOLDER")


class Objects:
    """The files below one URL, by names relative to it.

    Args:
        url: of a folder; it need not exist where folders do not.
        key: of the recipe that holds it, for errors.
        fs: gives the files, by names below its root, where fsspec has none for the URL.

    Raises:
        RecipeError: the protocol is not known, or its package is not installed.
    """

    def __init__(self, url: str, key: str = "store", fs: Any = None) -> None:
        import fsspec

        self.url = url.rstrip("/")
        if fs is not None:
            self.fs, self.root = fs, ""
            return
        protocol = url.partition("://")[0]
        # s3fs logs what it retries itself; our line comes when it gives up.
        logging.getLogger("s3fs").setLevel(logging.CRITICAL)
        try:
            # Others write there, too: a listing that was kept would be out of date.
            options = {"use_listings_cache": False, **_OPTIONS.get(protocol, {})}
            self.fs, self.root = answered(
                lambda: fsspec.core.url_to_fs(self.url, **options), ANSWER_SECONDS
            )
        except ValueError as error:
            raise RecipeError(f"{key}: {url}: {error}") from None
        except Exception as error:  # a driver that cannot start: no package, no login
            if isinstance(error, ImportError) or any(word in str(error) for word in _LIBRARIES):
                how = _EXTRAS.get(protocol, f"its package is missing: {error}")
                text = f"{key}: {url}: {protocol}:// needs another package: {how}"
                raise RecipeError(text) from None
            raise RecipeError(f"{key}: {url}: {_reason(error)}") from None
        self.root = self.root.rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _tried(self, work: Callable[[], T], name: str, what: str, seconds: float = 0.0) -> T:
        """``work()``, again and again until it succeeds or there is no hope.

        Args:
            seconds: that it may take besides the answer.
        """
        where = f"{self.url}/{name}" if name else self.url
        pause = PAUSE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return answered(work, ANSWER_SECONDS + seconds)
            except (FileNotFoundError, RunError, UserError):
                raise
            except Exception as error:
                reason = _reason(error)
                if isinstance(error, PermissionError) or any(word in reason for word in _REFUSALS):
                    raise Refusal(f"{where}: cannot be {what}: {reason}") from error
                if disk_is_full(error):
                    raise RunError(
                        f"{where}: cannot be {what}: no space is left there; free some (moesaic"
                        " store gc URL --keep RUN) and run the same command again, finished work"
                        " is kept"
                    ) from error
                if attempt == ATTEMPTS:
                    raise RunError(
                        f"{where}: cannot be {what}, tried {ATTEMPTS} times: {reason}; run the same"
                        " command again, finished work is kept"
                    ) from error
            # Many workers that failed together must not come back together.
            time.sleep(pause * (0.5 + random.random()))
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def read(self, name: str, limit: int) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it has more than ``limit`` bytes, which are not read.
        """

        def work() -> bytes:
            try:
                found: bytes = self.fs.cat_file(self._at(name), start=0, end=limit + 1)
            except FileNotFoundError:
                raise
            except Exception:  # servers refuse any part of a file that is empty
                if self.fs.info(self._at(name))["size"]:
                    raise
                return b""
            return found

        found = self._tried(work, name, "read")
        if len(found) > limit:
            raise ValueError(f"has more than {limit} bytes")
        return found

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` … ``stop - 1`` of a file, fewer where it ends. Raises
        FileNotFoundError."""

        def work() -> bytes:
            found: bytes = self.fs.cat_file(self._at(name), start=start, end=stop)
            return found

        return self._tried(work, name, "read")

    def read_many(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Small files, many at a time; those that are not there are left out.

        Args:
            sizes: name → bytes, none of which is 0; of a file that has become longer meanwhile no
                more is read.
        """
        if not sizes:
            return {}

        def work() -> dict[str, bytes]:
            found = self.fs.cat_ranges(
                [self._at(name) for name in sizes], [0] * len(sizes), list(sizes.values())
            )
            for value in found:
                if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                    raise value
            both = zip(sizes, found, strict=True)
            return {name: value for name, value in both if isinstance(value, bytes)}

        return self._tried(work, "", "read", len(sizes) / FILES_PER_SECOND)

    def _stripped(self, path: str) -> str:
        stripped: str = self.fs._strip_protocol(path)
        return stripped.lstrip("/")

    def info(self, name: str) -> Mapping[str, Any] | None:
        """What the place knows of a file (``size`` in bytes and more), None if it is not there."""

        def work() -> Mapping[str, Any]:
            found: Mapping[str, Any] = self.fs.info(self._at(name))
            return found

        try:
            return self._tried(work, name, "looked up")
        except FileNotFoundError:
            return None

    def listing(self, folder: str = "") -> dict[str, Mapping[str, Any]]:
        """Every file below a folder, by name; see :meth:`info`."""

        def work() -> Mapping[str, Any]:
            found: Mapping[str, Any] = self.fs.find(self._at(folder), detail=True)
            return found

        try:
            found = self._tried(work, folder, "listed", LISTING_SECONDS)
        except FileNotFoundError:
            return {}
        root = self._stripped(self.root)
        skip = len(root) + 1 if root else 0
        return {self._stripped(path)[skip:]: info for path, info in found.items()}

    def download(self, name: str, path: Path, size: int, begins: Callable[[], None]) -> None:
        """Copies a file of ``size`` bytes into ``path``.

        Args:
            begins: called whenever an attempt does.

        Raises:
            FileNotFoundError: there is none.
            OtherSizeError: it has become another one; no more than ``size`` bytes are written.
            OSError: the disk of ``path`` does not take it.
        """
        from fsspec.callbacks import Callback

        def check(found: int | None, done: int) -> None:
            if max(found or 0, done) > size:
                raise OtherSizeError(f"{self.url}/{name}: has more than {size:,} bytes")

        parts: list[Path] = []
        ended = threading.Event()

        def work() -> Path | OSError:
            begins()
            if (found := self.fs.info(self._at(name))["size"]) != size:
                raise OtherSizeError(f"{self.url}/{name}: has {found:,} bytes, not {size:,}")
            # Of its own: an attempt that was given up may still be writing.
            part = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
            parts.append(part)
            try:
                # Told before the first byte comes, and with every part of it.
                told = Callback(hooks={"size": check})
                self.fs.get_file(self._at(name), str(part), callback=told)
            except BaseException as error:
                part.unlink(missing_ok=True)
                # Reading fills no disk but ours; no permission may be meant of either.
                if isinstance(error, OSError) and (
                    disk_is_full(error) or error.filename == str(part)
                ):
                    return error  # and nothing to try again
                raise
            if ended.is_set():
                part.unlink(missing_ok=True)
            return part

        try:
            found = self._tried(work, name, "read", size / BYTES_PER_SECOND)
            if isinstance(found, OSError):
                raise found
            found.replace(path)
        finally:
            # Who still writes one of the others removes it then.
            ended.set()
            for part in parts:
                part.unlink(missing_ok=True)

    def upload(self, path: Path, name: str) -> None:
        """Copies ``path`` there."""

        def work() -> None:
            self._make_parent(name)
            self.fs.put_file(str(path), self._at(name))

        self._written(work, name, path.stat().st_size)

    def write(self, name: str, content: bytes) -> None:
        """A small file."""

        def work() -> None:
            self._make_parent(name)
            self.fs.pipe_file(self._at(name), content)

        self._written(work, name, len(content))

    def _written(self, work: Callable[[], None], name: str, size: int) -> None:
        try:
            self._tried(work, name, "written", size / BYTES_PER_SECOND)
        except FileNotFoundError as error:
            raise Refusal(f"{self.url}: no such bucket or folder: {_reason(error)}") from error

    def _make_parent(self, name: str) -> None:
        """Where there are folders they must exist; object stores would try to make a bucket."""
        if self.fs.protocol in ("memory", "abstract") or _is_object_store(self.fs):
            return
        self.fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        try:
            self._tried(lambda: self.fs.rm_file(self._at(name)), name, "removed")
        except FileNotFoundError:
            return

    def modified(self, name: str, info: Mapping[str, Any]) -> float:
        """When a file of :meth:`listing` was written, in seconds since 1970."""
        for key in _TIMES:
            if info.get(key) is not None:
                return _seconds(info[key])
        return _seconds(self._tried(lambda: self.fs.modified(self._at(name)), name, "looked up"))


def _is_object_store(fs: Any) -> bool:
    names = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not {"s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "oci"}.isdisjoint(names)


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def version_of(info: Mapping[str, Any]) -> str:
    """Another text when a file has other content, as far as the place tells."""
    for key in ("ETag", "etag", "md5Hash", "crc32c"):
        if key in info:
            return f"{info['size']} {info[key]}"
    # Times of a listing may be finer than those of a single file.
    times = [int(_seconds(info[key])) for key in _TIMES if info.get(key) is not None]
    return f"{info['size']} {times[:1]}"


def _reason(error: BaseException) -> str:
    text = " ".join(redacted(str(error)).split())[:200].rstrip(".")
    kind = type(error).__name__
    return text if kind in text else f"{kind}: {text}" if text else kind
