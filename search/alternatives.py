"""Banks that may be reduced first: which alternative each bank takes, then a plan as ever.

A bank of experts can be pruned or merged before it is compressed. Each way to do so is an
:class:`~moesaic.search.base.Alternative` with choices of its own. :func:`solve` decides in two
steps under one budget.

1. *Alternatives.* What an alternative can make of its bank is a *frontier*: the (bytes, loss) pairs
   that no others beat. One knapsack over all banks' frontiers, alternatives side by side, and all
   other choices tells how many bytes each bank is worth and which alternative holds them best.
2. *Choices.* With the alternatives settled, the problem is an ordinary one, which the strategy
   solves. Prefixes and the reductions' losses are put back.

The alternatives are the best ones as long as no frontier has more than ``_POINTS`` points and the
knapsack looks at no more than ``_MOST_MOVES`` moves; with an exact strategy so is the plan. Of a
larger frontier these points are kept: the corners of its lower convex hull, the points of one chain
for all choices and, where the corners are few, others spread evenly. The first step then rounds a
bank's losses up to the next point kept; the second one chooses anew within the alternatives.

Ties that reach over several banks (an engine that wants one format everywhere) leave the banks
independent once the tied chain is fixed: all chains are tried. Where such ties are many, banks that
hang together are put together to one frontier first. Forms, where all banks must have one, are
tried one by one, too.

Strategies that mix nothing (those with a ``smallest_bytes`` of their own, such as ``uniform``) do
not mix alternatives either: all banks take the same prefix, and the best one is chosen. A bank that
lacks a prefix stays as it is.

To strategies that share out how much each layer loses a bank is one layer, and their plan is
returned as it is (:mod:`moesaic.search._shared_out`). For all others, whatever was decided, the
plan is compared with the strategy's plans for one prefix in all banks, none included, and with
those of one prefix and one chain everywhere; the best is returned. Of equally good plans the one
with fewer bytes is taken, then the one whose prefixes came first.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.methods.base import Chain, chain_text
from moesaic.search import _shared_out, base, knapsack
from moesaic.search.base import (
    Alternative,
    Budget,
    Infeasible,
    Measurement,
    Plan,
    Problem,
    search_module,
)
from moesaic.search.knapsack import Group, Ints, worthwhile

# An alternative per bank.
Picks = Mapping[str, Alternative]

# Points of a frontier that is kept whole, and how many of a larger one are spread evenly.
_POINTS = 512
# Corners of a frontier's hull.
_CORNERS = 1024
# Combinations of tied chains that are tried one by one; more are put together tie by tie.
_COMBINATIONS = 64
# The most that one set of ties that hang together may have.
_MOST_COMBINATIONS = 4096
# Moves that the exact first step may look at; where these do not do, it goes on with the most
# promising partial plans, so many per group.
_MOST_MOVES = 20_000_000
_WIDEST = 2048
# What a bound is lowered by, in the units that losses are counted in (the largest total has 61
# bits): more than sums of floats in another order differ by.
_SLACK = 2.0**24


def solve(problem: Problem, strategy: str) -> Plan:
    """The best plan that a strategy finds, alternatives of banks included.

    Args:
        strategy: name of a search strategy.

    Raises:
        Infeasible: no plan fits; names the smallest in bytes.
        ValueError: there is no plan whatever the budget, or the problem contradicts itself.

    Example::

        bank = [Alternative((), "64x768", 0, 0.0, all_64),
                Alternative(reap, "48x768", -64, 0.1, other_48)]
        problem = Problem(linears, [], Budget(total, fixed), {"layers.0.experts": bank})
        plan = solve(problem, "knapsack")
    """
    if not problem.banks:
        return search_module(strategy).search(problem)
    if _shares_out(strategy):
        return _shared_out.solve(problem, strategy)
    plans = _mixed(problem, strategy) if _mixes(strategy) else _unmixed(problem, strategy)
    if not plans:
        raise Infeasible(f"{strategy} finds no plan of {problem.budget.total_bytes:,} bytes")
    return _better(plans)


def smallest_bytes(problem: Problem, strategy: str) -> int:
    """Bytes of the smallest plan that :func:`solve` can find, whatever the budget.

    Raises:
        ValueError: there is no plan at all.
    """
    if not problem.banks:
        return base.smallest_bytes(problem, strategy)
    if _shares_out(strategy):
        return _shared_out.smallest_bytes(problem, strategy)
    if _mixes(strategy):
        return FirstStep(problem).smallest()
    sizes, errors = [], []
    for picks in _unmixed_picks(problem, strategy):
        try:
            sizes.append(base.smallest_bytes(problem.settled(picks), strategy))
        except ValueError as error:
            errors.append(error)
    if not sizes:
        raise errors[0]
    return min(sizes)


def same_prefix(problem: Problem) -> list[Picks]:
    """One set of picks per prefix: every bank takes it, those that lack it stay as they are.

    Prefixes that leave some bank without an alternative, or without the common form, are left out.

    Raises:
        ValueError: a bank has no alternative, or two of one prefix.
    """
    tables = {}
    for bank, alternatives in problem.banks.items():
        tables[bank] = {a.prefix: a for a in alternatives}
        if not alternatives:
            raise ValueError(f"bank {bank} has no alternative")
        if len(tables[bank]) < len(alternatives):
            raise ValueError(f"bank {bank}: two alternatives have the same prefix")
    found: list[Picks] = []
    for prefix in dict.fromkeys(prefix for table in tables.values() for prefix in table):
        picked = {bank: table.get(prefix, table.get(())) for bank, table in tables.items()}
        picks = {bank: a for bank, a in picked.items() if a is not None}
        forms = {a.form for a in picks.values()}
        if len(picks) == len(tables) and (len(forms) == 1 or not problem.one_form):
            found.append(picks)
    return found


def _mixes(strategy: str) -> bool:
    """Whether a strategy chooses every group of tied units by itself (see ``base.Search``)."""
    return not hasattr(search_module(strategy), "smallest_bytes")


def _shares_out(strategy: str) -> bool:
    """Whether a strategy shares out how much each layer loses (see ``base.Search``)."""
    return bool(getattr(search_module(strategy), "SHARES_OUT", False))


def _unmixed(problem: Problem, strategy: str) -> list[Plan]:
    """Plans with one prefix in all banks."""
    _check_fits(smallest_bytes(problem, strategy), problem)
    same = _unmixed_picks(problem, strategy)
    # An error means that the strategy has no plan with a prefix: another one has, that did fit.
    plans = [_attempt(problem, strategy, picks, ValueError) for picks in same]
    return [plan for plan in plans if plan is not None]


def _unmixed_picks(problem: Problem, strategy: str) -> list[Picks]:
    same = same_prefix(problem)
    if not same:
        kind = " and one form" if problem.one_form else ""
        raise ValueError(f"{strategy}: no alternative of one prefix{kind} is there for all banks")
    return same


def _mixed(problem: Problem, strategy: str) -> list[Plan]:
    """The plan of the best alternatives, and those that might be better still."""
    same = same_prefix(problem)
    step = FirstStep(problem)
    _check_fits(step.smallest(), problem)
    first = step.best()
    tried = [_attempt(problem, strategy, first)]
    tried += [_attempt(problem, "uniform", picks, ValueError) for picks in same]
    plans = [plan for plan in tried if plan is not None]
    for picks in same:
        if picks != first and not (plans and step.bound(picks) > _better(plans).loss):
            plan = _attempt(problem, strategy, picks)
            plans += [] if plan is None else [plan]
    return plans


def _attempt(
    problem: Problem, strategy: str, picks: Picks, none: type[ValueError] = Infeasible
) -> Plan | None:
    """A strategy's plan with these alternatives; None if it raises ``none``."""
    try:
        return problem.whole(picks, search_module(strategy).search(problem.settled(picks)))
    except none:
        return None


