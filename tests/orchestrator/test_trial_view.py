"""What is shown of a study while it goes on."""

import io
from collections.abc import Sequence

from rich.console import Console

from moesaic.orchestrator.console import View
from moesaic.orchestrator.limits import Limits
from moesaic.orchestrator.study import Told
from moesaic.orchestrator.trial_failures import Failures
from moesaic.orchestrator.trial_view import TrialView


def trial(number: int, kl: float, **figures: float) -> Told:
    return Told(number, "complete", {}, kl, {"fits": True, **figures}, {})


def failed(number: int, reason: str) -> Told:
    return Told(number, "failed", {}, None, {"reason": reason}, {})


def shown(objectives: Sequence[str]) -> tuple[TrialView, io.StringIO]:
    """What is shown, and what of it is a line."""
    stream = io.StringIO()
    view = View(Console(file=stream, force_terminal=False, width=200, soft_wrap=True))
    return TrialView(view, Limits(objectives, {}), Failures()), stream


def test_members_of_the_front_are_told_from_time_to_time_and_in_the_end() -> None:
    found, stream = shown(["bytes", "kl"])
    known = [trial(0, 0.5, bytes=2000), trial(1, 0.25, bytes=4000)]
    found.open(9, known, known)
    found.begin(None)
    found.told(trial(2, 0.75, bytes=9000), known)
    third = [*known, trial(3, 0.75, bytes=1000)]
    found.told(third[-1], third)
    many = [trial(number, 1.0 / number, bytes=1000 * number) for number in range(4, 10)]
    found.told(many[-2], many[:-1])
    found.told(many[-1], many)  # soon after the first line

    def lines() -> list[str]:
        return [line for line in stream.getvalue().splitlines() if line.startswith("front")]

    first = "front of 3: 1,000 bytes → KL 0.75, 2,000 → 0.5, 4,000 → 0.25"
    assert lines() == [first]
    found.close()
    last = "front of 6: 4,000 bytes → KL 0.25, 6,000 → 0.1667, 7,000 → 0.1429, 9,000 → 0.1111"
    assert lines() == [first, last]
    found.close()
    assert lines() == [first, last]
    assert found._state() == [
        "best 0.1111 (trial 9)",
        "front 6 (4,000 → 0.25 … 9,000 → 0.1111)",
    ]


def test_a_front_without_bytes_is_one_of_latencies() -> None:
    found, stream = shown(["kl", "latency"])
    found.open(9, [], [])
    found.begin(None)
    first = trial(0, 0.5, bytes=2000, latency=1.25)
    found.told(first, [first])
    assert "front of 1: 1.25 ms/token → KL 0.5\n" in stream.getvalue()


def test_failures_of_earlier_runs_count() -> None:
    found, stream = shown(["kl"])
    found.open(9, [trial(0, 0.5, bytes=2000), failed(1, "no plan: too large")], [])
    found.begin(None)
    found.failures.reasons["no plan: too large"] += 1
    found.told(failed(2, "no plan: too large"), [])
    found.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "trials: 2 of 9 were finished before"
    assert lines[1].endswith("trials/min, 2 failed, best trial 0: KL 0.5, 2,000 bytes")
    assert lines[2:] == ["failed ×2: no plan: too large"]
