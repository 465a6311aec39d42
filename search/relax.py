"""RCO: probabilities of choices follow the gradient of the real loss, the budget kept exactly.

Helcig and Alistarh 2026, "Model Compression with Exact Budget Constraints via Riemannian
Manifolds", 2605.00649. Every group of units has probabilities for its choices, and what they expect
to take is the budget (:mod:`moesaic.search._manifold`). A step draws some plans: Gumbel noise is
added to the logits, and an exact knapsack takes the plan within the budget whose logits add up to
most. Each is run for its KL to the original model and for the slopes of that towards all other
choices. These go straight through the draw to the logits of the softmax that it was drawn from
(Gumbel straight-through); Adam makes a step of them, what leaves the surface is taken out, the rest
is led back to it, and the momentum is transported.

The first plan of a step has no noise. It, and what was drawn with little, are run on more text as
long as they are ahead of the best plan known; the best one that saw all of it is the result. Noise
fades out towards the end.

Two things that the slopes do not tell are taken from the table of measurements, times *scale*, the
measured loss of the best plan over its predicted one:

- A slope is the derivative at the weights as they are. To go from one choice to another changes
  the weights by a step that is not small; what the slope lacks is the curvature along it. With
  errors of the two choices that have nothing to do with each other that is the sum of their
  predicted losses, scaled. (For a choice alone, slope and curvature add up to the difference of
  the two predicted losses; with others around, the slope has their interactions.) ``CURVATURE``
  says how much of it is added. A rank's errors contain those of a larger rank, so that the sum
  overstates what a change costs there, in the same way for all.
- Between alternatives of a bank, which have other experts behind another router, there is no
  straight line of weights, and so no slope. Their logits get the difference of what the table
  predicts for the alternatives at the present probabilities, scaled. That is an estimate: what
  decides is how the plans run that are drawn with them.
"""

import functools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.search import knapsack
from moesaic.search._ledger import Ledger
from moesaic.search._manifold import Floats, Ints, Logits, Manifold
from moesaic.search._points import Point, Space, Table
from moesaic.search.base import Plan, Problem
from moesaic.search.refining import Answer, Batch, Effort, Refinement, Request, Text

CURVATURE = 0.5
# Adam.
_RATE, _MEAN, _SQUARE, _EPSILON = 0.1, 0.8, 0.95, 1e-12
# Size of the noise at the first step and at the last one.
_NOISE = (1.0, 0.3)
# Partial plans that the knapsack keeps per group: draws need not be the best of all plans.
_WIDEST = 256
# How much surer the start's choices are at first than the predictions make them.
_START = 0.5
# Draws before the alternatives of the best plan are taken, where others leave no plan.
_ATTEMPTS = 8


def refine(
    problem: Problem, start: Plan, text: Text, effort: Effort, curvature: float = CURVATURE
) -> Refinement:
    """The descent from a plan.

    Args:
        curvature: see the module's docstring; 0 for slopes that are differences already.

    Raises:
        ValueError: the start is none of the problem's plans.

    Example::

        search = refine(problem, plan, cut(64, 8), Effort(steps=30, draws=2))
        batch = next(search)
        while True:  # until StopIteration, which has the plans
            batch = search.send([run(request) for request in batch.requests])
    """
    space = Space(problem, start)
    ledger = Ledger(space, text, effort, effort.steps)
    yield from ledger.judge([space.start], ledger.every)
    best = space.start
    ledger.settle(best)
    descent = _Descent(space, curvature)
    rng = np.random.default_rng(effort.seed)
    for step in range(effort.steps):
        order = np.roll(ledger.every, -step).tolist()
        count = ledger.racers(effort.draws, order, slopes=True)
        if not count:
            break
        done = step / effort.steps
        if effort.passes is not None:
            done = max(done, ledger.passes / effort.passes)
        noise = _NOISE[0] + (_NOISE[1] - _NOISE[0]) * min(done, 1.0)
        best = ledger.ranked()[0]
        draws = [descent.draw(rng, noise if number else 0.0, best) for number in range(count)]
        descent.scale = _scale(space, ledger, best)
        gradients = yield from _gradients(descent, ledger, draws, order)
        descent.advance(gradients)
        seen = [draw.point for draw in draws if math.isfinite(ledger.kl(draw.point, order[:1]))]
        winner = yield from ledger.race(best, seen, order)
        best = best if winner is None else winner
        ledger.settle(best)
        ledger.step = step + 1
    if ledger.racers(1, ledger.every):
        last = descent.draw(rng, 0.0, best)
        winner = yield from ledger.race(best, [last.point], list(ledger.every))
        best = best if winner is None else winner
    return ledger.result(best)


