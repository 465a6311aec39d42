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
        passes: times that the whole text was run.
        step: generations or steps that are done.
        best: KL of the best point so far on the whole text; None before the start was judged.
    """

    def __init__(self, space: Space, text: Text, effort: Effort, steps: int) -> None:
        self.space = space
        self.text = text
        self.effort = effort
        self.steps = steps
        self.step = 0
        self.passes = 0.0
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
        for share in _SEEN:
            if not points:
                break
            blocks = order[: max(1, round(share * len(order)))]
            yield from self.judge(points, blocks)
            limit = self.kl(parent, blocks)
            ahead = sorted(
                (point for point in points if self.kl(point, blocks) < limit),
                key=lambda point: self.kl(point, blocks),
            )
            points = ahead[: max(1, math.floor(len(points) * _LEFT))]
        return points[0] if points else None

    def batch(self, requests: Sequence[Request]) -> Batch:
        return Batch(requests, self.step, self.steps, self.best)

    def settle(self, best: Point) -> None:
        """Says which point is the best so far."""
        self.best = self.kl(best, self.every)

    def take(self, point: Point, block: int, answer: Answer) -> None:
        """Remembers what a point lost on a block."""
        share = self.text.sequences(block) / self.text.total
        self.passes += share * (SLOPE_PASSES if answer.slopes else 1)
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

    def exhausted(self) -> bool:
        """Whether the whole text has been run as often as it may be."""
        return self.effort.passes is not None and self.passes >= self.effort.passes

    def result(self, best: Point) -> list[Judged]:
        """One plan, then the others that saw the whole text, the best first."""
        others = [point for point in self.ranked() if point is not best]
        return [
            Judged(self.space.plan(point), self.kl(point, self.every)) for point in [best, *others]
        ]
