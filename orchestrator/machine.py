"""What this machine can do: how many workers fit, and how fast the operations of a run are here.

The speeds are measured in about two seconds on matrices of the model's widths, cut where they are
large, as an undisturbed process has them. They are rough: one size stands for all of a kind.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moesaic.kernels import dense
from moesaic.methods import chains
from moesaic.methods.base import (
    OUTPUT_STATISTICS,
    Chain,
    Result,
    Stats,
    Unit,
    compressing,
    link_module,
)
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.cluster import cluster_address
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.placing import shares
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.room import own_room
from moesaic.orchestrator.statistics import StatisticsObserver, add_gram
from moesaic.orchestrator.store import file_digest, write_atomically

# One matrix product of a measurement takes at most this many operations, on sides of at most
# this width.
_PROBE_OPERATIONS = {"cpu": 2e8, "cuda": 2e12}
_PROBE_WIDTH = {"cpu": 2048, "cuda": 8192}
_PROBE_SECONDS = 0.1
_PROBE_REPEATS = 5
# A layer to compress: inputs (at least) and the two numbers of rows that give the slope.
_LAYER_INPUTS, _LAYER_ROWS = 256, (32, 512)
_READ_BYTES, _ADD_BYTES, _SAVE_BYTES = 64 << 20, 16 << 20, 16 << 20
_HEAD_ROWS = 64


@dataclass(frozen=True)
class Crew:
    """The workers of a run.

    Attributes:
        workers: how many; what the recipe says, or as many as fit this machine.
        fitting: how many fit this machine.
        cpus: cores of each.
        device: ``cpu`` or ``cuda``.
        cluster: address of a cluster that was not asked, or empty.
        room: bytes of a worker's device that a block may take; None where that is not known.
    """

    workers: int
    fitting: int
    cpus: int
    device: str
    cluster: str
    room: int | None = None


def crew(compute: Compute) -> Crew:
    """The workers that the recipe gives on this machine.

    Raises:
        RecipeError: they do not fit, and no cluster is named where they might.
    """
    gpus = torch.cuda.device_count()
    per_worker = compute.gpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if gpus else 0.0
    cpus = len(os.sched_getaffinity(0))
    fitting = cpus // compute.cpus_per_worker
    if per_worker:
        fitting = min(fitting, shares(gpus, per_worker))
    count = compute.workers or max(fitting, 1)
    device = "cuda" if gpus and per_worker else "cpu"
    team = Crew(
        workers=count,
        fitting=fitting,
        cpus=compute.cpus_per_worker,
        device=device,
        cluster=cluster_address(compute)[1] or "",
        room=own_room(device, per_worker, min(count, max(fitting, 1)), compute.memory_per_worker),
    )
    if not team.cluster and team.workers > fitting:
        raise RecipeError(
            f"compute: {team.workers} worker(s) of {team.cpus} CPU and {per_worker:g} GPU do not"
            f" fit this machine, which has {cpus} CPU and {gpus} GPU (at most {fitting}): lower"
            " compute.workers, compute.cpus_per_worker or compute.gpus_per_worker"
        )
    return team


@dataclass(frozen=True)
class Compressing:
    """Seconds of a chain: per column of a site, per weight, and per weight to make dense again.

    Where it factorises weights, ``cube`` is the time per weight and singular value instead.
    """

    column: float
    weight: float
    dense: float
    cube: float = 0.0


@dataclass(frozen=True)
class Speeds:
    """How fast one worker is.

    Attributes:
        matmul: operations per second of a linear, in the model's dtype.
        hessian: operations per second of x xᵀ, in float32.
        expert_matmul, expert_hessian: the same with the few tokens that one expert sees of a batch.
        head: seconds per token for logits and their log-softmax.
        read: bytes per second of a tensor read from the checkpoint and checked.
        add: bytes per second of an array that is set to zero and added to.
        write: seconds to write a small file so that it survives a crash.
        compress: chain → seconds; chains of methods that take no linears are not in it.
        save: bytes per second of a large file that is written and flushed.
        digest: bytes per second of a file whose digest is taken.
        host_add: as ``add``, on the processor.
        copy: bytes per second between the processor's memory and the device's; without one,
            infinite.
    """

    matmul: float
    hessian: float
    expert_matmul: float
    expert_hessian: float
    head: float
    read: float
    add: float
    write: float
    compress: Mapping[Chain, Compressing]
    save: float
    digest: float
    host_add: float
    copy: float


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], object], device: str) -> float:
    """Shortest time of a few calls: the first sets things up.

    On a processor it is the time of its cores, so that other processes do not count.
    """
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _PROBE_SECONDS and len(times) < _PROBE_REPEATS):
        started = _now(device)
        call()
        times.append(_now(device) - started)
    return max(min(times), 1e-9)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time() / torch.get_num_threads()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure_speeds(experiment: Experiment, crew: Crew, tokens: int, expert_tokens: int) -> Speeds:
    """Measures this machine with the threads of one worker.

    Args:
        tokens: of one batch.
        expert_tokens: of one batch that one expert sees; 0 in a dense model.
    """
    model = experiment.model
    hidden = model.hidden_size
    with using_threads(crew.cpus), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linears = [unit.shapes["weight"][0] for unit in model.units() if unit.kind == "linear"]
        banks = [unit.shapes["gate"][1] for unit in model.units() if unit.kind == "bank"]
        out, few = max(linears, default=hidden), expert_tokens or tokens
        narrow = max(banks, default=out)
        return Speeds(
            matmul=probe_matmul(tokens, hidden, out, model.dtype, crew.device),
            hessian=probe_hessian(tokens, hidden, model.dtype, crew.device),
            expert_matmul=probe_matmul(few, hidden, 2 * narrow, model.dtype, crew.device),
            expert_hessian=probe_hessian(few, hidden, model.dtype, crew.device),
            head=probe_head(hidden, model.vocab_size, model.dtype, crew.device),
            read=probe_read(experiment.original.checkpoint),
            add=probe_add(crew.device),
            write=probe_write(experiment.store.root),
            compress=_compressing(experiment, crew.device),
            save=probe_save(experiment.store.root),
            digest=probe_digest(experiment.store.root),
            host_add=probe_add("cpu"),
            copy=probe_copy(crew.device),
        )


def _cut(rows: int, inputs: int, out: int, device: str) -> tuple[int, int, int]:
    inputs, out = min(inputs, _PROBE_WIDTH[device]), min(out, _PROBE_WIDTH[device])
    return max(1, min(rows, int(_PROBE_OPERATIONS[device] / (2 * inputs * out)))), inputs, out


def probe_matmul(rows: int, inputs: int, out: int, dtype: torch.dtype, device: str) -> float:
    rows, inputs, out = _cut(rows, inputs, out, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(out, inputs, device=device).to(dtype)
    seconds = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * rows * inputs * out / seconds


def probe_hessian(rows: int, inputs: int, dtype: torch.dtype, device: str) -> float:
    rows, inputs, _ = _cut(rows, inputs, inputs, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    total = torch.zeros(inputs, inputs, device=device)

    def add() -> None:
        add_gram(total, x.float())

    return 2 * rows * inputs * inputs / _seconds(add, device)


def probe_head(hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> float:
    width = _PROBE_WIDTH[device]
    rows, inputs, out = _HEAD_ROWS, min(hidden, width), min(vocabulary, 2 * width)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(out, inputs, device=device).to(dtype)
    logits = torch.nn.functional.linear(x, weight)
    product = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    softmax = _seconds(lambda: logits.float().log_softmax(-1).exp().sum(-1), device)
    return (product * hidden / inputs + softmax) * vocabulary / out / rows


def probe_read(checkpoint: Checkpoint) -> float:
    sizes = sorted((checkpoint.nbytes(name), name) for name in checkpoint.names())
    size, name = next((s for s in reversed(sizes) if s[0] <= _READ_BYTES), sizes[0])
    return size / _seconds(lambda: checkpoint.check_finite(name, checkpoint.read(name)), "disk")


def probe_add(device: str) -> float:
    other = torch.ones(_ADD_BYTES // 4, device=device)
    return _ADD_BYTES / _seconds(lambda: torch.zeros_like(other).add_(other), device)


def probe_write(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"

    def write() -> None:
        write_atomically(path, _fill)
        path.unlink()

    return _seconds(write, "disk")


def probe_save(folder: Path) -> float:
    path, data = folder / f".probe-{uuid.uuid4().hex}", bytes(_SAVE_BYTES)

    def write() -> None:
        write_atomically(path, lambda temporary: _fill(temporary, data))
        path.unlink()

    return _SAVE_BYTES / _seconds(write, "disk")


def probe_load(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"
    _fill(path, bytes(_SAVE_BYTES))
    try:
        return _SAVE_BYTES / _seconds(path.read_bytes, "disk")
    finally:
        path.unlink()


def probe_digest(folder: Path) -> float:
    path = folder / f".probe-{uuid.uuid4().hex}"
    _fill(path, bytes(_SAVE_BYTES))
    try:
        return _SAVE_BYTES / _seconds(lambda: file_digest(path), "disk")
    finally:
        path.unlink()


def probe_copy(device: str) -> float:
    if device == "cpu":
        return math.inf
    there = torch.ones(_ADD_BYTES // 4, device=device)
    return _ADD_BYTES / _seconds(there.cpu, device)


def _fill(path: Path, data: bytes = bytes(4096)) -> None:
    path.write_bytes(data)


def _compressing(experiment: Experiment, device: str) -> dict[Chain, Compressing]:
    """Measures one chain of every method and setting of its switches.

    Numbers among the options (bits, group size) are taken not to change the time much; flags and
    names (act-order, clipping) do.
    """
    known: dict[tuple[tuple[str, object], ...], Compressing] = {}
    found: dict[Chain, Compressing] = {}
    for chain in experiment.recipe.chains():
        rest = compressing(chain)
        if not rest or any("linear" not in link_module(s.method).SCOPE for s in rest):
            continue
        key = tuple(switches(rest))
        if key not in known:
            known[key] = probe_compress(rest, experiment.dtype, device, experiment.units)
        found[chain] = known[key]
    return found


def switches(chain: Chain) -> Iterator[tuple[str, object]]:
    for spec in chain:
        yield spec.method, ""
        for name, value in spec.parsed().model_dump().items():
            if isinstance(value, bool | str):
                yield name, value


def probe_compress(
    chain: Chain, dtype: torch.dtype, device: str, units: Sequence[Unit]
) -> Compressing:
    few, many = _LAYER_ROWS
    widths = [*range(_LAYER_INPUTS, 4 * _LAYER_INPUTS, 8)]
    widths += sorted({shape[-1] for unit in units for shape in unit.shapes.values()})
    factoring = any(chains.can_be_cut(chain[: end + 1]) for end in range(len(chain)))
    if factoring:  # ranks are given for layers as large as the model's
        few = many = max(_LAYER_INPUTS, *(min(s[-2:]) for u in units for s in u.shapes.values()))
    fits = (w for w in widths if not chains.misfit("linear", {"weight": (few, w)}, chain))
    inputs = next(fits)
    made: list[Result] = []

    def layer(rows: int) -> Callable[[], None]:
        unit = Unit("probe", "linear", 0, "mlp", {"weight": (rows, inputs)}, {"weight": "probe"})
        needed = tuple(chains.needs(chain) - OUTPUT_STATISTICS.keys())
        observer = StatisticsObserver([unit], needed, torch.device(device))
        observer.inputs("probe", torch.randn(2 * inputs, inputs, device=device), None)
        sums = observer.finish()["probe"].sums
        if "fisher" in chains.needs(chain):
            sums = {**sums, "fisher": torch.rand(inputs, device=device)}
        weights = {"weight": torch.randn(rows, inputs, device=device).to(dtype)}
        # What a correction that comes first is asked to correct.
        nothing = Result({"weight": dense.pack(torch.zeros_like(weights["weight"]))})

        def run() -> None:
            # New Stats every time: what a method derives from them would be reused.
            stats = {"weight": Stats(sums)}
            result = nothing
            for end in range(len(chain)):
                result = chains.apply_link(chain[: end + 1], weights, result.members, stats)
            made.append(result)

        return run

    short = long = _seconds(layer(few), device)
    if factoring:
        unpack = _seconds(made[-1].members["weight"].dense, device) / (few * inputs)
        return Compressing(0.0, 0.0, unpack, cube=short / (few * inputs * min(few, inputs)))
    long = _seconds(layer(many), device)
    weight = max(0.0, (long - short) / ((many - few) * inputs))
    return Compressing(
        column=max(0.0, short / inputs - weight * few),
        weight=weight,
        dense=_seconds(made[-1].members["weight"].dense, device) / (many * inputs),
    )


def describe_machine() -> str:
    """Cores, memory and accelerators, in words."""
    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {', '.join(gpus) or 'no GPU'}"
