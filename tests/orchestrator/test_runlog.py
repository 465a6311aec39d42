"""The log of a run: whose line it is, how it ends, and how much workers may write."""

import os
import re
from pathlib import Path

import pytest
import ray

from moesaic.orchestrator import cluster, runlog
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.run import run_recipe
from moesaic.orchestrator.runlog import RunLog, run_log
from tests.orchestrator.projects import make_recipe


def said(folder: Path) -> list[str]:
    """Lines of the log without their times."""
    lines = (folder / "log.txt").read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(stamp, line) for line in lines)
    return [re.sub(stamp, "", line, count=1) for line in lines]


def test_lines_of_the_driver_and_of_workers_stand_in_one_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_log(tmp_path, "run"):
        stderr.print("measure: 3 of 4", markup=False)
        lines = ["a warning", "", "another\x1b[31m"]
        runlog.from_worker({"ip": "192.0.2.7", "pid": 12, "lines": lines})
        runlog.from_worker({"ip": "192.0.2.8", "pid": 12, "lines": ["a warning"]})
        lines = ["Usage: 2.0/2.0 CPU", ":event_summary:Adding 1 node"]
        runlog.from_worker({"ip": "192.0.2.7", "pid": "autoscaler", "lines": lines})
    first, *rest = said(tmp_path)
    assert first.startswith("moesaic run: version ")
    assert rest == [
        "measure: 3 of 4",
        "[192.0.2.7 12] a warning",
        "[192.0.2.7 12] another\\x1b[31m",
        "[192.0.2.8 12] a warning",
        "[192.0.2.7 autoscaler] Adding 1 node",
        "workers wrote 4 lines, see above",
        "done",
    ]
    # Workers do not write between the lines of the terminal.
    assert capsys.readouterr().err == "measure: 3 of 4\n"
    stderr.print("after it")
    runlog.from_worker({"ip": "192.0.2.7", "pid": 12, "lines": ["late"]})
    assert said(tmp_path)[-1] == "done"


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (KeyboardInterrupt(), "stopped; run the same command to go on from here"),
        (UserError("recipe.yaml: model: no"), "error: recipe.yaml: model: no"),
        (RunError("a worker died"), "failed: a worker died"),
        (ValueError("odd"), "failed: ValueError: odd"),
    ],
)
def test_the_last_line_tells_how_the_run_ended(
    tmp_path: Path, error: BaseException, end: str
) -> None:
    with pytest.raises(type(error)), run_log(tmp_path, "run"):
        raise error
    with run_log(tmp_path, "run"):
        pass
    lines = said(tmp_path)
    assert lines[1] == end and lines[-1] == "done" and len(lines) == 4


def test_what_ray_tells_of_deaths_is_in_the_log_and_not_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On stdout is the result, for ``--json``."""
    told = ray._private.worker.print_to_stdstream
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", told)  # restored in the end
    cluster._collect_lines()
    with runlog.run_log(tmp_path, "run"):
        ray._private.worker.print_to_stdstream(
            {"lines": ["A worker died."], "pid": "raylet", "is_err": False}, ignore_prefix=False
        )
    assert capfd.readouterr().out == ""
    assert " [raylet] A worker died." in (tmp_path / "log.txt").read_text()


def test_workers_that_write_much_or_repeat_themselves_do_not_fill_the_disk(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt", worker_bytes=5000)
    log.from_worker({"ip": "a", "pid": 1, "lines": ["the same"] * 1000})
    log.from_worker({"ip": "a", "pid": 2, "lines": ["x" * 100_000]})
    log.from_worker({"ip": "a", "pid": 1, "lines": [f"line {n}" for n in range(10_000)]})
    log.line("the driver goes on")
    log.close()
    lines = said(tmp_path)
    assert lines[0] == "[a 1] the same" and len(lines[1]) == 1000
    assert (tmp_path / "log.txt").stat().st_size < 10_000
    assert lines[-2:] == [
        "workers have written too much: their further lines are left out",
        "the driver goes on",
    ]
    assert log.worker_lines == 11_001


def test_repeats_are_counted(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt")
    log.from_worker({"ip": "a", "pid": 1, "lines": ["same"] * 3 + ["other"] + ["end"] * 2})
    log.close()
    assert said(tmp_path) == [
        "[a 1] same",
        "[a 1] 2 times more: same",
        "[a 1] other",
        "[a 1] end",
        "[a 1] 1 times more: end",
    ]


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match=r"log\.txt: cannot be written"), run_log(tmp_path, "run"):
        pass


@pytest.mark.parametrize("key", ["--output", "store"])
def test_a_run_into_rays_copy_of_the_working_directory_is_refused(tmp_path: Path, key: str) -> None:
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_12"
    recipe = make_recipe(copy if key == "store" else tmp_path, "builtin:demo")
    output = copy / "run" if key == "--output" else tmp_path / "run"
    with pytest.raises(UserError, match=f"^{key}: .* lies in Ray's copy of the working directory"):
        run_recipe(recipe, output, ("search",))
    assert not output.exists()


def test_a_full_disk_under_the_log_does_not_hide_why_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(runlog.os, "open", lambda *file: full)
    with pytest.raises(RunError, match="the reason"), run_log(tmp_path, "run") as log:
        log.line("a line that is lost")
        raise RunError("the reason")
