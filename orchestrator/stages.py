"""The stages as work for the pool: what must be done, what was done before, what follows what."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.methods.base import Chain, reducers_of, reducing, reverse_needs
from moesaic.methods.chains import refits
from moesaic.orchestrator.calibrate import LEAD
from moesaic.orchestrator.compression import CUT_OF
from moesaic.orchestrator.console import View
from moesaic.orchestrator.dividing import dividable
from moesaic.orchestrator.evaluate import Judge, score
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.gradients import gradient_path
from moesaic.orchestrator.measure import Job
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.shared import exists, open_store, remove_unfinished
from moesaic.orchestrator.statistics import Node, ranges
from moesaic.orchestrator.store import Entry, digest
from moesaic.orchestrator.walk import Walk, boundary_path
from moesaic.orchestrator.walk_ahead import Ahead
from moesaic.orchestrator.worker import plain

EVALUATION_PARTS = 4
_REDUCE, _FORWARD, _REVERSE, _REDUCE_BESIDE, _COLLECT, _MEASURE = range(6)


def finished_entries(experiment: Experiment, kind: str, keys: Iterable[str]) -> dict[str, Entry]:
    """Finished entries by key; their bytes are checked, several at a time."""
    return experiment.store.get_many(kind, keys)


def finished_pieces(experiment: Experiment, keys: Iterable[str]) -> dict[str, Entry]:
    """Finished pieces by key, without cuts of pieces that are gone."""
    found = finished_entries(experiment, "pieces", keys)
    wholes = {entry.metadata[CUT_OF] for entry in found.values() if CUT_OF in entry.metadata}
    known = found | finished_entries(experiment, "pieces", wholes - found.keys())
    return {k: e for k, e in found.items() if e.metadata.get(CUT_OF, k) in known}


class Calibration:
    """The walk over the dense model, and the measuring that follows it block by block."""

    def __init__(
        self, experiment: Experiment, pool: Pool, view: View, wanted: Mapping[str, Iterable[Chain]]
    ) -> None:
        self.experiment = experiment
        self.pool = pool
        self.view = view
        self.walk = experiment.walk
        self.wanted = {unit: list(chains) for unit, chains in wanted.items()}
        self.blocks: int = experiment.model.blocks
        self.passed = [0] * self.blocks
        self.reversed = [0] * self.blocks
        self.held: list[Task] = []
        self.told: set[str] = set()

    def run(self) -> None:
        """Does all that is missing."""
        store, walk = self.experiment.store, self.walk
        self.stats = {
            block
            for block in range(self.blocks)
            if store.get("stats", walk.stats_key(block)) is not None
        }
        self.gradients = set(range(self.blocks))
        if walk.gradients:
            self.gradients = {
                block
                for block in range(self.blocks)
                if store.get("gradients", walk.gradients_key(block)) is not None
            }
        start = self._forward_start()
        self.view.stage("calibrate", self.blocks, len(self.stats))
        if walk.gradients:
            self.view.stage("gradients", self.blocks, len(self.gradients))
        self.waiting = self._open_measuring()
        tasks = self._released()
        self.floor = start
        if start == self.blocks == len(self.gradients):
            self.pool.run(tasks, self.view.tick)
            remove_unfinished(walk.scratch)
            return
        compute, workers = self.experiment.recipe.compute, self.pool.size
        self.ranges = ranges(self.walk.shards, compute.walking(workers))
        self.ahead = compute.ahead(workers)
        if start < self.blocks and self.ahead:
            tasks += Ahead(self, (_FORWARD, _COLLECT)).start(start)
        elif start < self.blocks:
            tasks += [self._forward(start, w, span) for w, span in enumerate(self.ranges)]
        else:
            tasks += self._start_reverse()
        self.pool.run(tasks, self.view.tick)
        remove_unfinished(walk.scratch)

    def _open_measuring(self) -> list[tuple[Job, Task]]:
        """All jobs with their tasks, by block."""
        total = sum(len(chains) for chains in self.wanted.values())
        missing = missing_pairs(self.experiment, self.walk, self.wanted)
        if total:
            left = sum(len(pairs) for pairs in missing.values())
            self.view.stage("measure", total, total - left)
        jobs = measuring_jobs(self.experiment, self.walk, missing)
        return [(job, self._measure(job)) for job in sorted(jobs, key=lambda job: job.block)]

    def _released(self) -> list[Task]:
        """Jobs that waited for statistics which are there now."""

        def ready(job: Job) -> bool:
            reversed_too = job.gradients is None or job.block in self.gradients
            return job.block in self.stats and reversed_too

        released = [task for job, task in self.waiting if ready(job)]
        self.waiting = [(job, task) for job, task in self.waiting if not ready(job)]
        return released

    def _measure(self, job: Job) -> Task:
        steps = sum(len(pairs) for pairs in job.missing.values())

        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.view.advance("measure", steps, result["peak_bytes"])
            return ()

        units = [self.experiment.space.by_name[name] for name in job.units]
        # The longest first (Graham, 1969), so that small ones fill what is left in the end.
        priority = (_MEASURE, -sum(unit.parameters for unit in units), job.block)
        task = measure_task(self.experiment, job, priority, done)
        return dividable(task, job, units, self._measure, lambda: bool(self.waiting))

    def _forward_start(self) -> int:
        """First block that must be walked: its statistics, or states for the reverse pass, lack."""
        start: int = min(set(range(self.blocks)) - self.stats, default=self.blocks)
        missing = set(range(self.blocks)) - self.gradients
        if not missing:
            return start
        walk, shards = self.walk, range(self.walk.shards)
        top: int = max(missing)
        self.top = top
        returned = all(exists(gradient_path(walk, top + 1, s)) for s in shards)
        if top + 1 < self.blocks and not returned:
            self.top = self.blocks - 1
        needed = [*range(self.top + 1), *([self.blocks] if self.top + 1 == self.blocks else [])]
        for block in needed:
            if not all(exists(boundary_path(walk, block, s)) for s in shards):
                first: int = min(start, block, self.blocks - 1)
                return first
        return start

    def _forward(self, block: int, worker: int, span: Node) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.passed[block] += 1
            self.tell(block, result)
            new: list[Task] = []
            if block + 1 < self.blocks:
                self.held.append(self._forward(block + 1, worker, span))
            if self.passed[block] == len(self.ranges):
                self.floor = block + 1
                if block not in self.stats:
                    new += self.summed("stats", block, self.ranges, result)
                if block + 1 == self.blocks and len(self.gradients) < self.blocks:
                    new += self._start_reverse()
            ready = [t for t in self.held if t.arguments["block"] <= self.floor + LEAD]
            self.held = [t for t in self.held if t not in ready]
            return [*new, *ready]

        wanted = {"sums": block not in self.stats}
        arguments = {"walk": plain(self.walk), "block": block, "span": span, **wanted}
        label = f"forward {block}"
        return Task("calibrate:forward", arguments, label, (_FORWARD, block), worker, done)

    def tell(self, block: int, result: Mapping[str, Any]) -> None:
        """Says how a block was walked in parts; of blocks of one shape once."""
        told = result.get("parted", "")
        if told and told not in self.told:
            self.told.add(told)
            self.view.line(f"calibrate: block {block} {told}")

    def summed(
        self, what: str, block: int, spans: list[Node], result: Mapping[str, Any]
    ) -> Iterable[Task]:
        """What follows when all ``spans`` of shards have left their sums of a block.

        Args:
            result: of the last of the tasks that did.
        """
        if len(spans) == 1:  # as the block's entry
            return self._added(what, block, result)
        arguments = {"walk": plain(self.walk), "what": what, "block": block}
        # Where there are others who add, who walks back goes on.
        beside = what == "gradients" and self.ahead
        priority = (_REDUCE_BESIDE if beside else _REDUCE, block)
        done = partial(self._added, what, block)
        return [Task("sums:reduce", arguments, f"sum {block}", priority, None, done)]

    def _added(self, what: str, block: int, result: Mapping[str, Any]) -> Iterable[Task]:
        """What waits for the sums of a block, which are in the store now."""
        (self.stats if what == "stats" else self.gradients).add(block)
        stage = "calibrate" if what == "stats" else "gradients"
        self.view.advance(stage, 1, result["peak_bytes"])
        return self._released()

    def after_walk(self, worker: int, span: Node) -> list[Task]:
        """What a walker begins with when it has passed all blocks."""
        lacking = len(self.gradients) < self.blocks
        return [self._reverse(self.top, worker, span)] if lacking else []

    def _start_reverse(self) -> list[Task]:
        return [self._reverse(self.top, w, span) for w, span in enumerate(self.ranges)]

    def _reverse(self, block: int, worker: int, span: Node) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            self.reversed[block] += 1
            new = []
            if block > 0:
                new.append(self._reverse(block - 1, worker, span))
            if self.reversed[block] == len(self.ranges) and block not in self.gradients:
                new += self.summed("gradients", block, self.ranges, result)
            return new

        wanted = {"sums": block not in self.gradients}
        arguments = {"walk": plain(self.walk), "block": block, "span": span, **wanted}
        priority = (_REVERSE, self.blocks - block)
        return Task("gradients:reverse", arguments, f"back {block}", priority, worker, done)


def missing_pairs(
    experiment: Experiment, walk: Walk, wanted: Mapping[str, Iterable[Chain]]
) -> dict[str, list[tuple[Chain, str]]]:
    """Unit → (chain, key) of the pairs whose entries are not finished or were damaged.

    A reduction that lacks is made again with the first chain that begins with it. What corrections
    of merged experts needed of it is in their pieces.
    """
    keys = {
        (unit, chain): experiment.key(unit, chain, walk)
        for unit, chains in wanted.items()
        for chain in chains
    }
    reductions = {
        (unit, prefix): experiment.reduction_key(unit, prefix, walk)
        for unit, chain in keys
        for prefix in [reducing(chain)[0]]
        if prefix
    }
    pieces = finished_pieces(experiment, keys.values())
    errors = finished_entries(experiment, "errors", keys.values())
    reduced = finished_entries(experiment, "reductions", reductions.values())
    missing: dict[str, list[tuple[Chain, str]]] = {}
    for (unit, chain), key in keys.items():
        reduction = reductions.pop((unit, reducing(chain)[0]), None)
        lost = reduction is not None and reduction not in reduced
        if lost or key not in pieces or key not in errors:
            missing.setdefault(unit, []).append((chain, key))
    return missing


def measuring_jobs(
    experiment: Experiment, walk: Walk, missing: Mapping[str, list[tuple[Chain, str]]]
) -> Iterator[Job]:
    """Jobs for the missing pairs: units that share a site go together, each reduction alone.

    So do the chains that want what the reverse pass left, because they wait for it. That pass goes
    through the dense model, whatever ``walk`` goes through.
    """
    groups: dict[tuple[Any, ...], dict[str, list[tuple[Chain, str]]]] = {}
    for name, pairs in missing.items():
        sites = tuple(sorted(set(experiment.space.by_name[name].sites.values())))
        for chain, key in pairs:
            wants = bool(reverse_needs(chain))
            first, reduces = reducers_of(chain), bool(reducing(chain)[0])
            group = groups.setdefault((sites, first, reduces, wants), {})
            group.setdefault(name, []).append((chain, key))

    def plain_pairs(pairs: Iterable[tuple[Chain, str]]) -> list[tuple[list[tuple[str, str]], str]]:
        return [([(spec.method, spec.options) for spec in chain], key) for chain, key in pairs]

    for (_, first, reduces, wants), wanted in groups.items():
        units = [experiment.space.by_name[name] for name in wanted]
        block, part = units[0].block, experiment.shaping.part(units[0].name)
        gradients = experiment.store.path("gradients", experiment.walk.gradients_key(block))
        stats = experiment.store.path("stats", walk.stats_key(block))
        dense = experiment.store.path("stats", experiment.walk.stats_key(block))
        both = dense != stats and any(refits(c) for own in wanted.values() for c, _ in own)
        yield Job(
            model=walk.model,
            dtype=walk.dtype,
            trust_remote_code=walk.trust_remote_code,
            block=block,
            units=tuple(unit.name for unit in units),
            missing={name: plain_pairs(pairs) for name, pairs in wanted.items()},
            stages={
                name: plain_pairs(experiment.stages(name, pairs, walk))
                for name, pairs in wanted.items()
            },
            stats=str(stats),
            store=walk.store,
            reduction=experiment.reduction_key(units[0].name, first, walk) if first else None,
            part=part.name if reduces and part is not None else "",
            gradients=str(gradients) if wants else None,
            dense_stats=str(dense) if both else None,
        )


def measure_task(experiment: Experiment, job: Job, priority: tuple[int, ...], done: Any) -> Task:
    """A job as a task; a bank takes many times as long as a linear.

    What a node has read it keeps, in its page cache or as a copy: few should read the same block.
    """
    kind = experiment.space.by_name[job.units[0]].kind
    label = f"{job.units[0]}{f' +{len(job.units) - 1}' if len(job.units) > 1 else ''}"
    arguments = {"job": plain(job)}
    function, near = "measure:compress_job", f"block {job.block}"
    return Task(function, arguments, label, priority, None, done, kind=kind, near=near)


def _judge(experiment: Experiment, name: str) -> Judge:
    """What a plan is judged with; ``dense`` is the original, whatever was sliced out of it."""
    return experiment.judge.dense() if name == "dense" else experiment.judge


def _score_key(experiment: Experiment, name: str, pieces: Mapping[str, str]) -> str:
    """Names the score of a plan, given as unit → file of its piece."""
    sequences, judge = experiment.evaluation, _judge(experiment, name)
    made_of = judge.key({unit: Path(path).stem for unit, path in pieces.items()})
    return digest([made_of, sequences.labels, sequences.source.tolist()])


def known_scores(
    experiment: Experiment, plans: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]] | None:
    """What :func:`evaluated` found before; None where a score lacks."""
    all_plans: dict[str, Mapping[str, str]] = {"dense": {}, **plans}
    scores: dict[str, dict[str, Any]] = {}
    for name, pieces in all_plans.items():
        known = experiment.store.get_json("scores", _score_key(experiment, name, pieces))
        if known is None:
            return None
        scores[name] = known
    return scores


def remember_dense(pool: Pool, view: View, judge: Judge, rows: Iterable[tuple[int, int]]) -> None:
    """Makes the dense model's last hidden states of ``rows`` where they are missing."""
    store = open_store(judge.store)
    dense = plain(judge.dense())
    tasks = [
        Task("evaluate:evaluate_rows", {"judge": dense, "rows": part, "pieces": {}}, "dense")
        for part in rows
        if store.get("hidden", judge.hidden_key(part)) is None
    ]
    pool.run(tasks, view.tick)


