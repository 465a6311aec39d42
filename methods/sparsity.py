"""What methods that drop weights share: how many are kept, and the choice among scores."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from moesaic.kernels import sparse
from moesaic.kernels.tensor import Param
from moesaic.methods.base import MethodOptions, option


class SparseOptions(MethodOptions):
    """What every method that leaves a sparse weight must be told."""

    SHOWN: ClassVar[tuple[str, ...]] = ("density",)

    density: float = option(
        0.5,
        "share of the weights that is kept, rounded down, at least one per block",
        [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        gt=0,
        le=1,
    )
    block: int = option(
        -1,
        "inputs of an output channel among which that share is kept (0.5 and 4: 2:4 sparsity);"
        " -1: all of them",
        [-1, 4],
    )

    @field_validator("block")
    @classmethod
    def _positive_or_whole(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"block is {value}: it must be positive, or -1 for whole rows")
        return value

    def kept(self, inputs: int) -> int:
        """Weights that a block keeps in a layer of ``inputs`` inputs."""
        size = sparse.block_inputs(inputs, self.block)
        # A share like 0.3 lies just under what was meant.
        return max(1, math.floor(self.density * size * (1 + 1e-12)))


def sparse_problem(shapes: Mapping[str, tuple[int, ...]], options: SparseOptions) -> str | None:
    """Why the members cannot be cut into blocks, in one line; None if they can."""
    for name, shape in shapes.items():
        try:
            sparse.block_inputs(shape[-1], options.block)
        except ValueError as error:
            return f"{name}: {error}"
    return None


def sparse_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, options: SparseOptions
) -> int:
    """Bytes of the sparse members, exactly."""
    size = 0
    for shape in shapes.values():
        params: dict[str, Param] = {"kept": options.kept(shape[-1]), "block": options.block}
        parts = sparse.part_shapes(shape, dtype, params).values()
        size += sum(math.prod(part) * kind.itemsize for part, kind in parts)
    return size


def largest(score: Tensor, options: SparseOptions) -> Tensor:
    """The mask of as many weights per block as are kept, those of the largest ``score``.

    Args:
        score: ``[*, out, in]``. Of equal scores, those of the first inputs are taken.
    """
    kept = options.kept(score.shape[-1])
    size = sparse.block_inputs(score.shape[-1], options.block)
    blocks = score.reshape(*score.shape[:-1], -1, size)
    least = blocks.topk(kept, dim=-1).values[..., -1:]
    above, ties = blocks > least, blocks == least
    room = kept - above.sum(-1, keepdim=True)
    return (above | (ties & (ties.cumsum(-1) <= room))).view(score.shape)