def _scale(space: Space, ledger: Ledger, best: Point) -> float:
    """Measured over predicted loss of the best plan; 1 where that says nothing.

    Choices are predicted, so what is lost without any does not count as measured.
    """
    measured = ledger.kl(best, ledger.every) - ledger.text.lost
    predicted = space.table(best.picks).predicted(best.columns)
    known = predicted > 0 and 0 < measured < math.inf
    return measured / predicted if known else 1.0


@dataclass(frozen=True)
class _Draw:
    """A plan that was drawn.

    Attributes:
        point: the plan.
        weights: ``[rows, columns]`` of its table, the softmax that stands for the draw.
        alternatives: the same of the alternatives, ``[parts]``.
    """

    point: Point
    weights: Floats
    alternatives: Floats


def _gradients(
    descent: "_Descent", ledger: Ledger, draws: Sequence[_Draw], order: Sequence[int]
) -> Generator[Batch, Sequence[Answer], list[Logits]]:
    """Runs draws, each on one block and equal ones once; gradients of those that ran."""
    unique = list({draw.point.key: draw for draw in draws}.values())
    # All on the same block: they are compared with one another.
    requests = [Request(ledger.space.plan(draw.point), order[0], True) for draw in unique]
    answers = yield ledger.batch(requests)
    found = []
    for draw, answer in zip(unique, answers, strict=True):
        ledger.take(draw.point, order[0], answer)
        if math.isfinite(ledger.kl(draw.point, order[:1])) and answer.steady:
            found.append(descent.gradient(draw, answer.slopes))
    return found


@dataclass(frozen=True)
class _Link:
    """Which logits rows of a table are drawn by: one tied over several parts by the mean of theirs.

    Attributes:
        row, column: of the table.
        group, place: of the manifold.
        weight: share of the group in the row.
    """

    row: Ints
    column: Ints
    group: Ints
    place: Ints
    weight: Floats


