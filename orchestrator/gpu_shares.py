"""How much of a GPU a worker gets where the recipe leaves it open.

A GPU waits for Python where layers are small: a block of 32 million weights over a batch of 4,096
tokens is 0.26 Tflop, less than a millisecond for a GPU of today, and its hundred or so kernels take
longer to be launched one by one. Two or four workers on such a GPU launch side by side. With larger
blocks they would only share its memory.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from moesaic.methods.base import Unit
from moesaic.orchestrator.recipe_sections import Compute

# Weights of the largest block, at most → workers of one GPU.
_PER_GPU = {8_000_000: 4, 32_000_000: 2}
# Of all workers of a GPU, which hold the whole model in float32 when they judge plans: what half a
# GPU of 16 GB has.
_MODEL_BYTES = 8e9


def workers_per_gpu(units: Iterable[Unit], weights: int) -> int:
    """Workers that one GPU has work for.

    Args:
        units: of the model.
        weights: of the whole model, embeddings included.
    """
    blocks: dict[int, int] = {}
    for unit in units:
        blocks[unit.block] = blocks.get(unit.block, 0) + unit.parameters
    largest = max(blocks.values(), default=0)
    count = next((count for most, count in _PER_GPU.items() if largest <= most), 1)
    while count > 1 and count * weights * 4 > _MODEL_BYTES:
        count //= 2
    return count


def shares(gpus: float, each: float) -> int:
    """Workers that a node's accelerators carry; Ray does not spread a fraction over two of them."""
    return int(gpus) * int(1 / each) if each < 1 else int(gpus / each)


def gpu_share(compute: Compute, rooms: Iterable[tuple[float, float]], per_gpu: int) -> float:
    """GPUs of one worker: what the recipe says, or what suits nodes and model.

    Ray fills a GPU before it takes the next, so a GPU is shared only where there are workers for
    all of them.

    Args:
        rooms: processor cores and GPUs of every node.
        per_gpu: as :func:`workers_per_gpu` finds.

    Returns:
        0 where there are none.
    """
    if compute.gpus_per_worker is not None:
        return compute.gpus_per_worker
    carrying = [(int(cores), int(gpus)) for cores, gpus in rooms if gpus >= 1]
    if not carrying:
        return 0.0
    most = min(cores // compute.cpus_per_worker // gpus for cores, gpus in carrying)
    if compute.workers is not None:
        most = min(most, compute.workers // sum(gpus for _, gpus in carrying))
    count = per_gpu
    while count > max(1, most):
        count //= 2
    return 1 / count


def may_have_gpus() -> bool:
    """Whether this machine has the devices of a driver for GPUs; torch is not asked, which takes
    seconds to be imported."""
    names = os.listdir("/dev") if Path("/dev").is_dir() else []
    return "kfd" in names or any(name[:6] == "nvidia" and name[6:].isdecimal() for name in names)
