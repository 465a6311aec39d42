"""What benchmarks of searches share: one measuring, many plans from it, all judged together.

The candidates of a recipe are measured once, in a store of its own; a plan is then a choice among
finished pieces and costs its evaluation only. Sizes are those of the compressible weights with all
that is stored for them; headers of files are not counted.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import median, scratch

from moesaic.methods.base import Chain
from moesaic.methods.chains import ties_experts
from moesaic.orchestrator import results, stages
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pipeline import Pipeline
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool
from moesaic.orchestrator.run import open_experiment
from moesaic.search.alternatives import solve
from moesaic.search.base import Budget, Infeasible, Measurement, Plan, Problem


@dataclass(frozen=True)
class Outcome:
    """A plan on held-out text.

    Attributes:
        bytes: of the compressible weights.
        removed: share of their dense bytes that is gone.
        bits: stored bits per compressible weight.
        predicted: its predicted loss.
        kl, perplexity: pooled over all sources.
        choices: chain → share of the choices that took it.
    """

    bytes: int
    removed: float
    bits: float
    predicted: float
    kl: float
    perplexity: float
    choices: Mapping[Chain, float]


@dataclass(frozen=True)
class Measured:
    """A recipe whose candidates are all measured."""

    experiment: Experiment
    pool: Pool
    view: View
    problem: Problem

    @property
    def weights(self) -> int:
        return self.experiment.sizes.size.weights

    @property
    def dense_bytes(self) -> int:
        return sum(self.experiment.sizes.dense_bytes(unit) for unit in self.experiment.units)

    def everywhere(self, chain: Chain) -> Plan:
        """One chain for every unit that it is meant for."""
        return self.problem.plan(self.experiment.space.everywhere(chain))

    def searched(
        self,
        chains: Collection[Chain],
        size: int,
        by_error: bool = False,
        search: str = "knapsack",
    ) -> Plan | None:
        """The plan of least predicted loss in ``size`` bytes; None where nothing fits.

        Args:
            chains: what may be chosen, besides leaving a unit as it is.
            by_error: minimise the relative error of the outputs instead.
            search: another strategy than the exact one.
        """
        allowed = {*chains, ()}

        def offered(found: Sequence[Measurement], prefix: Chain) -> list[Measurement]:
            own = [m for m in found if prefix + m.chain in allowed]
            return [replace(m, score=None) for m in own] if by_error else own

        given = self.problem
        choices = {unit: offered(found, ()) for unit, found in given.choices.items()}
        banks = {}
        for bank, alternatives in given.banks.items():
            shaped = [
                replace(a, choices={name: offered(m, a.prefix) for name, m in a.choices.items()})
                for a in alternatives
            ]
            banks[bank] = [a for a in shaped if all(a.choices.values())]
            if not any(a.prefix for a in banks[bank]):  # nothing to pick there
                choices |= banks.pop(bank)[0].choices
        # Methods that take a bank as a whole tie its experts, which others need not be.
        whole = any(map(ties_experts, chains))
        ties = self.problem.ties if whole else []
        try:
            problem = Problem(choices, ties, Budget(size, 0), banks, layers=given.layers)
            plan = solve(problem, search)
        except Infeasible:
            return None
        return self.problem.plan(plan.units)

    def outcomes(self, plans: Mapping[str, Plan]) -> dict[str, Outcome]:
        """All plans on held-out text."""
        experiment = self.experiment
        pieces = {
            name: plan_pieces(experiment, experiment.walk, plan.units)
            for name, plan in plans.items()
        }
        scores = stages.evaluated(experiment, self.pool, self.view, pieces)
        return {name: self._outcome(plan, scores[name]) for name, plan in plans.items()}

    def dense_perplexity(self) -> float:
        """Of the model as it is."""
        scores = stages.evaluated(self.experiment, self.pool, self.view, {})
        return float(scores["dense"]["perplexity"])

    def _outcome(self, plan: Plan, score: Mapping[str, Any]) -> Outcome:
        chosen = list(plan.units.values())
        return Outcome(
            bytes=plan.bytes,
            removed=1 - plan.bytes / self.dense_bytes,
            bits=plan.bytes * 8 / self.weights,
            predicted=plan.loss,
            kl=float(score["kl"]),
            perplexity=float(score["perplexity"]),
            choices={c: chosen.count(c) / len(chosen) for c in dict.fromkeys(chosen)},
        )


@contextmanager
def measured(recipe: Path, output: Path) -> Iterator[Measured]:
    """Measures everything that a recipe names.

    Raises:
        UserError: there is something wrong with the recipe.
    """
    experiment = open_experiment(recipe, output)
    with View() as view, Pool(experiment.recipe.compute) as pool:
        pipeline = Pipeline(experiment, pool, view)
        pipeline.measure()
        budget = Budget(0, 0)
        problem = results.problem(experiment, pipeline.table, False, budget)
        yield Measured(experiment, pool, view, problem)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--seeds``, ``--workers``, how much text, what stays dense, where measurements are kept."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--heldout-sequences", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", nargs="+", default=[], metavar="PATTERN", help="units left dense")
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep measurements there; the same command then goes on with them",
    )


def folder(arguments: argparse.Namespace, name: str) -> AbstractContextManager[str]:
    """``--folder``, or one under build/ that goes in the end."""
    return nullcontext(str(arguments.folder)) if arguments.folder else scratch(name)


def recipe_sections(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The sections of a recipe that follow from these options; ``seed`` draws the text."""
    return {
        "calibration": {
            "sequences": arguments.sequences,
            "length": arguments.length,
            "seed": seed,
            "gradient_sequences": max(1, arguments.sequences // 2),
        },
        "evaluation": {
            "texts": [{"file": str(path.resolve())} for path in arguments.heldout],
            "sequences": arguments.heldout_sequences,
            "length": arguments.length,
        },
        "compute": {"dtype": "float32", "workers": arguments.workers},
        "keep": arguments.keep,
    }


def setting(arguments: argparse.Namespace, seeds: int) -> str:
    """How much text, and how many seeds are done, in a sentence."""
    model = arguments.model.resolve()
    name = model.parent.name if model.name == "model" else model.name
    tokens = f"{arguments.sequences} × {arguments.length} calibration tokens"
    heldout = f"{arguments.heldout_sequences} × {arguments.length} held-out tokens"
    done = "1 seed" if seeds == 1 else f"{seeds} seeds"
    asked = "" if seeds == arguments.seeds else f" of {arguments.seeds} that were asked for"
    kept = f", dense and not counted: {', '.join(arguments.keep)}" if arguments.keep else ""
    return f"{name}: {tokens} (half of them for gradients), {heldout}, float32, {done}{asked}{kept}"


def figure(values: Sequence[float]) -> str:
    """Median to four digits, and least and largest in brackets."""
    middle, low, high = (f"{f(values):.4g}" for f in (median, min, max))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"
