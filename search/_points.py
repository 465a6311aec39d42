"""Plans as arrays: what refiners change by the thousand.

Once every bank has its alternative a problem is an ordinary one: a :class:`Table` has a row per
group of tied units and a column per choice. A :class:`Point` is a plan: which alternatives, and a
column for every row. Rows hold all choices that are offered, bytes rising, also those that the
predictions call useless: that is what running them may refute.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.methods.base import Chain
from moesaic.search import knapsack
from moesaic.search.alternatives import Picks
from moesaic.search.base import Alternative, Plan, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Tables remembered, one for each combination of alternatives.
_TABLES = 64


@dataclass(frozen=True, eq=False)
class Point:
    """A plan.

    Attributes:
        picks: number of every bank's alternative, in the problem's order.
        columns: of every row of the table that these alternatives make.
    """

    picks: tuple[int, ...]
    columns: Ints

    @functools.cached_property
    def key(self) -> bytes:
        """The same for the same plan."""
        return np.array([*self.picks, *self.columns], dtype=np.int32).tobytes()


class Table:
    """A problem whose banks have their alternatives, as arrays.

    Attributes:
        names: units of every row.
        chains: of every choice, row by row, without the banks' prefixes.
        bytes, loss: ``[rows, columns]``, of all units of the row; rows with fewer choices repeat
            their last one.
        count: choices of every row.
        higher: ``[rows, columns]``: the next column of more bytes and less loss, -1 where there is
            none.
        fixed_bytes, fixed_loss: what every plan with these alternatives has besides.
    """

    def __init__(self, problem: Problem, picks: Picks) -> None:
        self.problem = problem
        self.picks = picks
        self.settled = problem.settled(picks) if problem.banks else problem
        groups = self.settled.groups()
        self.names = [units for units, _ in groups]
        # Stable: of equal choices the first stays first.
        offers = [sorted(found, key=lambda offer: offer[1:]) for _, found in groups]
        self.chains: list[list[Chain]] = [[chain for chain, _, _ in row] for row in offers]
        self.count = np.array([len(row) for row in offers], dtype=np.int64)
        width = int(self.count.max(initial=1))
        padded = [row + [row[-1]] * (width - len(row)) for row in offers]
        shape = (len(padded), width)
        self.bytes: Ints = np.array([[o[1] for o in row] for row in padded], np.int64).reshape(
            shape
        )
        self.loss: Floats = np.array([[o[2] for o in row] for row in padded], float).reshape(shape)
        self.higher = np.array([_higher(row) for row in padded], np.int64).reshape(shape)
        self.fixed_bytes = self.settled.budget.fixed_bytes
        self.fixed_loss = float(sum(picks[bank].loss for bank in problem.banks))
        self.rows = np.arange(len(padded))

    @property
    def limit(self) -> int:
        """Bytes that the rows together may have."""
        return self.settled.budget.unit_bytes

    @property
    def smallest(self) -> int:
        """Bytes that the rows together have at least."""
        return int(self.bytes[:, 0].sum())

    def size(self, columns: Ints) -> int:
        """Bytes of the rows together."""
        return int(self.bytes[self.rows, columns].sum())

    def predicted(self, columns: Ints) -> float:
        """Predicted loss of a plan."""
        return float(self.loss[self.rows, columns].sum()) + self.fixed_loss

    def plan(self, columns: Ints) -> Plan:
        """The plan, prefixes included."""
        chosen: dict[str, Chain] = {}
        for names, chains, column in zip(self.names, self.chains, columns, strict=True):
            chosen |= dict.fromkeys(names, chains[column])
        plan = self.settled.plan(chosen)
        return self.problem.whole(self.picks, plan) if self.problem.banks else plan

    def columns(self, plan: Plan) -> Ints:
        """Columns of a plan that has these alternatives."""
        skip = {
            name: len(self.picks[bank].prefix)
            for bank in self.problem.banks
            for name in self.picks[bank].choices
        }
        return np.array(
            [
                chains.index(plan.units[names[0]][skip.get(names[0], 0) :])
                for names, chains in zip(self.names, self.chains, strict=True)
            ],
            dtype=np.int64,
        )

    def cheapest(self, price: float) -> Ints:
        """Columns of least loss + price · bytes."""
        columns: Ints = np.argmin(self.loss + price * self.bytes, axis=1)
        return columns


def _higher(row: Sequence[tuple[Chain, int, float]]) -> list[int]:
    return [
        next(
            (
                column
                for column in range(here + 1, len(row))
                if row[column][1] > row[here][1] and row[column][2] < row[here][2]
            ),
            -1,
        )
        for here in range(len(row))
    ]


class Space:
    """All plans of a problem.

    Attributes:
        problem: what it is about.
        banks: alternatives of every bank.
        start: where a search begins.
        price: predicted loss per byte at the start.
    """

    def __init__(self, problem: Problem, start: Plan) -> None:
        self.problem = problem
        self.banks: list[tuple[str, Sequence[Alternative]]] = list(problem.banks.items())
        self._tables: dict[tuple[int, ...], Table] = {}
        self.start = self.point(start)
        table = self.table(self.start.picks)
        scale = knapsack.loss_scale(float(np.abs(table.loss).max(axis=1, initial=0).sum()))
        groups = knapsack.worthwhile_groups(table.settled.groups())
        limit = max(table.limit, sum(int(group.bytes[0]) for group in groups))
        self.price = knapsack.relaxed(groups, limit)[1] / scale

    def table(self, picks: tuple[int, ...]) -> Table:
        """The table of some alternatives; raises ValueError where they cannot be together."""
        found = self._tables.pop(picks, None) or Table(self.problem, self.alternatives(picks))
        self._tables[picks] = found
        while len(self._tables) > _TABLES:
            self._tables.pop(next(iter(self._tables)))
        return found

    def alternatives(self, picks: Sequence[int]) -> dict[str, Alternative]:
        """Bank → its alternative."""
        pairs = zip(self.banks, picks, strict=True)
        return {bank: alternatives[pick] for (bank, alternatives), pick in pairs}

    def point(self, plan: Plan) -> Point:
        """A plan as a point.

        Raises:
            ValueError: it is none of the problem's.
        """
        picked = self.problem.picked(plan.units)
        picks = tuple(
            next(n for n, a in enumerate(alternatives) if a is picked[bank])
            for bank, alternatives in self.banks
        )
        return Point(picks, self.table(picks).columns(plan))

    def plan(self, point: Point) -> Plan:
        return self.table(point.picks).plan(point.columns)

    def moved(self, point: Point, picks: tuple[int, ...]) -> Ints:
        """Columns for other alternatives: what stays keeps its choices, what is new takes what is
        best at the start's price. They may exceed the budget."""
        old, new = self.table(point.picks), self.table(picks)
        changed = {
            name
            for (_, alternatives), before, after in zip(self.banks, point.picks, picks, strict=True)
            if before != after
            for name in alternatives[after].choices
        }
        known: Mapping[str, Chain] = {
            name: chains[column]
            for names, chains, column in zip(old.names, old.chains, point.columns, strict=True)
            for name in names
        }
        columns = new.cheapest(self.price)
        for row, (names, chains) in enumerate(zip(new.names, new.chains, strict=True)):
            kept = [known[name] for name in names if name in known and name not in changed]
            if kept and kept[0] in chains:
                columns[row] = chains.index(kept[0])
        return columns
