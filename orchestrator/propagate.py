"""``propagate: true``: a plan solved again, each block on what its compressed predecessors give."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.methods.base import Chain, Spec, reducers_of
from moesaic.orchestrator.choices import Chosen, chains_of, choices_in
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.foreign import read_json, shown
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.shared import exists, remove_unfinished
from moesaic.orchestrator.stages import (
    measure_task,
    measuring_jobs,
    missing_pairs,
)
from moesaic.orchestrator.statistics import ranges
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.walk import Walk, hidden_path
from moesaic.orchestrator.worker import plain


def _names(experiment: Experiment, block: int, chosen: Chosen) -> list[str]:
    """The choices of a block under a plan."""
    units = [unit for unit in experiment.units if unit.block == block]
    return [choice.name for unit in units for choice in choices_in(unit, chosen)]


def prefixed(experiment: Experiment, chosen: Chosen) -> Walk:
    """The walk where each block reads what the blocks before it give as ``chosen`` has them."""
    prefixes: list[str] = []
    before: list[Any] = []
    for block in range(experiment.model.blocks):
        # Before the first block nothing is compressed: its statistics are those of the dense walk.
        prefixes.append(digest(before) if before else "")
        for name in _names(experiment, block, chosen):
            before.append([name, [[spec.method, spec.options] for spec in chosen[name]]])
    return replace(experiment.walk, prefixes=tuple(prefixes), gradients=0, fisher=False)


def entries(experiment: Experiment, plan: Path) -> list[Path]:
    """Files of every entry of the baselines and the plan that ``plan`` (plan.json) holds.

    None where the recipe does not propagate, or has no plan yet.
    """
    if not experiment.recipe.propagate or not plan.is_file():
        return []
    plans = [experiment.space.everywhere(chain) for chain in experiment.recipe.baselines.values()]
    try:
        plans.append(
            {
                name: tuple(Spec.of(spec["method"], spec["options"]) for spec in links)
                for name, links in read_json(plan)["units"].items()
            }
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{plan}: is damaged ({reason}): run the recipe again") from None
    found = []
    for chosen in plans:
        walk = prefixed(experiment, chosen)
        found.append(walk.scratch)
        found += [
            experiment.store.path("stats", walk.stats_key(block))
            for block in range(experiment.model.blocks)
        ]
        found += [
            experiment.store.path(kind, experiment.key(unit.name, chain, walk))
            for unit in experiment.units
            for chain in chains_of(unit, chosen)
            if chain
            for kind in ("pieces", "errors")
        ]
        found += [
            experiment.store.path("reductions", experiment.reduction_key(unit.name, prefix, walk))
            for unit in experiment.units
            for chain in chains_of(unit, chosen)
            for prefix in [reducers_of(chain)]
            if prefix
        ]
    return found


class Propagation:
    """Solves a plan again, front to back: each block learns from its compressed predecessors."""

    def __init__(
        self, experiment: Experiment, pool: Pool, view: View, name: str, chosen: Chosen
    ) -> None:
        self.experiment = experiment
        self.pool = pool
        self.view = view
        self.stage = f"propagate {name}"
        self.walk = prefixed(experiment, chosen)
        self.chosen: dict[int, Chosen] = {
            block: {name: chosen[name] for name in _names(experiment, block, chosen)}
            for block in range(experiment.model.blocks)
        }

    def run(self) -> Walk:
        """Does all that is missing.

        Returns:
            the walk under whose statistics the plan's pieces are named.
        """
        blocks = range(self.experiment.model.blocks)
        first = next((block for block in blocks if not self._finished(block)), len(blocks))
        self.view.stage(self.stage, len(blocks), first)
        for block in blocks[self._reached(first) : first]:
            self._advance(block)
        for block in blocks[first:]:
            self._solve(block)
            if block + 1 < len(blocks):
                self._advance(block)
            self.view.advance(self.stage)
        remove_unfinished(self.walk.scratch)
        return self.walk

    def _has_stats(self, block: int) -> bool:
        return self.experiment.store.get("stats", self.walk.stats_key(block)) is not None

    def _missing(self, block: int) -> dict[str, list[tuple[Chain, str]]]:
        wanted = {
            unit.name: [chain for chain in chains_of(unit, self.chosen[block]) if chain]
            for unit in self.experiment.units
            if unit.block == block
        }
        return missing_pairs(self.experiment, self.walk, wanted)

    def _finished(self, block: int) -> bool:
        return self._has_stats(block) and not self._missing(block)

    def _reached(self, first: int) -> int:
        """The last block up to ``first`` before which the hidden states are still there."""
        if first == self.experiment.model.blocks:
            return first
        shards = range(self.walk.shards)
        known = (
            block
            for block in range(first, 0, -1)
            if all(exists(hidden_path(self.walk, block, shard)) for shard in shards)
        )
        return next(known, 0)

    def _solve(self, block: int) -> None:
        """Statistics and pieces of a block."""
        if not self._has_stats(block):
            self._run("calibrate:collect", block)
            if len(ranges(self.walk.shards, self.pool.size)) > 1:
                arguments = {"walk": plain(self.walk), "what": "stats", "block": block}
                self.pool.run([Task("sums:reduce", arguments, f"sum {block}")], self.view.tick)
        jobs = measuring_jobs(self.experiment, self.walk, self._missing(block))
        tasks = [measure_task(self.experiment, job, (0,), lambda result: ()) for job in jobs]
        self.pool.run(tasks, self.view.tick)

    def _advance(self, block: int) -> None:
        """Takes the hidden states through a block made of its pieces."""
        pieces = plan_pieces(self.experiment, self.walk, self.chosen[block])
        self._run("calibrate:advance", block, pieces=pieces)

    def _run(self, function: str, block: int, **more: Any) -> None:
        arguments = {"walk": plain(self.walk), "block": block, **more}
        spans = ranges(self.walk.shards, self.pool.size)
        tasks = [
            Task(function, {**arguments, "span": span}, f"{function} {block}", (0,), worker)
            for worker, span in enumerate(spans)
        ]
        self.pool.run(tasks, self.view.tick)
