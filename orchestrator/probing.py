"""What a module computes around its linears, found out by trying: no class or name is trusted.

The module runs once, in float64 on the CPU, with stand-ins in the places of its linears. They
answer with known numbers and remember what they are asked. So what lies between the linears is
seen on its own, whatever the weights are, and can be compared with a formula.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NotUnderstood(Exception):
    """A module that no kernel can stand in for; the message says why, of several of its kind."""


@dataclass(frozen=True)
class Place:
    """Where a module is, and which of its linears stand where.

    Attributes:
        path: of the module, within a block; empty: the block itself.
        first: paths, within the module, of the linears that read what it is given.
        last: path of the one whose outputs it returns; None: there is none.
        after: path, within the block, of the linear that reads what the module returns, where the
            two are one thing; None: there is none.
    """

    path: str
    first: tuple[str, ...]
    last: str | None
    after: str | None = None

    @classmethod
    def within(cls, path: str, first: Sequence[str], last: str) -> "Place":
        """The place of a module, from the linears' paths within the block; ``last`` may lie
        outside of it."""
        prefix = f"{path}." if path else ""
        names = tuple(name.removeprefix(prefix) for name in first)
        return cls(path, names, last.removeprefix(prefix) if last.startswith(prefix) else None)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of all linears."""
        return self.first if self.last is None else (*self.first, self.last)

    def in_block(self, name: str) -> str:
        """The path within the block of a linear of the module."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def all_in_block(self) -> tuple[str, ...]:
        """Paths within the block of all linears, that of ``after`` too."""
        after = () if self.after is None else (self.after,)
        return (*map(self.in_block, self.names), *after)


@dataclass(frozen=True)
class Probe:
    """What came of one call.

    Attributes:
        answers: path of each of the first linears → what it gave.
        result: what the last linear was asked; without one, what the module returned.
    """

    answers: Mapping[str, Tensor]
    result: Tensor


class _StandIn(nn.Module):
    """In the place of a linear: remembers what it is asked, answers what it was told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return self.answer


def probed(
    module: nn.Module, place: Place, known: Callable[[int], Tensor], **arguments: Any
) -> Probe:
    """Calls the module at ``place`` with ``known(inputs)`` and ``arguments``.

    Args:
        known: makes numbers ``[*, size]``.

    Raises:
        NotUnderstood: the module has other tensors than its linears', asks the first ones
            something else than what it is given, or returns something else than the last one's
            answer, alone or as the first of several.
    """
    linears: dict[str, Any] = {name: module.get_submodule(name) for name in place.names}
    inside = {id(tensor) for linear in linears.values() for tensor in _tensors(linear)}
    if any(id(tensor) not in inside for tensor in _tensors(module)):
        raise NotUnderstood("they have tensors besides those of their linears")
    stand_ins = {name: _StandIn(known(linear.out_features)) for name, linear in linears.items()}
    x = known(linears[place.first[0]].in_features)
    numbers = [x, *(stand_in.answer for stand_in in stand_ins.values())]
    before = [number.clone() for number in numbers]
    try:
        for name, stand_in in stand_ins.items():
            module.set_submodule(name, stand_in)
        with torch.no_grad():
            found = module(x, **arguments)
    except Exception as error:  # whatever comes of a module that wants more of its linears
        raise NotUnderstood(f"trying one out ended in {type(error).__name__}") from error
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)
    returned = found[0] if isinstance(found, tuple) else found
    if any(len(stand_in.asked) != 1 for stand_in in stand_ins.values()):
        raise NotUnderstood("they call a linear more than once, or not at all")
    if any(stand_ins[name].asked[0] is not x for name in place.first):
        raise NotUnderstood("they change what goes in")
    if not all(map(torch.equal, numbers, before)):
        raise NotUnderstood("they write into what they are given")
    answers = {name: stand_ins[name].answer for name in place.first}
    if place.last is None:
        return Probe(answers, returned)
    if returned is not stand_ins[place.last].answer:
        raise NotUnderstood("they change what their last linear gives")
    return Probe(answers, stand_ins[place.last].asked[0])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
