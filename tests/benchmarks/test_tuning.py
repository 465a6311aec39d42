"""The rows of the table of searches that are worked out here and not by the command."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moesaic.methods.base import Spec
from moesaic.search.base import Budget, Layer, Measurement, Problem
from tests.benchmarks import common

CHAINS = {bits: (Spec.of("rtn", {"bits": bits}),) for bits in (2, 3, 4)}


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(common.__file__).parent)
    return importlib.import_module("tuning")


def problem(budget: int) -> Problem:
    """Two units of 80 weights."""
    choices = {
        unit: [Measurement(unit, c, 10 * b, 0.5**b, 0.5**b, 0.0) for b, c in CHAINS.items()]
        for unit in "ab"
    }
    return Problem(choices, [], Budget(budget, 0), layers=dict.fromkeys("ab", Layer(80)))


@pytest.mark.parametrize(
    ("budget", "bits"), [(10, 2), (40, 2), (41, 3), (60, 3), (61, 4), (80, 4), (81, None)]
)
def test_the_next_larger_uniform_plan_has_the_budgets_bytes_or_more(
    tuning: ModuleType, budget: int, bits: int | None
) -> None:
    plan = tuning.next_larger(problem(budget))
    if bits is None:
        assert plan is None
    else:
        assert plan.bytes == 20 * bits and set(plan.units.values()) == {CHAINS[bits]}


def test_the_goal_is_told_against_both_and_the_larger_one_is_no_way_to_reach_it(
    tuning: ModuleType, tmp_path: Path
) -> None:
    def row(kl: float, bits: float = 2.9) -> dict[str, float]:
        return {"kl": kl, "bits": bits, "seconds": 1.0, "tokens": 0.0}

    found: dict[tuple[float, str], list[Any]] = {
        (3.0, tuning.ONE): [row(0.9), row(0.8)],
        (3.0, tuning.NEXT): [row(0.1, 3.25), row(0.2, 3.25)],
        (3.0, tuning.EVEN): [row(0.5), row(0.4)],
        (3.0, tuning.KNAPSACK): [row(0.3), row(0.24)],
        (4.0, tuning.EVEN): [row(0.5), row(0.4)],
    }
    arguments = argparse.Namespace(
        model=tmp_path,
        bits=[3.0, 4.0],
        seeds=2,
        trials=2,
        judged=2,
        sequences=2,
        length=8,
        heldout_sequences=2,
        widths=[2, 3],
        group_sizes=[-1],
        workers=1,
        keep=[],
    )
    text = tuning.body(arguments, found, 2)
    assert "knapsack has 0.600 × the KL of the even plan; at most 0.7 was the goal: reach" in text
    assert "Against one chain, next larger (3.250 bits per weight) it has 2.100 × the KL." in text
    ways = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| 3")]
    assert ways == ["one chain", "one chain, next larger", "even", "knapsack"]
    assert tuning.WAYS[4] == tuning.TUNED  # folders of earlier runs name it so
