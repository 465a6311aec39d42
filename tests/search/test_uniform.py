import pytest

from moesaic.search.uniform import search, uniform_plan
from tests.search.problems import FIXED, chain, problem


def test_uniform_takes_the_least_loss_that_fits() -> None:
    tables = [
        [(10, 9.0), (20, 5.0), (25, 5.5), (40, 1.0)],
        [(10, 9.0), (20, 5.0), (25, 4), (40, 1)],
    ]
    plan = search(problem(tables, 60))
    assert set(plan.units.values()) == {chain(2)}  # 50 bytes, 9.5; the next has 80 bytes
    assert (plan.bytes, plan.loss) == (FIXED + 50, 9.5)


def test_uniform_takes_fewer_bytes_when_losses_are_equal() -> None:
    plan = search(problem([[(30, 1.0), (20, 1.0), (25, 1.0)]] * 3, 100))
    assert set(plan.units.values()) == {chain(1)}


def test_uniform_passes_over_chains_that_a_unit_lacks() -> None:
    plan = search(problem([[(10, 4.0), (20, 2.0), (30, 0.1)], [(10, 4.0), (20, 2.0)]], 100))
    assert set(plan.units.values()) == {chain(1)}


def test_uniform_says_what_is_missing_when_units_share_no_chain() -> None:
    given = problem([[(10, 1.0)], [(10, 1.0)], [(10, 1.0)]], 100)
    other = problem([[(10, 1.0), (20, 0.5)]], 100).choices["u0"][1]
    choices = {**given.choices, "u1": [other]}
    with pytest.raises(ValueError, match="all 3 units.*missing for 1 of them, u1 first"):
        search(type(given)(choices, [], given.budget))


def test_uniform_plan_ignores_the_budget() -> None:
    plan = uniform_plan(problem([[(10, 4.0), (20, 2.0)]] * 2, 1), chain(1))
    assert (plan.bytes, plan.loss) == (FIXED + 40, 4.0)