class _Descent:
    """Logits, and where they are going.

    Attributes:
        scale: measured over predicted loss.
    """

    def __init__(self, space: Space, curvature: float) -> None:
        self.space = space
        self.curvature = curvature
        self.scale = 1.0
        self.manifold = Manifold(space.problem)
        self.logits = self.manifold.retracted(self._first())
        self.mean, self.square, self.steps = self.manifold.zeros(), self.manifold.zeros(), 0
        self.link = functools.lru_cache(maxsize=64)(self._link)

    def _first(self) -> Logits:
        """What the predictions say at the start's price, its own choices a bit surer."""
        manifold, space = self.manifold, self.space
        value = np.where(
            manifold.there, manifold.loss + space.price * manifold.bytes, np.inf
        )  # [groups, columns]
        least = value.min(axis=1, initial=np.inf)
        behind = np.where(manifold.there, value - least[:, None], 0.0)
        choices = -behind / _typical(behind)
        sums = np.array([part.loss + space.price * part.bytes for part in manifold.parts])
        np.add.at(sums, manifold.part_of, least)
        alternatives = np.zeros(len(manifold.parts))
        for bank in range(len(space.banks)):
            own = [n for n, part in enumerate(manifold.parts) if part.bank == bank]
            alternatives[own] = -(sums[own] - sums[own].min())
        alternatives /= _typical(-alternatives)
        for number, part in enumerate(manifold.parts):
            if part.bank < 0 or space.start.picks[part.bank] == part.pick:
                alternatives[number] += _START if part.bank >= 0 else 0.0
        link = self._link(space.start.picks)
        taken = link.column == space.start.columns[link.row]
        choices[link.group[taken], link.place[taken]] += _START
        return Logits(choices, alternatives)

    def _link(self, picks: tuple[int, ...]) -> _Link:
        manifold, table = self.manifold, self.space.table(picks)
        group_of = {
            name: group
            for part in manifold.parts
            if part.bank < 0 or picks[part.bank] == part.pick
            for group in part.groups
            for name in manifold.names[group]
        }
        entries: list[tuple[int, int, int, int, float]] = []
        for row, (names, chains) in enumerate(zip(table.names, table.chains, strict=True)):
            groups = list(dict.fromkeys(group_of[name] for name in names))
            for group in groups:
                places = {chain: n for n, chain in enumerate(manifold.chains[group])}
                entries += [
                    (row, column, group, places[chain], 1 / len(groups))
                    for column, chain in enumerate(chains)
                ]
        columns = [np.array(column) for column in zip(*entries, strict=True)]
        return _Link(columns[0], columns[1], columns[2], columns[3], columns[4])

    def draw(self, rng: np.random.Generator, noise: float, best: Point) -> _Draw:
        """A plan by the logits and noise; with the best plan's alternatives where others fail."""
        for _ in range(_ATTEMPTS if noise else 1):
            shaken = self.logits.alternatives + noise * rng.gumbel(size=len(self.manifold.parts))
            picks = self._picks(shaken)
            try:
                table = self.space.table(picks)
            except ValueError:  # tied choices of these alternatives have no candidate in common
                continue
            if table.smallest <= table.limit:
                return self._drawn(rng, noise, picks, table, shaken)
        return self._drawn(rng, noise, best.picks, self.space.table(best.picks), shaken)

    def _picks(self, shaken: Floats) -> tuple[int, ...]:
        """The alternatives of highest logits, all of one form where that is asked for."""
        banks = self.space.banks
        values = [
            {p.pick: shaken[n] for n, p in enumerate(self.manifold.parts) if p.bank == bank}
            for bank in range(len(banks))
        ]
        forms: list[str | None] = [None]
        if self.space.problem.one_form and banks:
            forms = list(dict.fromkeys(a.form for _, found in banks for a in found))
        best: tuple[float, tuple[int, ...]] | None = None
        for form in forms:
            picks, total = [], 0.0
            for (_, found), value in zip(banks, values, strict=True):
                allowed = [n for n, a in enumerate(found) if form in (None, a.form)]
                if not allowed:
                    break
                picks.append(max(allowed, key=lambda n: value[n]))
                total += value[picks[-1]]
            else:
                if best is None or total > best[0]:
                    best = total, tuple(picks)
        assert best is not None, "the start has alternatives of one form"
        return best[1]

    def _drawn(
        self,
        rng: np.random.Generator,
        noise: float,
        picks: tuple[int, ...],
        table: Table,
        shaken: Floats,
    ) -> _Draw:
        link = self.link(picks)
        logits: Floats = np.zeros(table.bytes.shape)
        np.add.at(
            logits,
            (link.row, link.column),
            link.weight * self.logits.choices[link.group, link.place],
        )
        logits += noise * rng.gumbel(size=logits.shape)
        there = np.arange(table.bytes.shape[1]) < table.count[:, None]
        logits = np.where(there, logits, -np.inf)
        columns = _best_columns(table, logits)
        weights = np.exp(logits - logits.max(axis=1, initial=-np.inf)[:, None])
        weights /= weights.sum(axis=1)[:, None]
        moved = Logits(self.logits.choices, shaken)
        return _Draw(Point(picks, columns), weights, self.manifold.probabilities(moved)[1])

    def gradient(self, draw: _Draw, slopes: Mapping[str, Sequence[float]]) -> Logits:
        """Derivative of the KL with respect to the logits, straight through a draw."""
        table = self.space.table(draw.point.picks)
        value = np.zeros(table.bytes.shape)
        for row, (names, chains) in enumerate(zip(table.names, table.chains, strict=True)):
            for name in names:
                own = {
                    m.chain: slope
                    for m, slope in zip(table.settled.choices[name], slopes[name], strict=True)
                }
                value[row, : len(chains)] += [own[chain] for chain in chains]
        taken = table.loss[table.rows, draw.point.columns]
        other = np.ones(value.shape, dtype=bool)
        other[table.rows, draw.point.columns] = False
        value += self.curvature * self.scale * np.where(other, table.loss + taken[:, None], 0.0)
        mean = (draw.weights * value).sum(axis=1)
        through = draw.weights * (value - mean[:, None])
        link = self.link(draw.point.picks)
        choices = np.zeros(self.manifold.there.shape)
        np.add.at(choices, (link.group, link.place), link.weight * through[link.row, link.column])
        return Logits(choices, self._between_alternatives(draw))

    def _between_alternatives(self, draw: _Draw) -> Floats:
        """What the table predicts for alternatives, straight through a draw."""
        manifold = self.manifold
        choices, _ = manifold.probabilities(self.logits)
        value = np.array([part.loss for part in manifold.parts])
        np.add.at(value, manifold.part_of, (choices * manifold.loss).sum(axis=1))
        found = np.zeros(len(manifold.parts))
        for bank in range(len(self.space.banks)):
            own = [n for n, part in enumerate(manifold.parts) if part.bank == bank]
            weights = draw.alternatives[own]
            found[own] = weights * (value[own] - (weights * value[own]).sum())
        return self.scale * found

    def advance(self, gradients: Sequence[Logits]) -> None:
        """A step of Adam along the surface."""
        if not gradients:
            return
        total = functools.reduce(Logits.plus, gradients)
        gradient = self.manifold.tangent(_times(total, 1 / len(gradients)), self.logits)
        self.steps += 1
        self.mean = _times(self.mean, _MEAN).plus(gradient, 1 - _MEAN)
        squares = Logits(gradient.choices**2, gradient.alternatives**2)
        self.square = _times(self.square, _SQUARE).plus(squares, 1 - _SQUARE)
        mean = _times(self.mean, 1 / (1 - _MEAN**self.steps))
        square = _times(self.square, 1 / (1 - _SQUARE**self.steps))
        direction = Logits(
            mean.choices / (np.sqrt(square.choices) + _EPSILON),
            mean.alternatives / (np.sqrt(square.alternatives) + _EPSILON),
        )
        direction = self.manifold.tangent(direction, self.logits)
        self.logits = self.manifold.retracted(self.logits.plus(direction, -_RATE))
        self.mean = self.manifold.tangent(self.mean, self.logits)


