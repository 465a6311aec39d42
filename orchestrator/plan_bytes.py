"""Bytes of plans before any work: of every choice, of the parts that stay, and the budgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from moesaic.methods import chains
from moesaic.methods.base import Chain, Unit, reducing
from moesaic.orchestrator.assemble import header_bytes_bound
from moesaic.orchestrator.errors import Mistakes, RecipeError
from moesaic.orchestrator.recipe_sections import BudgetSection
from moesaic.orchestrator.space import Space
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import ties
from moesaic.search.base import Alternative, Budget, Measurement, Problem, smallest_bytes


@dataclass(frozen=True)
class Size:
    """What a plan's bytes consist of.

    Attributes:
        fixed_bytes: every tensor that is no unit, or a unit that the recipe keeps, and the headers
            of the files (an upper bound: a few bytes per tensor).
        header_bytes: of these, the bound on the headers.
        weights: number of weights in the units.
        smallest_bytes: of the smallest plan that candidates, target and search allow.
        dense_bytes: of the original files, headers included.
    """

    fixed_bytes: int
    header_bytes: int
    weights: int
    smallest_bytes: int
    dense_bytes: int


class PlanBytes:
    """Bytes of what a search may choose.

    Args:
        original: the model before it was sliced; the one of ``space`` where it is not.
    """

    def __init__(self, space: Space, original: StreamedModel) -> None:
        self.space, self.original = space, original
        self.recipe, self.model, self.shaping = space.recipe, space.model, space.shaping
        self.units = space.units

    @cached_property
    def size(self) -> Size:
        checkpoint = self.model.checkpoint
        fixed = sum(checkpoint.nbytes(name) for name in self.model.fixed_names())
        for unit in self.model.units():
            if unit.name not in self.space.by_name:
                fixed += self.dense_bytes(unit)
        serve, candidates = self.recipe.serve, self.recipe.candidates
        split = [reducing(chain) for chain in candidates] if serve == "moesaic" else []
        reduced = any(prefix for prefix, _ in split)
        chained = any(len(rest) > 1 or any(map(chains.has_rank, rest)) for _, rest in split)
        schemes = len(candidates)
        narrowed = reduced and bool(self.shaping.parts)
        headers = header_bytes_bound(
            self.model, self.units, serve, schemes, reduced, chained, narrowed
        )
        fixed += headers
        return Size(
            fixed_bytes=fixed,
            header_bytes=headers,
            weights=sum(unit.parameters for unit in self.units),
            smallest_bytes=self._smallest(fixed),
            dense_bytes=self.original.checkpoint.file_bytes,
        )

    def sized_problem(self, fixed_bytes: int) -> Problem:
        """What a search will be given, as far as it is known before any work: bytes, no losses.

        A choice is a member of a unit, ``UNIT.MEMBER``: all experts of a bank stand together here,
        because they are equally large. There is no budget.
        """
        members = {unit.name: [f"{unit.name}.{m}" for m in unit.shapes] for unit in self.units}
        offers: dict[str, list[Measurement]] = {}
        banks: dict[str, list[Alternative]] = {}
        owners = self.space.owners()
        for owner, units in owners.items():
            prefixes = self.space.prefixes(units)
            banks[owner] = [self._sized_alternative(units, prefix) for prefix in prefixes]
        for unit in self.units:
            if self.shaping.owners.get(unit.name) not in owners:
                (name,) = members[unit.name]
                offers[name] = self._sized_offers(unit, (), "weight", name)
        tied = ties(self.units, self.recipe.serve)
        if not self.space.mixed_banks:
            inside = {name for group in tied for name in group}
            tied += [[unit.name] for unit in self.units if unit.name not in inside]
        groups = [[name for unit in group for name in members[unit]] for group in tied]
        budget = Budget(0, fixed_bytes)
        return Problem(offers, groups, budget, banks, one_form=not self.space.mixed_banks)

    def _smallest(self, fixed_bytes: int) -> int:
        """Bytes of the smallest plan that the search can find.

        Raises:
            RecipeError: the candidates allow no plan at all.
        """
        try:
            return smallest_bytes(self.sized_problem(fixed_bytes), self.recipe.search)
        except ValueError as error:
            raise RecipeError(
                f"candidates: with search: {self.recipe.search} and serve: {self.recipe.serve}"
                f" there is no plan: {error}"
            ) from None

    def _sized_alternative(self, units: Sequence[Unit], prefix: Chain) -> Alternative:
        choices = {
            name: self._sized_offers(unit, prefix, member, name)
            for unit in units
            for member in unit.shapes
            for name in [f"{unit.name}.{member}"]
        }
        size = sum(self.shaping.side_bytes(unit, prefix) for unit in units) if prefix else 0
        return Alternative(prefix, self.shaping.form(units[0], prefix), size, 0.0, choices)

    def _sized_offers(self, unit: Unit, prefix: Chain, member: str, name: str) -> list[Measurement]:
        """What a search may choose for a member of a unit, after a reduction; bytes only."""
        shape, dtype = (
            self.shaping.reduced(unit, prefix).shapes[member],
            self.model.stored_dtype(unit),
        )
        dense = math.prod(shape) * dtype.itemsize
        found, known = [], self.space.candidates(unit)
        for chain in self.space.offers[unit.name]:
            first, rest = reducing(chain)
            if first != prefix or chain not in known:
                continue
            size = dense
            if rest:
                count = self.shaping.stand_ins(unit, rest)
                size = chains.predict_bytes({member: shape}, dtype, rest, count)
            found.append(Measurement(name, rest, size, 0.0, None, 0.0))
        if not prefix and self.space.may_stay_dense(unit):
            found.append(Measurement(name, (), dense, 0.0, None, 0.0))
        return found

    def dense_bytes(self, unit: Unit) -> int:
        """Bytes of the unit before it is compressed."""
        return _held_bytes(self.model, unit)

    def original_bytes(self) -> dict[str, int]:
        """Unit → bytes as the original holds it, before it was sliced."""
        return {unit.name: _held_bytes(self.original, unit) for unit in self.units}

    def predicted_bytes(self, unit: Unit, chain: Chain) -> int:
        """Bytes of the unit under a chain, before any work."""
        prefix, rest = reducing(chain)
        if not self.shaping.meant(unit, prefix):
            prefix = ()
        if unit.kind == "linear" and chains.for_banks(chain):
            rest = ()
        size = self.shaping.side_bytes(unit, prefix) if prefix else 0
        shapes, dtype = self.shaping.reduced(unit, prefix).shapes, self.model.stored_dtype(unit)
        if not rest:
            dense = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            return size + dense if prefix else self.dense_bytes(unit)
        count = self.shaping.stand_ins(unit, rest)
        return size + chains.predict_bytes(shapes, dtype, rest, count)

    def budgets(self, section: BudgetSection) -> dict[str, Budget]:
        """The limits by their names.

        Raises:
            RecipeError: naming every one that cannot be.
        """
        mistakes, found = Mistakes(), {}
        for label, wanted in section.each.items():
            where = f"budget {label}" if section.several else "budget"
            limit = mistakes.attempt(partial(self._budget, wanted, where))
            if limit is not None:
                found[label] = limit
        if mistakes.found:
            raise mistakes.error()
        return found

    def _budget(self, wanted: BudgetSection, where: str) -> Budget:
        size = self.size
        if wanted.bytes is not None:
            total = wanted.bytes
        else:
            assert isinstance(wanted.bits_per_weight, float)
            # Rounded first: a product that is a whole number may come out a hair below it.
            total = size.fixed_bytes + int(round(wanted.bits_per_weight * size.weights / 8, 3))
        assert isinstance(total, int)
        if total < size.smallest_bytes:
            bits = (size.smallest_bytes - size.fixed_bytes) * 8 / size.weights
            bits = math.ceil(bits * 1000) / 1000  # rounded down it would be refused again
            raise RecipeError(
                f"{where}: {total:,} bytes are too few: the smallest plan that these candidates"
                f" allow has {size.smallest_bytes:,} bytes ({bits:.3f} bits per weight;"
                f" serve: {self.recipe.serve}, search: {self.recipe.search});"
                f" {size.fixed_bytes:,} of them are parts that are not compressed"
            )
        if total >= size.dense_bytes and self.model is self.original:
            raise RecipeError(
                f"{where}: {total:,} bytes hold the whole dense model ({size.dense_bytes:,} bytes):"
                " there is nothing to compress, give less"
            )
        return Budget(total_bytes=total, fixed_bytes=size.fixed_bytes)


def _held_bytes(model: StreamedModel, unit: Unit) -> int:
    """Bytes of a unit in a model's files."""
    names = {name for group in model.unit_tensors(unit).values() for name in group}
    return sum(model.checkpoint.nbytes(name) for name in names)
