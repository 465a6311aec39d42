"""The predicted front against every plan there is."""

import dataclasses
import itertools

import numpy as np
import pytest

from moesaic.search.alternatives import solve
from moesaic.search.base import Budget, Plan, Problem
from moesaic.search.front import predicted_front
from tests.search.problems import FIXED, problem, realistic
from tests.search.test_alternatives import TIES, all_picks, drawn


def every_plan(given: Problem) -> list[Plan]:
    """All plans, of all alternatives and all their choices."""
    found = []
    for picks in all_picks(given):
        settled = given.settled(picks)
        groups = settled.groups()
        for pick in itertools.product(*(offers for _, offers in groups)):
            chosen = {
                unit: offer[0]
                for (units, _), offer in zip(groups, pick, strict=True)
                for unit in units
            }
            found.append(given.whole(picks, settled.plan(chosen)))
    return found


def lower_hull(plans: list[Plan]) -> list[tuple[int, float]]:
    """Corners of the lower convex hull from the smallest plan to that of least loss."""
    least: dict[int, float] = {}
    for plan in plans:
        least[plan.bytes] = min(plan.loss, least.get(plan.bytes, np.inf))
    corners: list[tuple[int, float]] = []
    for size, loss in sorted(least.items()):
        if corners and loss >= min(before for _, before in corners):
            continue
        while len(corners) > 1:
            (s0, l0), (s1, l1) = corners[-2], corners[-1]
            if (l0 - l1) * (size - s1) > (l1 - loss) * (s1 - s0):
                break
            corners.pop()
        corners.append((size, loss))
    return corners


def assert_is_front(given: Problem) -> None:
    front = predicted_front(given)
    plans = every_plan(given)
    corners = lower_hull(plans)
    assert list(front.bytes) == [size for size, _ in corners]
    assert front.loss == pytest.approx([loss for _, loss in corners], abs=1e-12)
    for point in range(len(front)):
        plan = front.plan(point)
        assert plan.bytes == front.bytes[point]
        assert plan.loss == pytest.approx(front.loss[point], abs=1e-12)
        fitting = [other.loss for other in plans if other.bytes <= plan.bytes]
        assert plan.loss == pytest.approx(min(fitting), abs=1e-12)


@pytest.mark.parametrize("one_form", [False, True])
@pytest.mark.parametrize("ties", TIES)
def test_every_corner_is_the_best_plan_of_its_size_with_banks(ties: str, one_form: bool) -> None:
    for seed in range(1 if ties == "none" else 6):
        given = drawn(seed, ties, one_form)
        if not all_picks(given):
            with pytest.raises(ValueError, match="no plan takes one alternative"):
                predicted_front(given)
        else:
            assert_is_front(given)


def test_every_corner_is_the_best_plan_of_its_size_without_banks() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        tables = [
            [(int(rng.integers(1, 30)), float(rng.integers(0, 40))) for _ in range(4)]
            for _ in range(5)
        ]
        given = problem(tables, 0, ties=[[0, 3]] if rng.random() < 0.5 else None)
        assert_is_front(given)


def test_the_front_bounds_what_the_knapsack_finds_at_every_budget() -> None:
    given = realistic(300, 12, 0.5)
    front = predicted_front(given)
    assert len(front) > 1000
    for point in (0, len(front) // 3, len(front) - 1):
        total = int(front.bytes[point])
        asked = dataclasses.replace(given, budget=Budget(total, FIXED))
        found = solve(asked, "knapsack")
        assert (found.bytes, found.loss) == (total, pytest.approx(front.loss[point], rel=1e-12))
        assert front.plan(point).loss == pytest.approx(found.loss, rel=1e-12)
    between = int(front.bytes[400] + front.bytes[401]) // 2
    found = solve(dataclasses.replace(given, budget=Budget(between, FIXED)), "knapsack")
    assert front.last_within(between) == 400
    assert front.bound(between) <= found.loss <= front.loss[400]
    assert front.last_within(int(front.bytes[0]) - 1) is None
    assert front.bound(int(front.bytes[0]) - 1) == np.inf
    few = front.spread(50)
    assert few[0] == 0 and few[-1] == len(front) - 1 and 40 < len(few) <= 50
    assert max(np.diff(front.bytes[few])) < 0.05 * (front.bytes[-1] - front.bytes[0])
