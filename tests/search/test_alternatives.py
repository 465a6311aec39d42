"""Alternatives of banks against every combination of them, and against plans without them."""

import itertools

import numpy as np
import pytest

from moesaic.methods.base import Chain, Spec
from moesaic.search import alternatives
from moesaic.search.alternatives import Picks, smallest_bytes, solve
from moesaic.search.base import (
    Alternative,
    Budget,
    Infeasible,
    Measurement,
    Plan,
    Problem,
)
from tests.search.problems import FIXED, best_by_looking_at_all, chain

PREFIXES: list[Chain] = [(), *((Spec("reduce", f"{number}"),) for number in range(5))]


def measured(name: str, table: list[tuple[int, float]]) -> list[Measurement]:
    return [
        Measurement(name, chain(number), size, loss, None, 0.0)
        for number, (size, loss) in enumerate(table)
    ]


def all_picks(given: Problem) -> list[Picks]:
    found = [
        dict(zip(given.banks, picked, strict=True))
        for picked in itertools.product(*given.banks.values())
    ]
    return [p for p in found if not given.one_form or len({a.form for a in p.values()}) == 1]


def best_of_all(given: Problem) -> Plan | None:
    """The fitting plan of least (loss, bytes), from all alternatives and all their choices."""
    plans = []
    for picks in all_picks(given):
        plan = best_by_looking_at_all(given.settled(picks))
        if plan is not None:
            plans.append(given.whole(picks, plan))
    return min(plans, key=lambda plan: (plan.loss, plan.bytes), default=None)


def smallest_of_all(given: Problem) -> int:
    sizes = []
    for picks in all_picks(given):
        settled = given.settled(picks)
        offers = [[size for _, size, _ in group] for _, group in settled.groups()]
        sizes.append(settled.budget.fixed_bytes + sum(map(min, offers)))
    return min(sizes)


def drawn(seed: int, ties: str, one_form: bool) -> Problem:
    """A small random problem whose losses have exact sums, equal ones among them."""
    rng = np.random.default_rng(seed)
    grain = int(rng.choice([1, 64]))

    def table() -> list[tuple[int, float]]:
        return [
            (int(rng.integers(1, 40)), int(rng.integers(-2 * grain, 10 * grain)) / grain)
            for _ in range(3)
        ]

    banks = {}
    for bank in range(int(rng.integers(2, 4))):
        found = []
        for number in sorted(rng.choice(4, size=int(rng.integers(1, 4)), replace=False)):
            names = [f"b{bank}.{expert}.up" for expert in range(2 if number < 2 else 1)]
            form = f"form{number if rng.random() < 0.7 else 0}"
            own = int(rng.integers(-20, 20)), int(rng.integers(-grain, 8 * grain)) / grain
            choices = {name: measured(name, table()) for name in names}
            found.append(Alternative(PREFIXES[number], form, *own, choices))
        banks[f"b{bank}"] = found
    outside = {f"u{unit}": measured(f"u{unit}", table()) for unit in range(3)}
    inner = {bank: [f"{bank}.{expert}.up" for expert in range(2)] for bank in banks}
    tied = {
        "none": [],
        "inside": [inner["b0"], ["u0", "u2"]],
        "across": [[name for names in inner.values() for name in names]],
        "outside too": [["u1", *inner["b0"]], ["b1.0.up", "b1.1.up"]],
        "many": [["b0.0.up", "b1.0.up"], ["u0", "b0.1.up"], ["u2", "b1.1.up"]],
    }[ties]
    budget = Budget(FIXED + int(rng.integers(20, 200)), FIXED)
    return Problem(outside, tied, budget, banks, one_form)


@pytest.mark.parametrize("one_form", [False, True])
@pytest.mark.parametrize("ties", ["none", "inside", "across", "outside too", "many"])
@pytest.mark.parametrize("tried", [64, 0])
def test_solve_equals_brute_force(
    ties: str, one_form: bool, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "_COMBINATIONS", tried)
    for seed in range(25):
        given = drawn(seed, ties, one_form)
        if not all_picks(given):
            with pytest.raises(ValueError, match="no form"):
                solve(given, "knapsack")
            continue
        smallest = smallest_of_all(given)
        assert smallest_bytes(given, "knapsack") == smallest
        best = best_of_all(given)
        if best is None:
            with pytest.raises(Infeasible, match=f"has {smallest:,} bytes"):
                solve(given, "knapsack")
            continue
        plan = solve(given, "knapsack")
        assert (plan.loss, plan.bytes) == (best.loss, best.bytes)
        assert given.plan(plan.units) == plan