def _better(plans: Sequence[Plan]) -> Plan:
    return min(plans, key=lambda plan: (plan.loss, plan.bytes))


def _check_fits(smallest: int, problem: Problem) -> None:
    limit = problem.budget.total_bytes
    if smallest > limit:
        raise Infeasible(f"the smallest plan has {smallest:,} bytes, the budget is {limit:,} bytes")


# Bytes and losses of points, bytes rising and losses falling.
Points = tuple[Ints, Ints]


def _front(sizes: Ints, losses: Ints) -> Points:
    """The points that no others beat."""
    order = np.lexsort((losses, sizes))
    order = order[knapsack.improves(losses[order])]
    return sizes[order], losses[order]


def _together(one: Points, other: Points) -> Points:
    """Every point of one with every point of another, those that are not beaten."""
    sizes = (one[0][:, None] + other[0]).ravel()
    return _front(sizes, (one[1][:, None] + other[1]).ravel())


def _corners(groups: Sequence[Group]) -> Points:
    """Corners of the hull of all groups together: their steps, the most rewarding ones first."""
    size = sum(int(g.bytes[0]) for g in groups)
    loss = sum(int(g.loss[0]) for g in groups)
    none = np.zeros(0, dtype=np.int64)
    more = np.concatenate([none, *(np.diff(g.bytes[g.hull]) for g in groups)])
    less = np.concatenate([none, *(np.diff(g.loss[g.hull]) for g in groups)])
    order = np.argsort(less / more, kind="stable")
    return (
        size + np.concatenate([[0], np.cumsum(more[order])]),
        loss + np.concatenate([[0], np.cumsum(less[order])]),
    )