def evaluated(
    experiment: Experiment, pool: Pool, view: View, plans: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Scores of the dense model and of plans, each given as unit → file of its piece."""
    store, judge = experiment.store, experiment.judge
    sequences = experiment.evaluation
    step = -(-len(sequences.ids) // (EVALUATION_PARTS * judge.batch)) * judge.batch
    rows = [
        (low, min(low + step, len(sequences.ids))) for low in range(0, len(sequences.ids), step)
    ]
    all_plans: dict[str, Mapping[str, str]] = {"dense": {}, **plans}
    keys = {name: _score_key(experiment, name, pieces) for name, pieces in all_plans.items()}
    found = {name: store.get_json("scores", key) for name, key in keys.items()}
    if not all(store.get("hidden", judge.hidden_key(part)) for part in rows):
        found["dense"] = None  # the others are compared with its hidden states
    scores: dict[str, dict[str, Any]] = {n: known for n, known in found.items() if known}
    view.stage("evaluate", len(all_plans) * len(rows), len(scores) * len(rows))
    parts: dict[str, dict[int, Mapping[str, Any]]] = {}

    def task(name: str, index: int) -> Task:
        def done(result: Mapping[str, Any]) -> Iterable[Task]:
            parts.setdefault(name, {})[index] = result
            view.advance("evaluate", 1, result["peak_bytes"])
            if len(parts[name]) == len(rows):
                ordered = [parts[name][number] for number in range(len(rows))]
                scores[name] = score(ordered, sequences.source.tolist(), sequences.labels)
                store.put_json("scores", keys[name], scores[name])
            return ()

        own, pieces = plain(_judge(experiment, name)), dict(all_plans[name])
        arguments = {"judge": own, "rows": rows[index], "pieces": pieces}
        label = f"{name} {rows[index][0]}"
        return Task("evaluate:evaluate_rows", arguments, label, done=done)

    missing = [name for name in all_plans if name not in scores]
    for names in (["dense"], list(plans)):
        left = [task(n, index) for n in names if n in missing for index in range(len(rows))]
        pool.run(left, view.tick)
    return {name: scores[name] for name in all_plans}
