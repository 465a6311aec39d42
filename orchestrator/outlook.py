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
from moesaic.orchestrator import machine, memory
from moesaic.orchestrator.bench import bench_speeds, read_bench
from moesaic.orchestrator.blueprint import PlannedExperiment
from moesaic.orchestrator.console import View
from moesaic.orchestrator.costs import Cost
from moesaic.orchestrator.datasheet import DATA_SHEETS, Host, sheet_speeds
from moesaic.orchestrator.errors import RecipeError, UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.file_probes import file_speeds
from moesaic.orchestrator.fleet import Cluster, read_cluster
from moesaic.orchestrator.forecast import duration, new_table, parted_events, size_text
from moesaic.orchestrator.machine import Crew, measure_speeds
from moesaic.orchestrator.memory import Sizes
from moesaic.orchestrator.objects import is_url
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.shared import RemoteStore
from moesaic.orchestrator.simulate import Links, Outcome, SimulatedPool
from moesaic.orchestrator.stage_times import OVERHEADS, closing
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.timing import Clock, SpeedSource

# Of the driver for one task, where nobody measured it: two cores, Ray 2.60.
CALL_SECONDS = 2e-3
# Numbers of walkers that are tried besides what the recipe says.
_WALKERS = (1, 2, 4, 8)
_OF_HOST = ("read", "write", "entry", "save", "digest", "host_add")
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
        cost, (block, units) = self._known[name, key], _about(task.arguments)
        own = {"own": units}
        named = [
            ((f"{what} {block}", own.get(part, part)), size) for (what, part), size in cost.files
        ]
        return replace(cost, files=tuple(named))

    def _rows(self, span: tuple[int, int]) -> tuple[int, ...]:
        pairs = map(self.clock.experiment.walk.shard_rows, range(*span))
        return tuple(high - low for low, high in pairs)

    def _forward(self, given: Mapping[str, Any]) -> Any:
        block, span = given["block"], given["span"]
        key = (self._shapes[block], self._rows(span), self._nodes([span]))
        return key, lambda: self.clock.forward(block, span)

    def _pass_block(self, given: Mapping[str, Any]) -> Any:
        block, span = given["block"], given["span"]
        key = (self._shapes[block], span)
        return key, lambda: self.clock.passing(block, span)

    def _collect(self, given: Mapping[str, Any]) -> Any:
        return (self._shapes[given["block"]],), lambda: self.clock.collecting(given["block"])

    def _reverse(self, given: Mapping[str, Any]) -> Any:
        block, span = given["block"], given["span"]
        last = block == self.clock.model.blocks - 1
        key = (self._shapes[block], span, last)
        return key, lambda: self.clock.reverse(block, span)

    def _reduce(self, given: Mapping[str, Any]) -> Any:
        block, what = given["block"], given["what"]
        spans = self.clock.summed(what)
        return (self._shapes[block], what), lambda: self.clock.reduce(what, block, spans)

    def _compress_job(self, given: Mapping[str, Any]) -> Any:
        job = given["job"]
        pairs = {
            name: tuple(_chain(specs) for specs, _ in wanted)
            for name, wanted in job["missing"].items()
        }
        group = [self.clock.experiment.space.by_name[name] for name in pairs]
        key = (self._shapes[job["block"]], *((_shape(u), pairs[u.name]) for u in group))
        return key, lambda: self.clock.job(group, pairs)

    def _nodes(self, spans: list[tuple[int, int]]) -> int:
        return self.clock.nodes(spans)


def _about(given: Mapping[str, Any]) -> tuple[int, str]:
    """The block that a task is about, and the first of its units where it takes not all of it."""
    if "job" in given:
        return int(given["job"]["block"]), str(given["job"]["units"][0])
    return int(given["block"]), ""


def _shape(unit: Unit) -> Hashable:
    return unit.kind, unit.part, tuple(unit.shapes.items())


def _chain(specs: Any) -> Chain:
    return tuple(Spec(method, options) for method, options in specs)


def predict_on(
    recipe_file: Path, output: Path | None, cluster: str, bench: Path | None
) -> dict[str, Any]:
    """What ``moesaic check RECIPE --cluster`` answers; see :func:`outlook`.

    Args:
        cluster: in words, or a file.
        bench: unit costs; without it, files and calls are measured on this machine.

    Raises:
        UserError: recipe, cluster or file of unit costs are wrong.
    """
    recipe, nodes = load_recipe(recipe_file), read_cluster(cluster)
    try:
        experiment = planned(recipe, recipe.folder(output), nodes)
    except RecipeError as error:
        raise UserError("\n".join(f"{recipe_file}: {text}" for text in error.args)) from None
    source, call, told = cluster_speeds(experiment, nodes, bench)
    overheads = OVERHEADS if bench is None else read_bench(bench)["host"]["overheads"]
    found = outlook(experiment, nodes, source, call, told, overheads)
    found["walkers"] = _walkers(experiment, nodes, source, call, found)
    model = {"recipe": recipe.name, "model": str(experiment.folder)}
    return {**model, "weights_are_here": experiment.weights_are_here, **found}


