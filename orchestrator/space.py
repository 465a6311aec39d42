"""What a search may choose from: the chains offered to every unit, and what goes with them."""

from collections.abc import Sequence
from functools import cached_property

from moesaic.methods import chains
from moesaic.methods.base import Chain, Spec, Unit, reducers_of, reducing
from moesaic.methods.reduction import is_open
from moesaic.orchestrator.allotment import Allotted, allotted
from moesaic.orchestrator.choices import Chosen, choices, member_choices, tied_choices
from moesaic.orchestrator.offers import Offering
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.shaping import Shaping
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import ties
from moesaic.orchestrator.walk import Walk


class Space:
    """The choices that a recipe leaves open in a model.

    Args:
        shaping: of the units that the recipe compresses.

    Attributes:
        offers: unit → chains that it is measured with.
        unloadable: reason → how many units a candidate is not offered on because of it.

    Raises:
        UserError: as :meth:`Offering.offers` says.
    """

    def __init__(self, recipe: Recipe, model: StreamedModel, shaping: Shaping) -> None:
        self.recipe, self.model, self.shaping = recipe, model, shaping
        self.units = shaping.units
        self._allotted: Allotted = {}
        offering = Offering(recipe, model, shaping)
        self.offers = offering.offers()
        self.unloadable = offering.unloadable

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    def open_specs(self) -> list[Spec]:
        """Reducers whose layers are still to share out how many experts each keeps."""
        found = [spec for chain in self.recipe.chains() for spec in reducers_of(chain)]
        return [spec for spec in dict.fromkeys(found) if is_open(spec.parsed())]

    def close(self, walk: Walk) -> None:
        """Lets the layers share out their experts; all statistics are there."""
        banks = [unit for unit in self.units if unit.kind == "bank"]
        self._allotted = allotted(self.model, banks, walk, self.open_specs())
        for bank in banks:
            chains = [self.closed(bank.name, chain) for chain in self.offers[bank.name]]
            self.offers[bank.name] = list(dict.fromkeys(chains))

    def closed(self, unit: str, chain: Chain) -> Chain:
        """A chain of the recipe as it is for one unit."""
        return tuple(self._allotted.get((unit, spec), spec) for spec in chain)

    def candidates(self, unit: Unit) -> set[Chain]:
        """What a search may choose for a unit, besides leaving it as it is."""
        return {self.closed(unit.name, chain) for chain in self.recipe.candidates}

    def everywhere(self, chain: Chain) -> Chosen:
        """Names of choices → what they take when every unit takes ``chain``, as far as it can.

        The linears of a part are reduced together or not at all.
        """
        chosen: dict[str, Chain] = {}
        for unit in self.units:
            own = self.closed(unit.name, chain)
            together = self.shaping.units_of(self.shaping.owners.get(unit.name, ""))
            offered = [own, reducing(own)[1]]
            if not all(own in self.offers[other.name] for other in together):
                offered = offered[1:]
            own = next((chain for chain in offered if chain in self.offers[unit.name]), ())
            prefix = reducing(own)[0]
            names = (choice.name for choice in choices(self.shaping.reduced(unit, prefix)))
            chosen |= dict.fromkeys(names, own)
        return chosen

    def owners(self, candidates_only: bool = True) -> dict[str, list[Unit]]:
        """What can be reduced → its units: every bank, and parts where a reduction is offered."""
        found = {}
        known = (self.shaping.owners.get(unit.name) for unit in self.units)
        for owner in dict.fromkeys(name for name in known if name is not None):
            units = self.shaping.units_of(owner)
            if owner not in self.shaping.parts or any(self.prefixes(units, candidates_only)):
                found[owner] = units
        return found

    def prefixes(self, units: Sequence[Unit], candidates_only: bool = True) -> list[Chain]:
        """Ways to reduce a bank or part that a search may choose, to leave it as it is first."""
        found: list[Chain] | None = None
        for unit in units:
            offered = self.offers[unit.name]
            known = self.candidates(unit) if candidates_only else set(offered)
            own = [reducing(chain)[0] for chain in offered if chain in known]
            if unit.kind == "linear":
                own.append(())
            found = own if found is None else [prefix for prefix in found if prefix in own]
        assert found is not None, "there is at least one unit"
        whole = [()] if not found or not all(found) else []
        return list(dict.fromkeys([*whole, *found]))

    def may_stay_dense(self, unit: Unit) -> bool:
        """Whether a search may leave a unit as it is.

        A bank can only be left as a whole. Where nothing ties its experts that is not offered,
        unless nothing else is.
        """
        return unit.kind != "bank" or not self.mixed_banks or not self.recipe.candidates

    @property
    def mixed_banks(self) -> bool:
        """Whether the target loads banks whose experts differ."""
        return self.recipe.serve == "moesaic"

    def ties(self) -> list[list[str]]:
        """Choices that must take the same chain so that the target can load the result."""
        tied = tied_choices(self.units, ties(self.units, self.recipe.serve), self.mixed_banks)
        inside = {name for group in tied for name in group}
        for unit in self.units:
            if any(map(chains.ties_experts, self.offers[unit.name])):
                by_member = member_choices(unit)
                tied += [group for group in by_member if inside.isdisjoint(group)]
        return tied
