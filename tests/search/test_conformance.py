"""What every search strategy must do, whatever it does."""

import dataclasses

import pytest

from moesaic.search.base import (
    Budget,
    Infeasible,
    Problem,
    search_module,
    searches,
    smallest_bytes,
)
from tests.search.problems import FIXED, extremes, problem, realistic

NAMES = searches()


def with_budget(given: Problem, unit_bytes: int) -> Problem:
    return dataclasses.replace(given, budget=Budget(FIXED + unit_bytes, FIXED))


def smallest_uniform(given: Problem) -> int:
    tables = [[m.bytes for m in found] for found in given.choices.values()]
    return min(sum(sizes) for sizes in zip(*tables, strict=True))


def test_discovery_finds_the_strategies() -> None:
    assert {"knapsack", "uniform"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.97, 1.0, 3.0])
def test_search_fits_the_budget_and_sums_are_the_plans(name: str, share: float) -> None:
    given = realistic(units=9, choices=7, share=share)
    given = with_budget(given, max(given.budget.unit_bytes, smallest_uniform(given)))
    plan = search_module(name).search(given)
    assert list(plan.units) == list(given.choices)
    assert plan.bytes <= given.budget.total_bytes
    chosen = [
        next(m for m in given.choices[unit] if m.chain == chain)
        for unit, chain in plan.units.items()
    ]
    assert plan.bytes == FIXED + sum(m.bytes for m in chosen)
    assert plan.loss == pytest.approx(sum(m.loss for m in chosen), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_search_keeps_ties(name: str) -> None:
    given = realistic(units=12, choices=7, share=0.4)
    ties = [["u0", "u1", "u2"], ["u4", "u9"]]
    plan = search_module(name).search(dataclasses.replace(given, ties=ties))
    for tie in ties:
        assert len({plan.units[unit] for unit in tie}) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ties", [[], [["u0", "u1", "u2"], ["u4", "u9"]]])
def test_the_smallest_plan_is_found_and_none_below_it(name: str, ties: list[list[str]]) -> None:
    given = dataclasses.replace(realistic(units=12, choices=7, share=0.4, seed=3), ties=ties)
    smallest = smallest_bytes(given, name) - FIXED
    assert search_module(name).search(with_budget(given, smallest)).bytes == FIXED + smallest
    with pytest.raises(Infeasible):
        search_module(name).search(with_budget(given, smallest - 1))


@pytest.mark.parametrize("name", NAMES)
def test_search_names_both_sizes_when_nothing_fits(name: str) -> None:
    given = realistic(units=5, choices=4, share=0.5)
    smallest = extremes(given)[0] if name != "uniform" else smallest_uniform(given)
    search_module(name).search(with_budget(given, smallest_uniform(given)))
    with pytest.raises(Infeasible) as caught:
        search_module(name).search(with_budget(given, smallest - 1))
    assert f"{FIXED + smallest:,} bytes" in str(caught.value)
    assert f"{FIXED + smallest - 1:,} bytes" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_search_gives_the_same_plan_again_when_choices_are_equal(name: str) -> None:
    given = problem([[(10, 3.0), (20, 2.0), (20, 2.0), (30, 1.0)]] * 8, 160)
    plans = [search_module(name).search(given) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert list(plans[0].units.items()) == list(plans[1].units.items())
