"""Probabilities with exact expected bytes: the maths against enumeration and finite differences."""

import itertools

import numpy as np
import pytest

from moesaic.search._manifold import Logits, Manifold
from moesaic.search.base import Problem
from tests.search.problems import FIXED, realistic
from tests.search.refining import with_budget
from tests.search.test_alternatives import all_picks, drawn


def reduced(ties: str = "inside") -> Problem:
    """Banks with alternatives, and a budget between the smallest and the largest plan."""
    for seed in itertools.count():
        given = drawn(seed, ties, one_form=False)
        if sum(len(found) > 1 for found in given.banks.values()) < 2:
            continue
        sizes = [
            (sum(min(o[1] for o in found) for _, found in settled.groups()), settled)
            for settled in map(given.settled, all_picks(given))
        ]
        low = min(size + settled.budget.fixed_bytes for size, settled in sizes) - FIXED
        return with_budget(given, int(low * 1.3) + 40)
    raise AssertionError


PROBLEMS = {
    "linears": realistic(7, 5, 0.4, seed=1),
    "banks": reduced(),
    "across": reduced("across"),
}


def random_logits(manifold: Manifold, seed: int) -> Logits:
    rng = np.random.default_rng(seed)
    choices = np.where(manifold.there, rng.normal(0, 2, manifold.there.shape), 0.0)
    return Logits(choices, rng.normal(0, 1, len(manifold.parts)))


def expected_by_plans(manifold: Manifold, logits: Logits) -> float:
    """Probability times bytes, bank by bank over all of its plans."""
    choices, taken = manifold.probabilities(logits)
    total = 0.0
    for number, part in enumerate(manifold.parts):
        here = float(part.bytes)
        plans = itertools.product(*(np.flatnonzero(manifold.there[g]) for g in part.groups))
        for plan in plans:
            pairs = list(zip(part.groups, plan, strict=True))
            chance = np.prod([choices[group, column] for group, column in pairs])
            here += float(chance) * sum(manifold.bytes[group, column] for group, column in pairs)
        total += taken[number] * here
    return total


@pytest.mark.parametrize("name", ["banks", "across"])
def test_expected_bytes_are_those_of_all_plans(name: str) -> None:
    manifold = Manifold(PROBLEMS[name])
    logits = random_logits(manifold, 0)
    assert manifold.expected(logits) == pytest.approx(
        expected_by_plans(manifold, logits), rel=1e-12
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_normal_is_the_derivative(name: str) -> None:
    manifold = Manifold(PROBLEMS[name])
    logits = random_logits(manifold, 1)
    normal, step = manifold.normal(logits), 1e-6
    largest = max(np.abs(normal.choices).max(), np.abs(normal.alternatives).max())
    for field in ("choices", "alternatives"):
        found = getattr(normal, field)
        for place in np.ndindex(found.shape):
            moved = manifold.zeros()
            getattr(moved, field)[place] = 1.0
            ends = [manifold.expected(logits.plus(moved, sign * step)) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            if field == "choices" and not manifold.there[place]:
                slope = 0.0
            assert found[place] == pytest.approx(slope, abs=1e-6 * largest)


@pytest.mark.parametrize("name", PROBLEMS)
def test_retraction_keeps_the_expected_bytes_and_nothing_else_of_equal_bytes(name: str) -> None:
    manifold = Manifold(PROBLEMS[name])
    assert manifold.target == PROBLEMS[name].budget.unit_bytes
    for seed in range(20):
        logits = manifold.retracted(random_logits(manifold, seed))
        assert manifold.expected(logits) == pytest.approx(manifold.target, rel=1e-9)
        # Steps along the surface, however large, come back to it.
        for size in (1e-3, 1.0, 30.0):
            direction = manifold.tangent(random_logits(manifold, seed + 100), logits)
            logits = manifold.retracted(logits.plus(direction, size))
            assert manifold.expected(logits) == pytest.approx(manifold.target, rel=1e-9)
        again = manifold.retracted(logits)
        assert np.abs(again.choices - logits.choices).max() < 1e-9


def test_shifting_by_bytes_lowers_the_expected_bytes_at_the_rate_of_their_variance() -> None:
    manifold = Manifold(PROBLEMS["linears"])
    logits = random_logits(manifold, 3)
    choices, _ = manifold.probabilities(logits)
    mean = (choices * manifold.bytes).sum(axis=1)
    variance = (choices * (manifold.bytes - mean[:, None]) ** 2).sum()
    shift, step = Logits(manifold.bytes, np.zeros(1)), 1e-12
    slope = (manifold.expected(logits.plus(shift, step)) - manifold.expected(logits)) / step
    assert slope == pytest.approx(variance, rel=1e-3)
    sizes = [
        manifold.expected(manifold._tilted(logits, tau)) for tau in np.linspace(-1e-4, 1e-4, 9)
    ]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_tangent_changes_the_expected_bytes_to_second_order_only(name: str) -> None:
    manifold = Manifold(PROBLEMS[name])
    logits = manifold.retracted(random_logits(manifold, 5))
    direction = manifold.tangent(random_logits(manifold, 6), logits)
    assert abs(direction.dot(manifold.normal(logits))) < 1e-6 * manifold.expected(logits)
    changes = [
        abs(manifold.expected(logits.plus(direction, step)) - manifold.expected(logits))
        for step in (1e-3, 1e-4)
    ]
    assert changes[1] < 0.02 * changes[0] + 1e-7 * manifold.expected(logits)
    assert manifold.tangent(direction, logits).dot(direction) == pytest.approx(
        direction.dot(direction), rel=1e-9
    )


def test_a_budget_that_every_plan_meets_binds_nothing() -> None:
    manifold = Manifold(realistic(5, 4, 1.5))
    logits = random_logits(manifold, 0)
    assert manifold.target is None
    assert manifold.retracted(logits) is logits and manifold.tangent(logits, logits) is logits


def test_a_budget_below_the_smallest_choices_is_an_error() -> None:
    given = with_budget(realistic(5, 4, 0.5), 10)
    manifold = Manifold(given)
    with pytest.raises(ValueError, match="no probabilities have 10 expected bytes"):
        manifold.retracted(random_logits(manifold, 0))
