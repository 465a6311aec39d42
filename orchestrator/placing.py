"""The workers of a run: how many fit the cluster, where they are, and what replaces a dead one.

Every worker has a numbered *slot*, which outlives it. A worker that died leaves its slot to a new
one, which Ray starts as soon as some node has room: until then the run goes on with the others.
Where the recipe leaves the number of workers open, nodes that join a cluster bring slots of their
own. Only while there is no worker at all the run waits, aloud and not for ever.

A node whose workers must not work, or cannot be made, ends the run at its start. Once some worker
has answered the node is *barred* instead: no worker is asked for there any more.
"""

import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from moesaic.orchestrator.bad_nodes import (
    check_installed,
    elsewhere,
    host_of,
    node_of,
    why_dead,
    why_failed,
)
from moesaic.orchestrator.cluster import cluster_address, free, place
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.gpu_shares import gpu_share, shares
from moesaic.orchestrator.head import interruptible
from moesaic.orchestrator.model_source import ModelPlace, ModelSource, offer_model
from moesaic.orchestrator.process import SLEEPING_THREADS
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.room import COMPILED_SHAPES

# Without any worker the run says so after the first, and stops after the second.
_SILENT_SECONDS, _START_SECONDS = 10.0, 300.0
# How long the first workers wait for the others before work begins.
_GRACE_SECONDS = 20.0
_POLL_SECONDS = 1.0
_GROW_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
# Deaths in a row of workers that had not answered yet.
_FAILED_STARTS = 5
# Nodes that are named in one line.
_NAMES = 5
_KIND = "accelerator_type:"
# oneDNN remembers matrix shapes, at up to 0.7 MB each: routed experts bring a new one with almost
# every batch.
WORKER_ENVIRONMENT = {
    **SLEEPING_THREADS,
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(COMPILED_SHAPES),
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass
class Slot:
    """A place for a worker.

    Attributes:
        actor: the worker in it, or the one that is to come.
        starting: handle of the worker's first answer; None once it is there.
        since: when Ray was asked for the worker.
        node: id of its node; empty before it is known.
        closed: whether there is none, because only barred nodes had room for it.
    """

    actor: Any
    starting: Any | None
    since: float
    node: str = ""
    closed: bool = False


class Roster:
    """All slots of a run; what is in them changes.

    Args:
        model: a folder that nodes may lack; without it they read what the tasks name.
        per_gpu: workers that a GPU has work for; see :mod:`moesaic.orchestrator.gpu_shares`.

    Attributes:
        replaced: how many workers were replaced.
        barred: ids of the nodes that get no more workers, and why.
    """

    def __init__(self, compute: Compute, model: ModelPlace | None = None, per_gpu: int = 1) -> None:
        self.compute, self.model, self.per_gpu = compute, model, per_gpu
        self.source: ModelSource | None = None
        self._fetching: set[str] = set()  # nodes that were told to fetch the model
        self.slots: list[Slot] = []
        self.replaced = 0
        self.barred: dict[str, RunError] = {}
        self._emptied: set[str] = set()  # barred nodes on which nobody may work on, either
        self._begun = False  # whether any worker has been able to work
        self.beside = 1  # workers that one node may get
        self.cpus, self.gpus = compute.cpus_per_worker, compute.gpus_per_worker or 0.0
        # Nobody joins a Ray that was started for this process.
        self.elastic = cluster_address(compute)[1] is not None
        self._none_since: float | None = None
        self._told = False
        self._looked, self._failures = 0.0, 0

    def ask(self) -> None:
        """Asks for the workers.

        Raises:
            RecipeError: they fit no node of the cluster.
        """
        nodes = _alive_nodes(self.barred)
        total_cpus = int(sum(node.get("CPU", 0) for node in nodes))
        total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
        rooms = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
        self.gpus = gpu_share(self.compute, rooms, self.per_gpu)
        fitting = self._fitting(nodes)
        count = self.compute.workers or max(fitting, 1)
        if fitting == 0 or (count > fitting and not self.elastic):
            raise RecipeError(
                f"compute: {count} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU do not"
                f" fit the cluster ({len(nodes)} node(s), {total_cpus} CPU, {total_gpus:g} GPU:"
                f" at most {fitting})"
            )
        if count > fitting:
            stderr.print(
                f"compute: {fitting} of {count} worker(s) fit the cluster now; the others start"
                " when nodes join",
                markup=False,
            )
        self._tell_unused(nodes)
        if self.compute.gpus_per_worker is None and 0 < self.gpus < 1:
            stderr.print(
                f"compute: small layers: {1 / self.gpus:.0f} workers share a GPU;"
                " compute.gpus_per_worker decides otherwise",
                markup=False,
            )
        kinds = _kinds(nodes) if self.gpus else set()
        if len(kinds) > 1:
            stderr.print(
                f"compute: GPUs of several kinds ({', '.join(sorted(kinds))}): what they compute"
                " differs by rounding, so a run that is repeated may leave other bytes",
                markup=False,
            )
        if self.elastic and self.model is not None:
            self.source = offer_model(self.model)
        self.beside = min(count, max(map(self._fitting_node, nodes), default=1))
        self.slots = [self._start() for _ in range(count)]
        self._looked = time.monotonic()

    def wait(self) -> None:
        """Waits until the first worker that was asked for can work, for the others a little longer.

        Those of one node get neighbouring numbers then, the fullest node the first: who walks the
        blocks has the first numbers, and reads what a node keeps of them.

        Raises:
            RunError: none could be started.
        """
        ready_since: float | None = None
        while starting := self.starting():
            ready, _ = ray.wait(starting, num_returns=1, timeout=_POLL_SECONDS)
            self.arrived(ready)
            if self.alive() and ready_since is None:
                ready_since = time.monotonic()
            if ready_since is not None and time.monotonic() - ready_since > _GRACE_SECONDS:
                break
            self.tend(work_waits=False)
        beside = Counter(slot.node for slot in self.slots if slot.node)
        self.slots.sort(key=lambda slot: (-beside[slot.node], slot.node))

    def _fitting(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Workers that the empty nodes have room for: one cannot be spread over two of them."""
        return sum(self._fitting_node(node) for node in nodes)

    def _fitting_node(self, node: Mapping[str, float]) -> int:
        count = int(node.get("CPU", 0)) // self.cpus
        return min(count, shares(node.get("GPU", 0.0), self.gpus)) if self.gpus else count

    def _tell_unused(self, nodes: Iterable[Mapping[str, float]]) -> None:
        """Nodes that no worker fits; one without a processor to give is not meant to work."""
        unused = [node for node in nodes if node.get("CPU", 0) and not self._fitting_node(node)]
        if not unused:
            return
        names = [name for node in unused if (name := _address(node))]
        shown = ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "")
        each = f"{self.cpus} CPU and {self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPU"
        how = "compute.cpus_per_worker"
        if self.gpus:
            how += ", or compute.gpus_per_worker: 0 for the processors of all nodes and no GPU"
        stderr.print(
            f"compute: {len(unused)} node(s) take no part{f' ({shown})' if names else ''}: no"
            f" worker of {each} fits them; see {how}",
            markup=False,
        )

    def _start(self) -> Slot:
        """Asks Ray for a worker, which comes when some node has room."""
        from moesaic.orchestrator.worker import Worker

        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(self.cpus)}
        if not self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them to who asked for none
        options: dict[str, Any] = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
        }
        if self.barred:
            options["label_selector"] = elsewhere(self.barred)
        memory = self.compute.memory_per_worker
        given = (self.cpus, self.gpus, self.beside, memory, self.source)
        actor = ray.remote(Worker).options(**options).remote(*given)
        return Slot(actor, actor.ready.remote(), time.monotonic())

    def starting(self) -> list[Any]:
        """Handles of the first answers that have not come yet."""
        return [slot.starting for slot in self.slots if slot.starting is not None]

    def alive(self) -> set[int]:
        """Numbers of the slots whose workers have answered, and are not known to be dead."""
        return {
            number
            for number, slot in enumerate(self.slots)
            if slot.starting is None and not slot.closed
        }

    def arrived(self, handles: Iterable[Any]) -> None:
        """First answers that are there: those workers can be given work.

        Raises:
            RunError: workers cannot be started, or have another version of this package, or another
                model; once any could work, only where no other node has room.
        """
        for handle in handles:
            number = {slot.starting: n for n, slot in enumerate(self.slots)}.get(handle)
            if number is None:
                continue  # its node was barred meanwhile
            try:
                told = ray.get(handle, timeout=_ANSWER_SECONDS)
                self.slots[number].node = told["node"]
                check_installed(told)
            except RunError as error:  # Ray's, which is both, shows where it was raised
                cause = error.cause if isinstance(error, RayTaskError) else error
                self._refuse(number, str(cause), all_there=True)
                continue
            except RayError as error:
                self._failed_start(number, error)
                continue
            if told["fetches"]:
                self._tell_fetching(told)
            self._failures, self._begun = 0, True
            self.slots[number].starting = None

    def _tell_fetching(self, told: Mapping[str, Any]) -> None:
        assert self.source is not None, "or nothing could be fetched"
        if told["node"] not in self._fetching:
            self._fetching.add(told["node"])
            stderr.print(
                f"model: node {told['host']} does not have {self.source.place.folder}: it fetches"
                f" what it needs from {self.source.host}",
                markup=False,
            )

    def _failed_start(self, number: int, error: RayError) -> None:
        """Tries again where it was an accident: the new worker, or its node, was killed."""
        self.check_nodes()
        self._failures += 1
        text = " ".join(str(error).split())
        by_itself = (
            isinstance(error, RuntimeEnvSetupError) or "error raised in its creation" in text
        )
        advice = ""
        if "No module named 'moesaic'" in text:
            reason = "a worker failed to start: moesaic is not installed on every node of the"
            reason += f" cluster at {place(self.compute)}"
        elif by_itself:
            reason = f"a worker failed to start: {why_failed(str(error))}"
        elif self._failures >= _FAILED_STARTS:
            reason = f"workers failed to start {self._failures} times in turn, the last time: "
            reason += why_dead(text)
            advice = "; see to the nodes and run the same command again, finished work is kept"
        else:
            self._anew(number)
            return
        self._refuse(number, reason, advice)

    def _refuse(self, number: int, reason: str, advice: str = "", all_there: bool = False) -> None:
        """Bars the node of a worker that has not started as it should; the others go on.

        Args:
            advice: what to do where the run does not go on.
            all_there: whether those that are at work on the node must end, too.

        Raises:
            RunError: no worker has started yet, or none is left, or Ray does not tell the node.
        """
        error = RunError(f"{reason}{advice}")
        if not self._begun:
            raise error
        starting = [n for n, slot in enumerate(self.slots) if slot.starting is not None]
        for slot in (self.slots[n] for n in starting):
            slot.node = slot.node or node_of(slot.actor)
        node = self.slots[number].node
        if not node:
            raise error
        if node not in self.barred:
            line = f"compute: node {host_of(node)} gets no more workers: {reason}"
            stderr.print(line, markup=False)
        self._failures, self.barred[node] = 0, error
        if all_there:
            self._emptied.add(node)
            for slot in self.slots:
                if slot.starting is None and slot.node == node and not slot.closed:
                    ray.kill(slot.actor)  # the loop takes note when it next asks for something
        for n in starting:
            # One that is nowhere yet might still come to a barred node.
            if self.slots[n].node in self.barred or not self.slots[n].node:
                self._anew(n)

    def replace(self, number: int) -> None:
        """Kills what is in a slot, if it lives, and asks for a new worker."""
        self._anew(number)
        self.replaced += 1

    def _anew(self, number: int) -> None:
        """Closes the slot instead where its node was barred, and the others have no room."""
        slot = self.slots[number]
        ray.kill(slot.actor)
        error = self.barred.get(slot.node)
        if error is not None:
            slot.starting, slot.closed = None, True
            if not self._unused():
                if all(slot.closed for slot in self.slots):
                    raise error
                return
        self.slots[number] = self._start()

    def _unused(self) -> int:
        """Workers that nodes have room for, beyond those that were asked for there."""
        workers = [slot for slot in self.slots if not slot.closed]
        there = sum(slot.node not in self.barred for slot in workers)
        unused = self._fitting(_alive_nodes(self.barred)) - there
        if self.compute.workers is not None:
            unused = min(unused, self.compute.workers - len(workers))
        return max(0, unused)

    def died_with_its_node(self, number: int) -> bool:
        """Whether all workers of the node of a slot are gone, which is no fault of its task."""
        node = self.slots[number].node
        if node in self._emptied:
            return True
        nodes = interruptible(ray.nodes)
        return any(n["NodeID"] == node and not n["Alive"] for n in nodes)

    def tend(self, work_waits: bool) -> None:
        """Looks after the slots; to be called again and again.

        Args:
            work_waits: whether more workers would have something to do.

        Raises:
            RunError: there has been no worker for too long, or Ray has lost all its nodes.
        """
        now = time.monotonic()
        while self.slots and self.slots[-1].closed:
            self.slots.pop()
        for number, slot in enumerate(self.slots):
            if slot.starting is not None and now - slot.since > _START_SECONDS:
                self._anew(number)  # it may hang on a node that nobody reaches
        if work_waits and self.elastic:
            self._grow(now)
        if self.alive():
            self._none_since, self._told = None, False
            return
        self.check_nodes()
        if self._none_since is None:
            self._none_since = now
        seconds, count = now - self._none_since, len(self.slots)
        where = place(self.compute)
        if seconds > _START_SECONDS:
            raise RunError(
                f"compute: {count} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU did not"
                f" start within {_START_SECONDS:.0f} s at {where} ({free()}): wait until others"
                " have finished, or ask for fewer (compute.workers); finished work is kept"
            )
        if seconds > _SILENT_SECONDS and not self._told:
            self._told = True
            stderr.print(
                f"waiting for {count} worker(s) of {self.cpus} CPU and {self.gpus:g} GPU at"
                f" {where} ({free()})",
                markup=False,
            )

    def _grow(self, now: float) -> None:
        """New slots for nodes that joined."""
        if now - self._looked < _GROW_SECONDS:
            return
        self._looked = now
        if more := self._unused():
            closed = [number for number, slot in enumerate(self.slots) if slot.closed][:more]
            for number in closed:
                self.slots[number] = self._start()
            self.slots += [self._start() for _ in range(more - len(closed))]
            stderr.print(f"nodes have joined: {more} more worker(s)", markup=False)

    def check_nodes(self) -> None:
        """A machine on which Ray itself died takes no worker, and Ray would not say so."""
        if not _alive_nodes():
            raise RunError(
                f"Ray at {place(self.compute)} has lost all its nodes (out of memory, or killed?);"
                " finished work is kept, run the same command again"
            )

    def close(self) -> None:
        """Ends all workers."""
        for slot in self.slots:
            if not slot.closed:
                ray.kill(slot.actor)
        if self.source is not None:
            self.source.close()
        self.slots, self.source = [], None


def _alive_nodes(barred: Container[str] = ()) -> list[Mapping[str, float]]:
    """What each node has that is not barred."""
    nodes = [node for node in interruptible(ray.nodes) if node["Alive"]]
    return [node["Resources"] for node in nodes if node.get("NodeID") not in barred]


def _kinds(nodes: Iterable[Mapping[str, float]]) -> set[str]:
    """Names of the accelerators; Ray has a resource of each node for them."""
    names = [name for node in nodes for name in node if name.startswith(_KIND)]
    return {name.removeprefix(_KIND) for name in names}


def _address(resources: Mapping[str, float]) -> str:
    """Where a node is; Ray names a resource after it."""
    own = (name.removeprefix("node:") for name in resources if name.startswith("node:"))
    return next((name for name in own if not name.startswith("__")), "")
