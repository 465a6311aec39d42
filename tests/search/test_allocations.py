"""The published allocations against figures worked out by hand, and against knapsack."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from moesaic.search import alternatives, modegpt, strs, svd_llm_v2
from moesaic.search.base import (
    Alternative,
    Budget,
    Infeasible,
    Layer,
    Measurement,
    Plan,
    Problem,
    search_module,
)
from tests.search.problems import FIXED, Table, chain, extremes, problem, realistic
from tests.search.test_alternatives import PREFIXES, TIES, drawn, layers

ALLOCATIONS = ["modegpt", "strs", "svd_llm_v2"]


def named(tables: dict[str, Table], unit_bytes: int, dense: dict[str, int]) -> Problem:
    """Units with names as models have them; losses are errors, squared and absolute."""
    choices = {
        unit: [
            Measurement(unit, chain(number), size, loss, None, 0.0)
            for number, (size, loss) in enumerate(table)
        ]
        for unit, table in tables.items()
    }
    known = {unit: Layer(size) for unit, size in dense.items()}
    return Problem(choices, [], Budget(FIXED + unit_bytes, FIXED), layers=known)


def picked(plan: Plan) -> list[int]:
    return [next(n for n in range(20) if chain(n) == own) for own in plan.units.values()]


def test_strs_takes_what_the_threshold_allows_whatever_it_saves() -> None:
    # 105 bytes at the top. The steps by loss: 0.1 (u1), 0.2 (u0), 0.5 (u1), 0.6 (u0).
    given = problem([[(60, 0.0), (50, 0.2), (10, 0.6)], [(45, 0.0), (44, 0.1), (20, 0.5)]], 94)
    assert picked(strs.search(given)) == [1, 1]  # 94 bytes
    one_less = dataclasses.replace(given, budget=Budget(FIXED + 93, FIXED))
    assert picked(strs.search(one_less)) == [1, 2]  # 70 bytes; knapsack would keep 80


def test_strs_takes_equal_steps_in_model_order() -> None:
    given = problem([[(10, 1.0), (20, 0.5), (30, 0.0)]] * 4, 100)
    assert picked(strs.search(given)) == [1, 1, 2, 2]


def test_strs_passes_over_choices_that_others_beat() -> None:
    given = problem([[(30, 0.0), (25, 0.4), (20, 0.3), (20, 0.3), (10, 0.5)]], 27)
    assert picked(strs.search(given)) == [2]


def below(given: Problem, threshold: float) -> Plan:
    """Every group's smallest choice of at most this loss; its best one where there is none."""
    chosen = {}
    for units, offers in given.groups():
        allowed = [offer for offer in offers if offer[2] <= threshold]
        best = min(offers, key=lambda offer: (offer[2], offer[1]))
        found = min(allowed, key=lambda offer: offer[1:], default=best)
        chosen |= dict.fromkeys(units, found[0])
    return given.plan(chosen)


def distinct(choices: int, units: int) -> st.SearchStrategy[list[Table]]:
    """Losses no two of which, nor two sums of two of which, are equal."""
    count = choices * units

    def tables(drawn: tuple[list[int], list[int]]) -> list[Table]:
        sizes, order = drawn
        flat = [(size, float(3**rank)) for size, rank in zip(sizes, order, strict=True)]
        return [flat[u * choices : (u + 1) * choices] for u in range(units)]

    sizes = st.lists(st.integers(1, 60), min_size=count, max_size=count)
    return st.tuples(sizes, st.permutations(range(count))).map(tables)


@settings(max_examples=200, deadline=None)
@for_all(distinct(4, 5), st.integers(0, 300), st.booleans())
def test_strs_equals_the_lowest_threshold_of_all_that_fits(
    drawn: list[Table], unit_bytes: int, tied: bool
) -> None:
    given = problem(drawn, unit_bytes, ties=[[0, 3]] if tied else [])
    losses = sorted({loss for _, offers in given.groups() for _, _, loss in offers})
    plans = [below(given, threshold) for threshold in losses]
    fitting = [plan for plan in plans if plan.bytes <= given.budget.total_bytes]
    if not fitting:
        with pytest.raises(Infeasible):
            strs.search(given)
        return
    assert strs.search(given) == fitting[0]


