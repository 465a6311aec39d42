"""Round to nearest: every weight goes to the closest point of its group's integer grid.

The baseline of every other quantizer: no data, no order, no feedback. ``clip: mse`` shrinks each
group's range to where the sum of |w - ŵ|^2.4 is least (see :mod:`moesaic.methods.grid`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Result, Stats, option
from moesaic.methods.grid import (
    GridOptions,
    check_finite,
    choose_grid,
    group_problem,
    pack_codes,
    predicted_bytes,
)

SCOPE = frozenset({"linear", "bank"})
ROWWISE = True
NEEDS: frozenset[str] = frozenset()

# Weights that are worked on at a time: bounds the float32 temporaries to a few times 16 MiB.
_ELEMENTS = 1 << 22


class Options(GridOptions):
    """Options of round to nearest."""

    clip: Literal["none", "mse"] = option(
        "none",
        "how a group's range is chosen: all of it, or where |w - ŵ|^2.4 is least",
        ["none", "mse"],
    )


def compress(weights: Mapping[str, Tensor], stats: Mapping[str, Stats], options: Options) -> Result:
    """Rounds each member ``[*batch, out, in]``; ``stats`` is not used.

    Raises:
        ValueError: a weight is NaN or infinite, or the group size does not divide the inputs.
    """
    reason = problem({name: tuple(weight.shape) for name, weight in weights.items()}, options)
    if reason:
        raise ValueError(reason)
    return Result({name: _round(name, weight, options) for name, weight in weights.items()})


def _round(name: str, weight: Tensor, options: Options) -> CompressedTensor:
    check_finite(name, weight)
    size = options.group_inputs(weight.shape[-1])
    groups = weight.reshape(-1, size)  # [n, g]
    codes = torch.empty_like(groups, dtype=torch.int8)
    scale = torch.empty(groups.shape[0], device=weight.device)
    zero = None if options.symmetric else torch.empty_like(scale)
    count = max(1, _ELEMENTS // size)
    for start in range(0, groups.shape[0], count):
        part = slice(start, start + count)
        columns = groups[part].float().t().contiguous()  # [g, n]
        grid = choose_grid(columns, weight.dtype, options, clip=options.clip == "mse")
        steps = grid.steps(columns)
        scale[part] = grid.scale
        if zero is not None and grid.zero is not None:
            zero[part] = grid.zero
            steps += grid.zero
        codes[part] = steps.to(torch.int8).t()
    shape = (*weight.shape[:-1], -1)
    return pack_codes(
        codes.view(weight.shape),
        scale.view(shape),
        None if zero is None else zero.view(shape),
        weight.dtype,
        options,
    )


def predict_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: Options
) -> int:
    """Bytes of codes, scales, zero points and shapes."""
    return predicted_bytes(shapes, dtype, options)


def problem(shapes: Mapping[str, tuple[int, ...]], options: Options) -> str | None:
    """The group size must divide the inputs."""
    return group_problem(shapes, options)
