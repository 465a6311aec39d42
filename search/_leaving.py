"""What knobs that are no numbers leave of the candidates.

Of ``gptq.act_order`` the value ``true`` leaves all chains out in which gptq has another one, and
``corrections: left out`` those that end in a correction. Knobs act one after the other; one that
would leave nothing of what a choice is offered leaves all of it.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

from moesaic.methods.base import Chain, is_repair
from moesaic.search.base import Measurement, Problem

T = TypeVar("T")
Rule = Callable[[Chain], bool]

CORRECTIONS = "corrections"
ANY, OFFERED, LEFT_OUT = "any", "offered", "left out"
# Combinations of values that are looked at for what they leave.
_COMBINATIONS = 4096


def text(value: Any) -> str:
    """An option's value as knobs have it."""
    return value if isinstance(value, str) else json.dumps(value)


def means(choice: str, value: Any) -> bool:
    """Whether a value that a user wrote is a choice of a knob; 1 and 1.0 are one number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(ValueError):
            if float(choice) == value:
                return True
    return text(value) == choice


def rule(name: str, value: float | str) -> Rule | None:
    """What chains must keep to under a value of a knob; None if nothing is left out."""
    if name == CORRECTIONS:
        return _uncorrected if value == LEFT_OUT else None
    if not isinstance(value, str) or value == ANY:
        return None
    method, option = name.split(".", 1)
    return partial(_keeps_to, method, option, value)


def left(offers: Sequence[T], chain: Callable[[T], Chain], rules: Sequence[Rule]) -> Sequence[T]:
    """What rules leave, one after the other; one that leaves nothing does not count."""
    for keeps in rules:
        offers = [offer for offer in offers if keeps(chain(offer))] or offers
    return offers


class Reach:
    """What some values or others may leave.

    Args:
        allowed: knob → its values, of those that are no numbers, in the order in which they act.
    """

    def __init__(self, allowed: Mapping[str, Sequence[str]]) -> None:
        self._rules = [[rule(name, v) for v in values] for name, values in allowed.items()]
        self.narrows = any(rules and None not in rules for rules in self._rules)
        if math.prod(map(len, self._rules)) > _COMBINATIONS:
            self.narrows = False
        self._some = cache(self._of)

    def left(self, offers: Sequence[T], chain: Callable[[T], Chain]) -> list[T]:
        """The offers that at least one combination of values leaves; all, where these are too many
        to look at, or each knob may leave everything."""
        if not self.narrows:
            return list(offers)
        some = self._some(tuple(map(chain, offers)))
        return [offer for offer, is_left in zip(offers, some, strict=True) if is_left]

    def problem(self, given: Problem) -> Problem:
        """The problem with what may be left of its choices and alternatives."""

        def kept(choices: Mapping[str, Sequence[Measurement]]) -> dict[str, list[Measurement]]:
            return {name: self.left(found, lambda m: m.chain) for name, found in choices.items()}

        banks = {
            bank: [
                replace(a, choices=kept(a.choices))
                for a in self.left(alternatives, lambda a: a.prefix)
            ]
            for bank, alternatives in given.banks.items()
        }
        return replace(given, choices=kept(given.choices), banks=banks)

    def _of(self, chains: tuple[Chain, ...]) -> list[bool]:
        everything, union = (1 << len(chains)) - 1, 0
        # Of each value the chains that it leaves, a bit for each.
        kept = [
            {everything if keeps is None else _bits(map(keeps, chains)) for keeps in rules}
            for rules in self._rules
        ]
        for combination in itertools.product(*kept):
            found = everything
            for bits in combination:
                found = found & bits or found
            union |= found
        return [bool(union >> place & 1) for place in range(len(chains))]


def _bits(values: "map[bool]") -> int:
    return sum(1 << place for place, value in enumerate(values) if value)


def _uncorrected(chain: Chain) -> bool:
    return not (chain and is_repair(chain[-1].method))


def _keeps_to(method: str, option: str, value: str, chain: Chain) -> bool:
    """Whether a chain has one value of an option wherever it uses the method."""
    own = [json.loads(spec.options)[option] for spec in chain if spec.method == method]
    return all(text(found) == value for found in own)