def _walkers(
    experiment: Experiment,
    cluster: Cluster,
    source: SpeedSource,
    call: float,
    found: Mapping[str, Any],
) -> dict[str, float]:
    """Number of workers that walk → seconds of calibrating and measuring, as it is and with fewer.

    What walkers leave must be written, read and added: more of them are not always faster.
    """
    recipe = experiment.recipe
    now = min(experiment.walk.shards, recipe.compute.walking(found["workers"]))
    times = {str(now): float(found["simulation"]["makespan"])}
    for count in (count for count in _WALKERS if count < now):
        compute = recipe.compute.model_copy(update={"walkers": count})
        other = experiment.under(recipe.model_copy(update={"compute": compute}), experiment.output)
        clock = Clock(other, cluster.crew(compute, experiment.workers_per_gpu), source)
        times[str(count)] = simulated(other, cluster, clock, call).makespan
    return times


def cluster_speeds(
    experiment: Experiment, cluster: Cluster, bench: Path | None
) -> tuple[SpeedSource, float, str]:
    """Speeds of a worker, seconds of the driver per task, and where both are from.

    Raises:
        UserError: nothing is known of the GPU.
    """
    found = None if bench is None else read_bench(bench)
    call = CALL_SECONDS if found is None else float(found["host"]["call"])
    if not cluster.gpu:
        if found is None:
            return measure_speeds, call, "processor and files measured on this machine just now"
        told = f"measured, {bench} ({found['machine']}, {found['date']})"
        return bench_speeds(found, found["devices"]["cpu"], str(bench)), call, told
    if found is not None:
        for name, device in found["devices"].items():
            if cluster.gpu.lower() in name.lower():
                told = f"measured on {name}, {bench} ({found['date']})"
                return bench_speeds(found, device, str(bench)), call, told
    if cluster.gpu not in DATA_SHEETS:
        known = ", ".join(DATA_SHEETS)
        raise UserError(
            f"--cluster: nothing is known of {cluster.gpu}: measure one (moesaic bench --output"
            f" FILE there, --bench FILE here); data sheets are known of {known}"
        )
    where = "this machine just now" if found is None else str(bench)
    told = f"{cluster.gpu} NOT measured: data sheet; files measured on {where}"
    host = _host(experiment) if found is None else Host(**{k: found["host"][k] for k in _OF_HOST})
    return sheet_speeds(cluster.gpu, host), call, told


def _host(experiment: Experiment) -> Host:
    return Host(**asdict(file_speeds(experiment.store)), host_add=machine.probe_add("cpu"))


def planned(recipe: Recipe, output: Path, cluster: Cluster) -> PlannedExperiment:
    """The recipe as it would be run there."""
    return PlannedExperiment(recipe, output, bool(cluster.gpu))