def _spread(count: int, most: int) -> Ints:
    """At most so many of ``count`` positions, evenly spread, first and last included."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def _thinned(points: Points) -> tuple[Ints, Points]:
    """Positions of the corners and of evenly spread points, and the points."""
    hull = np.array(knapsack.hull(*points), dtype=np.int64)
    keep = np.union1d(hull[_spread(len(hull), _POINTS // 2)], _spread(len(points[0]), _POINTS // 2))
    return keep, (points[0][keep], points[1][keep])


class Part:
    """What is chosen together: one alternative of a bank, or all that stands outside of banks.

    Attributes:
        offers: its choices that no tie binds to other parts, as :meth:`Problem.groups` has them.
        groups: the same, of each group what is worthwhile.
        shared: chain that all groups offer → bytes and loss of it everywhere.
        tied: tie that reaches over parts → chain → bytes and loss of its choices here.
        bound: tie that reaches over parts → names of its choices here.
        own: bytes and loss besides the choices.
        prefix: what chains of its choices leave out.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[Measurement]],
        ties: Sequence[Sequence[str]],
        across: Sequence[Sequence[str]],
        scale: float,
        own: tuple[int, int] = (0, 0),
        prefix: Chain = (),
    ) -> None:
        self.own = own
        self.prefix = prefix
        self.tied: dict[int, dict[Chain, tuple[int, int]]] = {}
        self.bound: dict[int, list[str]] = {}
        for number, tie in enumerate(across):
            names = [name for name in tie if name in choices]
            if names:
                self.bound[number] = names
                ((_, here),) = _offers({name: choices[name] for name in names}, [names])
                self.tied[number] = {c: (size, round(loss * scale)) for c, size, loss in here}
        bound = {name for names in self.bound.values() for name in names}
        free = {name: found for name, found in choices.items() if name not in bound}
        inside = [[name for name in tie if name in free] for tie in ties]
        self.offers = _offers(free, [tie for tie in inside if tie])
        tables = [[(c, n, round(loss * scale)) for c, n, loss in found] for _, found in self.offers]
        self.groups = [worthwhile([t[1] for t in table], [t[2] for t in table]) for table in tables]
        everywhere = Counter(chain for table in tables for chain, _, _ in table)
        self.shared: dict[Chain, tuple[int, int]] = {}
        for table in tables:
            for chain, size, loss in table:
                if everywhere[chain] == len(tables):
                    before = self.shared.get(chain, (0, 0))
                    self.shared[chain] = before[0] + size, before[1] + loss

    @functools.cached_property
    def least(self) -> int:
        """The fewest bytes of its free choices, and its own."""
        return self.own[0] + sum(int(group.bytes[0]) for group in self.groups)

    @functools.cached_property
    def corners(self) -> Points:
        """The hull of the free choices, its own included."""
        sizes, losses = _corners(self.groups)
        return sizes + self.own[0], losses + self.own[1]

    @functools.cached_property
    def frontier(self) -> Points:
        """What the free choices can make, its own included (see the module's docstring)."""
        zero = np.zeros(1, dtype=np.int64)
        corners = _corners(self.groups)
        close = len(corners[0]) > _POINTS // 2  # so close that more points gain nothing
        merged, exact = (zero, zero), True
        for group in self.groups:
            merged = _together(merged, (group.bytes, group.loss))
            if len(merged[0]) > _POINTS:
                exact = False
                if close:
                    break
                merged = _thinned(merged)[1]
        if not exact:
            keep = _spread(len(corners[0]), _CORNERS)
            shared = np.array(list(self.shared.values()), dtype=np.int64).reshape(-1, 2)
            kept = [(corners[0][keep], corners[1][keep]), (shared[:, 0], shared[:, 1])]
            kept += [] if close else [merged]
            sizes, losses = zip(*kept, strict=True)
            merged = _front(np.concatenate(sizes), np.concatenate(losses))
        return merged[0] + self.own[0], merged[1] + self.own[1]

    def shift(self, chains: Mapping[int, Chain]) -> tuple[int, int] | None:
        """Bytes and loss of the tied choices under the ties' chains; None if they cannot be had."""
        size = loss = 0
        for tie, table in self.tied.items():
            if chains[tie] not in table:
                return None
            size, loss = size + table[chains[tie]][0], loss + table[chains[tie]][1]
        return size, loss


