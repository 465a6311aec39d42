"""EMQ: evolves a score, a formula over features whose ranking is that of measured losses.

Dong et al. 2023, 2307.10554, section 3: formulas are trees of unary and binary operators over what
is known of a layer (activations, gradients, weights, Hessians; here the features of
:mod:`moesaic.search.features`, errors included). Their fitness is Spearman's rank correlation with
measured losses. The population is renewed by crossover and mutation of parents of which one is
among the best of a random part and the other any, so that it stays diverse; formulas that are
invalid, or rank everything as another one does, are rejected at once.

What differs here. A formula is evaluated pair by pair and added up over a plan, as the knapsack
does; it is fitted to plans (several units compressed) and swaps (one unit) alike, each kind's
correlation counting the same. So that it is a loss, it must be finite and not below 0, vanish
where the errors among its inputs do, and not fall when they grow. Measurements that are to judge
the result take no part, and few are left to learn from: every operator and input must be worth (1
− ρ²) / n of correlation, which is what one more meaningless variable gains on n measurements on
average, ρ being the correlation of the best single input.

All that is random comes from one seed: the same input gives the same formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import rankdata

from moesaic.search.formula import BINARY, UNARY, Floats, Formula, Tree, evaluate, in_units, nodes

POPULATION, GENERATIONS = 80, 40
# Most operators and inputs of a formula.
_LARGEST = 13
# Part of the population that the better parent is the best of.
_TOURNAMENT = 0.1
_CROSSOVER = 0.4
# Values of formulas in memory at a time.
_NUMBERS = 1 << 24
# Attempts at a child before it is given up.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Observed:
    """Measured losses of one kind of plans.

    Attributes:
        members: ``[plans, pairs]``, 1 where a plan has a pair.
        losses: ``[plans]``.
    """

    members: csr_array
    losses: Floats

    def predicted(self, values: Floats) -> Floats:
        """Sums of ``values [pairs]`` or ``[formulas, pairs]`` over each plan."""
        found: Floats = (self.members @ values.T).T
        return found

    def part(self, rows: NDArray[np.int64]) -> "Observed":
        """Some of the plans."""
        return Observed(self.members[rows], self.losses[rows])


@dataclass(frozen=True)
class Evolved:
    """What came of it.

    Attributes:
        formula: the best one.
        fitness: its mean correlation with what it was fitted to.
        tried: valid formulas that were evaluated.
    """

    formula: Formula
    fitness: float
    tried: int


def rank_correlations(values: Floats, losses: Floats) -> Floats:
    """Spearman's correlation of each row of ``values [formulas, plans]``; NaN for constant ones."""
    ranks, wanted = rankdata(values, axis=-1), rankdata(losses)
    ranks -= ranks.mean(-1, keepdims=True)
    wanted -= wanted.mean()
    scale = np.sqrt(np.square(ranks).sum(-1) * np.square(wanted).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = ranks @ wanted / scale
    return found


def evolve(
    features: Mapping[str, Floats],
    errors: frozenset[str],
    changed: NDArray[np.bool_],
    observed: Sequence[Observed],
    seed: int,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> Evolved:
    """The formula that ranks what was observed best.

    Args:
        features: input → one number per pair, none below 0.
        errors: inputs of which a formula must have one.
        changed: which pairs are compressed; the others lose nothing.
        observed: kinds of plans, each with three plans or more.

    Raises:
        ValueError: no input ranks anything, or too little was observed.
    """
    if not observed or any(len(kind.losses) < 3 for kind in observed):
        raise ValueError("emq needs three measured plans or more of each kind")
    search = _Evolution(features, errors, changed, observed, seed)
    search.admit(sorted(features))
    if not search.known:
        raise ValueError("emq: no input that measures an error tells the measured plans apart")
    search.set_price()
    search.admit(search.random_trees(4 * population))
    search.select(population)
    for _ in range(generations):
        search.admit(search.children(population))
        search.select(population)
    best = search.ranked()[0]
    return Evolved(Formula(best.tree), best.fitness, search.tried)


@dataclass(frozen=True)
class _Member:
    """A valid formula.

    Attributes:
        each: correlation with each kind of plans.
        behaviour: equal for those that rank all plans alike.
    """

    tree: Tree
    each: tuple[float, ...]
    behaviour: bytes

    @property
    def fitness(self) -> float:
        return sum(self.each) / len(self.each)

    def worth(self, price: float) -> tuple[float, int, str]:
        """The smaller the better; ``price`` is what a node must be worth."""
        size = Formula(self.tree).size
        return (price * size - round(self.fitness, 9), size, str(self.tree))


class _Evolution:
    """The population and what it is judged by."""

    def __init__(
        self,
        features: Mapping[str, Floats],
        errors: frozenset[str],
        changed: NDArray[np.bool_],
        observed: Sequence[Observed],
        seed: int,
    ) -> None:
        self.inputs = {name: in_units(values[changed]) for name, values in features.items()}
        self.grown, self.gone = (
            {n: v * factor if n in errors else v for n, v in self.inputs.items()}
            for factor in (2.0, 0.0)
        )
        self.names = sorted(features)
        self.errors = sorted(errors & features.keys())
        columns = np.flatnonzero(changed)
        self.observed = [Observed(kind.members[:, columns], kind.losses) for kind in observed]
        self.random = np.random.default_rng(seed)
        self.known: dict[bytes, _Member] = {}
        self.seen: set[Tree] = set()
        self.tried = 0
        self.price = 0.0

    # Judging

    def admit(self, trees: Sequence[Tree]) -> None:
        """Judges trees and takes in those that are valid and new."""
        fresh = [tree for tree in dict.fromkeys(trees) if tree not in self.seen]
        self.seen.update(fresh)
        step = max(1, _NUMBERS // max(len(self.inputs[self.names[0]]), 1))
        for low in range(0, len(fresh), step):
            self._judge(fresh[low : low + step])

    def _judge(self, trees: Sequence[Tree]) -> None:
        valued = [(tree, value) for tree in trees for value in self._values(tree)]
        if not valued:
            return
        values = np.stack([value for _, value in valued])  # [formulas, pairs]
        sums = [kind.predicted(values) for kind in self.observed]
        found = [rank_correlations(sums[i], kind.losses) for i, kind in enumerate(self.observed)]
        ranks = np.concatenate([rankdata(s, axis=-1) for s in sums], axis=-1)
        each = np.stack(found, axis=1)  # [formulas, kinds]
        self.tried += len(valued)
        for row, (tree, _) in enumerate(valued):
            if not np.isfinite(each[row]).all():
                continue
            member = _Member(tree, tuple(each[row].tolist()), ranks[row].tobytes())
            other = self.known.get(member.behaviour)
            if other is None or member.worth(self.price) < other.worth(self.price):
                self.known[member.behaviour] = member

    def _values(self, tree: Tree) -> list[Floats]:
        """The tree's values on compressed pairs, if it is valid."""
        names = {node for node in nodes(tree) if isinstance(node, str)}
        if not names.intersection(self.errors) or Formula(tree).size > _LARGEST:
            return []
        values = evaluate(tree, self.inputs)
        fine = np.isfinite(values).all() and values.min() >= 0 and values.max() > values.min()
        return [values] if fine and self._is_loss(tree, values) else []

    def _is_loss(self, tree: Tree, values: Floats) -> bool:
        """Whether values vanish with the errors, and do not fall when these are twice as large."""
        grown = evaluate(tree, self.grown)
        return bool((evaluate(tree, self.gone) == 0).all() and (grown >= values).all())

    # Selecting

    def set_price(self) -> None:
        """What a node must be worth, from the best of the inputs alone (see the top)."""
        best = self.ranked()[0].each
        gains = [(1 - r * r) / len(o.losses) for r, o in zip(best, self.observed, strict=True)]
        self.price = sum(gains) / len(gains)

    def ranked(self) -> list[_Member]:
        return sorted(self.known.values(), key=lambda member: member.worth(self.price))

    def select(self, count: int) -> None:
        """Leaves the best."""
        self.known = {member.behaviour: member for member in self.ranked()[:count]}

    def children(self, count: int) -> list[Tree]:
        """Trees made of the population's, and some that are new."""
        members = self.ranked()
        size = max(1, round(_TOURNAMENT * len(members)))
        found: list[Tree] = []
        for _ in range(count):
            for _ in range(_ATTEMPTS):
                # Members are in order of worth: the lowest place is the best one.
                first = members[int(self.random.integers(len(members), size=size).min())].tree
                if self.random.random() < _CROSSOVER:
                    other = members[int(self.random.integers(len(members)))].tree
                    child = self._replaced(first, self._any_node(other))
                else:
                    child = self._mutated(first)
                if child not in self.seen and Formula(child).size <= _LARGEST:
                    found.append(child)
                    break
        return [*found, *self.random_trees(count // 8)]

    # Trees

    def random_trees(self, count: int) -> list[Tree]:
        return [self._tree(3) for _ in range(count)]

    def _tree(self, depth: int) -> Tree:
        kind = self.random.random()
        if depth == 0 or kind < 0.25:
            return self._pick(self.names)
        if kind < 0.5:
            return (self._pick([*UNARY]), self._tree(depth - 1))
        return (self._pick([*BINARY]), self._tree(depth - 1), self._tree(depth - 1))

    def _pick(self, names: Sequence[str]) -> str:
        return names[int(self.random.integers(len(names)))]

    def _any_node(self, tree: Tree) -> Tree:
        every = list(nodes(tree))
        return every[int(self.random.integers(len(every)))]

    def _replaced(self, tree: Tree, by: Tree) -> Tree:
        """The tree with one of its nodes, any, replaced."""
        return _with_node(tree, int(self.random.integers(Formula(tree).size)), by)

    def _mutated(self, tree: Tree) -> Tree:
        """A tree with a new part, another operator or input, or something around or taken off."""
        kind = int(self.random.integers(4))
        if kind == 0:
            return self._replaced(tree, self._tree(2))
        place = int(self.random.integers(Formula(tree).size))
        node = list(nodes(tree))[place]
        if kind == 1:
            around: Tree = (self._pick([*UNARY]), node)
            if self.random.random() < 0.5:
                around = (self._pick([*BINARY]), node, self._pick(self.names))
            return _with_node(tree, place, around)
        if isinstance(node, str):
            return _with_node(tree, place, self._pick(self.names))
        if kind == 2:
            return _with_node(tree, place, node[1 + int(self.random.integers(len(node) - 1))])
        same = UNARY if len(node) == 2 else BINARY
        return _with_node(tree, place, (self._pick([*same]), *node[1:]))


def _with_node(tree: Tree, place: int, by: Tree) -> Tree:
    """The tree with the node at a place, in the order of :func:`nodes`, replaced."""
    if place == 0:
        return by
    place -= 1
    assert not isinstance(tree, str), "an input has no node below it"
    parts = []
    for part in tree[1:]:
        size = Formula(part).size
        parts.append(_with_node(part, place, by) if 0 <= place < size else part)
        place -= size
    return (tree[0], *parts)
