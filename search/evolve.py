"""EvoPress: offspring trade bytes between units; those that run best on more and more text stay.

Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
2410.14649, section 3. One plan is the parent. Its *offspring* are made by level switches: a few
groups of units go up, others go down, and the budget is kept. They are run on a part of the text,
the better ones on more of it, the last one on all of it; it is the next parent if it is nearer to
the original model there than the parent. The parent never gets worse, and is never run twice.

What differs from the paper, whose units have all the same size:

- Bytes are counted exactly. After the switches of an offspring, groups chosen at random go down
  until it fits, then groups go up as long as one fits into what is left.
- Choices that the predictions call useless are offered as well, also those of the same bytes.
- Offspring are picked from many *proposals* by what the table of measurements predicts for them: of
  some the best of 4, of others the best of 16, 64 and 256, with the bytes that a proposal leaves
  unused charged at the plan's own price. A random switch at 3 bits mostly ruins something that the
  predictions are right about; among the better proposals they do not know.
- Banks that may be reduced: some offspring switch the alternative of a bank (of all banks where
  these must have one form). The choices in it are those of least predicted loss at the plan's
  price; then single steps with the best predicted rates, multiplied by noise, are taken until the
  budget is met.
- An offspring that is behind the parent on the text that both have seen goes no further. Which part
  of the text comes first changes from generation to generation.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moesaic.search._ledger import Ledger
from moesaic.search._points import Ints, Point, Space, Table
from moesaic.search.base import Plan, Problem
from moesaic.search.refining import Effort, Refinement, Text

Bools = NDArray[np.bool_]

# Proposals that an offspring is the best of, in turns.
_TOURNAMENTS = (4, 16, 64, 256)
# The most groups that move before the budget is looked at; one more for every so many generations
# without a better plan.
_SWITCHES, _PATIENCE = 3, 4
# Groups tried, going down until an offspring fits and then up as long as one fits.
_REPAIRS, _FILLS = 6, 4
# Offspring that switch an alternative, where there are some: one in so many.
_ALTERNATIVES = 4
# Generations without any offspring that end a search: everything near has been run.
_BARREN = 8
# Spread of the noise on rates, where an offspring is led back to the budget step by step.
_NOISE = 0.5
# Attempts to find something that was not run yet: rounds of proposals, and the best of each.
_ATTEMPTS, _TRIES = 4, 3


def refine(problem: Problem, start: Plan, text: Text, effort: Effort) -> Refinement:
    """The evolution of a plan.

    Raises:
        ValueError: the start is none of the problem's plans.

    Example::

        search = refine(problem, plan, cut(64, 8), Effort(generations=20))
        batch = next(search)
        while True:  # until StopIteration, which has the plans
            batch = search.send([run(request) for request in batch.requests])
    """
    space = Space(problem, start)
    rng = np.random.default_rng(effort.seed)
    ledger = Ledger(space, text, effort, effort.generations)
    parent = space.start
    yield from ledger.judge([parent], ledger.every)
    ledger.settle(parent)
    stale = barren = 0
    for generation in range(effort.generations):
        order = np.roll(ledger.every, -generation).tolist()
        count = ledger.racers(effort.offspring, order)
        if not count:
            break
        breeder = _Breeder(space, parent, ledger, rng, _SWITCHES + stale // _PATIENCE)
        offspring = list(breeder.offspring(count))
        barren = 0 if offspring else barren + 1
        if barren == _BARREN:
            break
        winner = yield from ledger.race(parent, offspring, order)
        parent, stale = (parent, stale + 1) if winner is None else (winner, 0)
        ledger.settle(parent)
        ledger.step = generation + 1
    return ledger.result(parent)


class _Breeder:
    """Makes offspring of one parent.

    Args:
        switches: that an offspring begins with, at most.
    """

    def __init__(
        self,
        space: Space,
        parent: Point,
        ledger: Ledger,
        rng: np.random.Generator,
        switches: int,
    ) -> None:
        self.space = space
        self.parent = parent
        self.ledger = ledger
        self.rng = rng
        self.switches = switches
        self.taken: set[bytes] = set()

    def offspring(self, count: int) -> Iterator[Point]:
        """Points that were not run yet, all different; fewer where no more are found."""
        if any(len(alternatives) > 1 for _, alternatives in self.space.banks):
            for _ in range(0, count, _ALTERNATIVES):
                point = _other_alternative(self.space, self.parent, self.rng)
                if point is not None and self._new(point):
                    yield point
        for _ in range(_ATTEMPTS):
            yield from self._switched(count - len(self.taken))

    def _new(self, point: Point) -> bool:
        """Whether a point is one more; if so it is taken."""
        if self.ledger.knows(point) or point.key in self.taken:
            return False
        self.taken.add(point.key)
        return True

    def _switched(self, count: int) -> Iterator[Point]:
        """At most so many offspring by level switches, each the best of its proposals."""
        if count <= 0:
            return
        parent, table = self.parent, self.space.table(self.parent.picks)
        sizes = [_TOURNAMENTS[number % len(_TOURNAMENTS)] for number in range(count)]
        # Twice as many, because some exceed the limit or change nothing.
        made = propose(table, parent.columns, self.rng, 2 * sum(sizes), self.switches)
        score = made.loss + self.space.price * (table.limit - made.size)
        numbers = np.flatnonzero(made.usable())
        begin = 0
        for size in sizes:
            group = numbers[begin : begin + size]
            begin += size
            for number in group[np.argsort(score[group], kind="stable")[:_TRIES]]:
                point = Point(parent.picks, fill(table, made.made(number), self.rng))
                if self._new(point):
                    yield point
                    break


class Proposals:
    """Level switches of one plan, many at a time.

    Only what they change is kept: a place for every group that a proposal moves.

    Attributes:
        size, loss: bytes of the rows together, and predicted loss; ``[count]``.

    Args:
        moves: that there will be at most.
    """

    def __init__(self, table: Table, columns: Ints, count: int, moves: int) -> None:
        self.table = table
        self.columns = columns
        self.size = np.full(count, table.size(columns))
        self.loss = np.full(count, table.predicted(columns))
        self._numbers = np.arange(count)
        self._rows = np.full((count, moves), -1, dtype=np.int64)
        self._after = np.zeros((count, moves), dtype=np.int64)
        self._place = 0

    def move(
        self, rng: np.random.Generator, jump: Ints, wanted: Bools, fitting: bool = False
    ) -> None:
        """Moves a group drawn at random in each of the ``wanted`` proposals.

        Args:
            jump: by how many columns, ``[count]``.
            fitting: only where the proposal then keeps to the limit.
        """
        table = self.table
        numbers = self._numbers[wanted]
        rows = rng.integers(0, len(table.rows), len(wanted))[wanted]
        same = self._rows[numbers] == rows[:, None]
        place = np.where(same.any(axis=1), same.argmax(axis=1), self._place)
        moved = self._rows[numbers, place] >= 0
        before = np.where(moved, self._after[numbers, place], self.columns[rows])
        after = np.clip(before + jump[wanted], 0, table.count[rows] - 1)
        more = table.bytes[rows, after] - table.bytes[rows, before]
        gained = table.loss[rows, after] - table.loss[rows, before]
        if fitting:
            fits = np.flatnonzero(self.size[numbers] + more <= table.limit)
            numbers, rows, place, after = numbers[fits], rows[fits], place[fits], after[fits]
            more, gained = more[fits], gained[fits]
        self._rows[numbers, place], self._after[numbers, place] = rows, after
        self.size[numbers] += more
        self.loss[numbers] += gained
        self._place += 1

    def usable(self) -> Bools:
        """Which keep to the limit and change something."""
        changed = (self._rows >= 0) & (self._after != self.columns[self._rows])
        usable: Bools = (self.size <= self.table.limit) & changed.any(axis=1)
        return usable

    def made(self, number: int) -> Ints:
        """Columns of a proposal."""
        columns = self.columns.copy()
        moved = self._rows[number] >= 0
        columns[self._rows[number][moved]] = self._after[number][moved]
        return columns


def propose(
    table: Table, columns: Ints, rng: np.random.Generator, count: int, switches: int = _SWITCHES
) -> Proposals:
    """Level switches of a plan; most keep to the table's limit.

    Args:
        count: of proposals.
        switches: groups moved before the budget is looked at, at most.
    """
    made = Proposals(table, columns, count, switches + _REPAIRS + _FILLS)
    # The smaller of two draws, as in the paper's code: mostly few switches.
    wanted = np.minimum(*rng.integers(1, switches + 1, (2, count)))
    for number in range(switches):
        up = np.where(rng.random(count) < 0.5, 1, -1)
        made.move(rng, up * _jumps(rng, count), wanted > number)
    for _ in range(_REPAIRS):
        made.move(rng, -_jumps(rng, count), made.size > table.limit)
    for _ in range(_FILLS):
        made.move(rng, _jumps(rng, count), made.size < table.limit, fitting=True)
    return made


def _jumps(rng: np.random.Generator, count: int) -> Ints:
    """How many levels: 1 mostly, or a few."""
    return rng.geometric(0.7, count)


def fill(table: Table, columns: Ints, rng: np.random.Generator) -> Ints:
    """Takes steps up, drawn at random, until none fits into what the limit leaves."""
    columns = columns.copy()
    free = table.limit - table.size(columns)
    while True:
        higher = table.higher[table.rows, columns]
        more = table.bytes[table.rows, higher] - table.bytes[table.rows, columns]
        fitting = np.flatnonzero((higher >= 0) & (more <= free))
        if not len(fitting):
            return columns
        row = rng.choice(fitting)
        columns[row] = higher[row]
        free -= int(more[row])


def _other_alternative(space: Space, parent: Point, rng: np.random.Generator) -> Point | None:
    """The parent with another alternative in some bank, led back to the budget."""
    picks = list(parent.picks)
    open_banks = [n for n, (_, found) in enumerate(space.banks) if len(found) > 1]
    bank = int(rng.choice(open_banks))
    others = [n for n in range(len(space.banks[bank][1])) if n != picks[bank]]
    picks[bank] = int(rng.choice(others))
    if space.problem.one_form:
        form = space.banks[bank][1][picks[bank]].form
        for number, (_, found) in enumerate(space.banks):
            if found[picks[number]].form != form:
                alike = [n for n, a in enumerate(found) if a.form == form]
                if not alike:
                    return None
                picks[number] = int(rng.choice(alike))
    try:
        table = space.table(tuple(picks))
    except ValueError:  # tied choices of these alternatives have no candidate in common
        return None
    columns = _led_back(table, space.moved(parent, tuple(picks)), rng)
    return None if columns is None else Point(tuple(picks), fill(table, columns, rng))


def _led_back(table: Table, columns: Ints, rng: np.random.Generator) -> Ints | None:
    """Single steps to the budget, the best predicted rates first but for noise; None if even the
    smallest choices exceed it."""
    columns = columns.copy()
    noise = np.exp(_NOISE * rng.standard_normal(len(table.rows)))
    size = table.size(columns)
    while size > table.limit:
        lower = _next_smaller(table, columns)
        less = table.bytes[table.rows, columns] - table.bytes[table.rows, lower]
        if not less.any():
            return None
        lost = table.loss[table.rows, lower] - table.loss[table.rows, columns]
        rate = np.where(less > 0, lost / np.maximum(less, 1) * noise, np.inf)
        row = int(np.argmin(rate))
        columns[row] = lower[row]
        size -= int(less[row])
    while True:
        higher = table.higher[table.rows, columns]
        more = table.bytes[table.rows, higher] - table.bytes[table.rows, columns]
        gained = table.loss[table.rows, columns] - table.loss[table.rows, higher]
        fits = (higher >= 0) & (more <= table.limit - size)
        if not fits.any():
            return columns
        rate = np.where(fits, gained / np.maximum(more, 1) * noise, -np.inf)
        row = int(np.argmax(rate))
        columns[row] = higher[row]
        size += int(more[row])


def _next_smaller(table: Table, columns: Ints) -> Ints:
    """Of every row the column of least loss among the next smaller bytes; itself at the end."""
    held = table.bytes[table.rows, columns]
    smaller = table.bytes < held[:, None]
    size = np.where(smaller, table.bytes, -1).max(axis=1)
    # Rows are sorted by bytes, then loss: the first column of a size has its least loss.
    first = np.argmax(table.bytes == size[:, None], axis=1)
    return np.where(size >= 0, first, columns)
