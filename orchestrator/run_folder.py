"""One run at a time in a run folder, and what changed in the recipe since the last one.

The lock is the file ``OUTPUT/.running.json``: who writes into the folder. It is touched every few
seconds. One that a killed process left is taken over: of the same machine when no such process is
there, of another machine when it was not touched for a while. How long that is, is told by the file
system's own clock, or by watching; clocks of two machines are never compared.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.files import disk_errors
from moesaic.orchestrator.foreign import printable, read_json, shown
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.yamlfile import read_yaml

LOCK = ".running.json"
# What is not written under another name first, below a run's folder and those of its budgets.
IN_PLACE = (
    *("log.txt", "pictures", "model", ".model.partial", ".model.replaced"),
    *("journal.log", "journal.log.driver"),
)
# Of another machine's lock: not touched for so long, its owner is dead.
_TOUCH_SECONDS, _STALE_SECONDS = 10.0, 60.0
_LOOK_SECONDS, _JOIN_SECONDS = 1.0, 10.0
_MOST_BYTES = 1 << 16
_SHOWN_KEYS, _SHOWN_CHARACTERS, _NAME_CHARACTERS = 12, 60, 300
_NONE = "(not set)"


@contextmanager
def run_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Keeps other runs out of a folder; tells what the recipe changes in it.

    Raises:
        UserError: another run is writing into the folder, or a link there leads out of it.
    """
    _check_links(folder, recipe)
    with _Lock(folder):
        for line in changed_lines(folder, recipe):
            stderr.print(line, markup=False)
        yield


def _check_links(folder: Path, recipe: Recipe) -> None:
    """Raises a UserError for a link where a run would write in place: who gave away the folder
    chose where it leads. Other files are made beside and renamed, which takes a link's place."""
    plans = recipe.budget.each if recipe.budget.several else ()
    for place in (folder, *(folder / label for label in plans)):
        for path in (place, *(place / name for name in IN_PLACE)):
            if path != folder and path.is_symlink():
                raise UserError(
                    f"{path}: is a symbolic link, and a run would write through it: remove it, or"
                    " give another --output"
                )


def changed_lines(folder: Path, recipe: Recipe) -> list[str]:
    """What differs from the recipe of the last run in the folder; empty if nothing, or none was.

    Where the record is kept is left out: it changes no result, and may hold a password.
    """
    file = folder / "recipe.yaml"
    if not file.exists():
        return []
    try:
        before, _ = read_yaml(file)
    except UserError:
        before = None
    if not isinstance(before, dict):
        return [f"{file}: cannot be read, so what differs from the last run is not known"]
    old, new = _flat(before), _flat(yaml.safe_load(recipe.to_yaml()))
    keys = [
        key
        for key in dict.fromkeys([*old, *new])
        if old.get(key, _NONE) != new.get(key, _NONE) and not key.startswith("tracking.")
    ]
    if not keys:
        return []
    lines = [f"{folder}: the recipe differs from that of the last run here:"]
    for key in keys[:_SHOWN_KEYS]:
        lines.append(
            f"  {printable(key)}: {_shown(old.get(key, _NONE))} → {_shown(new.get(key, _NONE))}"
        )
    if len(keys) > _SHOWN_KEYS:
        lines.append(f"  and {len(keys) - _SHOWN_KEYS} more")
    lines.append(
        "finished pieces that still apply are reused, the rest is made anew; results in the folder"
        " are replaced"
    )
    return lines


