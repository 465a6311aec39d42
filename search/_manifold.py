"""Probabilities of choices whose expected bytes are exactly the budget.

Helcig and Alistarh 2026, "Model Compression with Exact Budget Constraints via Riemannian
Manifolds", 2605.00649, sections 2 and 3. Every group of units has a logit per choice, p = softmax;
the expected bytes are a smooth function of the logits, and those that meet a budget are a surface.
To stay on it one needs three things.

- The *normal*. Of a group's logit k it is p_k · (bytes_k − expected bytes of the group).
- *Retraction*: whoever left the surface comes back to it along the bytes: logit − τ · bytes. The
  expected bytes fall as τ rises, at the rate of their variance, so that one τ meets the budget.
- *Transport* of a momentum to another point: what points along the normal there is taken out.

Banks that may be reduced have a logit per alternative as well, whose choices count only where it is
taken: the distribution is over whole plans of the bank, first its alternative, then the choices in
it. All three carry over: the normal gets the probability of the alternative as a factor, and
shifting all plans of a bank by −τ · bytes shifts an alternative's logit by what that does to the
sum over its plans, which for a product is a sum of logarithms over its groups.

What is tied over several banks, and the form that all banks must share, count in plans that are
drawn (:mod:`moesaic.search.relax`), not here: every bank has logits of its own for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from moesaic.methods.base import Chain
from moesaic.search.base import Budget, Measurement, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Relative error of the expected bytes after a retraction.
_CLOSE = 1e-12
# Doublings of τ before it is given up that any meets the budget.
_DOUBLINGS = 200


@dataclass(frozen=True)
class Logits:
    """A point, or a direction.

    Attributes:
        choices: ``[groups, columns]``; 0 where a group has fewer choices.
        alternatives: ``[parts]``, the first part being what stands outside of banks.
    """

    choices: Floats
    alternatives: Floats

    def dot(self, other: "Logits") -> float:
        """Inner product."""
        own = float((self.choices * other.choices).sum())
        return own + float((self.alternatives * other.alternatives).sum())

    def plus(self, other: "Logits", factor: float = 1.0) -> "Logits":
        """Sum with a multiple of another one."""
        return Logits(
            self.choices + factor * other.choices,
            self.alternatives + factor * other.alternatives,
        )


@dataclass(frozen=True)
class Part:
    """What stands outside of banks, or an alternative of a bank.

    Attributes:
        bank, pick: number of the bank and of its alternative; -1 outside.
        groups: numbers of its groups.
        bytes, loss: of it besides its groups.
    """

    bank: int
    pick: int
    groups: range
    bytes: int
    loss: float


class Manifold:
    """The logits of a problem that meet its budget.

    Attributes:
        parts: what stands outside first, then bank by bank.
        names: units of every group.
        chains: of every group, in the order of its columns.
        bytes: ``[groups, columns]``.
        loss: the same, predicted.
        there: which columns a group has.
        target: what the expected bytes of units and alternatives are to be; None where any plan
            fits.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.names: list[tuple[str, ...]] = []
        self.chains: list[list[Chain]] = []
        offers: list[list[tuple[Chain, int, float]]] = []
        self.parts: list[Part] = []
        for bank, pick, choices, size, loss in self._sources():
            first = len(self.names)
            for units, found in _groups(choices, problem.ties):
                self.names.append(units)
                self.chains.append([chain for chain, _, _ in found])
                offers.append(found)
            groups = range(first, len(self.names))
            self.parts.append(Part(bank, pick, groups, size, loss))
        width = max((len(found) for found in offers), default=1)
        shape = (len(offers), width)
        self.there: Bools = np.zeros(shape, dtype=bool)
        self.bytes: Floats = np.zeros(shape)
        self.loss: Floats = np.zeros(shape)
        for row, found in enumerate(offers):
            self.there[row, : len(found)] = True
            self.bytes[row, : len(found)] = [size for _, size, _ in found]
            self.loss[row, : len(found)] = [loss for _, _, loss in found]
        self.part_of: Ints = np.repeat(
            np.arange(len(self.parts)), [len(part.groups) for part in self.parts]
        )
        self._own = np.array([part.bytes for part in self.parts], dtype=float)
        # Outside is -1, the last place of an array of parts, which no bank has.
        self._banks = np.array([part.bank for part in self.parts])
        # Costs near one: τ and what it multiplies are then of the size of logits.
        self._unit = max(float(self.bytes[self.there].mean()), 1.0) if offers else 1.0
        largest = self.expected(self._tilted(self.zeros(), -1e6 / self._unit))
        limit = float(problem.budget.unit_bytes)
        self.target = limit if largest > limit else None

    def _sources(
        self,
    ) -> Iterator[tuple[int, int, Mapping[str, Sequence[Measurement]], int, float]]:
        yield -1, -1, self.problem.choices, 0, 0.0
        for number, alternatives in enumerate(self.problem.banks.values()):
            for pick, a in enumerate(alternatives):
                yield number, pick, a.choices, a.bytes, a.loss

    def zeros(self) -> Logits:
        """All choices alike."""
        return Logits(np.zeros(self.there.shape), np.zeros(len(self.parts)))

    def probabilities(self, logits: Logits) -> tuple[Floats, Floats]:
        """Of the choices in their groups, and of the alternatives in their banks."""
        choices = np.exp(self._masked(logits) - _logsumexp(self._masked(logits))[:, None])
        return choices, np.exp(logits.alternatives - self._over_banks(logits.alternatives))

    def expected(self, logits: Logits) -> float:
        """Bytes of units and alternatives."""
        _, taken, sizes = self._sizes(logits)
        return float((taken * sizes).sum())

    def normal(self, logits: Logits) -> Logits:
        """Derivative of the expected bytes."""
        choices, taken, sizes = self._sizes(logits)
        mean = (choices * self.bytes).sum(axis=1)
        groups = taken[self.part_of, None] * choices * (self.bytes - mean[:, None])
        in_bank = np.zeros(len(self.parts))
        np.add.at(in_bank, self._banks, taken * sizes)
        return Logits(groups, taken * (sizes - in_bank[self._banks]))

    def tangent(self, direction: Logits, logits: Logits) -> Logits:
        """A direction without what leaves the surface at a point; with that at another point than
        the direction's own, the direction is transported there."""
        if self.target is None:
            return direction
        normal = self.normal(logits)
        square = normal.dot(normal)
        return direction.plus(normal, -direction.dot(normal) / square) if square else direction

    def retracted(self, logits: Logits) -> Logits:
        """The point of the surface that shifting by the bytes leads to.

        Raises:
            ValueError: there is none: even the smallest choices exceed the budget.
        """
        if self.target is None:
            return logits
        target = self.target

        def excess(tau: float) -> float:
            return (self.expected(self._tilted(logits, tau / self._unit)) - target) / target

        here = excess(0.0)
        if abs(here) < _CLOSE:
            return logits
        step = 1.0 if here > 0 else -1.0
        for _ in range(_DOUBLINGS):
            if excess(step) * here <= 0:
                break
            step *= 2
        else:
            raise ValueError(f"no probabilities have {target:,.0f} expected bytes")
        tau = brentq(excess, min(0.0, step), max(0.0, step), xtol=1e-300, rtol=1e-15, maxiter=500)
        return self._tilted(logits, float(tau) / self._unit)

    def _tilted(self, logits: Logits, tau: float) -> Logits:
        """Every plan's logarithm less τ · its bytes."""
        before = self._masked(logits)
        after = np.where(self.there, before - tau * self.bytes, -np.inf)
        gained = np.zeros(len(self.parts))
        np.add.at(gained, self.part_of, _logsumexp(after) - _logsumexp(before))
        choices = np.where(self.there, logits.choices - tau * self.bytes, 0.0)
        # Only differences within a group matter; kept small, they stay exact.
        choices -= np.where(self.there, after.max(axis=1, initial=-np.inf)[:, None], 0.0)
        alternatives = logits.alternatives + gained - tau * self._own
        return Logits(choices, alternatives - self._over_banks(alternatives))

    def _masked(self, logits: Logits) -> Floats:
        masked: Floats = np.where(self.there, logits.choices, -np.inf)
        return masked

    def _sizes(self, logits: Logits) -> tuple[Floats, Floats, Floats]:
        """Probabilities, and expected bytes of every part where it is taken."""
        choices, taken = self.probabilities(logits)
        sizes = self._own.copy()
        np.add.at(sizes, self.part_of, (choices * self.bytes).sum(axis=1))
        return choices, taken, sizes

    def _over_banks(self, values: Floats) -> Floats:
        """Of every part the log of the sum of exp over its bank; what is outside is one of its
        own."""
        highest = np.full(len(self.parts), -np.inf)
        np.maximum.at(highest, self._banks, values)
        total = np.zeros(len(self.parts))
        np.add.at(total, self._banks, np.exp(values - highest[self._banks]))
        with np.errstate(divide="ignore"):
            over = highest + np.log(total)
        found: Floats = over[self._banks]
        return found


def _logsumexp(values: Floats) -> Floats:
    """Over the columns of every row."""
    highest = values.max(axis=1, initial=-np.inf)
    found: Floats = highest + np.log(np.exp(values - highest[:, None]).sum(axis=1))
    return found


def _groups(
    choices: Mapping[str, Sequence[Measurement]], ties: Sequence[Sequence[str]]
) -> list[tuple[tuple[str, ...], list[tuple[Chain, int, float]]]]:
    """Groups of a part alone: of ties what stands in it."""
    inside = [[name for name in tie if name in choices] for tie in ties]
    return replace(
        Problem(choices, [], Budget(0, 0)), ties=[tie for tie in inside if len(tie) > 1]
    ).groups()