# The alternatives of each bank that are looked at, with their numbers.
Parts = Mapping[str, Sequence[tuple[int, Part]]]


def _offers(
    choices: Mapping[str, Sequence[Measurement]], ties: Sequence[Sequence[str]]
) -> list[tuple[tuple[str, ...], list[tuple[Chain, int, float]]]]:
    return Problem(choices, ties, Budget(0, 0)).groups()


@dataclass(frozen=True)
class _Entry:
    """A group of the first step that stands for banks.

    Attributes:
        banks: their names.
        group: the points.
        picks: number of the alternative of each bank, per offer that the group's ``index`` names.
    """

    banks: tuple[str, ...]
    group: Group
    picks: Ints  # [offers, banks]


class FirstStep:
    """Which alternatives are best.

    Forms and chains of ties that reach over parts split the problem into *cases*: in each of them
    every bank, or cluster of banks that other ties join, is one group of a knapsack.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        owner = _owners(problem)
        known = [[name for name in tie if name in owner] for tie in problem.ties]
        reach = [{owner[name] for name in tie} for tie in known]
        self.across = [tie for tie, owners in zip(known, reach, strict=True) if len(owners) > 1]
        ties = [tie for tie, owners in zip(known, reach, strict=True) if len(owners) == 1]
        self.scale = knapsack.loss_scale(_largest_loss(problem))
        self.outside = Part(problem.choices, ties, self.across, self.scale)
        local: dict[str | None, list[list[str]]] = {}
        for tie in ties:
            local.setdefault(owner[tie[0]], []).append(tie)
        self.parts = {
            bank: [
                Part(
                    a.choices,
                    local.get(bank, []),
                    self.across,
                    self.scale,
                    (a.bytes, round(a.loss * self.scale)),
                    a.prefix,
                )
                for a in alternatives
            ]
            for bank, alternatives in problem.banks.items()
        }
        self.clusters = self._clusters()

    def _clusters(self) -> list[tuple[list[int], list[str]]]:
        """Ties that reach over parts and the banks that they hang together, in order of the banks.

        Ties that meet only outside of banks are independent: what is there is a sum over ties.
        """
        ties_of = {
            bank: {tie for part in parts for tie in part.tied} for bank, parts in self.parts.items()
        }
        clusters: list[tuple[set[int], list[str]]] = []
        for bank, ties in ties_of.items():
            joined, banks = set(ties), [bank]
            for cluster in [c for c in clusters if c[0] & ties]:
                clusters.remove(cluster)
                joined, banks = joined | cluster[0], cluster[1] + banks
            clusters.append((joined, banks))
        return [(sorted(ties), banks) for ties, banks in clusters]

    def smallest(self) -> int:
        """Bytes of the smallest plan.

        Raises:
            ValueError: there is none.
        """
        sizes = []
        for form in self.forms():
            parts = self.allowed(form, None)
            least = [self._least(ties, banks, parts) for ties, banks in self.clusters]
            known = [size for size in least if size is not None]
            if len(known) == len(least):
                sizes.append(sum(known))
        if not sizes:
            raise ValueError(self._nothing())
        return self.problem.budget.fixed_bytes + self.outside.least + min(sizes)

    def _least(self, ties: list[int], banks: list[str], parts: Parts) -> int | None:
        """Bytes of the smallest plan of a cluster; None if there is none."""
        sizes = []
        for chains in self.combinations(ties, parts):
            size = self.beside(chains)[0]
            for bank in banks:
                shifts = [(part.least, part.shift(chains)) for _, part in parts[bank]]
                found = [least + shift[0] for least, shift in shifts if shift is not None]
                if not found:
                    break
                size += min(found)
            else:
                sizes.append(size)
        return min(sizes, default=None)

    def best(self) -> Picks:
        """The alternatives of the best plan; the smallest plan fits."""
        limit = self.problem.budget.unit_bytes
        cases = [(self._bound(*case), case) for case in self._cases(None)]
        cases = sorted((c for c in cases if c[0] < math.inf), key=lambda case: case[0])
        best: tuple[int, int] | None = None
        picks: dict[str, Alternative] = {}
        for bound, (parts, chains) in cases:
            if best is not None and bound > best[0]:
                break
            entries = self._entries(parts, chains, corners=False)
            if entries is None:
                continue
            groups = self.outside.groups + [entry.group for entry in entries]
            size, loss = self.beside(chains)
            if size + sum(int(group.bytes[0]) for group in groups) > limit:
                continue
            picked = _solved(groups, limit - size)
            for group, pick in zip(groups, picked, strict=True):
                size, loss = size + int(group.bytes[pick]), loss + int(group.loss[pick])
            if best is None or (loss, size) < best:
                best = loss, size
                picks = self._picks(entries, picked[len(self.outside.groups) :])
        assert picks, "smallest() has checked that something fits"
        return picks

    def bound(self, picks: Picks) -> float:
        """No plan with these alternatives has less loss."""
        bounds = [self._bound(*case) for case in self._cases(picks)]
        return min(bounds, default=math.inf) / self.scale

    def _bound(self, parts: Parts, chains: Mapping[int, Chain]) -> float:
        """No plan of the case has less loss, in whole numbers, but for rounding."""
        entries = self._entries(parts, chains, corners=True)
        if entries is None:
            return math.inf
        groups = self.outside.groups + [entry.group for entry in entries]
        size, loss = self.beside(chains)
        free = self.problem.budget.unit_bytes - size
        if sum(int(group.bytes[0]) for group in groups) > free:
            return math.inf
        base, price = knapsack.relaxed(groups, free)
        for group, pick in zip(groups, base, strict=True):
            free, loss = free - int(group.bytes[pick]), loss + int(group.loss[pick])
        return loss - price * free - _SLACK

    def _picks(self, entries: Sequence[_Entry], picked: Sequence[int]) -> dict[str, Alternative]:
        found = {}
        for entry, pick in zip(entries, picked, strict=True):
            numbers = entry.picks[entry.group.index[pick]]
            for bank, number in zip(entry.banks, numbers, strict=True):
                found[bank] = self.problem.banks[bank][int(number)]
        return {bank: found[bank] for bank in self.problem.banks}

    def forms(self) -> list[str | None]:
        if not self.problem.one_form:
            return [None]
        banks = self.problem.banks.values()
        return list(dict.fromkeys(a.form for alternatives in banks for a in alternatives))

    def allowed(self, form: str | None, picks: Picks | None) -> Parts:
        """The alternatives of a form, or those picked of it, with their numbers."""
        return {
            bank: [
                (number, part)
                for number, (part, a) in enumerate(zip(self.parts[bank], alternatives, strict=True))
                if form in (None, a.form) and (picks is None or picks[bank] is a)
            ]
            for bank, alternatives in self.problem.banks.items()
        }

    def _cases(self, picks: Picks | None) -> Iterator[tuple[Parts, dict[int, Chain]]]:
        """Forms and combinations of tied chains to be tried one by one."""
        for form in self.forms():
            parts = self.allowed(form, picks)
            if not all(parts.values()):
                continue
            for chains in self.combinations(self._outer(), parts):
                yield parts, chains

    def _outer(self) -> list[int]:
        """Ties whose chains are tried one by one: all, if they are few or hang together."""
        tied = [ties for ties, _ in self.clusters if ties]
        outer = sorted(tie for ties in tied for tie in ties)
        count = math.prod(len(self._chains(tie, self.allowed(None, None))) for tie in outer)
        return outer if len(tied) == 1 or count <= _COMBINATIONS else []

    def _chains(self, tie: int, parts: Parts) -> list[Chain]:
        """What a tie may take; not every alternative has all of it."""
        if tie in self.outside.tied:
            return list(self.outside.tied[tie])
        tables = [part.tied.get(tie, {}) for found in parts.values() for _, part in found]
        # Where no alternative has a choice of the tie, it binds nothing: one turn with any chain.
        return list(dict.fromkeys(chain for table in tables for chain in table)) or [()]

    def combinations(self, ties: Sequence[int], parts: Parts) -> Iterator[dict[int, Chain]]:
        """Every combination of chains of the ties."""
        chains = [self._chains(tie, parts) for tie in ties]
        count = math.prod(map(len, chains))
        if count > _MOST_COMBINATIONS:
            raise RuntimeError(
                f"{len(ties)} ties that reach over banks have {count:,} combinations of chains"
                f" (the limit is {_MOST_COMBINATIONS:,})"
            )
        for combination in itertools.product(*chains):
            yield dict(zip(ties, combination, strict=True))

    def beside(self, chains: Mapping[int, Chain]) -> tuple[int, int]:
        """Bytes and loss of choices outside of banks that ties give these chains."""
        found = [
            self.outside.tied[tie][chain]
            for tie, chain in chains.items()
            if tie in self.outside.tied
        ]
        return sum(size for size, _ in found), sum(loss for _, loss in found)

    def _entries(
        self, parts: Parts, chains: Mapping[int, Chain], corners: bool
    ) -> list[_Entry] | None:
        """The banks as groups, in one combination of chains; None if a bank has no alternative.

        Args:
            corners: hulls instead of frontiers.
        """
        entries = []
        for ties, banks in self.clusters:
            found: list[_Entry | None]
            if all(tie in chains for tie in ties):
                found = [_entry(bank, parts[bank], chains, corners) for bank in banks]
            else:
                offers = [
                    self._joined(parts, inner, banks, corners)
                    for inner in self.combinations(ties, parts)
                ]
                found = [_either([offer for offer in offers if offer is not None])]
            for entry in found:
                if entry is None:
                    return None
                entries.append(entry)
        return entries

    def _joined(
        self, parts: Parts, chains: Mapping[int, Chain], banks: Sequence[str], corners: bool
    ) -> _Entry | None:
        """A cluster's banks under given chains as one, what is tied to them outside included."""
        entries = []
        for bank in banks:
            entry = _entry(bank, parts[bank], chains, corners)
            if entry is None:
                return None
            entries.append(entry)
        if corners:  # of which no alternatives are asked
            sizes, losses = _corners([entry.group for entry in entries])
            picks = np.zeros((len(sizes), len(banks)), dtype=np.int64)
        else:
            whole = functools.reduce(_both, entries)
            sizes, losses = whole.group.bytes, whole.group.loss
            picks = whole.picks[whole.group.index]
        size, loss = self.beside(chains)
        return _Entry(tuple(banks), worthwhile(sizes + size, losses + loss), picks)

    def _nothing(self) -> str:
        if self.problem.one_form:
            return "no form of experts is there for all banks"
        return "the choices tied across banks have no candidate in common"