def test_shares_go_by_one_over_the_logarithm_of_the_error() -> None:
    found = svd_llm_v2.shares([math.e, math.e**2, math.e**4])
    assert found == pytest.approx([12 / 7, 6 / 7, 3 / 7])  # 1, 1/2, 1/4 over their mean 7/12


def test_shares_of_small_errors_are_scaled_together() -> None:
    large = svd_llm_v2.shares([math.e, math.e**2, math.e**3])
    small = svd_llm_v2.shares([math.e**-5, math.e**-4, math.e**-3])
    assert small == pytest.approx(large)
    assert svd_llm_v2.shares([0.0, math.e**-5, math.e**-4]) == pytest.approx([1.2, 1.2, 0.6])
    assert svd_llm_v2.shares([0.0, 0.0]) == [1.0, 1.0]


def test_unit_type_leaves_out_blocks_and_experts() -> None:
    assert svd_llm_v2.unit_type(["model.layers.3.self_attn.q_proj"]) == (
        "model.layers.self_attn.q_proj",
    )
    tied = [f"layers.7.experts.{e}.{m}" for e in range(3) for m in ("gate", "up")]
    assert svd_llm_v2.unit_type(tied) == ("layers.experts.gate", "layers.experts.up")


def test_svd_llm_v2_removes_less_where_the_uniform_ratio_costs_more() -> None:
    sizes = [90, 80, 70, 60, 50, 40, 30]
    # Squared errors of e² and e⁴ everywhere: norms e and e², weights 1 and 1/2, shares 4/3 and 2/3.
    tables = {
        "layers.0.q": [(size, math.exp(2 - size * 1e-9)) for size in sizes],
        "layers.1.q": [(size, math.exp(4 - size * 1e-9)) for size in sizes],
        "layers.0.up": [(size, 1.0 / size) for size in sizes],
    }
    dense = dict.fromkeys(tables, 100)
    # Removed 0.3: 40 % of the first, 20 % of the second, 30 % of the third, 60 + 80 + 70 bytes.
    assert picked(svd_llm_v2.search(named(tables, 210, dense))) == [3, 1, 2]
    # Just above 0.3 each goes one down.
    assert picked(svd_llm_v2.search(named(tables, 180, dense))) == [4, 2, 3]


def test_svd_llm_v2_reckons_with_absolute_errors_where_norms_are_known() -> None:
    tables: dict[str, Table] = {f"layers.{n}.q": [(80, 0.1), (40, 0.2)] for n in range(2)}
    given = named(tables, 120, dict.fromkeys(tables, 100))
    assert picked(svd_llm_v2.search(given)) == [1, 0]  # equal shares: model order
    choices = {
        unit: [dataclasses.replace(m, norm=norm) for m in given.choices[unit]]
        for unit, norm in zip(given.choices, (1e6, 1e3), strict=True)
    }
    plan = svd_llm_v2.search(dataclasses.replace(given, choices=choices))
    assert picked(plan) == [0, 1]


def test_svd_llm_v2_measures_shares_against_the_dense_layer() -> None:
    tables: dict[str, Table] = {"layers.0.q": [(50, 0.1), (40, 0.2)], "layers.0.k": [(50, 0.1)]}
    tables["layers.1.k"] = [(50, 0.1), (49, 0.2)]
    # 90 % or 92 % of q are gone, half or 51 % of k: q has its share only when k has had it.
    dense = {"layers.0.q": 500, "layers.0.k": 100, "layers.1.k": 100}
    assert picked(svd_llm_v2.search(named(tables, 149, dense))) == [0, 0, 1]
    assert picked(svd_llm_v2.search(named(tables, 148, dense))) == [1, 0, 1]


def test_svd_llm_v2_refuses_an_error_that_is_not_finite() -> None:
    given = problem([[(9, 1.0), (5, 2.0)]], 9)
    bad = [dataclasses.replace(m, score=m.error, error=math.nan) for m in given.choices["u0"]]
    with pytest.raises(ValueError, match="unit u0: its squared error is nan"):
        svd_llm_v2.search(dataclasses.replace(given, choices={"u0": bad}))


