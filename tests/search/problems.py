"""Problems made of numbers alone, and the best plan found by looking at every one."""

import dataclasses

import numpy as np

from moesaic.methods.base import Chain, Spec
from moesaic.search.base import Budget, Layer, Measurement, Plan, Problem

FIXED = 1000
# Far above the error of a sum of losses, far below a difference of two that are not equal.
_ROUNDING = 1e-9
Table = list[tuple[int, float]]


def chain(number: int) -> Chain:
    return (Spec.of("rtn", {"bits": 2 + number % 7, "group_size": 8 * (1 + number // 7)}),)


def problem(tables: list[Table], unit_bytes: int, ties: list[list[int]] | None = None) -> Problem:
    """Unit ``u0``, ``u1`` … with a table of (bytes, loss) per chain each.

    Their blocks have one of three influences.
    """
    choices = {
        f"u{unit}": [
            Measurement(f"u{unit}", chain(number), size, loss, None, 0.0)
            for number, (size, loss) in enumerate(table)
        ]
        for unit, table in enumerate(tables)
    }
    named = [[f"u{unit}" for unit in tie] for tie in ties or []]
    layers = {
        f"u{unit}": Layer(max(size for size, _ in table), influence=0.1 * (1 + unit % 3))
        for unit, table in enumerate(tables)
    }
    return Problem(choices, named, Budget(FIXED + unit_bytes, FIXED), layers=layers)


def extremes(given: Problem) -> tuple[int, int]:
    """Bytes of the smallest and of the largest plan's units."""
    sizes = [[size for _, size, _ in offers] for _, offers in given.groups()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def best_by_looking_at_all(given: Problem) -> Plan | None:
    """The fitting plan of least (loss, bytes)."""
    groups = given.groups()
    sizes = np.array([given.budget.fixed_bytes])
    losses = np.array([0.0])
    for _, offers in groups:  # one more column; the last one counts fastest
        sizes = np.add.outer(sizes, [size for _, size, _ in offers]).ravel()
        losses = np.add.outer(losses, [loss for _, _, loss in offers]).ravel()
    fits = sizes <= given.budget.total_bytes
    if not fits.any():
        return None
    # What rounding could make the least is looked at as a plan.
    nearly = np.flatnonzero(fits & (losses <= losses[fits].min() + _ROUNDING))
    shape = [len(offers) for _, offers in groups]
    plans = []
    for pick in zip(*np.unravel_index(nearly, shape), strict=True):
        chosen = {
            unit: offers[number][0]
            for (units, offers), number in zip(groups, pick, strict=True)
            for unit in units
        }
        plans.append(given.plan(chosen))
    assert all(plan.bytes <= given.budget.total_bytes for plan in plans)
    return min(plans, key=lambda plan: (plan.loss, plan.bytes))


def realistic(units: int, choices: int, share: float, seed: int = 0) -> Problem:
    """Losses that fall by four per bit, units of uneven importance and odd sizes.

    ``share`` says where between the smallest and the largest plan the budget lies.
    """
    rng = np.random.default_rng(seed)
    tables: list[Table] = []
    for _ in range(units):
        bits = np.linspace(2, 8, choices)
        size = rng.integers(10_000, 1_000_000) * bits / 8 * (1 + 0.05 * rng.random(choices))
        loss = np.exp(rng.normal(0, 1.5)) * 4.0**-bits * np.exp(rng.normal(0, 0.2, choices))
        tables.append([(int(s), float(x)) for s, x in zip(size, loss, strict=True)])
    given = problem(tables, 0)
    low, high = extremes(given)
    budget = Budget(FIXED + int(low + share * (high - low)), FIXED)
    return dataclasses.replace(given, budget=budget)
