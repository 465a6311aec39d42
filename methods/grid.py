"""Uniform integer grids, shared by every method that rounds: scales, zero points, clipping.

A group of weights is stored as signed codes q in [-2^(b-1), 2^(b-1)-1] and stands for
(q - z) * s, with one scale s, in the dtype of the dense weight, and, where the grid is asymmetric,
one zero point z per group. Scales are rounded to that dtype *before* anything is quantized, so that
a code is chosen with the scale that will multiply it.

Groups are columns here: a tensor ``[g, *rest]`` holds one group of g weights per position of
``rest``. That keeps reductions contiguous and is the layout of GPTQ's column loop.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import field_validator
from torch import Tensor

from moesaic.kernels import int_group
from moesaic.kernels.tensor import CompressedTensor, Param
from moesaic.methods.base import MethodOptions, option

# The clip search: sum |w - ŵ|^2.4 over 100 ranges, from the full one down to a fifth of it.
CLIP_NORM = 2.4
CLIP_STEPS = 100
CLIP_SMALLEST = 0.2
# Elements per slice of the clip search: its temporaries stay in a core's second-level cache.
_CLIP_ELEMENTS = 1 << 16


class GridOptions(MethodOptions):
    """What every method on an integer grid must be told."""

    SHOWN = ("bits", "group_size")

    bits: int = option(4, "bits per code", [2, 3, 4, 5, 6, 8], ge=2, le=8)
    group_size: int = option(
        64, "inputs that share a scale; -1: all inputs of an output channel", [32, 64, 128, -1]
    )
    symmetric: bool = option(True, "no zero point: the grid is centred on zero", [True, False])

    @field_validator("group_size")
    @classmethod
    def _positive_or_whole(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"group_size is {value}: it must be positive, or -1 for whole rows")
        return value

    def group_inputs(self, inputs: int) -> int:
        """Inputs that share a scale in a layer of ``inputs`` inputs."""
        return inputs if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Grid:
    """The grids of some groups, in float32 for computing.

    Attributes:
        scale: ``[*rest]``, finite, positive and exactly representable in the dense dtype.
        zero: ``[*rest]`` whole numbers in the range of the codes; None where symmetric.
        lowest: smallest code minus zero point, a number or ``[*rest]``.
        highest: largest code minus zero point, likewise.
    """

    scale: Tensor
    zero: Tensor | None
    lowest: Tensor
    highest: Tensor

    def steps(self, weight: Tensor) -> Tensor:
        """Code minus zero point for each weight ``[g, *rest]``, as float32."""
        return torch.clamp((weight / self.scale).round_(), self.lowest, self.highest)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def choose_grid(
    weight: Tensor,
    dtype: torch.dtype,
    options: GridOptions,
    clip: bool,
    importance: Tensor | None = None,
) -> Grid:
    """The grid of each group of ``weight`` ``[g, *rest]`` (float32, finite).

    Symmetric: s = max|w| / ((2^b - 1) / 2). Asymmetric: the range from min(w, 0) to max(w, 0), so
    that zero is on the grid. A group of zeros gets the scale 1 and stays exactly zero.

    Args:
        dtype: dtype of the dense weight, to which scales are rounded.
        clip: search the range with the least sum of |w - dequantized|^2.4 instead of the full one;
            the full one is among those tried, so the sum never grows.
        importance: weights of the terms of that sum, ``[g, *rest]`` or broadcastable to it.
    """
    rest = weight.shape[1:]
    flat = weight.reshape(weight.shape[0], -1)  # [g, n]
    low, high = flat.amin(0).clamp_(max=0), flat.amax(0).clamp_(min=0)
    if options.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale, zero = _grid_of_range(low, high, dtype, options)
    if clip:
        if importance is not None:
            importance = importance.expand(weight.shape).reshape(flat.shape)
        width = max(1, _CLIP_ELEMENTS // flat.shape[0])
        for start in range(0, flat.shape[1], width):
            part = slice(start, start + width)
            weights = None if importance is None else importance[:, part]
            scale[part], best = _clip_search(
                flat[:, part], low[part], high[part], dtype, options, weights
            )
            if zero is not None and best is not None:
                zero[part] = best
    return make_grid(scale.view(rest), None if zero is None else zero.view(rest), options.bits)


def make_grid(scale: Tensor, zero: Tensor | None, bits: int) -> Grid:
    """The grid with this scale and zero point ``[*rest]``."""
    smallest, largest = code_range(bits)
    if zero is None:
        return Grid(scale, None, scale.new_tensor(smallest), scale.new_tensor(largest))
    return Grid(scale, zero, smallest - zero, largest - zero)


def _grid_of_range(
    low: Tensor, high: Tensor, dtype: torch.dtype, options: GridOptions
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point ``[n]`` of the grid that spans ``low <= 0`` to ``high >= 0``."""
    intervals = (1 << options.bits) - 1
    # Each end is divided by itself: their difference may overflow float32.
    exact = high / intervals - low / intervals
    info = torch.finfo(dtype)
    floor = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    scale = exact.clamp(min=floor).to(dtype).float()
    scale = torch.where((low == 0) & (high == 0), 1.0, scale)
    if options.symmetric:
        return scale, None
    smallest, largest = code_range(options.bits)
    return scale, (smallest - low / scale).round_().clamp_(smallest, largest)


