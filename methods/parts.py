"""The words of methods that make a dense part of a block narrower: its MLP, or its attention.

A reducer (see :mod:`moesaic.methods.reduction`) that can do this, too, also defines

``PARTS``         kinds of parts that it can cut, a frozenset of ``"mlp"`` and ``"attention"``
``outline_part``  ``(shape, options) -> {role: (out, in)}``: what will be left, from shapes alone
``reduce_part``   ``(part, options) -> PartReduction``

The linears of a part play *roles*: ``gate``, ``up`` and ``down`` in an MLP (``gate`` may lack),
``query``, ``key``, ``value`` and ``output`` in an attention. What is left of each is a linear like
any other, with fewer rows or columns, and goes on to be compressed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from moesaic.kernels.discovery import plugins
from moesaic.methods.base import Chain, Event, Stats
from moesaic.methods.reduction import reducer_module

PartKind = Literal["mlp", "attention"]
RoleShapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class PartShape:
    """Sizes of a part.

    Attributes:
        kind: which part.
        shapes: role → ``(out, in)``.
        heads, kv_heads: of an attention: rows of query, and of key and value, belong to so many
            heads; query head h reads key and value head ``h // (heads // kv_heads)``.
        paired: whether channels i and i + d/2 of a query or key head of d are turned together by
            rotary embeddings and nothing else looks at them, so that pairs of them can go.
    """

    kind: PartKind
    shapes: RoleShapes
    heads: int = 0
    kv_heads: int = 0
    paired: bool = False

    @property
    def head_channels(self) -> int:
        """Channels d of a query or key head."""
        return self.shapes["query"][0] // self.heads

    @property
    def value_channels(self) -> int:
        """Channels of a value head."""
        return self.shapes["value"][0] // self.kv_heads


@dataclass(frozen=True)
class Part:
    """A part as reducers see it.

    Attributes:
        shape: its sizes.
        weights: role → ``[out, in]``, in the file's dtype.
        biases: role → ``[out]``, of those that have one.
        stats: role → statistics of its inputs: ``tokens`` and ``hessian``.
    """

    shape: PartShape
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    stats: Mapping[str, Stats]


@dataclass(frozen=True)
class Narrowed:
    """What is left of a linear ``[out, in]``.

    Attributes:
        weight: ``[rows, columns]``, dtype of the original.
        rows, columns: where these stand in the original's outputs and inputs, int64, rising; None:
            all are there.
        error: Σ over the tokens of the square by which each output changes, float64 ``[out]``.
        bias: ``[out]``, in the place of the original's; None: it stays.
        inputs: new inputs as combinations of the old ones, float64 ``[columns, in]``; None: they
            are the old ones at ``columns``.
        slopes: gradients at the new outputs as combinations of the old ones, float64
            ``[rows, out]``; None: they are the old ones at ``rows``.
    """

    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    error: Tensor
    bias: Tensor | None = None
    inputs: Tensor | None = None
    slopes: Tensor | None = None

    def narrow_inputs(self, stats: Stats) -> Stats:
        """Statistics of the inputs that are left.

        Where they are new combinations, Σ\\|x\\| is not known and taken as n times their root mean
        square, which it never exceeds.
        """
        if self.columns is None and self.inputs is None:
            return stats
        sums = {}
        for name, value in stats.sums.items():
            if name.split("/")[0] == "hessian":  # of all text, or of a source
                sums[name] = self._narrow_hessian(value)
            elif name == "abs" and self.inputs is None:
                assert self.columns is not None
                sums[name] = value[self.columns.to(value.device)]
            elif name != "abs":
                sums[name] = value
        if "abs" in stats and "abs" not in sums:
            diagonal = self._narrow_hessian(stats["hessian"]).diagonal().clamp_min(0)
            sums["abs"] = (diagonal * stats["tokens"]).sqrt()
        return Stats(sums)

    def _narrow_hessian(self, hessian: Tensor) -> Tensor:
        if self.inputs is not None:
            mix = self.inputs.to(hessian.device)
            mixed = mix @ hessian.double() @ mix.T
            return ((mixed + mixed.T) / 2).to(hessian.dtype)
        assert self.columns is not None
        columns = self.columns.to(hessian.device)
        return hessian[columns][:, columns].contiguous()

    def narrow_gradients(self, stats: Stats) -> Stats:
        """What the reverse pass left of the outputs and inputs that are left.

        Squares of combined gradients are those of independent ones. Fisher information of combined
        inputs is not known, and left out.
        """
        sums = {}
        for name, value in stats.sums.items():
            if name == "fisher" and self.inputs is not None:
                continue
            if name == "fisher" and self.columns is not None:
                value = value[self.columns.to(value.device)]
            elif name == "grad_sq" and self.slopes is not None:
                value = (self.slopes.to(value.device).square() @ value.double()).to(value.dtype)
            elif name == "grad_sq" and self.rows is not None:
                value = value[self.rows.to(value.device)]
            sums[name] = value
        return Stats(sums)


def whole(weight: Tensor) -> Narrowed:
    """A linear of which everything is left."""
    return Narrowed(weight, None, None, torch.zeros(len(weight), dtype=torch.float64))


@dataclass(frozen=True)
class PartReduction:
    """What a reducer makes of a part: what is left of every role, and what a person should know."""

    linears: Mapping[str, Narrowed]
    events: Sequence[Event] = field(default_factory=tuple)


class PartReducer(Protocol):
    """What a reducer of parts defines; see the module's docstring."""

    PARTS: frozenset[str]

    def outline_part(self, shape: PartShape, options: Any) -> RoleShapes:
        """What :func:`reduce_part` will leave of a part of this shape.

        Raises:
            ValueError: the part cannot be cut so, in one line.
        """

    def reduce_part(self, part: Part, options: Any) -> PartReduction:
        """Cuts one part."""


def part_reducer(name: str) -> PartReducer:
    """The reducer called ``name`` as one of parts; see :func:`cuts_parts`."""
    return cast(PartReducer, reducer_module(name))


def cuts_parts(name: str) -> frozenset[str]:
    """Kinds of parts that a reducer can cut; none for those of experts alone."""
    module = plugins("moesaic.methods", ("reduce",))[name]
    parts: frozenset[str] = getattr(module, "PARTS", frozenset())
    return parts


def outline_part(shape: PartShape, prefix: Chain) -> RoleShapes:
    """What the reducers of a chain leave of a part.

    Raises:
        ValueError: the part cannot be reduced so, in one line.
    """
    (spec,) = prefix
    if shape.kind not in cuts_parts(spec.method):
        raise ValueError(f"{spec.method} does not work on an {shape.kind}")
    return part_reducer(spec.method).outline_part(shape, spec.parsed())
