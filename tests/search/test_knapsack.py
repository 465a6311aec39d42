import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from moesaic.search import knapsack
from moesaic.search.base import Infeasible, Problem
from tests.search.problems import Table, best_by_looking_at_all, chain, problem, realistic


def tables(losses: st.SearchStrategy[float], units: int) -> st.SearchStrategy[list[Table]]:
    choice = st.tuples(st.integers(1, 60), losses)
    return st.lists(st.lists(choice, min_size=4, max_size=4), min_size=units, max_size=units)


def check(given: Problem) -> None:
    """Losses that are multiples of 1/64 have exact sums, so that equal plans are equal here too."""
    best = best_by_looking_at_all(given)
    if best is None:
        with pytest.raises(Infeasible):
            knapsack.search(given)
        return
    plan = knapsack.search(given)
    assert (plan.loss, plan.bytes) == (best.loss, best.bytes)


@settings(max_examples=150, deadline=None)
@for_all(tables(st.integers(0, 6400).map(lambda n: n / 64), 5), st.integers(0, 300))
def test_knapsack_equals_brute_force(drawn: list[Table], unit_bytes: int) -> None:
    check(problem(drawn, unit_bytes))


@settings(max_examples=150, deadline=None)
@for_all(tables(st.integers(0, 4).map(float), 5), st.integers(0, 300))
def test_knapsack_equals_brute_force_when_losses_are_equal(
    drawn: list[Table], unit_bytes: int
) -> None:
    check(problem(drawn, unit_bytes))


def test_knapsack_takes_fewer_bytes_when_equal_losses_add_up_from_thirds() -> None:
    # 1 + 3 and 4 + 0 are equal only if a seventeenth of the largest total is no unit of counting.
    rows: list[Table] = [[(1, 2.0)], [(1, 4.0)], [(1, 4.0)]]
    check(problem([*rows, [(1, 1.0), (1, 3.0), (2, 0.0)], [(2, 4.0), (4, 3.0), (5, 0.0)]], 8))


@settings(max_examples=100, deadline=None)
@for_all(tables(st.integers(-320, 320).map(lambda n: n / 64), 7), st.integers(0, 400))
def test_knapsack_equals_brute_force_when_units_are_tied(
    drawn: list[Table], unit_bytes: int
) -> None:
    check(problem(drawn, unit_bytes, ties=[[0, 2, 5], [3, 4]]))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_knapsack_equals_mixed_integer_programming(share: float) -> None:
    given = realistic(units=60, choices=8, share=share, seed=3)
    groups = given.groups()
    rows = [number for number, (_, offers) in enumerate(groups) for _ in offers]
    size = np.array([offer[1] for _, offers in groups for offer in offers], dtype=float)
    loss = np.array([offer[2] for _, offers in groups for offer in offers])
    one_each = csr_matrix((np.ones(len(rows)), (rows, range(len(rows)))))
    limit = given.budget.unit_bytes
    found = milp(
        loss * 1e6,  # the solver's absolute gap is 1e-6
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_matrix(size / limit), -np.inf, 1),
        ],
        options={"mip_rel_gap": 0.0},
    )
    picked = np.round(found.x)
    assert found.status == 0 and size @ picked <= limit
    assert knapsack.search(given).loss == pytest.approx(float(loss @ picked), rel=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_knapsack_is_fast_when_large(share: float) -> None:
    given = realistic(units=400, choices=12, share=share)
    started = time.process_time()
    plan = knapsack.search(given)
    assert time.process_time() - started < 3
    assert plan.bytes > 0.999 * given.budget.total_bytes


def test_knapsack_takes_the_best_everywhere_when_the_budget_is_ample() -> None:
    plan = knapsack.search(problem([[(9, 1.0), (5, 3.0), (7, 1.0)]] * 3, 10**6))
    assert set(plan.units.values()) == {chain(2)}


def test_knapsack_refuses_a_loss_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="unit u1: the loss of rtn.* is nan"):
        knapsack.search(problem([[(9, 1.0)], [(9, 1.0), (5, float("nan"))]], 100))


def test_knapsack_stops_when_there_are_too_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_MOST_STATES", 20)
    given = realistic(units=30, choices=8, share=0.4)
    with pytest.raises(RuntimeError, match="more than 20 partial plans"):
        knapsack.search(given)


def test_knapsack_uses_the_error_when_there_is_no_score() -> None:
    given = problem([[(9, 1.0), (9, 2.0)]], 100)
    scored = [dataclasses.replace(m, score=5.0 - m.error) for m in given.choices["u0"]]
    plan = knapsack.search(dataclasses.replace(given, choices={"u0": scored}))
    assert plan.units["u0"] == chain(1)
    assert knapsack.search(given).units["u0"] == chain(0)
