"""How many bytes a worker has for its work: of its GPU, or of its node's memory."""

from pathlib import Path

import psutil
import torch

# Resident size of a worker that has Ray, torch and transformers loaded and has run a block
# (measured on Linux, CPU builds).
PROCESS_BYTES = 750_000_000
# Share that glibc keeps beyond what is in use, measured with blocks of 60 MB and sums of 90 MB.
KEPT_BY_ALLOCATOR = 0.2
# What oneDNN keeps of every shape of a product in 16 bits that it has compiled (measured with
# bfloat16; float32 takes none).
COMPILED_BYTES = 700_000
# Shapes that it remembers in a worker.
COMPILED_SHAPES = 512
# What of a GPU, and of a node's memory, is planned with: the rest is for fragments of freed
# memory, and for Ray, the driver and the system.
_OF_GPU, _OF_NODE = 0.92, 0.9
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def node_bytes() -> int:
    """Memory of this node, or of the container that this process is in."""
    limits = [psutil.virtual_memory().total]
    for name in _CGROUP:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)


def gpu_bytes(share: float) -> int:
    """Memory that this process can have of its GPU.

    Args:
        share: of one GPU that the worker was given; more than one counts as one.
    """
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    return int(min(free + own, total * min(1.0, share)))


def block_room(device: str, there: int, limit: int | None = None) -> int:
    """What blocks may take of a device's memory.

    Args:
        there: bytes of the device that are this worker's.
        limit: what the recipe allows instead.
    """
    if device == "cuda":
        return int(_OF_GPU * there) if limit is None else min(limit, int(_OF_GPU * there))
    whole = int(_OF_NODE * there) if limit is None else limit
    return max(0, int((whole - PROCESS_BYTES) / (1 + KEPT_BY_ALLOCATOR)))


def own_room(device: str, gpus: float, beside: int, limit: int | None) -> int:
    """:func:`block_room` of this process.

    Args:
        gpus: that the worker was given.
        beside: workers of its node, itself included.
    """
    there = gpu_bytes(gpus) if device == "cuda" else node_bytes() // max(1, beside)
    return block_room(device, there, limit)
