"""Objectives that are numbers alone, and a driver that answers refiners with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesaic.search.base import Budget, Plan, Problem
from moesaic.search.refining import Answer, Batch, Judged, Refinement, Request, Text
from tests.search.problems import Table, chain, problem

Loss = Callable[[Plan], float]
Slopes = Callable[[Plan], Mapping[str, Sequence[float]]]


@dataclass
class Driven:
    """What came of driving a refiner.

    Attributes:
        result: plans that saw everything, the best first.
        requests: all that it asked, batch by batch.
    """

    result: list[Judged]
    requests: list[Sequence[Request]]

    @property
    def plans(self) -> list[Plan]:
        return [request.plan for batch in self.requests for request in batch]


def drive(
    search: Refinement, loss: Loss, slopes: Slopes | None = None, text: Text | None = None
) -> Driven:
    """Runs a refiner to its end; every sequence of every block has the plan's loss.

    Args:
        text: by default blocks have two sequences each.
    """
    requests = []
    batch: Batch = next(search)
    while True:
        requests.append(batch.requests)
        answers = [
            Answer(
                [loss(r.plan)] * (text.sequences(r.block) if text else 2),
                slopes(r.plan) if r.slopes and slopes else {},
            )
            for r in batch.requests
        ]
        try:
            batch = search.send(answers)
        except StopIteration as end:
            return Driven(end.value, requests)


class Quadratic:
    """½ eᵀHe of weights' errors e: what a KL is to second order, units interacting as H has it.

    Predictions are the units' own terms, each wrong by a factor of its own.

    Attributes:
        problem: at ``bits`` of 2 … 2 + choices − 1 per weight.
        errors: ``[units, choices, weights]``.
    """

    def __init__(
        self,
        seed: int,
        units: int = 12,
        choices: int = 4,
        weights: int = 8,
        bits: float = 3.1,
        wrong: float = 0.5,
        ties: list[list[int]] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(50, 400, units)
        root = rng.normal(size=(units * weights, units * weights)) / np.sqrt(units * weights)
        important = np.repeat(np.exp(rng.normal(0, 0.6, units)), weights)
        mixed = 0.4 * root @ root.T + 0.6 * np.eye(units * weights)
        self.hessian: NDArray[np.float64] = mixed * important[:, None] * important
        drawn = rng.normal(size=(units, choices, weights)) + 0.5 * rng.normal(
            size=(units, 1, weights)
        )
        drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
        self.errors = drawn * 2.0 ** -np.arange(2, 2 + choices)[:, None]
        blocks = self.hessian.reshape(units, weights, units, weights)
        own = [[0.5 * float(e @ blocks[u, :, u] @ e) for e in self.errors[u]] for u in range(units)]
        factor = np.exp(rng.normal(0, wrong, units))
        tables: list[Table] = [
            [(int(sizes[u] * (2 + k)), float(factor[u] * own[u][k])) for k in range(choices)]
            for u in range(units)
        ]
        self.problem: Problem = problem(tables, int(bits * sizes.sum()), ties)
        self._number = {chain(number): number for number in range(choices)}

    def columns(self, plan: Plan) -> list[int]:
        return [self._number[found] for found in plan.units.values()]

    def _error(self, plan: Plan) -> NDArray[np.float64]:
        picked = [self.errors[u, k] for u, k in enumerate(self.columns(plan))]
        return np.concatenate(picked)

    def loss(self, plan: Plan) -> float:
        error = self._error(plan)
        return 0.5 * float(error @ self.hessian @ error)

    def slopes(self, plan: Plan) -> dict[str, list[float]]:
        """⟨gradient, other error − error⟩ of every choice."""
        gradient = (self.hessian @ self._error(plan)).reshape(len(self.errors), -1)
        columns = self.columns(plan)
        return {
            f"u{u}": [float(gradient[u] @ (e - self.errors[u, columns[u]])) for e in self.errors[u]]
            for u in range(len(self.errors))
        }


def with_budget(given: Problem, unit_bytes: int) -> Problem:
    """The problem with another budget for its units."""
    fixed = given.budget.fixed_bytes
    return replace(given, budget=Budget(fixed + unit_bytes, fixed))
