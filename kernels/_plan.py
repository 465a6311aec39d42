"""Which of several ways to compute the same thing is fastest: measured once per key, remembered.

A fused kernel saves memory traffic, and now and then loses to two well-tuned library calls; which
it is depends on shape, dtype and card. So nothing is believed: the first call with a new key times
every way on the card, later ones look the answer up.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext

import torch

Ways = Mapping[str, Callable[[], object]]
LARGEST_BUCKET = 8192  # rows; more of them change nothing but the time that measuring takes
_WARMUP_MILLISECONDS, _MEASURED_MILLISECONDS = 5, 20
_table: dict[Hashable, dict[str, float]] = {}


def row_bucket(rows: int) -> int:
    """Rows to measure in place of ``rows``: the next power of two, up to ``LARGEST_BUCKET``."""
    return min(1 << max(0, rows - 1).bit_length(), LARGEST_BUCKET)


def milliseconds(way: Callable[[], object]) -> float:
    """Median time of a way on the GPU with a cold L2 cache; infinite where it does not fit."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(
            do_bench(
                way,
                warmup=_WARMUP_MILLISECONDS,
                rep=_MEASURED_MILLISECONDS,
                return_mode="median",
            )
        )
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf


def fastest(
    key: Hashable,
    ways: Callable[[], Ways],
    default: str,
    device: torch.device,
) -> str:
    """Name of the fastest way for ``key``.

    Args:
        key: what decides the time: operation, shape, dtype, device.
        ways: makes the ways, with operands of their own; called only if ``key`` is new.
        default: the way to go where nothing can be measured: while a CUDA graph is captured, and
            without memory for the operands.
        device: where the ways run, which need not be the current device.
    """
    if key not in _table:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return default
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                _table[key] = {name: milliseconds(way) for name, way in ways().items()}
        except torch.OutOfMemoryError:  # no room for operands: another time
            return default
    times = _table[key]
    return min(times, key=lambda name: times[name])


def measurements() -> dict[Hashable, dict[str, float]]:
    """What was measured so far: milliseconds of every way by key."""
    return {key: dict(times) for key, times in _table.items()}


def forget() -> None:
    """Empties the table."""
    _table.clear()