def _entry(
    bank: str, parts: Sequence[tuple[int, Part]], chains: Mapping[int, Chain], corners: bool
) -> _Entry | None:
    """A bank under given chains; None if no alternative can be had."""
    offers = []
    for number, part in parts:
        shift = part.shift(chains)
        if shift is not None:
            sizes, losses = part.corners if corners else part.frontier
            group = worthwhile(sizes + shift[0], losses + shift[1])
            picks = np.full((len(sizes), 1), number, dtype=np.int64)
            offers.append(_Entry((bank,), group, picks))
    return _either(offers)


def _either(entries: Sequence[_Entry]) -> _Entry | None:
    """Entries of the same banks as one with the points of all."""
    if len(entries) < 2:
        return entries[0] if entries else None
    sizes = np.concatenate([entry.group.bytes for entry in entries])
    losses = np.concatenate([entry.group.loss for entry in entries])
    picks = np.concatenate([entry.picks[entry.group.index] for entry in entries])
    return _Entry(entries[0].banks, worthwhile(sizes, losses), picks)


def _both(one: _Entry, other: _Entry) -> _Entry:
    """Entries of different banks as one with their sums, thinned where they are many."""
    sizes = (one.group.bytes[:, None] + other.group.bytes).ravel()
    losses = (one.group.loss[:, None] + other.group.loss).ravel()
    group = worthwhile(sizes, losses)
    index = group.index
    if len(index) > _POINTS:
        index = index[_thinned((group.bytes, group.loss))[0]]
    first, second = np.divmod(index, len(other.group.bytes))
    picks = np.concatenate(
        [one.picks[one.group.index[first]], other.picks[other.group.index[second]]], axis=1
    )
    return _Entry(one.banks + other.banks, worthwhile(sizes[index], losses[index]), picks)