def influenced(tables: dict[str, Table], unit_bytes: int, influence: list[float]) -> Problem:
    given = named(tables, unit_bytes, {})
    known = {u: Layer(100, s) for u, s in zip(tables, influence, strict=True)}
    return dataclasses.replace(given, layers=known)


STEPS = [(size, 1.0 - size / 100) for size in range(100, 0, -5)]


def share(plan: Plan) -> list[int]:
    """What is removed of every unit of 100 bytes."""
    return [5 * step for step in picked(plan)]


def test_modegpt_removes_by_the_softmax_of_the_influence() -> None:
    # Twice the share for a block whose influence is lower by ε log 2.
    influence = [0.3, 0.3 - modegpt.EPSILON * math.log(2), 0.3 - modegpt.EPSILON * math.log(4)]
    tables = {f"layers.{n}.q": STEPS for n in range(3)}
    plan = modegpt.search(influenced(tables, 300 - 68, influence))
    assert share(plan) == [10, 20, 40]
    plan = modegpt.search(influenced(tables, 300 - 82, influence))
    assert share(plan) == [15, 25, 45]  # just above 10, 20 and 40; without the first it is 80


def test_modegpt_removes_more_than_the_most_only_where_the_budget_wants_it() -> None:
    tables = {f"layers.{n}.q": STEPS for n in range(2)}
    influence = [0.9, 0.1]
    assert share(modegpt.search(influenced(tables, 200 - 85, influence))) == [5, 80]
    assert share(modegpt.search(influenced(tables, 200 - 160, influence))) == [80, 80]
    assert share(modegpt.search(influenced(tables, 200 - 165, influence))) == [80, 85]
    assert share(modegpt.search(influenced(tables, 10, influence))) == [95, 95]


def test_modegpt_gives_all_layers_of_a_block_one_share() -> None:
    tables = {f"layers.{n}.{m}": STEPS for n in range(2) for m in ("q", "up")}
    plan = modegpt.search(influenced(tables, 400 - 160, [0.2, 0.2, 0.1, 0.1]))
    found = share(plan)
    assert abs(found[0] - found[1]) <= 5 and abs(found[2] - found[3]) <= 5
    assert found[0] < found[2]


def test_modegpt_says_whose_influence_is_missing() -> None:
    given = influenced({"layers.0.q": STEPS, "layers.1.q": STEPS}, 150, [0.1, 0.2])
    given = dataclasses.replace(given, layers={"layers.0.q": given.layers["layers.0.q"]})
    with pytest.raises(ValueError, match="unit layers.1.q: the influence of its block"):
        modegpt.search(given)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_loss_that_is_not_finite_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unit u1: the loss of rtn.* is nan"):
        search_module(name).search(problem([[(9, 1.0)], [(9, 1.0), (5, math.nan)]], 100))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_knapsack_is_never_worse(name: str) -> None:
    for seed in range(30):
        given = realistic(12, 7, np.random.default_rng(seed).random(), seed)
        ties = [["u0", "u1", "u2"], ["u4", "u9"]] if seed % 2 else []
        given = dataclasses.replace(given, ties=ties)
        found, best = search_module(name).search(given), search_module("knapsack").search(given)
        assert found.bytes <= given.budget.total_bytes
        assert best.loss <= found.loss * (1 + 1e-12)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_plans_shrink_with_the_budget(name: str) -> None:
    given = realistic(12, 7, 0.0, seed=5)
    low, high = extremes(given)
    sizes = []
    for unit_bytes in np.linspace(low, high, 40).astype(int):
        budget = Budget(FIXED + int(unit_bytes), FIXED)
        sizes.append(search_module(name).search(dataclasses.replace(given, budget=budget)).bytes)
    if name != "svd_llm_v2":  # whose weights depend on the budget
        assert sizes == sorted(sizes)
    assert sizes[0] == FIXED + low and sizes[-1] == FIXED + high


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_banks_that_may_be_reduced_are_no_obstacle(name: str, share: float) -> None:
    given = layers(banks=3, experts=4, linears=4, share=share)
    names = [*given.choices, *(n for bank in given.banks.values() for n in bank[0].choices)]
    given = dataclasses.replace(given, layers={n: Layer(2048 * 768 * 2, 0.1) for n in names})
    plan = alternatives.solve(given, name)
    assert plan.bytes <= given.budget.total_bytes
    assert given.plan(plan.units) == plan == alternatives.solve(given, name)