def _flat(value: Any) -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` as ``{"a.b.0": 1}``, names cut where they are long."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        name, value = waiting.pop()
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        elif name:
            found[name] = value
        inner = [(f"{name}.{key}" if name else str(key), part) for key, part in items]
        # Each part repeats the names of those that it is in, aliases as well.
        waiting += [(own[:_NAME_CHARACTERS], part) for own, part in reversed(inner)]
    return found


def _shown(value: Any) -> str:
    text = printable(" ".join(str(value).split())[: _SHOWN_CHARACTERS + 1])
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


class _Lock:
    """Held while the block is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> "_Lock":
        while not self._made():
            owner = self._owner()
            if owner is not None:
                self._wait_or_refuse(owner)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended.set()
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():  # the storage does not answer, and would not answer us either
            stderr.print(
                f"{self.folder}: does not answer; {LOCK} stays there, and the next run here waits"
                f" {_STALE_SECONDS:.0f} s for nobody",
                markup=False,
            )
            return
        owner = self._owner()
        if owner is not None and owner.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _made(self) -> bool:
        """Makes the file, if there is none."""
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "machine": _machine(),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "token": self.token,
        }
        with disk_errors(self.path):
            try:
                number = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            try:
                with open(number, "w", encoding="utf-8") as stream:
                    json.dump(me, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            except BaseException:  # a full disk: the next run must not wait for nobody
                with contextlib.suppress(OSError):
                    self.path.unlink()
                raise
        return True

    def _owner(self) -> dict[str, Any] | None:
        """What the file says; None without it."""
        try:
            return _told(self.path)
        except FileNotFoundError:
            return None

    def _wait_or_refuse(self, owner: dict[str, Any]) -> None:
        """Removes a dead owner's file; the owner of another machine is watched meanwhile.

        Raises:
            UserError: the owner lives.
        """
        if owner.get("machine") == _machine():
            if _alive(owner):
                raise self._refusal(owner)
            self._remove(owner)
            return
        touched = self._touched()
        if touched is None:
            return
        quiet = self._now() - touched
        watched = time.monotonic() - max(0.0, min(quiet, _STALE_SECONDS))
        stderr.print(
            f"{self.folder}: {_words(owner)} was at work here; looking whether it lives (up to"
            f" {_STALE_SECONDS:.0f} s)",
            markup=False,
        )
        while time.monotonic() - watched < _STALE_SECONDS:
            time.sleep(_LOOK_SECONDS)
            now = self._touched()
            if now is None:
                return
            if now != touched:
                raise self._refusal(self._owner() or owner)
        self._remove(owner)

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        return UserError(
            f"{self.folder}: {_words(owner)} is writing into this folder since"
            f" {shown(owner.get('since', 'just now'))}: wait until it has ended, stop it, or give"
            " another --output"
        )

    def _remove(self, owner: Mapping[str, Any]) -> None:
        """Takes the file away, unless it is another one by now."""
        aside = self.path.with_name(f"{LOCK}.{self.token}")
        with disk_errors(self.path):
            try:
                self.path.rename(aside)
            except FileNotFoundError:
                return
            try:
                if _told(aside).get("token") != owner.get("token"):  # somebody was faster
                    with contextlib.suppress(FileExistsError):
                        os.link(aside, self.path)
            finally:
                aside.unlink()

    def _touched(self) -> float | None:
        """When the file was touched last, by the file system's clock."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """What the file system's clock says."""
        probe = self.path.with_name(f"{LOCK}.{self.token}")
        with disk_errors(probe):
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink()

    def _touch(self) -> None:
        """Shows that this run lives; stops it where another one took it for dead."""
        while not self._ended.wait(_TOUCH_SECONDS):
            try:
                owner = self._owner()
                if owner is not None and owner.get("token") == self.token:
                    os.utime(self.path)
                    continue
            except OSError:
                continue  # trouble that passes, or else the run meets it itself
            by = "nobody" if owner is None else _words(owner)
            stderr.print(
                f"{self.folder}: this run did not answer for a while, and the folder was taken over"
                f" by {by}",
                markup=False,
            )
            # As Ctrl-C; who was started in the background may ignore that, but then takes SIGTERM.
            handled = callable(signal.getsignal(signal.SIGTERM))
            os.kill(os.getpid(), signal.SIGTERM if handled else signal.SIGINT)
            return


def _told(file: Path) -> dict[str, Any]:
    """What a lock's file says; nothing is known of one that is just being made, or damaged.

    Raises:
        OSError: as the system says it.
    """
    try:
        told = read_json(file, _MOST_BYTES)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _words(owner: Mapping[str, Any]) -> str:
    if "host" not in owner:
        return "another run"
    return f"another run (host {shown(owner['host'])}, pid {shown(owner.get('pid'))})"


def _machine() -> str:
    """What two processes share that see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that made a lock is still there."""
    try:
        process = psutil.Process(int(owner["pid"]))
        same = abs(process.create_time() - float(owner["started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
        return False
