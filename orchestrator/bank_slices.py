"""Experts of which some are on the device at a time; the rest stays in the model's files.

In a block that is walked in parts, ``module.gate_up_proj[expert]`` is not a row of a parameter but
of a slice of the bank, which is read when one of its experts is asked for and dropped when one of
another slice is. Whoever goes through the experts in order reads each of them once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("gate_up_proj", "down_proj")


class BankSlices:
    """The weights of a bank, ``step`` experts at a time.

    Args:
        experts: number of experts.
        step: how many are on the device at a time.
        read: gives ``gate_up`` and ``down`` of the experts ``low … high - 1`` on the device.
    """

    def __init__(
        self, experts: int, step: int, read: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> None:
        self.experts, self.step = experts, step
        self._read = read
        self._number = -1
        self._held: tuple[Tensor, ...] = ()

    def spans(self) -> Iterator[range]:
        """Experts of every slice."""
        for low in range(0, self.experts, self.step):
            yield range(low, min(low + self.step, self.experts))

    def slice_of(self, number: int) -> tuple[Tensor, ...]:
        """``gate_up`` and ``down`` of a slice."""
        if number != self._number:
            self._held = ()  # before the next one is there
            low = number * self.step
            self._held = self._read(low, min(low + self.step, self.experts))
            self._number = number
        return self._held

    def put_into(self, module: nn.Module) -> None:
        """Takes the place of the parameters of an experts module."""
        for member, name in enumerate(NAMES):
            del module._parameters[name]
            setattr(module, name, _Rows(self, member))

    @contextmanager
    def kept_out_of_graphs(self) -> Iterator[None]:
        """While this is open, weights that autograd would keep for the way back are read again
        there: a graph holds no slice."""

        def pack(tensor: Tensor) -> Any:
            place = tensor.untyped_storage().data_ptr()
            for member, held in enumerate(self._held):
                if held.untyped_storage().data_ptr() == place:
                    offset = int(tensor.storage_offset())
                    shape = tuple(tensor.shape), tensor.stride()
                    return _Place(self._number, member, *shape, offset)
            return tensor

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _Place):
                kept: Tensor = packed
                return kept
            whole = self.slice_of(packed.number)[packed.member]
            return whole.as_strided(packed.shape, packed.strides, packed.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


@dataclass(frozen=True)
class _Place:
    """Where a view of a slice lies."""

    number: int
    member: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Rows:
    """What stands for a parameter ``[experts, …]``."""

    slices: BankSlices
    member: int

    def __getitem__(self, expert: int) -> Tensor:
        number, row = divmod(expert, self.slices.step)
        return self.slices.slice_of(number)[self.member][row]


def bank_slices(module: nn.Module) -> BankSlices | None:
    """What :meth:`BankSlices.put_into` put into an experts module."""
    rows = module.__dict__.get(NAMES[0])
    return rows.slices if isinstance(rows, _Rows) else None


@contextmanager
def slices_kept_out_of_graphs(block: nn.Module) -> Iterator[None]:
    """:meth:`BankSlices.kept_out_of_graphs` of the bank in a block, if it has one in slices."""
    found = next(filter(None, map(bank_slices, block.modules())), None)
    if found is None:
        yield
    else:
        with found.kept_out_of_graphs():
            yield
