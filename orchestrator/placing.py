"""The workers of a run: how many fit the cluster, where they are, and what replaces a dead one.

Every worker has a numbered *slot*, which outlives it. A worker that died leaves its slot to a new
one, which Ray starts as soon as some node has room: until then the run goes on with the others.
Where the recipe leaves the number of workers open, nodes that join a cluster bring slots of their
own. Only while there is no worker at all the run waits, aloud and not for ever.
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from moesaic.orchestrator.cluster import cluster_address, free, place
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.gpu_shares import gpu_share, shares
from moesaic.orchestrator.head import interruptible
from moesaic.orchestrator.model_source import ModelPlace, ModelSource, offer_model
from moesaic.orchestrator.process import SLEEPING_THREADS
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.room import COMPILED_SHAPES
from moesaic.orchestrator.worker import installed

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
# Characters shown of what Ray tells of a death.
_CAUSE = 300
_FRAME = re.compile(r'\s+File ".*", line \d+, in ')
_NAMES_OF_ACTOR = re.compile(
    r"^The actor died unexpectedly before finishing this task\. "
    r"(?:(?:class_name|actor_id|pid|name|namespace|ip): \S+ )*"
)
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
        node: id of its node; empty before it answered.
    """

    actor: Any
    starting: Any | None
    since: float
    node: str = ""


class Roster:
    """All slots of a run; what is in them changes.

    Args:
        model: a folder that nodes may lack; without it they read what the tasks name.
        per_gpu: workers that a GPU has work for; see :mod:`moesaic.orchestrator.gpu_shares`.

    Attributes:
        replaced: how many workers were replaced.
    """

    def __init__(self, compute: Compute, model: ModelPlace | None = None, per_gpu: int = 1) -> None:
        self.compute, self.model, self.per_gpu = compute, model, per_gpu
        self.source: ModelSource | None = None
        self._fetching: set[str] = set()  # nodes that were told to fetch the model
        self.slots: list[Slot] = []
        self.replaced = 0
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
        nodes = _alive_nodes()
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
        options = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
        }
        memory = self.compute.memory_per_worker
        given = (self.cpus, self.gpus, self.beside, memory, self.source)
        actor = ray.remote(Worker).options(**options).remote(*given)
        return Slot(actor, actor.ready.remote(), time.monotonic())

    def starting(self) -> list[Any]:
        """Handles of the first answers that have not come yet."""
        return [slot.starting for slot in self.slots if slot.starting is not None]

    def alive(self) -> set[int]:
        """Numbers of the slots whose workers have answered, and are not known to be dead."""
        return {number for number, slot in enumerate(self.slots) if slot.starting is None}

    def arrived(self, handles: Iterable[Any]) -> None:
        """First answers that are there: those workers can be given work.

        Raises:
            RunError: workers cannot be started, or have another version of this package, or another
                model.
        """
        by_handle = {slot.starting: n for n, slot in enumerate(self.slots)}
        for handle in handles:
            number = by_handle[handle]
            try:
                told = ray.get(handle, timeout=_ANSWER_SECONDS)
            except RunError as error:  # Ray's, which is both, shows where it was raised
                raise (error.cause if isinstance(error, RayTaskError) else error) from None
            except RayError as error:
                self._failed_start(number, error)
                continue
            _check_installed(told)
            if told["fetches"]:
                self._tell_fetching(told)
            self._failures = 0
            self.slots[number].starting, self.slots[number].node = None, told["node"]

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
        if "No module named 'moesaic'" in text:
            raise RunError(
                f"a worker failed to start: moesaic is not installed on every node of the cluster"
                f" at {place(self.compute)}"
            ) from error
        if by_itself:
            raise RunError(f"a worker failed to start: {why_failed(str(error))}") from error
        if self._failures >= _FAILED_STARTS:
            raise RunError(
                f"workers failed to start {self._failures} times in turn, the last time:"
                f" {why_dead(text)}; see to the nodes and run the same command again, finished work"
                " is kept"
            ) from error
        self._anew(number)

    def replace(self, number: int) -> None:
        """Kills what is in a slot, if it lives, and asks for a new worker."""
        self._anew(number)
        self.replaced += 1

    def _anew(self, number: int) -> None:
        ray.kill(self.slots[number].actor)
        self.slots[number] = self._start()

    def died_with_its_node(self, number: int) -> bool:
        """Whether the whole node of a slot's worker is gone, which is no fault of its task."""
        node = self.slots[number].node
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
        for number, slot in enumerate(self.slots):
            if slot.starting is not None and now - slot.since > _START_SECONDS:
                self._anew(number)  # it may hang on a node that nobody reaches
        if work_waits and self.elastic and self.compute.workers is None:
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
        more = self._fitting(_alive_nodes()) - len(self.slots)
        if more > 0:
            self.slots += [self._start() for _ in range(more)]
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
            ray.kill(slot.actor)
        if self.source is not None:
            self.source.close()
        self.slots, self.source = [], None


def why_failed(text: str) -> str:
    """What was raised when a worker was made: it stands behind the last frame of a traceback."""
    lines = text.splitlines()
    frames = [n for n, line in enumerate(lines) if _FRAME.match(line)]
    after = lines[frames[-1] + 1 :] if frames else lines
    raised = list(itertools.dropwhile(lambda line: line[:1].isspace(), after)) if frames else after
    return _shortened(" ".join(" ".join(raised or lines).split()))


def why_dead(text: str) -> str:
    """What Ray says of the death of an actor, in a sentence.

    Its message begins with the actor's names and numbers; the cause may be followed by pages of
    advice.
    """
    cause = re.search(r"(The actor (?:is dead|died) because .*?)(?:\. |$)", text)
    found = cause[1] if cause else _NAMES_OF_ACTOR.sub("", text)
    return _shortened(found.partition(" Some common causes include")[0].rstrip("."))


def _shortened(text: str) -> str:
    return text if len(text) <= _CAUSE else f"{text[:_CAUSE].rpartition(' ')[0]} …"


def _alive_nodes() -> list[Mapping[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in interruptible(ray.nodes) if node["Alive"]]


def _kinds(nodes: Iterable[Mapping[str, float]]) -> set[str]:
    """Names of the accelerators; Ray has a resource of each node for them."""
    names = [name for node in nodes for name in node if name.startswith(_KIND)]
    return {name.removeprefix(_KIND) for name in names}


def _address(resources: Mapping[str, float]) -> str:
    """Where a node is; Ray names a resource after it."""
    own = (name.removeprefix("node:") for name in resources if name.startswith("node:"))
    return next((name for name in own if not name.startswith("__")), "")


def _check_installed(there: Mapping[str, str]) -> None:
    """Results of different code must not be mixed, and keys of entries tell only the driver's."""
    here = installed()

    def compare(name: str) -> None:
        if there[name] != here[name]:
            raise RunError(
                f"node {there['host']} has {name} {there[name]}, this process has {here[name]}:"
                " install the same version on all machines"
            )

    compare("moesaic")
    if there["code"] != here["code"]:
        raise RunError(
            f"node {there['host']} has other sources of moesaic {here['moesaic']} (digest"
            f" {there['code'][:8]}) than this process ({here['code'][:8]}): install the same on all"
            " machines, and start again what was started before a change"
        )
    compare("torch")
    compare("transformers")
