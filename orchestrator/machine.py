"""What this machine can do: how many workers fit, and how fast the operations of a run are here.

The speeds are measured in some seconds on matrices of the model's widths, cut where they are large,
as an undisturbed process has them (see :mod:`moesaic.orchestrator.probes`). One size stands for all
of a kind.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from moesaic.methods.base import Chain
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.cluster import cluster_address
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.file_probes import file_speeds
from moesaic.orchestrator.gpu_shares import gpu_share, shares
from moesaic.orchestrator.probes import (
    WIDTH,
    probe_attention,
    probe_experts,
    probe_factor,
    probe_gram,
    probe_matmul,
    probe_product,
    probe_reverse,
    probe_sums,
    probe_wide,
    shortest,
)
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.room import own_room
from moesaic.orchestrator.solving import Compressing, solving_times

_READ_BYTES, _ADD_BYTES = 64 << 20, 16 << 20
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


def crew(compute: Compute, per_gpu: int) -> Crew:
    """The workers that the recipe gives on this machine.

    Args:
        per_gpu: that a GPU has work for.

    Raises:
        RecipeError: they do not fit, and no cluster is named where they might.
    """
    gpus = torch.cuda.device_count()
    cpus = len(os.sched_getaffinity(0))
    per_worker = gpu_share(compute, [(cpus, gpus)], per_gpu)
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
class Speeds:
    """How fast one worker is.

    Attributes:
        matmul: operations per second of a linear, in the model's dtype.
        hessian: operations per second of adding x xᵀ to a Hessian, in float32.
        expert_matmul: operations per second of experts with the few tokens that each sees of a
            batch, which are gathered for it and given back.
        expert_hessian: as ``hessian``, with these tokens.
        expert_reverse: as ``expert_matmul``, forward and back, with the tokens of one sequence.
        attention: seconds per token, token that it looks at, and channel.
        wide: seconds per value of an operation on single values.
        head: seconds per token for logits and their log-softmax.
        read: bytes per second of a tensor read from the checkpoint and checked.
        sums: bytes per second of a shard's Hessians that are made, filled, made symmetric and added
            to others.
        product: operations per second of weights times Hessians, in float32.
        factor: cubes of its inputs per second of a Hessian that is factorised.
        write: seconds to write a small file so that it survives a crash.
        entry: seconds for a small entry of the store.
        compress: chain → what it takes; chains that only reduce are not in it.
        save: bytes per second of a large file that is written and flushed.
        digest: bytes per second of a file whose digest is taken.
        host_add: bytes per second of an array that is set to zero and added to, on the processor.
        copy: bytes per second between the processor's memory and the device's; without one,
            infinite.
    """

    matmul: float
    hessian: float
    expert_matmul: float
    expert_hessian: float
    expert_reverse: float
    attention: float
    wide: float
    head: float
    read: float
    sums: float
    product: float
    factor: float
    write: float
    entry: float
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


@dataclass(frozen=True)
class Load:
    """What a worker computes at a time.

    Attributes:
        tokens: of a batch.
        few: of them that one expert sees; 0 in a dense model.
        fewer: the same of one sequence.
        length: of a sequence.
        heads, channels: of its attention, and of each head.
    """

    tokens: int
    few: int
    fewer: int
    length: int
    heads: int
    channels: int


@torch.no_grad()
def measure_speeds(experiment: Experiment, crew: Crew, load: Load) -> Speeds:
    """Measures this machine with the threads of one worker."""
    model, device = experiment.model, crew.device
    hidden, dtype = model.hidden_size, model.dtype
    files = file_speeds(experiment.store)
    with using_threads(crew.cpus), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        units = model.units()
        linears = [unit.shapes["weight"][0] for unit in units if unit.kind == "linear"]
        banks = [unit.shapes["gate"][1] for unit in units if unit.kind == "bank"]
        matmul = probe_matmul(load.tokens, hidden, max(linears, default=hidden), dtype, device)
        # A dense model has no experts.
        bank = (hidden, max(banks, default=hidden), dtype, device)
        visited = probe_experts(load.few, *bank) if banks else matmul
        return Speeds(
            matmul=matmul,
            hessian=probe_gram(load.tokens, hidden, dtype, device),
            expert_matmul=visited,
            expert_hessian=probe_gram(load.few or load.tokens, hidden, dtype, device),
            expert_reverse=probe_reverse(load.fewer, *bank) if banks else matmul,
            attention=probe_attention(load.length, load.heads, load.channels, dtype, device),
            wide=probe_wide(device),
            head=probe_head(hidden, model.vocab_size, dtype, device),
            # The model is read, and the store.
            read=min(probe_read(experiment.original.checkpoint), files.read),
            sums=probe_sums(hidden, device),
            product=probe_product(hidden, device),
            factor=probe_factor(hidden, device),
            write=files.write,
            entry=files.entry,
            compress=solving_times(
                experiment.recipe.chains(), experiment.dtype, device, experiment.units
            ),
            save=files.save,
            digest=files.digest,
            host_add=probe_add("cpu"),
            copy=probe_copy(device),
        )


def probe_head(hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> float:
    width = WIDTH[device]
    rows, inputs, out = _HEAD_ROWS, min(hidden, width), min(vocabulary, 2 * width)
    # Logits as small as a model's: exp takes ten times as long where its results are denormal.
    x = (torch.randn(rows, inputs, device=device) / inputs**0.5).to(dtype)
    weight = torch.randn(out, inputs, device=device).to(dtype)
    logits = torch.nn.functional.linear(x, weight)
    product = shortest(lambda: torch.nn.functional.linear(x, weight), device)
    softmax = shortest(lambda: logits.float().log_softmax(-1).exp().sum(-1), device)
    return (product * hidden / inputs + softmax) * vocabulary / out / rows


def probe_read(checkpoint: Checkpoint) -> float:
    sizes = sorted((checkpoint.nbytes(name), name) for name in checkpoint.names())
    size, name = next((s for s in reversed(sizes) if s[0] <= _READ_BYTES), sizes[0])
    return size / shortest(lambda: checkpoint.check_finite(name, checkpoint.read(name)), "disk")


def probe_add(device: str) -> float:
    other = torch.ones(_ADD_BYTES // 4, device=device)
    return _ADD_BYTES / shortest(lambda: torch.zeros_like(other).add_(other), device)


def probe_copy(device: str) -> float:
    if device == "cpu":
        return math.inf
    there = torch.ones(_ADD_BYTES // 4, device=device)
    return _ADD_BYTES / shortest(there.cpu, device)


def describe_machine() -> str:
    """Cores, memory and accelerators, in words."""
    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {', '.join(gpus) or 'no GPU'}"