def simulated(experiment: Experiment, cluster: Cluster, clock: Clock, call: float) -> Outcome:
    """Calibration and measuring on the cluster, from an empty store.

    Args:
        clock: of the experiment and one of its workers.
        call: seconds of the driver per task.
    """
    places = cluster.places(experiment.recipe.compute, experiment.workers_per_gpu)
    speeds, caches = clock.speeds, cluster.caches()
    if is_url(experiment.recipe.model) or isinstance(experiment.store, RemoteStore):
        copies = float(experiment.recipe.cache.size)  # nodes keep files that they have fetched
        caches = [min(copies, size) for size in caches]
    links = Links(
        store=cluster.store,
        networks=cluster.networks(),
        read=speeds.read,
        write=speeds.save,
        call=call,
        caches=caches,
        # A copy within the processor's memory, which takes no longer than adding there.
        cached=max(speeds.read, speeds.host_add),
    )
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
    experiment: Experiment,
    cluster: Cluster,
    source: SpeedSource,
    call: float,
    told: str,
    overheads: Mapping[str, float],
) -> dict[str, Any]:
    """Time, memory, store and network of a run on the cluster, as plain data.

    Args:
        source: of a worker's speeds.
        call: seconds of the driver per task.
        told: where the speeds are from, for people.
        overheads: stage → seconds that do not depend on the model.
    """
    team = cluster.crew(experiment.recipe.compute, experiment.workers_per_gpu)
    sizes = Sizes(experiment, team)
    stages = memory.predict_memory(sizes)
    store = memory.predict_store(sizes)
    clock = Clock(experiment, team, source)
    found = simulated(experiment, cluster, clock, call)
    first = sum(overheads[name] for name in ("calibrate", "gradients", "measure"))
    seconds = {
        "start": overheads["start"],
        "calibrate and measure": found.makespan + first,
        **closing(clock, overheads),
    }
    places = {name: _placed(parts, team) for name, parts in stages.items()}
    beside = max(1, cluster.places(experiment.recipe.compute, experiment.workers_per_gpu).count(0))
    node = min(group.node_memory for group in cluster.nodes)
    return {
        "cluster": cluster.model_dump(),
        "workers": team.workers,
        "device": team.device,
        "speeds": told,
        "time": {**seconds, "total": sum(seconds.values())},
        "stages": _stages(found),
        "memory": {
            "stages": places,
            "device_bytes": cluster.gpu_memory,
            "node_bytes": node,
            "workers_per_node": beside,
        },
        "short": _short(places, cluster.gpu_memory, node / beside),
        "parted": [asdict(event) for event in parted_events(sizes)],
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
        "walk_ahead:pass_block": "forward",
        "calibrate:collect": "statistics",
        "sums:reduce": "sums",
        "gradients:reverse": "reverse",
        "measure:compress_job": "measure",
    }
    return {names[name]: dict(stage) for name, stage in found.stages.items()}


def _short(
    places: Mapping[str, Mapping[str, int]], device_bytes: int, host_bytes: float
) -> dict[str, str]:
    """Stages for which memory is too small: the times are those of machines that had it."""
    found = {}
    for name, parts in places.items():
        for where, there in (("device", device_bytes), ("host", host_bytes)):
            if parts[where] > there:
                found[f"{name} {where} memory"] = (
                    f"needs {size_text(parts[where])}, there is {size_text(there)}"
                )
    return found


def _placed(parts: Mapping[str, int], team: Crew) -> dict[str, int]:
    """Bytes on the device and in the processor's memory."""
    own = {name: size for name, size in parts.items() if name != "total"}
    if team.device == "cpu":
        return {"device": 0, "host": sum(own.values())}
    host = sum(size for name, size in own.items() if name in _HOST_PARTS)
    return {"device": sum(own.values()) - host, "host": host}


def show_outlook(found: Mapping[str, Any], console: Console) -> None:
    """Prints what :func:`outlook` found."""
    run = found["simulation"]
    console.print(
        f"{found['recipe']}: {found['model']} on {found['workers']} worker(s), {found['device']}\n"
        f"speeds  {found['speeds']}",
        markup=False,
    )
    table = new_table("stage", "tasks", "worker time", "from", "to")
    for name, stage in found["stages"].items():
        times = (duration(stage[key]) for key in ("seconds", "first", "last"))
        table.add_row(name, f"{stage['tasks']:,.0f}", *times)
    table.add_row(
        "calibrate and measure",
        f"{run['tasks']:,}",
        duration(run["work"]),
        "",
        duration(run["makespan"]),
        style="bold",
    )
    for name in ("start", "search", "evaluate", "assemble", "report"):
        table.add_row(name, "", "", "", duration(found["time"][name]))
    console.print(table)
    room = found["memory"]
    table = new_table("largest worker", "device", "processor")
    for name, parts in room["stages"].items():
        table.add_row(name, size_text(parts["device"]), size_text(parts["host"]))
    each = room["node_bytes"] / max(1, room["workers_per_node"])
    table.add_row("there is", size_text(room["device_bytes"]), size_text(each), style="bold")
    console.print(table)
    store, net = found["store"], found["network"]
    console.print(
        f"store   {size_text(store['total'])} in the end; moved: {size_text(net['read'])} read,"
        f" {size_text(net['written'])} written\n"
        f"limit   {run['limit']}: workers busy {run['busy_share']:.0%} of the time, longest chain"
        f" {duration(run['critical'])}, store full {duration(run['store_full'])}, network full"
        f" {duration(run['network_full'])}, driver busy {duration(run['driver'])}",
        markup=False,
    )
    times = found["walkers"]
    best = min(times, key=lambda count: times[count])
    now, then = duration(next(iter(times.values()))), duration(times[best])
    if now != then:
        console.print(f"compute.walkers: {best} would take {then} instead of {now}", markup=False)
    for name, text in found["short"].items():
        console.print(f"event {name}: {text}", markup=False)
    for event in found["parted"]:
        console.print(f"event {event['kind']}: {event['message']}", markup=False)
