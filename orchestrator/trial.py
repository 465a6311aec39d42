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
class Trial:
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


def tried(
    module: nn.Module,
    first: Sequence[str],
    last: str | None,
    known: Callable[[int], Tensor],
    **arguments: Any,
) -> Trial:
    """Calls the module with ``known(inputs)`` and ``arguments``.

    Args:
        first: paths of the linears that read what the module is given.
        last: path of the one whose outputs it returns, alone or first of several; None: there is
            none.
        known: makes numbers ``[*, size]``.

    Raises:
        NotUnderstood: the module has other tensors than its linears', asks the first ones
            something else than what it is given, or returns something else than the last one's
            answer.
    """
    names = [*first, *([] if last is None else [last])]
    linears: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    inside = {id(tensor) for linear in linears.values() for tensor in _tensors(linear)}
    if any(id(tensor) not in inside for tensor in _tensors(module)):
        raise NotUnderstood("they have tensors besides those of their linears")
    stand_ins = {name: _StandIn(known(linear.out_features)) for name, linear in linears.items()}
    x = known(linears[first[0]].in_features)
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
    if any(stand_ins[name].asked[0] is not x for name in first):
        raise NotUnderstood("they change what goes in")
    if last is not None and returned is not stand_ins[last].answer:
        raise NotUnderstood("they change what their last linear gives")
    result = returned if last is None else stand_ins[last].asked[0]
    return Trial({name: stand_ins[name].answer for name in first}, result)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
