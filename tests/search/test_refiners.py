"""What every refiner must do, and what each of them reaches where the best plan is known."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from moesaic.methods.base import Spec
from moesaic.search import evolve, knapsack, relax, uniform
from moesaic.search.alternatives import solve
from moesaic.search.base import Alternative, Plan, Problem
from moesaic.search.refining import Effort, cut, refiner, refiners
from tests.search.problems import best_by_looking_at_all, realistic
from tests.search.refining import Driven, Quadratic, drive, with_budget
from tests.search.test_alternatives import all_picks, best_of_all, drawn

NAMES = refiners()
TEXT = cut(16, 8)
EFFORT = Effort(generations=12, offspring=6, steps=6, draws=3)


def no_slopes(given: Problem) -> Callable[[Plan], Mapping[str, Sequence[float]]]:
    """Slopes that are all nought, of every choice that a plan has."""

    def slopes(plan: Plan) -> dict[str, list[float]]:
        settled = given.settled(given.picked(plan.units)) if given.banks else given
        return {name: [0.0] * len(settled.choices[name]) for name in plan.units}

    return slopes


def refined(name: str, given: Problem, start: Plan, effort: Effort = EFFORT) -> Driven:
    """By a loss that is as predicted, but for a term that no sum over units has."""

    def loss(plan: Plan) -> float:
        numbers = [sum(map(ord, str(chain))) % 7 for chain in plan.units.values()]
        return plan.loss * (1 + 0.05 * math.sin(sum(n * m for n, m in enumerate(numbers))))

    return drive(refiner(name).refine(given, start, TEXT, effort), loss, no_slopes(given))


def test_refiners_are_found_by_their_files() -> None:
    assert NAMES == ["evolve", "relax"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_plan_fits_and_keeps_its_ties(name: str, share: float) -> None:
    given = realistic(units=12, choices=5, share=share)
    ties = [["u0", "u1", "u2"], ["u4", "u9"]]
    given = Problem(given.choices, ties, given.budget)
    given = given if share else _smallest(given)
    found = refined(name, given, knapsack.search(given))
    assert found.plans and found.result
    for plan in [*found.plans, *(judged.plan for judged in found.result)]:
        assert plan == given.plan(plan.units)
        assert plan.bytes <= given.budget.total_bytes
        for tie in ties:
            assert len({plan.units[unit] for unit in tie}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_form_of_banks_is_no_matter_where_there_are_none(name: str) -> None:
    given = replace(realistic(units=5, choices=3, share=0.4), one_form=True)
    found = refined(name, given, knapsack.search(given))
    assert len(found.plans) > len(TEXT.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_alternatives_that_no_choices_bring_within_the_budget_are_never_run(name: str) -> None:
    given = realistic(units=6, choices=3, share=0.4)
    names = list(given.choices)
    bank = dict(given.choices)
    rest = {unit: bank.pop(unit) for unit in names[:2]}
    smallest = sum(min(m.bytes for m in found) for found in given.choices.values())
    beyond = given.budget.unit_bytes - smallest + 1
    # Tempting, each of them a byte too large, and many.
    keeps = [(Spec.of("reap", {"keep": number / 40}),) for number in range(1, 40)]
    large = [Alternative(prefix, "large", beyond, 0.0, bank) for prefix in keeps]
    alternatives = [Alternative((), "small", 0, 1.0, bank), *large]
    given = replace(given, choices=rest, banks={"bank": alternatives})
    found = refined(name, given, solve(given, "knapsack"))
    assert all(plan.bytes <= given.budget.total_bytes for plan in found.plans)
    assert len(found.plans) > len(TEXT.blocks)


def _smallest(given: Problem) -> Problem:
    offers = [found for _, found in given.groups()]
    return with_budget(given, sum(min(size for _, size, _ in found) for found in offers))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("one_form", [False, True])
def test_banks_with_alternatives_are_refined(name: str, one_form: bool) -> None:
    switched = tried = 0
    for seed, ties in itertools.product(range(40), ("none", "inside", "across", "many")):
        given = drawn(seed, ties, one_form)
        possible = [picks for picks in all_picks(given) if _fits(given.settled(picks))]
        if len(possible) < 2 or tried == 12:
            continue
        tried += 1
        start = solve(given, "knapsack")
        found = refined(name, given, start)
        for plan in found.plans:
            assert plan == given.plan(plan.units)
            assert plan.bytes <= given.budget.total_bytes
            picks = given.picked(plan.units)
            assert not one_form or len({a.form for a in picks.values()}) == 1
            switched += picks != given.picked(start.units)
            skips = {unit: len(a.prefix) for a in picks.values() for unit in a.choices}
            for units, _ in given.settled(picks).groups():
                assert len({plan.units[unit][skips.get(unit, 0) :] for unit in units}) == 1
    assert tried == 12 and switched > 5


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_a_candidate_and_the_same_search_asks_the_same(name: str) -> None:
    made = Quadratic(3)
    start = knapsack.search(made.problem)
    runs = [
        drive(refiner(name).refine(made.problem, start, TEXT, EFFORT), made.loss, made.slopes)
        for _ in range(2)
    ]
    assert runs[0].requests == runs[1].requests and runs[0].result == runs[1].result
    other = drive(
        refiner(name).refine(made.problem, start, TEXT, Effort(**{**vars(EFFORT), "seed": 1})),
        made.loss,
        made.slopes,
    )
    assert other.requests != runs[0].requests
    for found in (*runs, other):
        assert found.result[0].kl <= made.loss(start)
        assert start in [judged.plan for judged in found.result]
        others = [judged.kl for judged in found.result[1:]]
        assert others == sorted(others) and found.result[0].kl <= others[0] * (1 + 1e-12)
        for judged in found.result:
            assert judged.kl == pytest.approx(made.loss(judged.plan), rel=1e-12)


# Passes that a search may leave because another generation or step might not end within them.
UNUSED = {"evolve": 1.0, "relax": 4 / 8 + 7 / 8}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", [10, 3.3])
@pytest.mark.parametrize("sequences", [16, 21, 3, 1])
def test_nothing_is_run_twice_and_passes_bound_the_search(
    name: str, passes: float, sequences: int
) -> None:
    made, text = Quadratic(4), cut(sequences, 8)
    start = knapsack.search(made.problem)
    effort = Effort(generations=1000, offspring=8, steps=1000, draws=4, passes=passes)
    search = refiner(name).refine(made.problem, start, text, effort)
    found = drive(search, made.loss, made.slopes, text)
    plain = [
        (tuple(r.plan.units.items()), r.block) for b in found.requests for r in b if not r.slopes
    ]
    assert len(plain) == len(set(plain))
    requests = [request for batch in found.requests for request in batch]
    ran = sum((4 if r.slopes else 1) * text.sequences(r.block) for r in requests)
    assert ran <= passes * text.total
    if sequences == 16:
        assert ran > (passes - UNUSED[name]) * text.total


@pytest.mark.parametrize("name", NAMES)
def test_less_than_a_pass_judges_the_start_alone(name: str) -> None:
    made = Quadratic(4)
    start = knapsack.search(made.problem)
    search = refiner(name).refine(made.problem, start, TEXT, Effort(passes=0.5))
    found = drive(search, made.loss, made.slopes)
    assert len(found.requests) == 1 and [judged.plan for judged in found.result] == [start]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_ruins_the_model_is_never_taken(name: str) -> None:
    made = Quadratic(5)
    start = knapsack.search(made.problem)

    def loss(plan: Plan) -> float:
        return made.loss(plan) if plan.units == start.units else math.nan

    found = drive(refiner(name).refine(made.problem, start, TEXT, EFFORT), loss, made.slopes)
    assert found.result[0].plan == start
    assert math.isfinite(found.result[0].kl)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_that_is_no_plan_of_the_problem_is_refused(name: str) -> None:
    made = Quadratic(6)
    start = knapsack.search(made.problem)
    units = dict(start.units) | {"u0": ()}
    broken = Plan(units, start.bytes, start.loss)
    with pytest.raises(ValueError):
        next(refiner(name).refine(made.problem, broken, TEXT, EFFORT))


def best_plan(made: Quadratic) -> float:
    """Least loss of all plans that fit, by looking at every one."""
    given = made.problem
    offers = [found for _, found in given.groups()]
    numbers = np.array(list(itertools.product(*(range(len(found)) for found in offers))))
    sizes = np.array([[size for _, size, _ in found] for found in offers])
    rows = np.arange(len(offers))
    fitting = numbers[sizes[rows, numbers].sum(axis=1) <= given.budget.unit_bytes]
    errors = made.errors[rows, fitting].reshape(len(fitting), -1)
    return float(0.5 * np.einsum("ni,ij,nj->n", errors, made.hessian, errors, optimize=True).min())


def test_evolve_reaches_the_best_plan() -> None:
    for seed in range(3):
        made = Quadratic(seed, units=7)
        start = knapsack.search(made.problem)
        effort = Effort(generations=40, offspring=8, seed=seed)
        found = drive(evolve.refine(made.problem, start, TEXT, effort), made.loss)
        assert found.result[0].kl == pytest.approx(best_plan(made), rel=1e-9)
        looked_at = len({tuple(plan.units.values()) for plan in found.plans})
        assert looked_at < 0.1 * 4**7


def test_evolve_keeps_the_best_plan_of_losses_that_add_up() -> None:
    given = realistic(units=6, choices=4, share=0.4, seed=2)
    best = best_by_looking_at_all(given)
    assert best is not None
    start = uniform.search(given)
    effort = Effort(generations=40, offspring=8)
    found = drive(evolve.refine(given, start, TEXT, effort), lambda plan: plan.loss)
    assert found.result[0].plan.loss == pytest.approx(best.loss, rel=1e-12)


def test_evolve_finds_the_best_alternatives_of_banks() -> None:
    reached = 0
    for seed in range(4):
        given = drawn(seed, "inside", False)
        best = best_of_all(given)
        if best is None:
            continue
        starts = [
            given.whole(picks, knapsack.search(given.settled(picks)))
            for picks in all_picks(given)
            if _fits(given.settled(picks))
        ]
        start = max(starts, key=lambda plan: plan.loss)  # the worst alternatives of all
        effort = Effort(generations=40, offspring=8, seed=seed)
        found = drive(evolve.refine(given, start, TEXT, effort), lambda plan: 9e3 + plan.loss)
        assert found.result[0].plan.loss <= start.loss
        reached += found.result[0].plan.loss == pytest.approx(best.loss, abs=1e-9)
    assert reached >= 3  # of 4


def _fits(given: Problem) -> bool:
    smallest = sum(min(size for _, size, _ in found) for _, found in given.groups())
    return smallest <= given.budget.unit_bytes


def test_relax_goes_nearly_all_the_way_from_uniform_by_slopes_alone() -> None:
    shares = []
    for seed in range(6):
        made = Quadratic(seed, units=7)
        start = uniform.search(made.problem)
        effort = Effort(steps=30, draws=4, seed=seed)
        found = drive(relax.refine(made.problem, start, TEXT, effort), made.loss, made.slopes)
        far, best = made.loss(start), best_plan(made)
        shares.append((far - found.result[0].kl) / (far - best))
    assert min(shares) >= 0.95, shares


def test_relax_with_slopes_that_are_differences_reaches_losses_that_add_up() -> None:
    given = realistic(units=40, choices=5, share=0.35, seed=1)
    start, best = uniform.search(given), knapsack.search(given)

    def slopes(plan: Plan) -> dict[str, list[float]]:
        own = {
            name: next(m.loss for m in found if m.chain == plan.units[name])
            for name, found in given.choices.items()
        }
        return {n: [m.loss - own[n] for m in found] for n, found in given.choices.items()}

    effort = Effort(steps=40, draws=2)
    search = relax.refine(given, start, TEXT, effort, curvature=0.0)
    found = drive(search, lambda plan: plan.loss, slopes)
    gained = (start.loss - found.result[0].kl) / (start.loss - best.loss)
    assert gained >= 0.95


def test_relax_does_not_take_what_no_choice_changes_for_a_loss_of_choices() -> None:
    made = Quadratic(seed=1)
    start = knapsack.search(made.problem)
    asked = []
    for lost in (0.0, 3.0):
        text = replace(TEXT, lost=lost)
        search = relax.refine(made.problem, start, text, EFFORT)
        found = drive(search, lambda plan, lost=lost: made.loss(plan) + lost, made.slopes)  # type: ignore[misc]
        asked.append([plan.units for plan in found.plans])
    assert asked[0] == asked[1]


def test_relax_leaves_plans_without_finite_slopes_out() -> None:
    given = realistic(units=6, choices=4, share=0.5)

    def broken(plan: Plan) -> dict[str, list[float]]:
        return {name: [math.nan] * len(given.choices[name]) for name in plan.units}

    start = knapsack.search(given)
    search = relax.refine(given, start, TEXT, Effort(steps=3, draws=2))
    found = drive(search, lambda plan: plan.loss, broken)
    assert found.result[0].plan.loss <= start.loss and len(found.plans) > 1
