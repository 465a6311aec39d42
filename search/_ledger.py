"""What a refiner was told so far."""

import math
from collections.abc import Generator, Iterable, Sequence

import numpy as np

from moesaic.search._points import Floats, Point, Space
from moesaic.search.refining import (
    SLOPE_PASSES,
    Answer,
    Batch,
    Effort,
    Judged,
    Request,
    Text,
)

# Shares of the text that points have seen when the best of them are picked, and the share of them
# that goes on.
_SEEN, _LEFT = (1 / 8, 3 / 8, 1.0), 1 / 4


class Ledger:
    """The points that were run, and how far they were from the original on each block.

    Attributes:
        every: all blocks of the text.
        sequences: that were run; one whose slopes were taken counts as four.
        step: generations or steps that are done.
        best: KL of the best point so far on the whole text; None before the start was judged.
    """

    def __init__(self, space: Space, text: Text, effort: Effort, steps: int) -> None:
        self.space = space
        self.text = text
        self.effort = effort
        self.steps = steps
        self.step = 0
        self.sequences = 0
        self.every = range(len(text.blocks))
        self.best: float | None = None
        self._points: dict[bytes, Point] = {}
        self._kl: dict[bytes, dict[int, Floats]] = {}

    def judge(
        self, points: Iterable[Point], blocks: Sequence[int]
    ) -> Generator[Batch, Sequence[Answer], None]:
        """Has points run on those of the blocks that they have not seen."""
        wanted = [
            (point, block)
            for point in {point.key: point for point in points}.values()
            for block in blocks
            if block not in self._kl.get(point.key, {})
        ]
        if wanted:
            plans = {point.key: self.space.plan(point) for point, _ in wanted}
            answers = yield self.batch([Request(plans[p.key], block) for p, block in wanted])
            for (point, block), answer in zip(wanted, answers, strict=True):
                self.take(point, block, answer)

    def race(
        self, parent: Point, points: Sequence[Point], order: Sequence[int]
    ) -> Generator[Batch, Sequence[Answer], Point | None]:
        """The best of some points if it is better on the whole text than one that has seen it.

        They are run on more and more of the text. Who is behind the parent on what both have seen
        goes no further, and of the others the best go on.

        Args:
            order: of the blocks.
        """
        for blocks in _stages(order):
            if not points:
                break
            yield from self.judge(points, blocks)
            limit = self.kl(parent, blocks)
            ahead = sorted(
                (point for point in points if self.kl(point, blocks) < limit),
                key=lambda point: self.kl(point, blocks),
            )
            points = ahead[: _left(len(points))]
        return points[0] if points else None

    def racers(self, most: int, order: Sequence[int], slopes: bool = False) -> int:
        """How many points may race so that what they take, whatever comes of it, is within what is
        left to run; 0 where not even one may.

        Args:
            most: that are wanted.
            slopes: whether theirs are taken first, on the first block.
        """
        if self.effort.passes is None:
            return most
        left = int(self.effort.passes * self.text.total + 1e-9) - self.sequences
        fitting = (n for n in range(most, 0, -1) if self._cost(n, order, slopes) <= left)
        return next(fitting, 0)

    def _cost(self, count: int, order: Sequence[int], slopes: bool) -> int:
        """Sequences that a race of so many points takes at most."""
        found = seen = 0
        if slopes:
            found, seen = count * SLOPE_PASSES * self.text.sequences(order[0]), 1
        for blocks in _stages(order):
            found += count * sum(map(self.text.sequences, blocks[seen:]))
            count, seen = _left(count), len(blocks)
        return found

    def batch(self, requests: Sequence[Request]) -> Batch:
        return Batch(requests, self.step, self.steps, self.best)

    def settle(self, best: Point) -> None:
        """Says which point is the best so far."""
        self.best = self.kl(best, self.every)

    def take(self, point: Point, block: int, answer: Answer) -> None:
        """Remembers what a point lost on a block."""
        self.sequences += self.text.sequences(block) * (SLOPE_PASSES if answer.slopes else 1)
        kl = np.array(answer.kl, dtype=float)
        kl[~np.isfinite(kl)] = np.inf
        self._points[point.key] = point
        self._kl.setdefault(point.key, {})[block] = kl

    def kl(self, point: Point, blocks: Sequence[int]) -> float:
        """Mean over blocks that the point has seen, nats per token."""
        return float(np.concatenate([self._kl[point.key][block] for block in blocks]).mean())

    def knows(self, point: Point) -> bool:
        """Whether a point was ever run."""
        return point.key in self._kl

    def ranked(self) -> list[Point]:
        """The points that saw the whole text, the best first; of equals the first one."""
        whole = [self._points[k] for k, seen in self._kl.items() if len(seen) == len(self.every)]
        return sorted(whole, key=lambda point: self.kl(point, self.every))

    @property
    def passes(self) -> float:
        """Times that the whole text was run."""
        return self.sequences / self.text.total

    def result(self, best: Point) -> list[Judged]:
        """One plan, then the others that saw the whole text, the best first."""
        others = [point for point in self.ranked() if point is not best]
        return [
            Judged(self.space.plan(point), self.kl(point, self.every)) for point in [best, *others]
        ]


def _stages(order: Sequence[int]) -> list[Sequence[int]]:
    """Blocks that points have seen when the best of them are picked."""
    return [order[: max(1, round(share * len(order)))] for share in _SEEN]


def _left(count: int) -> int:
    """How many of so many points go on."""
    return max(1, math.floor(count * _LEFT))