def _clip_search(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
    options: GridOptions,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point ``[n]`` with the least error for ``weight`` ``[g, n]``.

    The search ends early where no group can gain: one end of the range is cut off by at least half
    of what the grid lacks in width, and that grows as the range shrinks.
    """
    best_scale, best_zero = _grid_of_range(low, high, dtype, options)
    reference = best_scale
    best = torch.full_like(low, math.inf)
    error = torch.empty_like(weight)
    least = 1.0 if importance is None else importance.amin(0)
    for shrink in torch.linspace(1.0, CLIP_SMALLEST, CLIP_STEPS).tolist():
        scale, zero = _grid_of_range(low * shrink, high * shrink, dtype, options)
        lacking = ((high - low) - scale * (1 << options.bits)).clamp_(min=0)
        if ((lacking / (2 * reference)).pow_(CLIP_NORM) * least > best).all():
            break
        grid = make_grid(scale, zero, options.bits)
        torch.div(weight, scale, out=error)
        error -= torch.clamp(error.round(), grid.lowest, grid.highest)  # in steps
        # |e|^2.4 = exp(1.2 log e²): five times as fast as pow, and log 0 = -inf gives 0.
        error.mul_(error).log_().mul_(CLIP_NORM / 2).exp_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(0).mul_((scale / reference).pow_(CLIP_NORM))
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError, naming the member, if ``weight`` holds NaN or infinity."""
    smallest, largest = weight.aminmax()
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        wrong = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{name}: {wrong} of {weight.numel()} weights are NaN or infinite")


def pack_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, options: GridOptions
) -> CompressedTensor:
    """``codes`` int8 ``[*batch, out, in]``, ``scale`` and ``zero`` ``[*batch, out, groups]``."""
    return int_group.pack(
        codes,
        scale.to(dtype),
        None if zero is None else zero.to(torch.int8),
        bits=options.bits,
        group_size=options.group_size,
        dtype=dtype,
    )


def predicted_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: GridOptions
) -> int:
    """Bytes of the members on integer grids, exactly."""
    params: dict[str, Param] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
    }
    return sum(
        math.prod(shape) * part.itemsize
        for member in shapes.values()
        for shape, part in int_group.part_shapes(member, dtype, params).values()
    )


def group_problem(shapes: Mapping[str, tuple[int, ...]], options: GridOptions) -> str | None:
    """Why the members cannot be cut into groups, in one line; None if they can."""
    for name, shape in shapes.items():
        inputs = shape[-1]
        if inputs % options.group_inputs(inputs):
            return f"group_size {options.group_size} does not divide the {inputs} inputs of {name}"
    return None
