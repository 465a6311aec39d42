"""The words that searches are written in: measurements in, a plan out. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from moesaic.kernels.discovery import plugin, plugins
from moesaic.methods.base import Chain, chain_text


class Infeasible(ValueError):
    """No plan fits the budget; the message names the smallest possible one in bytes."""


@dataclass(frozen=True)
class Measurement:
    """One unit compressed by one chain.

    Attributes:
        unit: name of the unit.
        chain: what was done to it.
        bytes: what the file holds.
        error: ‖(W−Ŵ)X‖² / ‖WX‖² over the calibration tokens.
        score: predicted loss, KL to the dense model in nats per token; None where no gradients
            were collected.
        seconds: time that the compression took.
        events: how often each kind of event happened.
        norm: ‖WX‖² over the calibration tokens, of which ``error`` is a part; None if not known.
        shares: what part of the loss is each text source's; empty where they are not told apart.
    """

    unit: str
    chain: Chain
    bytes: int
    error: float
    score: float | None
    seconds: float
    events: Mapping[str, int] = field(default_factory=dict)
    norm: float | None = None
    shares: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """What a search minimises: the predicted loss, or the error where there is none."""
        return self.error if self.score is None else self.score

    def scored(self, score: float) -> "Measurement":
        """The same with another score; ``dataclasses.replace`` would take several times as long,
        which counts where a study makes thousands of them for each plan."""
        return Measurement(
            self.unit,
            self.chain,
            self.bytes,
            self.error,
            score,
            self.seconds,
            self.events,
            self.norm,
            self.shares,
        )


@dataclass(frozen=True)
class Layer:
    """What is known of a unit before it is compressed; strategies that share out ratios need it.

    Attributes:
        bytes: of the unit as the original has it.
        influence: of its block: mean of 1 − cos between hidden states before and after it.
    """

    bytes: int
    influence: float | None = None


@dataclass(frozen=True)
class Budget:
    """A limit in bytes for the units of a plan together.

    Attributes:
        total_bytes: limit for the whole checkpoint's tensors.
        fixed_bytes: what every plan holds besides its units (embeddings, norms, routers …).
    """

    total_bytes: int
    fixed_bytes: int

    @property
    def unit_bytes(self) -> int:
        return self.total_bytes - self.fixed_bytes


@dataclass(frozen=True)
class Plan:
    """One chain per unit.

    Attributes:
        units: unit name → chain, in model order.
        bytes: of the whole checkpoint, fixed parts included.
        loss: sum of the units' predicted losses.
    """

    units: Mapping[str, Chain]
    bytes: int
    loss: float

    def to_json(self) -> dict[str, Any]:
        return {
            "units": {u: [spec.to_json() for spec in chain] for u, chain in self.units.items()},
            "bytes": self.bytes,
            "loss": self.loss,
        }


@dataclass(frozen=True)
class Alternative:
    """One way to shape the experts of a bank before they are compressed.

    Attributes:
        prefix: first links of the chains of all its choices; () leaves the experts as they are.
        form: what an engine must know of it (``48x768``); where :attr:`Problem.one_form` is set,
            all banks take alternatives of one form.
        bytes: what it holds besides its choices, against the bank as it is (router rows, maps);
            may be negative.
        loss: predicted loss of the reduction itself.
        choices: choice → its measurements, with chains that leave out the prefix.
    """

    prefix: Chain
    form: str
    bytes: int
    loss: float
    choices: Mapping[str, Sequence[Measurement]]


@dataclass(frozen=True)
class Problem:
    """What a search is given.

    A problem with ``banks`` is for :func:`moesaic.search.alternatives.solve`; strategies see it
    only after an alternative was picked for each bank (see :meth:`settled`).

    Attributes:
        choices: unit → its measurements, at least one each, in model order.
        ties: groups of units that must take the same chain, after the prefix where there is one;
            units in no group are free. Names that the picked alternatives lack do not count.
        budget: the limit.
        banks: bank → its alternatives, no two of one prefix; their choices are not in ``choices``.
        one_form: whether all banks must take alternatives of one form.
        layers: choice → what is known of it before it is compressed, if that is known; of the
            experts of a bank as they are before any reduction.
    """

    choices: Mapping[str, Sequence[Measurement]]
    ties: Sequence[Sequence[str]]
    budget: Budget
    banks: Mapping[str, Sequence[Alternative]] = field(default_factory=dict)
    one_form: bool = False
    layers: Mapping[str, Layer] = field(default_factory=dict)

    def settled(self, picks: Mapping[str, Alternative]) -> "Problem":
        """The problem that is left when every bank takes its alternative; chains lack prefixes.

        Raises:
            ValueError: two of its choices have one name.
        """
        offers = dict(self.choices)
        for bank in self.banks:
            for name, found in picks[bank].choices.items():
                if name in offers:
                    raise ValueError(f"bank {bank}: the choice {name} stands elsewhere, too")
                offers[name] = found
        ties = [[name for name in tie if name in offers] for tie in self.ties]
        fixed = self.budget.fixed_bytes + sum(picks[bank].bytes for bank in self.banks)
        return Problem(
            offers,
            [tie for tie in ties if len(tie) > 1],
            replace(self.budget, fixed_bytes=fixed),
            layers=self.layers,
        )

    def whole(self, picks: Mapping[str, Alternative], plan: Plan) -> Plan:
        """A plan of the settled problem as one of this: with prefixes, and what they lose."""
        prefixes = {name: picks[bank].prefix for bank in self.banks for name in picks[bank].choices}
        units = {unit: prefixes.get(unit, ()) + chain for unit, chain in plan.units.items()}
        return Plan(units, plan.bytes, plan.loss + sum(picks[bank].loss for bank in self.banks))

    def groups(self) -> list[tuple[tuple[str, ...], list[tuple[Chain, int, float]]]]:
        """Tied units as one choice: (units, [(chain, bytes, loss), …]), in model order.

        Only chains that every unit of the group was measured with are offered.

        Raises:
            ValueError: a unit stands in two ties, or the units of a tie share no chain, or
                alternatives are still to be picked.
        """
        if self.banks:
            raise ValueError("banks have alternatives: see moesaic.search.alternatives.solve")
        owner: dict[str, tuple[str, ...]] = {}
        for tie in self.ties:
            for unit in tie:
                if unit in owner:
                    raise ValueError(f"unit {unit} stands in two ties")
                owner[unit] = tuple(tie)
        groups = []
        for unit in self.choices:
            units = owner.get(unit, (unit,))
            if unit != units[0]:
                continue
            tables = [{m.chain: m for m in self.choices[u]} for u in units]
            shared = [chain for chain in tables[0] if all(chain in table for table in tables)]
            if not shared:
                names = ", ".join(units)
                raise ValueError(f"the tied units {names} have no candidate in common")
            offers = [
                (
                    chain,
                    sum(table[chain].bytes for table in tables),
                    sum(table[chain].loss for table in tables),
                )
                for chain in shared
            ]
            groups.append((units, offers))
        return groups

    def plan(self, chosen: Mapping[str, Chain]) -> Plan:
        """The plan that gives every unit its chosen chain; prefixes tell the alternatives.

        Raises:
            ValueError: a unit was not measured with its chain, or a bank has no such alternative.
        """
        if self.banks:
            picks = self.picked(chosen)
            skip = {name: len(picks[bank].prefix) for bank in picks for name in picks[bank].choices}
            rest = {unit: chain[skip.get(unit, 0) :] for unit, chain in chosen.items()}
            return self.whole(picks, self.settled(picks).plan(rest))
        units, size, loss = {}, self.budget.fixed_bytes, 0.0
        for unit, measurements in self.choices.items():
            chain = chosen[unit]
            found = next((m for m in measurements if m.chain == chain), None)
            if found is None:
                raise ValueError(f"unit {unit} was not measured with {chain_text(chain)}")
            units[unit], size, loss = chain, size + found.bytes, loss + found.loss
        return Plan(units, size, loss)

    def picked(self, chosen: Mapping[str, Chain]) -> dict[str, Alternative]:
        """Bank → the alternative that a plan uses.

        Raises:
            ValueError: there is none with its chains.
        """
        return {bank: self._picked(bank, chosen) for bank in self.banks}

    def _picked(self, bank: str, chosen: Mapping[str, Chain]) -> Alternative:
        """The alternative of a bank that a plan uses."""
        for alternative in self.banks[bank]:
            prefix = alternative.prefix
            if all(
                name in chosen
                and chosen[name][: len(prefix)] == prefix
                and any(m.chain == chosen[name][len(prefix) :] for m in measurements)
                for name, measurements in alternative.choices.items()
            ):
                return alternative
        raise ValueError(f"bank {bank} has no alternative with the chosen chains")


class Search(Protocol):
    """What a search module defines.

    A strategy that cannot choose every group of tied units by itself also defines
    ``smallest_bytes(problem) -> int``; see the function of that name here. One that shares out how
    much each layer loses says ``SHARES_OUT = True``: banks that may be reduced are then one layer
    each to it (:mod:`moesaic.search._shared_out`).
    """

    def search(self, problem: Problem) -> Plan:
        """The best plan within the budget; raises :class:`Infeasible` if there is none."""


def search_module(name: str) -> Search:
    """The strategy called ``name``; raises ``UnknownName`` with the list of known ones."""
    return cast(Search, plugin("moesaic.search", ("search",), name))


def smallest_bytes(problem: Problem, strategy: str) -> int:
    """Bytes of the smallest plan that a strategy can find, whatever the budget.

    Raises:
        ValueError: there is no plan at all.
    """
    if problem.banks:
        # Imported here: it is written in the words of this module.
        from moesaic.search import alternatives

        return alternatives.smallest_bytes(problem, strategy)
    own = getattr(search_module(strategy), "smallest_bytes", None)
    if own is not None:
        return int(own(problem))
    offers = [offered for _, offered in problem.groups()]
    return problem.budget.fixed_bytes + sum(min(size for _, size, _ in group) for group in offers)


def searches() -> list[str]:
    """Names of all search strategies."""
    return list(plugins("moesaic.search", ("search",)))