def _times(logits: Logits, factor: float) -> Logits:
    return Logits(factor * logits.choices, factor * logits.alternatives)


def _typical(behind: Floats) -> float:
    """The median of what is above zero; 1 where nothing is."""
    above = behind[behind > 0]
    return float(np.median(above)) if len(above) else 1.0


def _best_columns(table: Table, logits: Floats) -> Ints:
    """The plan of the limit's bytes, or hardly fewer, whose logits add up to most, or nearly."""
    sizes = table.bytes / max(table.limit, 1)
    # What all plans of the same bytes get alike changes nothing among them. Enough of it makes
    # plans of fewer bytes no better.
    reward = 0.0
    while True:
        value = logits + reward * sizes
        spent = int(table.bytes[table.rows, np.argmax(value, axis=1)].sum())
        if spent >= min(table.limit, int(table.bytes.max(axis=1, initial=0).sum())):
            break
        reward = max(2 * reward, 1.0)
    rows = [value[row, :count] for row, count in enumerate(table.count)]
    scale = knapsack.loss_scale(float(sum(np.abs(row).max() for row in rows)))
    groups = [
        knapsack.worthwhile(
            table.bytes[row, : len(values)], np.array([round(-x * scale) for x in values.tolist()])
        )
        for row, values in enumerate(rows)
    ]
    picked = knapsack.solve(groups, table.limit, widest=_WIDEST)
    return np.array(
        [group.index[pick] for group, pick in zip(groups, picked, strict=True)], dtype=np.int64
    )
