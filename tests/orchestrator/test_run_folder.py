"""One run at a time in a folder; what a changed recipe changes."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesaic.orchestrator import run_folder as module
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.run import run_recipe
from moesaic.orchestrator.run_folder import IN_PLACE, LOCK, changed_lines, run_folder
from moesaic.orchestrator.runlog import run_log
from moesaic.orchestrator.study import JOURNAL
from tests.orchestrator.projects import make_model_folder, make_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    return load_recipe(make_recipe(tmp_path / "recipe", model))


def hold(folder: Path, recipe: Recipe, ready: Any) -> None:
    """In a process of its own: a run that never ends."""
    with run_folder(folder, recipe):
        ready.set()
        time.sleep(600)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path, recipe: Recipe) -> None:
    with run_folder(tmp_path, recipe):
        owner = json.loads((tmp_path / LOCK).read_text())
        with pytest.raises(UserError) as error, run_folder(tmp_path, recipe):
            pass
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: another run (host {owner['host']}, pid {os.getpid()}) is")
    assert f"since {owner['since']}" in text and "--output" in text and "\n" not in text
    assert list(tmp_path.glob(f"{LOCK}*")) == []
    with run_folder(tmp_path, recipe):  # free again
        assert (tmp_path / LOCK).exists()


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path: Path, recipe: Recipe) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, recipe, ready))
    process.start()
    assert ready.wait(60) and process.pid is not None
    with pytest.raises(UserError, match=f"pid {process.pid}"), run_folder(tmp_path, recipe):
        pass
    os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(process.pid)], timeout=10)
    started = time.monotonic()  # the process is a zombie now: nobody waited for it
    with run_folder(tmp_path, recipe):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 5
    process.join()


def test_a_lock_of_a_process_id_that_was_given_anew_is_dead(tmp_path: Path, recipe: Recipe) -> None:
    with run_folder(tmp_path, recipe):
        owner = json.loads((tmp_path / LOCK).read_text())
    owner |= {"started": owner["started"] - 1000.0, "token": "other"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with run_folder(tmp_path, recipe):
        assert json.loads((tmp_path / LOCK).read_text())["token"] != "other"


def foreign(folder: Path) -> Path:
    """A lock of another machine."""
    path = folder / LOCK
    owner = {"host": "elsewhere", "pid": 7, "machine": "elsewhere", "since": "noon", "token": "x"}
    path.write_text(json.dumps(owner))
    return path


def test_another_machines_lock_is_judged_by_the_file_systems_clock(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine's clock says."""
    path = foreign(tmp_path)
    old = path.stat().st_mtime - module._STALE_SECONDS - 1
    os.utime(path, (old, old))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    started = time.monotonic()
    with run_folder(tmp_path, recipe):
        assert json.loads(path.read_text())["host"] != "elsewhere"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("ahead_seconds", [0, 86400])
def test_another_machines_lock_is_watched_until_it_is_quiet(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, ahead_seconds: int
) -> None:
    """Also one that was touched in the future."""
    monkeypatch.setattr(module, "_STALE_SECONDS", 1.5)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.1)
    path = foreign(tmp_path)
    when = path.stat().st_mtime + ahead_seconds
    os.utime(path, (when, when))
    started = time.monotonic()
    with run_folder(tmp_path, recipe):
        assert 1.0 < time.monotonic() - started < 10


def test_another_machines_run_that_lives_is_not_disturbed(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.1)
    path = foreign(tmp_path)
    beat = threading.Timer(0.5, lambda: os.utime(path))
    beat.start()
    refused = pytest.raises(UserError, match=r"another run \(host elsewhere, pid 7\) is .* noon")
    with refused, run_folder(tmp_path, recipe):
        pass
    beat.join()
    assert json.loads(path.read_text())["token"] == "x"
    assert [p.name for p in tmp_path.glob(f"{LOCK}*")] == [LOCK]


def test_a_run_that_was_taken_for_dead_stops(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOUCH_SECONDS", 0.1)
    # Tests that were started in the background would ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), run_folder(tmp_path, recipe):
            foreign(tmp_path)
            time.sleep(20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 300,
        b"gar\xffbage",
        b'{"host": "her',
        b"[1]",
        b'"x"',
        b"[" * 60_000,
        b"7" * 99_999,
    ]
    + [b'{"machine": "%s", "pid": 1e999}', b'{"machine": "%s", "pid": 9%s}' % (b"%s", b"9" * 30)],
)
def test_a_damaged_lock_is_taken_over_once_nobody_touches_it(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(module, "_STALE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    (tmp_path / LOCK).write_bytes(content.replace(b"%s", module._machine().encode()))
    with run_folder(tmp_path, recipe):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.glob(f"{LOCK}*")) == []


def test_a_full_disk_leaves_no_lock(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"), run_folder(tmp_path, recipe):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe"]


def test_a_folder_that_does_not_answer_holds_up_no_end(
    tmp_path: Path,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "_JOIN_SECONDS", 0.2)
    hanging, never = threading.Event(), threading.Event()

    def utime(_: Path) -> None:
        hanging.set()
        never.wait(30)

    monkeypatch.setattr(os, "utime", utime)
    with run_folder(tmp_path, recipe):
        assert hanging.wait(10)
    never.set()
    assert (tmp_path / LOCK).exists()
    assert capsys.readouterr().err.startswith(f"{tmp_path}: does not answer; .running.json stays")


def test_what_changed_since_the_last_run_is_told_by_key(
    model: Path, tmp_path: Path, recipe: Recipe
) -> None:
    assert changed_lines(tmp_path, recipe) == []  # nothing was run here
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert changed_lines(tmp_path, recipe) == []
    changes: dict[str, Any] = {
        "budget": {"bits_per_weight": 6.5},
        "calibration": {"sequences": 24},
        "candidates": [{"method": "rtn", "bits": [3, 8], "group_size": 16}],
        "tracking": {"uri": "https://user:secret@example.org"},
    }
    other = load_recipe(make_recipe(tmp_path / "other", model, **changes))
    lines = changed_lines(tmp_path, other)
    assert "differs from that of the last run" in lines[0] and "are reused" in lines[-1]
    assert "  budget.bits_per_weight: 4.6 → 6.5" in lines
    assert "  calibration.sequences: 12 → 24" in lines
    assert "  candidates.2.method: gptq → (not set)" in lines
    assert not any("secret" in line for line in lines)


def test_a_damaged_recipe_of_the_last_run_is_told(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    (line,) = changed_lines(tmp_path, recipe)
    assert line.startswith(str(tmp_path / "recipe.yaml")) and "cannot be read" in line


@pytest.mark.parametrize("name", [*IN_PLACE, "2.5bpw", "2.5bpw/model"])
def test_nothing_is_written_through_a_link_that_lay_in_the_folder(
    tmp_path: Path, model: Path, name: str
) -> None:
    """The folder of a run may come from somebody else."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    outside.mkdir()
    (folder / name).symlink_to(outside)
    budgets = {"budget": {"bits_per_weight": [2.5, 4.6]}}
    file = make_recipe(tmp_path / "recipe", model, **budgets)
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link"):
        run_recipe(file, folder, ("calibrate",))
    assert not list(outside.iterdir()) and not (folder / LOCK).exists()
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    (folder / name).unlink()
    with run_folder(tmp_path / "link", load_recipe(file)):
        pass


def test_a_log_that_became_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="log.txt: cannot be written"), run_log(tmp_path, "run"):
        pass
    assert JOURNAL in IN_PLACE and not (tmp_path / "outside").exists()
