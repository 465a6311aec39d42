"""What a compressed weight is made of, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor

from moesaic.kernels.discovery import plugin, plugins

Param = int | float | bool | str


@dataclass(frozen=True)
class CompressedTensor:
    """A weight ``[*batch, out, in]`` in a named format.

    ``batch`` is empty for a linear layer and ``(experts,)`` for an expert bank; every part then has
    the same leading dimension, so that slicing a bank is slicing its parts. A format whose parts
    lie otherwise defines ``select(tensor, index)``.

    Attributes:
        format: file name of a module in ``kernels/``.
        parts: named tensors exactly as the file holds them.
        shape: shape of the dense weight.
        dtype: dtype of the dense weight.
        params: what the format must know besides the parts (bits, group size …).
    """

    format: str
    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    params: Mapping[str, Param] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def nbytes(self) -> int:
        """Bytes that the file holds: scales, zero points, shapes, everything."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def dense(self) -> Tensor:
        """The weight that the parts stand for, ``shape`` and ``dtype``."""
        return format_module(self.format).unpack(self)

    def effective(self) -> Tensor:
        """The weight that products with the tensor amount to.

        Formats that multiply by factors never round their product: ``effective(tensor)`` of such a
        module gives it in float32 at least. For all others it is :meth:`dense`.
        """
        module = format_module(self.format)
        function = getattr(module, "effective", module.unpack)
        weight: Tensor = function(self)
        return weight

    def to(self, device: torch.device | str) -> "CompressedTensor":
        """The same with its parts on ``device``."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return CompressedTensor(self.format, parts, self.shape, self.dtype, self.params)

    def cut(self, rank: int) -> "CompressedTensor":
        """The same at a smaller rank, where the format defines ``cut(tensor, rank)``."""
        cut = getattr(format_module(self.format), "cut", None)
        if cut is None:
            raise ValueError(f"a tensor in the format {self.format} has no rank to cut")
        smaller: CompressedTensor = cut(self, rank)
        return smaller

    def __getitem__(self, index: int) -> "CompressedTensor":
        """Member ``index`` of a bank."""
        if len(self.shape) < 3:
            raise IndexError(f"a weight of shape {self.shape} is not a bank")
        select = getattr(format_module(self.format), "select", None)
        if select is not None:
            chosen: CompressedTensor = select(self, index)
            return chosen
        parts = {name: part[index] for name, part in self.parts.items()}
        return CompressedTensor(self.format, parts, self.shape[1:], self.dtype, self.params)


class Format(Protocol):
    """What a format module defines (besides its own ``pack``, whose arguments differ)."""

    def unpack(self, tensor: CompressedTensor) -> Tensor:
        """Dense weight, ``tensor.shape`` and ``tensor.dtype``."""

    def part_shapes(
        self, shape: tuple[int, ...], dtype: torch.dtype, params: Mapping[str, Param]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part, from the dense shape alone: bytes before any work."""

    def matmul_reference(self, x: Tensor, tensor: CompressedTensor) -> Tensor:
        """``x [*, in] @ weightᵀ -> [*, out]`` in plain PyTorch."""

    def matmul(self, x: Tensor, tensor: CompressedTensor) -> Tensor:
        """The same by the Triton kernel; ``x`` on a GPU (or under Triton's interpreter)."""


def format_module(name: str) -> Format:
    """The format called ``name``; raises ``UnknownName`` with the list of known formats."""
    return cast(Format, plugin("moesaic.kernels", ("pack",), name))


def formats() -> list[str]:
    """Names of all formats."""
    return list(plugins("moesaic.kernels", ("pack",)))