def reduced(shares: dict[str, list[float]], dense: int, budget: int) -> Problem:
    """Banks of two choices with alternatives that leave such shares of their bytes."""
    banks = {
        bank: [
            Alternative(
                PREFIXES[number] if number else (),
                "",
                4 if number else 0,
                number * 0.5,
                {
                    f"{bank}.{member}": [
                        Measurement(f"{bank}.{member}", (), int(share * dense), 0.1, 0.0, 0.0)
                    ]
                    for member in ("up", "down")
                },
            )
            for number, share in enumerate(own)
        ]
        for bank, own in shares.items()
    }
    known = {
        f"{bank}.{member}": Layer(dense, influence=0.1 * number)
        for number, bank in enumerate(shares)
        for member in ("up", "down")
    }
    return Problem({}, [], Budget(budget, 0), banks, layers=known)


@pytest.mark.parametrize("strategy", ALLOCATIONS)
def test_banks_that_may_be_reduced_are_layers_to_be_shared_out(strategy: str) -> None:
    own = [1.0, 0.8, 0.6, 0.4]
    given = reduced({"a.0": own, "a.1": own, "a.2": own}, 1000, 4600)
    plan = alternatives.solve(given, strategy)
    assert plan.bytes <= 4600 and list(plan.units) == [
        f"a.{n}.{member}" for n in range(3) for member in ("up", "down")
    ]
    assert plan == given.plan(plan.units)
    # A bank takes one alternative as a whole.
    left = [given.banks[f"a.{n}"] for n in range(3)]
    picks = [
        next(a for a in own if a.prefix == plan.units[f"a.{n}.up"]) for n, own in enumerate(left)
    ]
    assert all(plan.units[f"a.{n}.down"] == a.prefix for n, a in enumerate(picks))
    if strategy == "modegpt":  # what turns the hidden states little loses more
        sizes = [sum(m[0].bytes for m in a.choices.values()) for a in picks]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    smallest = alternatives.smallest_bytes(given, strategy)
    assert smallest == 3 * (2 * 400 + 4)
    tight = dataclasses.replace(given, budget=Budget(smallest, 0))
    assert alternatives.solve(tight, strategy).bytes == smallest
    none = dataclasses.replace(given, budget=Budget(smallest - 1, 0))
    with pytest.raises(Infeasible, match=f"{smallest:,}"):
        alternatives.solve(none, strategy)


@pytest.mark.parametrize("strategy", ALLOCATIONS)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("one_form", [False, True])
def test_shared_out_plans_of_any_banks_keep_budget_and_ties(
    strategy: str, ties: str, one_form: bool
) -> None:
    plans = 0
    for seed in range(40):
        given = drawn(seed, ties, one_form)
        names = {n for found in given.banks.values() for a in found for n in a.choices}
        known = {name: Layer(40, influence=0.2) for name in [*given.choices, *names]}
        given = dataclasses.replace(given, layers=known)
        try:
            plan = alternatives.solve(given, strategy)
        except ValueError:  # no plan, or none with one chain in a bank
            continue
        plans += 1
        assert plan.bytes <= given.budget.total_bytes
        assert plan.loss >= alternatives.solve(given, "knapsack").loss - 1e-9
        again = given.plan(plan.units)
        assert (again.bytes, again.units) == (plan.bytes, plan.units)
        assert again.loss == pytest.approx(plan.loss)
        for tie in given.ties:
            prefixes = {
                n: next((p for p in PREFIXES[1:] if plan.units[n][:1] == p), ())
                for n in tie
                if n in plan.units
            }
            assert len({plan.units[n][len(p) :] for n, p in prefixes.items()}) <= 1
    assert plans > 0
