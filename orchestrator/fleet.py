"""A cluster on paper: nodes with cores, GPUs, memory and links, as a person writes them down.

In words, groups of equal nodes are separated by commas:

    8xH100:16cpu            one node with 8 H100 and 16 cores
    8*8xH100:128cpu         eight nodes with 8 H100 and 128 cores each
    3*32cpu                 three nodes with 32 cores and no GPU

A YAML file says more: ``nodes``, a list of groups (``count``, ``gpus``, ``gpu``, ``gpu_memory``,
``cpus``, ``memory``, ``network``), and ``store``, bytes per second that the shared store gives all
nodes together.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moesaic.orchestrator.datasheet import DATA_SHEETS
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.foreign import shown
from moesaic.orchestrator.gpu_shares import gpu_share, shares
from moesaic.orchestrator.machine import Crew
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.recipe_values import parse_bytes
from moesaic.orchestrator.room import block_room
from moesaic.orchestrator.yamlfile import read_yaml

# What is taken where nothing is said: cores per GPU of a node that names none, memory per core,
# a link of 100 Gbit/s per node, and a shared file system of a mid-sized cluster.
CPUS_PER_GPU = 8
MEMORY_PER_CPU = 8_000_000_000
NETWORK_BYTES, STORE_BYTES = 12_500_000_000, 20_000_000_000
# Of a node's memory: what processes do not use is the page cache's.
CACHE_SHARE = 0.5
# Of a cluster; every node, and every worker that fits one, is something to look at.
_MOST_NODES, _MOST_CORES = 10**5, 10**7
_GROUP = re.compile(r"(?:(\d+)\*)?(?:(?:(\d+)x)?([A-Za-z]\w*)(?::(\d+)cpu)?|(\d+)cpu)", re.I)
_HOW = "write 8xH100:16cpu, 4*8xA100:96cpu or 3*32cpu, several separated by commas, or name a file"


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Group(BaseModel):
    """Equal nodes; bandwidths in bytes per second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(default=1, ge=1, le=10**5)
    gpus: int = Field(default=0, ge=0, le=64)
    gpu: str = ""
    gpu_memory: Bytes | None = None
    cpus: int | None = Field(default=None, ge=1, le=10**4)
    memory: Bytes | None = None
    network: Bytes = NETWORK_BYTES

    @property
    def cores(self) -> int:
        return self.cpus or CPUS_PER_GPU * max(1, self.gpus)

    @property
    def node_memory(self) -> int:
        return self.memory or MEMORY_PER_CPU * self.cores


class Cluster(BaseModel):
    """Nodes, and what the store that they share gives them together, in bytes per second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: list[Group] = Field(min_length=1)
    store: Bytes = STORE_BYTES

    @property
    def gpu(self) -> str:
        """Name of its GPUs; empty where it has none."""
        return next((group.gpu for group in self.nodes if group.gpus), "")

    @property
    def gpu_memory(self) -> int:
        """Bytes of the smallest GPU; 0 where there is none."""
        found = [
            group.gpu_memory or DATA_SHEETS[group.gpu].memory for group in self.nodes if group.gpus
        ]
        return min(found, default=0)

    def share(self, compute: Compute, per_gpu: int) -> float:
        """GPUs of one worker.

        Args:
            per_gpu: workers that a GPU has work for.
        """
        rooms = [(group.cores, group.gpus) for group in self.nodes for _ in range(group.count)]
        return gpu_share(compute, rooms, per_gpu)

    def places(self, compute: Compute, per_gpu: int = 1) -> list[int]:
        """Node of every worker that the cluster carries, in the order in which they are filled.

        Args:
            per_gpu: workers that a GPU has work for.

        Raises:
            UserError: no worker fits, or fewer than the recipe wants.
        """
        each = self.share(compute, per_gpu)
        rooms = []
        for group in self.nodes:
            room = group.cores // compute.cpus_per_worker
            rooms += [min(room, shares(group.gpus, each)) if each else room] * group.count
        found = [node for node, room in enumerate(rooms) for _ in range(room)]
        wanted = compute.workers or max(1, len(found))
        if wanted > len(found):
            raise UserError(
                f"--cluster: {wanted} worker(s) of {compute.cpus_per_worker} CPU and {each:g} GPU"
                f" do not fit its {len(rooms)} node(s): at most {len(found)}"
            )
        return found[:wanted]

    def networks(self) -> list[int]:
        """Bytes per second of every node's link."""
        return [group.network for group in self.nodes for _ in range(group.count)]

    def caches(self) -> list[float]:
        """Bytes of every node's memory in which files stay that were read."""
        return [CACHE_SHARE * group.node_memory for group in self.nodes for _ in range(group.count)]

    def crew(self, compute: Compute, per_gpu: int = 1) -> Crew:
        """The workers of a run there; see :meth:`places`."""
        places, share = self.places(compute, per_gpu), self.share(compute, per_gpu)
        device = "cuda" if share else "cpu"
        if device == "cuda":
            there = int(self.gpu_memory * min(1.0, share))
        else:
            there = min(group.node_memory for group in self.nodes) // max(1, places.count(0))
        room = block_room(device, there, compute.memory_per_worker)
        return Crew(len(places), len(places), compute.cpus_per_worker, device, "", room)


def read_cluster(text: str) -> Cluster:
    """A cluster from words, or from the file that they name.

    Raises:
        UserError: neither; with what is wrong and what may be written.
    """
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return _checked(text, _loaded(Path(text)))
    groups = []
    for part in text.replace(" ", "").split(","):
        match = _GROUP.fullmatch(part)
        if match is None:
            raise UserError(f"--cluster: {part[:80]!r} is no group of nodes: {_HOW}")
        count, gpus, gpu, cpus, alone = match.groups()
        group: dict[str, Any] = {"count": int(count or 1)}
        if gpu:
            group |= {"gpus": int(gpus or 1), "gpu": gpu}
        if cpus or alone:
            group["cpus"] = int(cpus or alone)
        groups.append(group)
    return _checked("--cluster", {"nodes": groups})


def _loaded(file: Path) -> Any:
    found, twice = read_yaml(file, "cluster file")
    if twice:
        raise UserError(f"{file}: {twice[0]}")
    return found


def _checked(where: str, content: Any) -> Cluster:
    try:
        cluster = Cluster.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where}: {shown(key)}: {shown(first['msg'])}; {_HOW}") from None
    nodes = sum(group.count for group in cluster.nodes)
    cores = sum(group.count * group.cores for group in cluster.nodes)
    if nodes > _MOST_NODES or cores > _MOST_CORES:
        raise UserError(
            f"{where}: {nodes:,} nodes with {cores:,} cores: at most {_MOST_NODES:,} and"
            f" {_MOST_CORES:,}"
        )
    kinds = {group.gpu for group in cluster.nodes if group.gpus}
    if len(kinds) > 1:
        raise UserError(
            f"{where}: one kind of GPU at a time, not {shown(', '.join(sorted(kinds)))}"
        )
    for group in cluster.nodes:
        if group.gpus and group.gpu_memory is None and group.gpu not in DATA_SHEETS:
            raise UserError(
                f"{where}: gpu {shown(repr(group.gpu))} has no known memory: say gpu_memory in a"
                f" file; known are {', '.join(DATA_SHEETS)}"
            )
    return cluster
