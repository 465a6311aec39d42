"""A few numbers that say how far an allocation trusts its measurements.

An allocation is only as good as the losses that it adds up. They are predicted, each from one unit
alone; so they are wrong in ways that many units share: early blocks matter more than they seem, one
kind of part less, errors add up otherwise than a sum. A handful of *knobs* says by how much. From
their values a problem is re-weighted and solved as ever, and the plan fits the budget as ever. What
remains for a sampler is to find a few numbers, whatever the number of units; to choose for each of
hundreds of units by itself is more than any sampler can do in a few hundred trials.

The loss of a choice c of unit u with predicted loss L and relative error E becomes

    L' = w · exp(slope · (depth − ½)) · (g_u / g)^(exponent − 1) · L^(1 − mix) · (s · E)^mix

where depth runs from 0 (first block) to 1 (last), w is the product of the weights of the kind of
part and of the groups that u belongs to, g_u is the geometric mean of the unit's losses per weight,
g the mean of that over all units, and s makes losses and errors equally large on the whole. All
knobs at their defaults leave L as it is. With an exponent of 0 all weights of the model are equally
sensitive, whatever was measured: that is the uniform plan, or as near to it as the budget allows.
Where measurements tell sources of text apart, L' is also a weighted mean over them
(:mod:`moesaic.search._sources`).

Knobs that are no numbers leave some candidates out (:mod:`moesaic.search._leaving`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moesaic.methods.base import Chain, is_repair
from moesaic.search._leaving import (
    ANY,
    CORRECTIONS,
    LEFT_OUT,
    OFFERED,
    Reach,
    left,
    means,
    rule,
    text,
)
from moesaic.search._sources import SOURCE, SourceWeights, varied
from moesaic.search.alternatives import solve
from moesaic.search.base import Measurement, Plan, Problem, smallest_bytes

Value = float | str
Values = Mapping[str, Value]

EXPONENT, SLOPE, MIX = "score_exponent", "depth_slope", "mix"
CHARGE, WEIGHT = "charge.reductions", "weight."
PREDICTED = "as predicted"  # a start
GREEDY = "greedy"  # another one, and the strategy that makes its plan
_FACTORS = 1e-3, 1e3  # the widest range of a factor
# Options that say how large a result is: what an allocation chooses by itself.
SIZES = frozenset({"bits", "rank", "keep", "density", "outliers", "width"})


@dataclass(frozen=True)
class Knob:
    """One knob.

    Attributes:
        name: as recipes and studies have it.
        meaning: for people.
        default: what leaves everything as it was predicted.
        low, high: range of a number.
        log: whether factors matter rather than differences.
        choices: the values of a knob that is no number.
        widest: what a recipe may make of the range; no more than that, if None.
    """

    name: str
    meaning: str
    default: Value
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()
    widest: tuple[float, float] | None = None

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.choices) == 1 or (not self.choices and self.low == self.high)

    def nearest(self, value: Value) -> Value:
        """The value, or the nearest one allowed."""
        if self.choices:
            return value if value in self.choices else self.default
        return min(max(float(value), self.low), self.high)

    def range_text(self) -> str:
        """What is allowed, for people."""
        return ", ".join(self.choices) if self.choices else f"{self.low:g} to {self.high:g}"

    def to_json(self) -> dict[str, Any]:
        allowed: Any = list(self.choices) if self.choices else [self.low, self.high]
        return {"default": self.default, "allowed": allowed, "log": self.log}


@dataclass(frozen=True)
class Place:
    """Where a choice stands in the model.

    Attributes:
        kind: of part, such as ``attention``.
        depth: of its block, 0 for the first one and 1 for the last.
        groups: names of the user's groups that it belongs to.
    """

    kind: str
    depth: float
    groups: tuple[str, ...] = ()


def narrowed(knobs: Sequence[Knob], wishes: Mapping[str, Any]) -> list[Knob]:
    """Knobs as a user wants them: one value fixes a knob, ``[low, high]`` is another range of a
    number, perhaps a wider one, and a list leaves some of the values.

    Raises:
        ValueError: naming every wish that cannot be met.
    """
    known = {knob.name: knob for knob in knobs}
    problems = []
    for name, wish in wishes.items():
        if name not in known:
            problems.append(f"{name}: no such knob here (there are: {', '.join(known)})")
            continue
        try:
            known[name] = _narrowed(known[name], wish)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return list(known.values())


def _narrowed(knob: Knob, wish: Any) -> Knob:
    if knob.choices:
        wishes = wish if isinstance(wish, list) else [wish]
        meant = [next((c for c in knob.choices if means(c, value)), None) for value in wishes]
        wanted = [choice for choice in meant if choice is not None]
        if not wanted or len(wanted) < len(meant):
            raise ValueError(f"{wish!r} is not among {knob.range_text()}")
        default = knob.default if knob.default in wanted else wanted[0]
        return replace(knob, choices=tuple(dict.fromkeys(wanted)), default=default)
    ends = wish if isinstance(wish, list) else [wish, wish]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if not numbers or len(ends) != 2:
        raise ValueError(f"{wish!r} is neither a number nor [low, high]")
    least, most = knob.widest or (knob.low, knob.high)
    if not least <= ends[0] <= ends[1] <= most:
        raise ValueError(f"{wish!r} is not within {least:g} to {most:g}")
    low, high = map(float, ends)
    return replace(knob, low=low, high=high, default=min(max(float(knob.default), low), high))


class Allocator:
    """Plans of one problem, by the values of its knobs.

    Args:
        problem: measurements, ties, budget.
        places: of every choice, those of banks included.
        strategy: name of a search strategy that adds up losses.
        sources: of the text, name → sequences, where measurements tell them apart.

    Attributes:
        knobs: all there are, in a fixed order.

    Example::

        allocator = Allocator(problem, {name: Place("mlp", 0.5) for name in problem.choices})
        plan = allocator.plan({"score_exponent": 0.8, "depth_slope": -1.0})
    """

    def __init__(
        self,
        problem: Problem,
        places: Mapping[str, Place],
        strategy: str = "knapsack",
        sources: Mapping[str, int] | None = None,
    ) -> None:
        self.problem = problem
        self.places = places
        self.strategy = strategy
        self.sources = sources or {}
        self.knobs = [*self._numbers(), *self._options()]

    def plan(self, values: Values) -> Plan:
        """The plan of some values; knobs that are not named are at their defaults.

        Raises:
            Infeasible: no plan fits the budget.
            ValueError: there is none whatever the budget.
        """
        found = solve(self.reweighted(values), self.strategy)
        return self.problem.plan(found.units)

    def reweighted(self, values: Values) -> Problem:
        """The problem with other losses, and without what some knobs leave out."""
        weigh = _Weighing(self, {knob.name: knob.default for knob in self.knobs} | dict(values))
        banks = {}
        for bank, alternatives in self.problem.banks.items():
            banks[bank] = [
                replace(a, loss=a.loss * weigh.charge, choices=weigh.choices(a.choices))
                for a in left(alternatives, lambda a: a.prefix, weigh.rules)
            ]
        return replace(self.problem, choices=weigh.choices(self.problem.choices), banks=banks)

    def smallest_bytes(self, knobs: Sequence[Knob]) -> int:
        """Bytes of the smallest plan that knobs lead to as they are allowed to be turned. Where a
        knob is left several values, but not all, it may be a little less: each unit is taken with
        the values that suit it.

        Raises:
            ValueError: there is no plan at all.
        """
        reach = Reach({knob.name: knob.choices for knob in knobs if knob.choices})
        return smallest_bytes(reach.problem(self.problem), self.strategy)

    def starts(self) -> dict[str, dict[str, Value]]:
        """Values to try first, by name: the allocation as predicted, the even one, and the greedy
        one, which is the first with the strategy of that name."""
        found: dict[str, dict[str, Value]] = {
            PREDICTED: {},
            "even": {EXPONENT: 0.0},
            GREEDY: {},
        }
        names = {knob.name for knob in self.knobs}
        if CHARGE in names:
            found["reductions × 4"] = {CHARGE: 4.0}
        if CORRECTIONS in names:
            found["without corrections"] = {CORRECTIONS: LEFT_OUT}
        return found

    def measured(self) -> list[list[Any]]:
        """All that plans depend on, plain: of every choice its candidates, and alternatives."""
        found: list[list[Any]] = []
        for name, alternatives in self.problem.banks.items():
            found += [[name, str(a.prefix), a.bytes, a.loss] for a in alternatives]
        for choices in self._tables():
            for name, offers in choices.items():
                found += [
                    [name, str(m.chain), m.bytes, m.error, m.score, *m.shares] for m in offers
                ]
        return found

    # What there is to turn

    def _numbers(self) -> Iterator[Knob]:
        meaning = "1: sensitivities as measured; 0: all weights alike"
        yield Knob(EXPONENT, meaning, 1.0, 0.0, 2.0, widest=(-2.0, 4.0))
        depths = {place.depth for place in self.places.values()}
        if len(depths) > 1:
            meaning = "above 0: late blocks matter more than measured"
            yield Knob(SLOPE, meaning, 0.0, -3.0, 3.0, widest=(-10.0, 10.0))
        scored = [m.score is not None for m in self._measurements()]
        if all(scored):
            meaning = "0: predicted losses alone; 1: relative errors of the outputs alone"
            yield Knob(MIX, meaning, 0.0, 0.0, 1.0)
        kinds: dict[str, int] = {}
        for name, place in self.places.items():
            kinds[place.kind] = kinds.get(place.kind, 0) + self._weights_of(name)
        largest = max(kinds, key=lambda kind: kinds[kind], default="")
        for kind in kinds:
            # Only how kinds stand to each other matters: one of them needs none.
            if kind != largest:
                yield _weight(kind, f"how much more {kind} matters than {largest}, as measured")
        for group in dict.fromkeys(g for place in self.places.values() for g in place.groups):
            yield _weight(group, f"how much more the units of the group {group} matter")
        for source in varied(self.sources):
            yield _factor_knob(SOURCE + source, f"how much more the text {source} counts")
        if any(a.prefix for found in self.problem.banks.values() for a in found):
            meaning = "factor on what reductions are predicted to lose"
            yield Knob(CHARGE, meaning, 1.0, 0.25, 16.0, log=True, widest=_FACTORS)

    def _options(self) -> Iterator[Knob]:
        chains = list(dict.fromkeys(self._chains()))
        corrected = [bool(chain) and is_repair(chain[-1].method) for chain in chains]
        if any(corrected) and not all(corrected):
            meaning = "whether chains that end in a correction are offered"
            yield Knob(CORRECTIONS, meaning, OFFERED, choices=(OFFERED, LEFT_OUT))
        seen = set()
        for method in dict.fromkeys(spec.method for chain in chains for spec in chain):
            specs = dict.fromkeys(s for chain in chains for s in chain if s.method == method)
            options = [json.loads(spec.options) for spec in specs]
            for option in dict.fromkeys(name for own in options for name in own):
                texts = [text(own[option]) for own in options]
                values = tuple(dict.fromkeys(texts))
                # An option that another one decides is no second knob.
                split = (method, tuple(map(values.index, texts)))
                if len(values) < 2 or option in SIZES or split in seen:
                    continue
                seen.add(split)
                meaning = f"{option} of {method}; {ANY}: whatever is predicted to be best"
                yield Knob(f"{method}.{option}", meaning, ANY, choices=(ANY, *values))

    def _measurements(self) -> Iterator[Measurement]:
        for choices in self._tables():
            for found in choices.values():
                yield from found

    def _tables(self) -> Iterator[Mapping[str, Sequence[Measurement]]]:
        yield self.problem.choices
        for alternatives in self.problem.banks.values():
            yield from (a.choices for a in alternatives)

    def _chains(self) -> Iterator[Chain]:
        yield from (m.chain for m in self._measurements())
        for alternatives in self.problem.banks.values():
            yield from (a.prefix for a in alternatives)

    def _weights_of(self, name: str) -> int:
        """Bytes of a choice before it was compressed; 1 where that is not known."""
        layer = self.problem.layers.get(name)
        return 1 if layer is None else layer.bytes

    # How large things are

    @cached_property
    def sensitivity(self) -> dict[str, tuple[float, float]]:
        """Choice → mean logarithm of its losses and of its errors, both per weight.

        Of choices that stand in several alternatives, the first one's. Zeros do not count.
        """
        found: dict[str, tuple[float, float]] = {}
        for choices in self._tables():
            for name, measured in choices.items():
                both = [(m.loss, m.error) for m in measured if m.loss > 0 and m.error > 0]
                if name not in found and both:
                    size = math.log(self._weights_of(name))
                    loss = sum(math.log(loss) for loss, _ in both) / len(both)
                    error = sum(math.log(error) for _, error in both) / len(both)
                    found[name] = (loss - size, error - size)
        return found

    @cached_property
    def level(self) -> tuple[float, float]:
        """Means of :attr:`sensitivity`."""
        count = max(len(self.sensitivity), 1)
        loss, error = (sum(pair[i] for pair in self.sensitivity.values()) for i in (0, 1))
        return loss / count, error / count


class _Weighing:
    """What values do to measurements."""

    def __init__(self, allocator: Allocator, values: Values) -> None:
        self.allocator = allocator
        self.values = values
        self.charge = float(values.get(CHARGE, 1.0))
        self.mix = float(values.get(MIX, 0.0))
        self.sources = SourceWeights(allocator.sources, values)
        rules = (rule(name, value) for name, value in values.items())
        self.rules = [keeps for keeps in rules if keeps is not None]

    def choices(self, choices: Mapping[str, Sequence[Measurement]]) -> dict[str, list[Measurement]]:
        return {
            name: self._weighed(name, left(measured, lambda m: m.chain, self.rules))
            for name, measured in choices.items()
        }

    def _weighed(self, name: str, measured: Sequence[Measurement]) -> list[Measurement]:
        factor, (loss, error) = self._factor(name), self.allocator.level
        scale = math.exp(loss - error)
        mix, own = self.mix, [factor * self.sources.factor(m.shares) for m in measured]
        if mix == 0:
            return [m.scored(f * m.loss) for m, f in zip(measured, own, strict=True)]
        return [
            m.scored(f * m.loss ** (1 - mix) * (scale * m.error) ** mix)
            for m, f in zip(measured, own, strict=True)
        ]

    def _factor(self, name: str) -> float:
        allocator, place = self.allocator, self.allocator.places[name]
        logarithm = float(self.values.get(SLOPE, 0.0)) * (place.depth - 0.5)
        for kind in (place.kind, *place.groups):
            logarithm += math.log(float(self.values.get(WEIGHT + kind, 1.0)))
        if name in allocator.sensitivity:
            own, all_units = allocator.sensitivity[name], allocator.level
            spread = [a - b for a, b in zip(own, all_units, strict=True)]
            mixed = (1 - self.mix) * spread[0] + self.mix * spread[1]
            logarithm += (float(self.values[EXPONENT]) - 1) * mixed
        return math.exp(logarithm)


def _weight(name: str, meaning: str) -> Knob:
    return _factor_knob(WEIGHT + name, meaning)


def _factor_knob(name: str, meaning: str) -> Knob:
    return Knob(name, meaning, 1.0, 0.125, 8.0, log=True, widest=_FACTORS)
