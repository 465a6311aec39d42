"""What a person sees: lines in a log, and the table at the end."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.methods.base import Event
from moesaic.orchestrator import console as module
from moesaic.orchestrator.console import View, score_table
from moesaic.orchestrator.runlog import run_log


class Clock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def log() -> tuple[View, io.StringIO]:
    """A view that writes lines, as into a file."""
    stream = io.StringIO()
    return View(Console(file=stream, force_terminal=False, width=200, soft_wrap=True)), stream


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left(clock: Clock) -> None:
    view, stream = log()
    with view:
        view.stage("measure", 100, done=60)
        clock.now += 1000  # the stage waits for another one; that is no speed of its own
        view.advance("measure", 1)
        clock.now += 10
        view.advance("measure", 9, peak_bytes=2_000_000_000)
        view.tick(["experts 2"])
        view.tick(["experts 3"])
        clock.now += 10
        view.tick(["experts 4"])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "measure: 60 of 100 were finished before"
    # 9 in 10 seconds: neither what an earlier run did nor the time before counts.
    assert lines[1:] == ["measure: 70/100  0.9/s  34 s left  experts 2  peak 2.0 GB/worker"]
    assert view.seconds["measure"] == 1010


def test_a_stage_with_a_limit_takes_no_longer_than_that(clock: Clock) -> None:
    view, stream = log()
    with view:
        view.stage("trials", 1000)
        view.limit("trials", 60)
        clock.now += 20
        view.tick([])  # nothing is done yet
        view.advance("trials", 1)
        clock.now += 20
        view.advance("trials", 1)
        view.tick([])
        (task,) = view.progress.tasks
        assert str(module._TimeLeft().render(task)) == "0:00:20"
        clock.now += 30  # what is under way is finished
        assert str(module._TimeLeft().render(task)) == "0:00:00"
        view.progress.update(task.id, completed=999)
        view.finish("trials")
    assert [line.split("  ")[2] for line in stream.getvalue().splitlines()] == [
        "40 s left",
        "20 s left",
    ]


def test_steps_that_end_together_make_no_speed(clock: Clock) -> None:
    """Two trials of two workers, after half a minute."""
    view, stream = log()
    with view:
        view.stage("trials", 20)
        clock.now += 30
        view.advance("trials")
        clock.now += 0.1
        view.advance("trials")
        view.tick(["best 0.5"])
    assert stream.getvalue() == "trials: 2/20  4.0/min  271 s left  best 0.5\n"


LONG = ["best 0.02444 (trial 8)", "front 12", "49.6 trials/min, 3 failed (no room for 3 GB)"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_long_note_is_shown_whole_on_a_terminal_of_any_width(clock: Clock, width: int) -> None:
    stream = io.StringIO()
    view = View(Console(file=stream, force_terminal=True, width=width, soft_wrap=True))
    view.stage("trials", 60)
    view.tick(LONG)
    screen = io.StringIO()
    Console(file=screen, width=width).print(view.progress.get_renderable())
    lines = screen.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    column = lines[0].index("best")
    assert " ".join(" ".join(line[column:] for line in lines).split()) == ", ".join(LONG)


def test_a_log_has_long_notes_whole_and_few_of_many_names(clock: Clock) -> None:
    view, stream = log()
    view.stage("trials", 60)
    clock.now += 20
    view.tick(LONG)
    clock.now += 20
    view.tick([f"experts {n}" for n in range(64)])
    first, second = stream.getvalue().splitlines()
    assert first.endswith(", ".join(LONG))
    assert second.endswith("experts 0, experts 1, experts 2, experts 3, 60 more")


def test_a_finished_stage_says_no_more(clock: Clock) -> None:
    view, stream = log()
    with view:
        view.stage("calibrate", 2)
        view.advance("calibrate", 2)
        clock.now += 100
        view.tick([])
    assert stream.getvalue() == ""


def test_a_stage_that_ends_early_says_no_more(clock: Clock) -> None:
    view, stream = log()
    with view:
        view.stage("relax", 30)
        clock.now += 5
        view.advance("relax", 12)
        clock.now += 1
        view.finish("relax")
        clock.now += 100
        view.finish("relax")
        view.finish("evolve")  # never began
        view.tick([])
    (bar,) = view.progress.tasks
    assert bar.finished and bar.completed == bar.total == 12
    assert stream.getvalue() == "" and view.seconds == {"relax": 6}


@pytest.mark.parametrize("steps", [3, 10])
def test_stages_of_one_name_add_up(clock: Clock, steps: int) -> None:
    view, stream = log()
    with view:
        for _ in range(3):
            view.stage("evolve", 10)
            clock.now += 4
            view.advance("evolve", steps)
            clock.now += 100  # other stages
        assert view.seconds == {"evolve": 12}
        assert [bar.finished for bar in view.progress.tasks] == [True, True, steps == 10]
        view.tick([])
    assert len(stream.getvalue().splitlines()) == (steps < 10)


def test_events_are_counted_by_kind_and_the_first_is_told() -> None:
    view, stream = log()
    few = [Event("few_tokens", f"{n} tokens [48]", f"bank {n}") for n in range(3)]
    view.events([few[0], Event("damping_grew", "to 0.1", "q"), *few[1:]])
    assert stream.getvalue().splitlines() == [
        "event few_tokens ×3: bank 0: 0 tokens [48]",
        "event damping_grew ×1: q: to 0.1",
    ]


def test_the_table_has_a_row_per_score() -> None:
    score: dict[str, Any] = {
        "bytes": 1234567,
        "bits_per_weight": 3.0004,
        "perplexity": 7.25,
        "kl": 0.01234,
        "accuracy": 0.5,
    }
    stream = io.StringIO()
    table = score_table({"dense": {**score, "kl": 0.0}, "plan": score})
    Console(file=stream, width=120).print(table)
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if "plan" in line)
    for word in ("1,234,567", "3.000", "7.250", "0.0123", "50.0%"):
        assert word in row
    assert "0.0000" in next(line for line in text.splitlines() if "dense" in line)


def test_a_stage_that_is_over_says_what_was_found_last(clock: Clock) -> None:
    view = View(Console(file=io.StringIO(), force_terminal=True, width=120))
    with view:
        view.stage("trials", 2)
        view.tick(["best 0.5 (trial 0)"])
        view.advance("trials", 2)  # full: ticks are for others now
        view.tick(["best 0.4 (trial 1)"])
        view.finish("trials", ["best 0.3 (trial 1)"])
    (bar,) = view.progress.tasks
    assert bar.fields["note"] == "best 0.3 (trial 1)"


@pytest.mark.parametrize("broken", ["pipe", "disk"])
def test_who_reads_no_more_ends_no_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``moesaic run 2>&1 | head``, or a terminal that was closed: lines go into the log alone."""
    if broken == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", buffering=1)
    else:
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with run_log(tmp_path, "run"):
        module.stderr.print("first", markup=False)
        module.show_scores({})
        module.stderr.print("second", markup=False)
    if broken == "pipe":
        stream.write("who writes there directly meets no error, either\n")
        stream.close()
    else:
        with pytest.raises(OSError):  # what the stream still holds
            stream.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines[1:]] == ["first", "second", "done"]
