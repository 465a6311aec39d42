"""What a run will take on a given cluster: the recipe's own tasks, with their costs, replayed.

Costs come from :mod:`moesaic.orchestrator.timing`, speeds from a file of ``moesaic bench`` or a
data sheet, the order of the work from the real loop on a calculated clock
(:mod:`moesaic.orchestrator.simulate`).
"""

import io
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.methods.base import Chain, Spec, Unit
from moesaic.orchestrator import memory
from moesaic.orchestrator.blueprint import PlannedExperiment
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.fleet import Cluster
from moesaic.orchestrator.machine import Crew, Speeds
from moesaic.orchestrator.memory import Sizes
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.simulate import Links, Outcome, SimulatedPool
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.timing import START_SECONDS, Clock, Cost

# Parts of a worker's memory that are not on its device.
_HOST_PARTS = ("hidden states", "process", "allocator", "compiled products")


class TaskCosts:
    """Costs of the tasks of calibrating and measuring; those of equal shapes are worked out once.

    Args:
        clock: of the experiment whose tasks they are.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._known: dict[Hashable, Cost] = {}
        blocks = range(clock.model.blocks)
        self._shapes = [tuple(map(_shape, clock.sizes.block_units(block))) for block in blocks]

    def __call__(self, task: Task) -> Cost:
        name = task.function.partition(":")[2]
        key, found = getattr(self, f"_{name}")(task.arguments)
        if (name, key) not in self._known:
            self._known[name, key] = found()
        return self._known[name, key]

    def _rows(self, span: tuple[int, int]) -> tuple[int, ...]:
        pairs = map(self.clock.experiment.walk.shard_rows, range(*span))
        return tuple(high - low for low, high in pairs)

    def _forward(self, given: Mapping[str, Any]) -> Any:
        block, span = given["block"], given["span"]
        key = (self._shapes[block], self._rows(span), self._nodes([span]))
        return key, lambda: self.clock.forward(block, span)

    def _reverse(self, given: Mapping[str, Any]) -> Any:
        block, span = given["block"], given["span"]
        last = block == self.clock.model.blocks - 1
        key = (self._shapes[block], self._rows(span), self._nodes([span]), last)
        return key, lambda: self.clock.reverse(block, span)

    def _reduce(self, given: Mapping[str, Any]) -> Any:
        block, what, spans = given["block"], given["what"], self.clock.spans
        return (self._shapes[block], what), lambda: self.clock.reduce(what, block, spans)

    def _compress_job(self, given: Mapping[str, Any]) -> Any:
        job = given["job"]
        pairs = {
            name: tuple(_chain(specs) for specs, _ in wanted)
            for name, wanted in job["missing"].items()
        }
        group = [self.clock.experiment.by_name[name] for name in pairs]
        key = (self._shapes[job["block"]], *((_shape(u), pairs[u.name]) for u in group))
        return key, lambda: self.clock.job(group, pairs)

    def _nodes(self, spans: list[tuple[int, int]]) -> int:
        return self.clock.nodes(spans)


def _shape(unit: Unit) -> Hashable:
    return unit.kind, unit.part, tuple(unit.shapes.items())


def _chain(specs: Any) -> Chain:
    return tuple(Spec(method, options) for method, options in specs)


def planned(recipe: Recipe, output: Path, cluster: Cluster) -> PlannedExperiment:
    """The recipe as it would be run there."""
    return PlannedExperiment(recipe, output, bool(cluster.gpu))


def simulated(experiment: Experiment, cluster: Cluster, speeds: Speeds, call: float) -> Outcome:
    """Calibration and measuring on the cluster, from an empty store.

    Args:
        speeds: of one of its workers.
        call: seconds of the driver per task.
    """
    places = cluster.places(experiment.recipe.compute)
    clock = Clock(experiment, cluster.crew(experiment.recipe.compute), speeds)
    links = Links(cluster.store, cluster.networks(), speeds.read, speeds.save, call)
    pool = SimulatedPool(places, links, TaskCosts(clock))
    view = View(Console(file=io.StringIO()))
    # What an earlier run left plays no part, and nothing is left for a later one.
    with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
        empty = experiment.under(experiment.recipe, experiment.output)
        empty.store = Store(Path(folder))
        empty.__dict__["walk"] = replace(experiment.walk, store=folder)
        Calibration(empty, pool, view, empty.offers).run()
    return pool.outcome


def outlook(
    experiment: Experiment, cluster: Cluster, speeds: Speeds, call: float, source: str
) -> dict[str, Any]:
    """Time, memory, store and network of a run on the cluster, as plain data.

    Args:
        source: where the speeds are from, for people.
    """
    team = cluster.crew(experiment.recipe.compute)
    sizes = Sizes(experiment, team)
    stages = memory.predict_memory(sizes)
    store = memory.predict_store(sizes)
    clock = Clock(experiment, team, speeds)
    found = simulated(experiment, cluster, speeds, call)
    evaluate = clock.evaluate() / clock.evaluators()
    return {
        "cluster": cluster.model_dump(),
        "workers": team.workers,
        "device": team.device,
        "speeds": source,
        "time": {
            "start": START_SECONDS,
            "calibrate and measure": found.makespan,
            "evaluate": evaluate,
            "total": START_SECONDS + found.makespan + evaluate,
        },
        "stages": _stages(found),
        "memory": {
            "stages": {name: _placed(parts, team) for name, parts in stages.items()},
            "device_bytes": cluster.gpu_memory,
            "node_bytes": min(group.node_memory for group in cluster.nodes),
            "workers_per_node": max(map(cluster.places(experiment.recipe.compute).count, [0])),
        },
        "store": {**store, "total": sum(store.values())},
        "network": {"read": found.read, "written": found.written},
        "simulation": {
            **{k: v for k, v in asdict(found).items() if k != "stages"},
            "limit": found.limit(),
            "busy_share": found.busy / (found.workers * found.makespan),
        },
    }


def _stages(found: Outcome) -> dict[str, dict[str, float]]:
    names = {
        "calibrate:forward": "forward",
        "calibrate:reduce": "sums",
        "gradients:reverse": "reverse",
        "measure:compress_job": "measure",
    }
    return {names[name]: dict(stage) for name, stage in found.stages.items()}


def _placed(parts: Mapping[str, int], team: Crew) -> dict[str, int]:
    """Bytes on the device and in the processor's memory."""
    own = {name: size for name, size in parts.items() if name != "total"}
    if team.device == "cpu":
        return {"device": 0, "host": sum(own.values())}
    host = sum(size for name, size in own.items() if name in _HOST_PARTS)
    return {"device": sum(own.values()) - host, "host": host}
