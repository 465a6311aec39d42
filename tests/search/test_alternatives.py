"""Alternatives of banks against every combination of them, and against plans without them."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from moesaic.methods.base import Chain, Spec
from moesaic.search import alternatives, base
from moesaic.search.alternatives import Picks, same_prefix, smallest_bytes, solve
from moesaic.search.base import (
    Alternative,
    Budget,
    Infeasible,
    Measurement,
    Plan,
    Problem,
    search_module,
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

    def table(times: int = 1) -> list[tuple[int, float]]:
        return [
            (times * int(rng.integers(1, 40)), times * int(rng.integers(-grain, 9 * grain)) / grain)
            for _ in range(3)
        ]

    banks = {}
    for bank in range(3 if ties == "apart" else int(rng.integers(2, 4))):
        found = []
        for number in sorted(rng.choice(4, size=int(rng.integers(1, 4)), replace=False)):
            names = [f"b{bank}.{expert}.up" for expert in range(2 if number < 2 else 1)]
            form = f"form{number if rng.random() < 0.7 else 0}"
            own = int(rng.integers(-20, 20)), int(rng.integers(-grain, 8 * grain)) / grain
            choices = {name: measured(name, table()) for name in names}
            found.append(Alternative(PREFIXES[number], form, *own, choices))
        banks[f"b{bank}"] = found
    outside = {f"u{unit}": measured(f"u{unit}", table(3)) for unit in range(3)}
    inner = {bank: [f"{bank}.{expert}.up" for expert in range(2)] for bank in banks}
    groups = {
        "none": [],
        "inside": [[*inner["b0"]], ["u0", "u2"]],
        "across": [[name for names in inner.values() for name in names]],
        "outside too": [["u1", *inner["b0"]], ["b1.0.up", "b1.1.up"]],
        "many": [["b0.0.up", "b1.0.up"], ["u0", "b0.1.up"], ["u2", "b1.1.up"]],
        "apart": [["u1", *inner["b0"]], ["b1.0.up", "b2.0.up"], ["b1.1.up", "b2.1.up", "u0"]],
    }[ties]
    budget = Budget(FIXED + int(rng.integers(50, 350)), FIXED)
    return Problem(outside, groups, budget, banks, one_form)


TIES = ["none", "inside", "across", "outside too", "many", "apart"]


@pytest.mark.parametrize("one_form", [False, True])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("tried", [64, 0])
def test_solve_equals_brute_force(
    ties: str, one_form: bool, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "_COMBINATIONS", tried)
    for seed in range({"none": 8, "apart": 20}.get(ties, 40)):
        given = drawn(seed + 1000 * tried, ties, one_form)
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


def with_budget(given: Problem, total_bytes: int) -> Problem:
    return dataclasses.replace(given, budget=Budget(total_bytes, FIXED))


@pytest.mark.parametrize("strategy", ["knapsack", "uniform"])
@pytest.mark.parametrize("ties", TIES)
def test_the_smallest_plan_is_found_and_none_below_it(strategy: str, ties: str) -> None:
    for seed in range(10):
        given = drawn(seed, ties, one_form=False)
        if strategy == "uniform" and not same_prefix(given):
            continue
        smallest = base.smallest_bytes(given, strategy)
        assert solve(with_budget(given, smallest), strategy).bytes == smallest
        with pytest.raises(Infeasible) as caught:
            solve(with_budget(given, smallest - 1), strategy)
        assert f"{smallest:,} bytes" in str(caught.value)
        assert f"{smallest - 1:,} bytes" in str(caught.value)


def layers(
    banks: int, experts: int, linears: int, share: float, seed: int = 0, members: int = 3
) -> Problem:
    """Banks that may be reduced to fewer experts; sizes as of real layers, few experts matter most.

    ``share`` says where between the smallest plan and all at eight bits the budget lies.
    """
    rng = np.random.default_rng(seed)
    bits = np.array([2.25, 3.25, 4.25, 8.25])
    chains = [chain(number) for number in range(4)]

    def offers(name: str, weights: int, weight: float) -> list[Measurement]:
        losses = weight * 4.0 ** (2 - bits) * np.exp(rng.normal(0, 0.2, 4))
        sizes = weights * bits / 8
        return [
            Measurement(name, c, int(s), float(x), None, 0.0)
            for c, s, x in zip(chains, sizes, losses, strict=True)
        ]

    found = {}
    for bank in range(banks):
        importance = 1e-3 * np.exp(rng.normal(0, 1))
        load = np.sort(np.exp(rng.normal(0, 1, experts)))[::-1]
        load /= load.sum()
        alternatives = []
        for number, eighths in enumerate((8, 7, 6, 5, 4)):
            left = experts * eighths // 8
            lost = importance * load[left:].sum() ** 1.3 * rng.uniform(0.1, 0.6)
            names = [(e, f"b{bank}.{e}.m{m}") for e in range(left) for m in range(members)]
            choices = {name: offers(name, 2048 * 768, importance * load[e]) for e, name in names}
            own = -4096 * (experts - left)
            alternatives.append(Alternative(PREFIXES[number], f"{left}", own, float(lost), choices))
        found[f"b{bank}"] = alternatives
    linear = {
        f"u{n}": offers(f"u{n}", 2048 * int(rng.choice([512, 2048])), 1e-4 * rng.random())
        for n in range(linears)
    }
    given = Problem(linear, [], Budget(FIXED, FIXED), found)
    low = smallest_bytes(given, "knapsack")
    high = sum(plan[-1].bytes for plan in linear.values())
    high += sum(m[-1].bytes for bank in found.values() for m in bank[0].choices.values())
    return with_budget(given, int(low + share * (high - low)))


def lower_bound(given: Problem) -> float:
    """max over prices λ of Σ min (loss + λ·bytes) − λ·budget: no plan has less loss."""
    outside = [Alternative((), "", 0, 0.0, given.choices)]
    banks = [
        [
            (
                a.loss,
                a.bytes,
                np.array([[m.loss for m in found] for found in a.choices.values()]),
                np.array([[m.bytes for m in found] for found in a.choices.values()]),
            )
            for a in bank
        ]
        for bank in [outside, *given.banks.values()]
    ]

    def value(price: float) -> float:
        total = -price * given.budget.unit_bytes
        for bank in banks:
            total += min(
                loss + price * size + float((losses + price * sizes).min(axis=1).sum())
                for loss, size, losses, sizes in bank
            )
        return total

    low, high = -40.0, 0.0  # log of the price; the value is concave in the price
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if value(np.exp(left)) < value(np.exp(right)):
            low = left
        else:
            high = right
    return value(np.exp(low))


def test_solve_is_fast_and_near_the_bound_when_large() -> None:
    given = layers(banks=48, experts=64, linears=192, share=0.4)
    started = time.process_time()
    plan = solve(given, "knapsack")
    assert time.process_time() - started < 20
    assert plan.bytes <= given.budget.total_bytes
    bound = lower_bound(given)
    assert bound <= plan.loss < 1.001 * bound
    assert len({len(chain) for chain in plan.units.values()}) == 2  # some banks are reduced


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("points", [512, 24])
def test_solve_equals_mixed_integer_programming_nearly_when_frontiers_are_thinned(
    share: float, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "_POINTS", points)
    given = layers(banks=4, experts=8, linears=6, share=share, members=1)
    columns: list[tuple[int, float]] = []
    rows: list[dict[int, float]] = []  # each sums to the last column's 1, which is constant
    for bank in [[Alternative((), "", 0, 0.0, given.choices)], *given.banks.values()]:
        one = {}
        for a in bank:
            owner = len(columns)
            columns.append((a.bytes, a.loss))
            one[owner] = 1.0
            for found in a.choices.values():
                row = {len(columns) + n: 1.0 for n in range(len(found))}
                columns += [(m.bytes, m.loss) for m in found]
                rows.append({**row, owner: -1.0})
        rows.append(one)
    matrix = lil_matrix((len(rows), len(columns)))
    for number, row in enumerate(rows):
        for column, entry in row.items():
            matrix[number, column] = entry
    ends = np.array([0.0 if -1.0 in row.values() else 1.0 for row in rows])
    size, loss = np.array(columns).T
    limit = given.budget.unit_bytes
    best = milp(
        loss * 1e6,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(matrix.tocsr(), ends, ends),
            LinearConstraint(size[None, :] / limit, -np.inf, 1),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert best.status == 0
    optimum = float(loss @ np.round(best.x))
    assert optimum * (1 - 1e-5) <= solve(given, "knapsack").loss <= 1.002 * optimum


def tied(given: Problem, ties: str) -> Problem:
    names = sorted({n for bank in given.banks.values() for a in bank for n in a.choices})
    groups = {
        "none": [],
        "banks": [[n for n in names if n.startswith(f"{bank}.")] for bank in given.banks],
        "all": [names],
        "members": [[n for n in names if n.endswith(end)] for end in ("m0", "m1", "m2")],
    }[ties]
    return dataclasses.replace(given, ties=groups)


@pytest.mark.parametrize("one_form", [False, True])
@pytest.mark.parametrize("ties", ["none", "banks", "all", "members"])
@pytest.mark.parametrize("points", [512, 12])
def test_solve_is_never_worse_than_one_prefix(
    ties: str, one_form: bool, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "_POINTS", points)
    for seed, share in enumerate((0.01, 0.2, 0.6)):
        given = tied(layers(6, 8, 10, share, seed), ties)
        given = dataclasses.replace(given, one_form=one_form)
        for strategy in ("knapsack", "uniform"):
            found = []
            for picks in same_prefix(given):
                for name in (strategy, "uniform"):
                    try:
                        plan = search_module(name).search(given.settled(picks))
                    except Infeasible:
                        continue
                    found.append(given.whole(picks, plan).loss)
            plan = solve(given, strategy)
            assert plan.loss <= min(found)
            assert given.plan(plan.units) == plan
            again = solve(given, strategy)
            assert again == plan
            assert list(again.units.items()) == list(plan.units.items())


def test_solve_is_good_when_it_may_only_keep_few_partial_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = layers(8, 8, 10, 0.3)
    exact = solve(given, "knapsack")
    monkeypatch.setattr(alternatives, "_MOST_MOVES", 10)
    monkeypatch.setattr(alternatives, "_WIDEST", 8)
    assert exact.loss <= solve(given, "knapsack").loss < 1.01 * exact.loss


def small(*banks: list[Alternative], one_form: bool = False, unit_bytes: int = 100) -> Problem:
    outside = {"u0": measured("u0", [(10, 4.0), (20, 2.0)])}
    named = {f"b{number}": bank for number, bank in enumerate(banks)}
    return Problem(outside, [], Budget(FIXED + unit_bytes, FIXED), named, one_form)


def alternative(
    bank: int, prefix: int, loss: float, sizes: tuple[int, int] = (10, 20), own: int = 0
) -> Alternative:
    names = [f"b{bank}.{expert}.up" for expert in range(4 - prefix)]
    table = [(sizes[0], 3.0), (sizes[1], 1.0)]
    return Alternative(
        PREFIXES[prefix], f"f{prefix}", own, loss, {name: measured(name, table) for name in names}
    )


def test_plan_has_prefixes_and_what_reductions_cost() -> None:
    given = small([alternative(0, 0, 0.0), alternative(0, 2, 0.5, own=7)], unit_bytes=67)
    plan = solve(given, "knapsack")
    assert plan.units == {
        "u0": chain(1),
        "b0.0.up": PREFIXES[2] + chain(1),
        "b0.1.up": PREFIXES[2] + chain(1),
    }
    assert (plan.bytes, plan.loss) == (FIXED + 67, 4.5)


@pytest.mark.parametrize("strategy", ["knapsack", "uniform"])
def test_solve_takes_fewer_bytes_then_the_first_when_losses_are_equal(strategy: str) -> None:
    bank = [dataclasses.replace(alternative(0, 1, 1.0, own=n), prefix=PREFIXES[n]) for n in (3, 2)]
    assert solve(small(bank), strategy).units["b0.0.up"] == PREFIXES[2] + chain(1)
    bank = [dataclasses.replace(a, bytes=0) for a in bank]
    assert solve(small(bank), strategy).units["b0.0.up"] == PREFIXES[3] + chain(1)


def test_uniform_takes_one_prefix_and_leaves_a_bank_that_lacks_it() -> None:
    both = [alternative(0, 0, 0.0), alternative(0, 1, 0.1)]
    given = small(both, [alternative(1, 0, 0.0)], unit_bytes=160)
    plan = solve(given, "uniform")
    assert plan.units["b0.2.up"] == PREFIXES[1] + chain(1)
    assert plan.units["b1.3.up"] == plan.units["u0"] == chain(1)
    assert plan == given.plan(plan.units)
    # One form for all: the second bank cannot follow.
    plan = solve(dataclasses.replace(given, one_form=True), "uniform")
    assert set(plan.units.values()) == {chain(0)}


def test_uniform_says_so_when_no_prefix_is_there_for_all() -> None:
    given = small([alternative(0, 1, 0.0)], [alternative(1, 2, 0.0)])
    for ask in (solve, smallest_bytes):
        with pytest.raises(ValueError, match="uniform: no alternative of one prefix"):
            ask(given, "uniform")
    assert solve(given, "knapsack").bytes <= given.budget.total_bytes


class Wasteful:
    """A strategy that takes the first chain of everything."""

    @staticmethod
    def search(problem: Problem) -> Plan:
        return problem.plan({unit: found[0].chain for unit, found in problem.choices.items()})


def test_solve_returns_one_chain_everywhere_when_a_strategy_is_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = alternatives.search_module
    monkeypatch.setattr(
        alternatives, "search_module", lambda name: Wasteful if name == "wasteful" else known(name)
    )
    given = small([alternative(0, 0, 0.0), alternative(0, 1, 0.5)])
    found = solve(given, "wasteful").units
    assert {name: found[name] for name in found if name[0] == "b"} == {
        name: PREFIXES[1] + chain(1) for name in given.banks["b0"][1].choices
    }
    assert found["u0"] == chain(1)


def test_problem_without_banks_goes_to_the_strategy() -> None:
    given = small()
    assert solve(given, "uniform") == search_module("uniform").search(given)
    assert smallest_bytes(given, "knapsack") == FIXED + 10


def test_problem_with_banks_is_refused_by_strategies() -> None:
    with pytest.raises(ValueError, match="banks have alternatives"):
        search_module("knapsack").search(small([alternative(0, 0, 0.0)]))


@pytest.mark.parametrize("strategy", ["knapsack", "uniform"])
def test_contradictions_are_refused(strategy: str) -> None:
    bank = [alternative(0, 0, 0.0)]
    with pytest.raises(ValueError, match="bank b1: two alternatives have the same prefix"):
        solve(small(bank, [alternative(1, 1, 0.0)] * 2), strategy)
    with pytest.raises(ValueError, match="bank b1 has no alternative"):
        solve(small(bank, []), strategy)
    with pytest.raises(ValueError, match="bank b1: the choice b0.0.up stands elsewhere, too"):
        solve(small(bank, bank), strategy)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="bank b0: the loss of .* is nan"):
        solve(small([alternative(0, 0, float("nan"))]), "knapsack")


def test_plan_names_the_bank_when_chains_fit_no_alternative() -> None:
    given = small([alternative(0, 1, 0.0)])
    with pytest.raises(ValueError, match="bank b0 has no alternative with the chosen chains"):
        given.plan({"u0": chain(0), "b0.0.up": chain(0)})
