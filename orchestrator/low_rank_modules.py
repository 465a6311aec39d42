"""Modules whose linears are of low rank, and which one kernel computes, in models that are loaded.

Which linears belong together is told by the family; what a module makes of them is found out by
trying (see :mod:`moesaic.orchestrator.probing`). A module that is understood gets a class before
its own, which decides on every call between the kernel and the forward behind it. The kernel is for
a GPU, for the 16-bit dtype that the weights were compressed in, for shapes where it was the fastest
way when it was measured (see ``kernels/_plan.py``), and for as long as nobody has hooked the
linears or put something else in their places.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.orchestrator import low_rank_attention, low_rank_mlp
from moesaic.orchestrator.family import Family
from moesaic.orchestrator.low_rank_linears import factors
from moesaic.orchestrator.probing import NotUnderstood, Place

_log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Modules that one kernel computes.

    Attributes:
        name: of several of them.
        places: where a block has them.
        recognise: what the module at a place computes; raises :class:`NotUnderstood`.
        front: the class that comes before the module's own.
        last_too: whether the last linear must be of low rank, and not only the first ones.
    """

    name: str
    places: Callable[[Family], Iterator[Place]]
    recognise: Callable[[Any, Place], Any]
    front: type
    last_too: bool


KINDS = (
    Kind(
        "feed-forward layers",
        low_rank_mlp.feed_forwards,
        low_rank_mlp.recognise,
        low_rank_mlp.LowRankFeedForward,
        last_too=True,
    ),
    Kind(
        "attentions",
        low_rank_attention.attentions,
        low_rank_attention.recognise,
        low_rank_attention.LowRankAttention,
        last_too=False,
    ),
)


def fuse(blocks: nn.Module, family: Family) -> None:
    """Lets kernels compute those modules of ``blocks`` that they can.

    Modules with linears that are not of low rank are left as they are. So are those that are not
    understood; the log says how many, and why.
    """
    for kind in KINDS:
        refused: dict[str, list[str]] = {}
        for place in kind.places(family):
            for number, block in blocks.named_children():
                first = tuple(map(place.in_block, place.first))
                names = place.all_in_block if kind.last_too else first
                linears = [_submodule(block, name) for name in names]
                if any(factors(linear) is None for linear in linears):
                    continue
                module: Any = block.get_submodule(place.path)
                try:
                    module.low_rank_form = kind.recognise(module, place)
                    module.__class__ = _fronted(kind.front, module.__class__)
                    if place.after is not None:
                        after: Any = block.get_submodule(place.after)
                        after.__class__ = _fronted(low_rank_mlp.LowRankAfter, after.__class__)
                        module.low_rank_after = (after,)
                except NotUnderstood as error:
                    refused.setdefault(str(error), []).append(number)
        for reason, numbers in refused.items():
            _log.log(
                logging.WARNING if torch.cuda.is_available() else logging.INFO,
                "%d %s of low rank (from block %s on) go without the fused kernel: %s",
                len(numbers),
                kind.name,
                numbers[0],
                reason,
            )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule; None if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


@cache
def _fronted(front: type, kind: type) -> type:
    """A class that is ``front`` before it is ``kind``."""
    return type(f"LowRank{kind.__name__}", (front, kind), {})
