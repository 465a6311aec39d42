"""Refining: searches that have plans really run, and change one until it loses less.

An allocator (``search``) adds up what was measured of each unit alone. A refiner starts from such a
plan and looks at the loss of whole plans instead: it says which plans it wants run on which part of
a text, is told how far they are from the original model there, and goes on from that. It runs
nothing itself. A module of this folder that defines ``refine`` is a refiner::

    def refine(problem: Problem, start: Plan, text: Text, effort: Effort) -> Refinement: ...

which is a generator: it yields a :class:`Batch` of requests, is sent an answer to each of them in
their order, and returns all plans that saw the whole text: the one that it decided for, then the
others, the best first. What it asks follows
from its arguments and the answers alone, so that whoever kept the answers can repeat a search that
was interrupted. Every plan that it asks for keeps to the problem's budget and ties.

The text is cut into blocks of sequences. Requests name one block each; nothing else is ever asked
for, so that answers can be kept.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from moesaic.kernels.discovery import plugin, plugins
from moesaic.search.base import Plan, Problem

# A range of sequences: the first, and one past the last.
Rows = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """What plans are judged on.

    Attributes:
        blocks: of sequences, one after the other.
        lost: KL that all plans have and no choice changes, nats per token: of a model that was
            made narrower as a whole before.
    """

    blocks: Sequence[Rows]
    lost: float = 0.0

    def sequences(self, block: int) -> int:
        low, high = self.blocks[block]
        return high - low

    @property
    def total(self) -> int:
        """Sequences of all blocks."""
        return sum(high - low for low, high in self.blocks)


def cut(sequences: int, blocks: int) -> Text:
    """So many sequences in at most so many blocks, as equal as can be."""
    count = min(sequences, blocks)
    ends = [sequences * number // count for number in range(count + 1)]
    return Text(list(zip(ends, ends[1:], strict=False)))


@dataclass(frozen=True)
class Effort:
    """How long to search. What a refiner has no use for it does not look at.

    Attributes:
        generations, offspring: of :mod:`moesaic.search.evolve`.
        steps, draws: of :mod:`moesaic.search.relax`, and plans drawn in each step.
        passes: times that the whole text may be run, at most; None for no limit. A search does less
            in its last generation or step, or stops before it, rather than go beyond. The plan to
            start from is always run.
        seed: of what is drawn.
    """

    generations: int = 20
    offspring: int = 16
    steps: int = 30
    draws: int = 2
    passes: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A plan to be run.

    Attributes:
        plan: which one.
        block: of the text.
        slopes: whether slopes are wanted, too.
    """

    plan: Plan
    block: int
    slopes: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        kl: of every sequence of the block, KL to the original model in nats per token.
        slopes: choice of the plan → of every measurement that the problem has of it (after the
            prefix that the plan gives it), in that order, the derivative of the block's mean KL
            with respect to how much of that candidate's weights is in place of the plan's:
            ⟨∂KL/∂W, W' − W⟩. Empty where they were not asked for.
    """

    kl: Sequence[float]
    slopes: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def steady(self) -> bool:
        """Whether all slopes are finite; a backward pass may overflow where the model does not."""
        return all(math.isfinite(value) for values in self.slopes.values() for value in values)


@dataclass(frozen=True)
class Batch:
    """Requests that may be answered side by side.

    Attributes:
        requests: no two alike.
        step: generations or steps that are done.
        steps: that there will be.
        best: KL of the best plan on the whole text; None before the start was judged.
    """

    requests: Sequence[Request]
    step: int
    steps: int
    best: float | None


@dataclass(frozen=True)
class Judged:
    """A plan that saw the whole text.

    Attributes:
        kl: nats per token; infinite where the plan ruins the model.
    """

    plan: Plan
    kl: float


Refinement = Generator[Batch, Sequence[Answer], list[Judged]]


class Refiner(Protocol):
    """What a refining module defines."""

    def refine(self, problem: Problem, start: Plan, text: Text, effort: Effort) -> Refinement:
        """The search from a plan; see this module's docstring."""


# Passes of the model's arithmetic that slopes take, of which a KL takes one: forward, forward again
# block by block, and backward, which is twice a forward pass.
SLOPE_PASSES = 4


def refiner(name: str) -> Refiner:
    """The refiner called ``name``; raises ``UnknownName`` with the list of known ones."""
    return cast(Refiner, plugin("moesaic.search", ("refine",), name))


def refiners() -> list[str]:
    """Names of all refiners."""
    return list(plugins("moesaic.search", ("refine",)))