def _solved(groups: Sequence[Group], budget: int) -> list[int]:
    """The best choices, or nearly: see ``_MOST_MOVES``."""
    try:
        return knapsack.solve(groups, budget, most_moves=_MOST_MOVES)
    except RuntimeError:
        return knapsack.solve(groups, budget, widest=_WIDEST)


def _owners(problem: Problem) -> dict[str, str | None]:
    """Choice → its bank; None outside of banks."""
    owner: dict[str, str | None] = dict.fromkeys(problem.choices)
    for bank, alternatives in problem.banks.items():
        for name in dict.fromkeys(name for a in alternatives for name in a.choices):
            if name in owner:
                raise ValueError(f"bank {bank}: the choice {name} stands elsewhere, too")
            owner[name] = bank
    return owner


def _largest_loss(problem: Problem) -> float:
    """No plan's loss is larger."""
    total = _largest(problem.choices)
    for bank, alternatives in problem.banks.items():
        for a in alternatives:
            if not math.isfinite(a.loss):
                raise ValueError(f"bank {bank}: the loss of {chain_text(a.prefix)} is {a.loss}")
        total += max(abs(a.loss) + _largest(a.choices) for a in alternatives)
    return total


def _largest(choices: Mapping[str, Sequence[Measurement]]) -> float:
    total = 0.0
    for unit, found in choices.items():
        for m in found:
            if not math.isfinite(m.loss):
                raise ValueError(f"unit {unit}: the loss of {chain_text(m.chain)} is {m.loss}")
        total += max(abs(m.loss) for m in found)
    return total
