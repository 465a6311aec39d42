"""SliceGPT: the residual stream of a whole model, rotated to its principal axes and cut.

Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2401.15024,
section 3. A norm without a weight commutes with rotations, so the weight of every RMSNorm goes into
the layers that read behind it; then the stream x in R^D may be replaced by Qᵀx before and by Q
inside of every layer. With the eigenvectors of Σ n nᵀ as Q, n = x / rms(x), the axes that the
stream hardly uses are the last ones, and only the first d columns of Q are kept:

    embedding, outputs        E Q, Qᵀ W, and biases of outputs likewise
    what reads behind a norm  W diag(norm) Q

Each place between two layers has axes of its own. Then the stream has to be turned from one set to
the next where it passes a layer by: x + f(x) becomes x Q_iᵀQ_{i+1} + f(x), a matrix ``[d, d]`` per
layer that is stored (*shortcut*). One set of axes for all places needs none of them, and leaves a
narrower model of the same kind.

Two things are ours. The kept columns may be turned among themselves, so each basis is turned as
close to the one before as it goes (orthogonal Procrustes), and what is stored is Q_{i+1}ᵀQ_i - 1:
small numbers, whose rounding matters less. And the stream is held √(d/D) times as large: the norm
of a d-wide model divides by √d where the norm of the D-wide one divided by √D, so that this makes
both equal, epsilon and all, with no norm weight but 1 and the same epsilon. The layers that read
behind a norm are multiplied by √(D/d) for it.

All of it is computed in float64.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor

from moesaic.methods.base import Event, MethodOptions, option

# What it applies to: no unit, but the width of all of them.
SCOPE = frozenset({"model"})
# A width that comes from a share is a multiple of this.
WIDTH_MULTIPLE = 8
# Rows that are turned at a time.
_ROWS = 8192


def _width_or_share(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.80} is neither a width (512) nor a share of the width (0.8)")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{value} is no share: above 0 and at most 1.0")
    if isinstance(value, int) and (value < WIDTH_MULTIPLE or value % WIDTH_MULTIPLE):
        raise ValueError(
            f"{value} is no multiple of {WIDTH_MULTIPLE}: give one, or a share such as 0.8"
        )
    return value


class Options(MethodOptions):
    """Options of slicing; the key ``slice`` of a recipe."""

    SHOWN = ("hidden",)

    method: Literal["slicegpt"] = option("slicegpt", "the only one there is")
    hidden: Annotated[int | float, BeforeValidator(_width_or_share)] = option(
        0.8,
        "hidden size that is left (a whole number), or the share of it (0.8), rounded down to a"
        " multiple of 8",
        [0.7, 0.8, 0.9],
    )
    shortcuts: bool = option(
        False,
        "axes of its own for every place, at the price of a matrix per attention and MLP",
        [False, True],
    )


def wanted_width(hidden_size: int, hidden: int | float) -> int:
    """The width that is asked for, at most; a share is rounded down.

    Raises:
        ValueError: it is above the model's, or nothing is left.
    """
    if isinstance(hidden, int) or hidden == 1:
        width = hidden_size if isinstance(hidden, float) else hidden
    else:
        # A share like 0.7 lies just under what was meant.
        width = math.floor(hidden * hidden_size * (1 + 1e-12))
        width -= width % WIDTH_MULTIPLE
    if width > hidden_size:
        raise ValueError(f"{width} is above {hidden_size}, the model's hidden size")
    if width < 1:
        raise ValueError(f"{hidden} of {hidden_size} leaves no multiple of {WIDTH_MULTIPLE}: more")
    return width


def principal_axes(gram: Tensor, width: int, tokens: int) -> tuple[Tensor, float, list[Event]]:
    """The axes to keep.

    Args:
        gram: Σ n nᵀ ``[D, D]`` over tokens, n of length √D, float64.
        width: how many.

    Returns:
        the basis ``[D, width]``, float64, with orthonormal columns; the share of Σ‖n‖² that lies
        outside of it; and an event where fewer axes are used than kept, so that the last of them
        are arbitrary.

    Raises:
        ValueError: the sum is not finite.
    """
    if not gram.isfinite().all():
        raise ValueError("the sum over the residual stream has NaN or infinite entries")
    values, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    total = float(values.sum())
    dropped = float(values[width:].sum()) / total if total else 0.0
    # What rounding of the stream to float32 leaves on an axis that nothing uses.
    rank = int((values > total * torch.finfo(torch.float32).eps ** 2).sum())
    events = []
    if rank < width:
        kind = "few_tokens" if tokens < width else "rank_deficient"
        text = (
            f"{tokens:,} tokens span {rank} axes of the residual stream, {width} are kept: the"
            " others are arbitrary"
        )
        events.append(Event(kind, text, value=float(rank)))
    return vectors[:, :width].contiguous(), dropped, events


def aligned(basis: Tensor, before: Tensor) -> Tensor:
    """``basis`` ``[D, d]`` turned within what it spans, as close to ``before`` as it goes."""
    left, _, right = torch.linalg.svd(basis.mT @ before)
    turned: Tensor = basis @ (left @ right)
    return turned


def projected(x: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """What a layer must add to ``x`` so that the sum is the projection of ``x + output``.

    Args:
        x, output: ``[*, D]``.
        basis: ``[D, d]``.
    """
    wide = x.float() + output.float()
    axes = basis.float()
    return ((wide @ axes) @ axes.mT - x.float()).to(output.dtype)


def read(weight: Tensor, norm: Tensor, basis: Tensor) -> Tensor:
    """A weight ``[*, D]`` that multiplies what a norm gives, ``[*, d]``."""
    full, width = basis.shape
    matrix = norm.double()[:, None] * basis * math.sqrt(full / width)
    return _turned(weight, matrix)


def added(rows: Tensor, basis: Tensor) -> Tensor:
    """What is added to the stream ``[*, D]`` (an embedding, a bias), ``[*, d]``."""
    full, width = basis.shape
    return _turned(rows, basis * math.sqrt(width / full))


def written(weight: Tensor, basis: Tensor) -> Tensor:
    """A weight ``[*, D, in]`` whose product is added to the stream, ``[*, d, in]``."""
    return added(weight.mT, basis).mT.contiguous()


def shortcut(before: Tensor, after: Tensor) -> Tensor:
    """``[d, d]``: what the stream has to be multiplied with, and the product added to it, to come
    from the axes ``before`` to the axes ``after``, both ``[D, d]``."""
    matrix = after.mT @ before
    matrix.diagonal().sub_(1)
    return matrix


def _turned(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows [*, D] @ matrix [D, d]``, rounded once to the dtype of ``rows``."""
    flat = rows.reshape(-1, rows.shape[-1])
    parts = [(part.double() @ matrix).to(rows.dtype) for part in flat.split(_ROWS)]
    return torch.cat(parts).reshape(*rows.shape[:-1], matrix.shape[-1])
