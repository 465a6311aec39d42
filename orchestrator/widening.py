"""Candidates that a study adds to those of its recipe: values of options that ``tune.knobs`` lists.

``METHOD.OPTION: [a, b]`` in ``tune.knobs`` has both values tried. One that no candidate has yet is
given to every candidate of the method, which makes new candidates that differ in nothing else;
values that some candidate has stay where they are. ``METHOD.OPTION: suggested`` stands for ``any``,
the values that there are, and those that the method's ``Options`` suggest. One value alone fixes a
knob and adds nothing. Sizes (bits, ranks …) are what an allocation chooses itself, and no knobs.

This is done once, to the recipe, before anything else looks at it: what follows (offers, pieces,
the forecast, what a study is made of, ``recipe.yaml`` as resolved) knows no difference. A recipe
that was widened is not widened any further.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from pydantic import ValidationError

from moesaic.methods.base import Chain, MethodOptions, Spec, options_of
from moesaic.orchestrator.errors import Mistakes, RecipeError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.recipe_candidates import MOST_CHOICES, option_line
from moesaic.orchestrator.recipe_values import shown_value
from moesaic.search._leaving import ANY, means, text
from moesaic.search._sources import SOURCE
from moesaic.search.knobs import CHARGE, SIZES, WEIGHT

SUGGESTED = "suggested"
# Knobs with a dot that are about no option.
_OTHERS = (WEIGHT, SOURCE, CHARGE)
# Reasons shown why something cannot be had.
_SHOWN = 2


def widened(recipe: Recipe) -> Recipe:
    """The recipe with the candidates that its knobs add, and the values in place of ``suggested``.

    Raises:
        RecipeError: naming every knob of an option that cannot be.
    """
    if recipe.tune is None:
        return recipe
    mistakes, knobs = Mistakes(), dict(recipe.tune.knobs)
    found = dict.fromkeys(recipe.candidates, "")
    for name, wish in recipe.tune.knobs.items():
        if "." not in name or name.startswith(_OTHERS):
            continue
        more = mistakes.attempt(partial(_wished, name, wish, list(found)))
        if more is not None:
            knobs[name], chains = more
            found |= {chain: name for chain in chains if chain not in found}
    added = {chain: name for chain, name in found.items() if name}
    if added and len(found) > MOST_CHOICES:
        names = ", ".join(dict.fromkeys(added.values()))
        mistakes.found.append(
            f"tune.knobs: with the values of {names} there are {len(found):,} candidates: at most"
            f" {MOST_CHOICES:,} are taken"
        )
    if mistakes.found:
        raise mistakes.error()
    tune = recipe.tune.model_copy(update={"knobs": knobs})
    return recipe.model_copy(update={"tune": tune}).with_candidates(added)


def check_added(experiment: Experiment) -> None:
    """Finds out whether everything that was added can be had by some unit.

    Raises:
        RecipeError: naming what cannot.
    """
    offered = {chain for found in experiment.offers.values() for chain in found}
    made: dict[tuple[str, str], list[Chain]] = {}
    for chain, name in experiment.recipe.added.items():
        method, option = name.split(".", 1)
        own = next(spec for spec in chain if spec.method == method)
        made.setdefault((name, text(json.loads(own.options)[option])), []).append(chain)
    lost = [pair for pair, chains in made.items() if offered.isdisjoint(chains)]
    if lost:
        reasons = "; ".join(list(experiment.space.unloadable)[:_SHOWN])
        raise RecipeError(
            *(
                f"tune.knobs.{name}: no unit can have {value} ({reasons}): leave it out"
                for name, value in lost
            )
        )


def added_text(experiment: Experiment) -> str | None:
    """How many candidates units have by what was added, for people; None where nothing was."""
    recipe = experiment.recipe
    if not recipe.added:
        return None
    own = set(recipe.candidates)
    offers = [own.intersection(offered) for offered in experiment.offers.values()]
    names = ", ".join(dict.fromkeys(recipe.added.values()))
    return (
        f"tune.knobs: {names}: {len(recipe.added)} candidates more; a unit has"
        f" {_span(map(len, offers))} instead of"
        f" {_span(len(offered - recipe.added.keys()) for offered in offers)}"
    )


def _wished(name: str, wish: Any, candidates: Sequence[Chain]) -> tuple[Any, list[Chain]]:
    """What a knob of an option may be, and the candidates that it adds."""
    option = _Option(name, candidates)
    if wish == SUGGESTED:
        wish = option.suggested()
    return wish, list(option.added(wish))


def _span(counts: Iterable[int]) -> str:
    found = set(counts)
    return str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"


class _Option:
    """An option of a method that candidates have.

    Args:
        name: ``METHOD.OPTION``.
        chains: the candidates.

    Raises:
        RecipeError: no candidate has the method, or it has no such option, or that is a size.
    """

    def __init__(self, name: str, chains: Iterable[Chain]) -> None:
        self.key = f"tune.knobs.{name}"
        self.method, self.option = name.split(".", 1)
        self.chains = [c for c in chains if any(spec.method == self.method for spec in c)]
        if not self.chains:
            methods = dict.fromkeys(spec.method for chain in chains for spec in chain)
            raise RecipeError(
                f"{self.key}: no candidate has the method {self.method} (there are:"
                f" {', '.join(methods)})"
            )
        self.fields = options_of(self.method).model_fields
        if self.option not in self.fields:
            raise RecipeError(
                f"{self.key}: {self.method} has no option {self.option} (there are:"
                f" {', '.join(self.fields)})"
            )
        if self.option in SIZES:
            raise RecipeError(
                f"{self.key}: {self.option} is a size, which the allocation chooses for each unit:"
                " list its values in candidates"
            )

    def suggested(self) -> list[Any]:
        """Any, the values that there are, and those that the method suggests.

        Raises:
            RecipeError: it suggests nothing but its default.
        """
        values = cast(Mapping[str, Any], self.fields[self.option].json_schema_extra)["candidates"]
        if len(values) < 2:
            raise RecipeError(
                f"{self.key}: {self.method} suggests no values of {self.option}: list some"
            )
        return [ANY, *{text(value): value for value in [*self._there(), *values]}.values()]

    def added(self, wish: Any) -> Iterator[Chain]:
        """The candidates with values that none has yet.

        Raises:
            RecipeError: a value is none of this option, or one alone that no candidate has.
        """
        there = list(map(text, self._there()))
        for value in wish if isinstance(wish, list) else [wish]:
            if value == ANY or any(means(choice, value) for choice in there):
                continue
            if value == SUGGESTED:
                raise RecipeError(f"{self.key}: {SUGGESTED} stands by itself, not in a list")
            made = self._with(value)
            if not isinstance(wish, list) or len(set(map(text, wish))) < 2:
                raise RecipeError(
                    f"{self.key}: no candidate has {shown_value(value)}, and one value alone adds"
                    " nothing to try: put it into candidates, or list several"
                )
            yield from made

    def _there(self) -> list[Any]:
        """Values that candidates have, each once."""
        specs = (spec for chain in self.chains for spec in chain if spec.method == self.method)
        values = (json.loads(spec.options)[self.option] for spec in specs)
        return list({text(value): value for value in values}.values())

    def _with(self, value: Any) -> Sequence[Chain]:
        """The candidates with another value, where other options do not decide it.

        Raises:
            RecipeError: it is no value of this option, or never one with those that there are.
        """
        found = []
        for chain in self.chains:
            try:
                made = tuple(
                    self._changed(s, value) if s.method == self.method else s for s in chain
                )
            except ValidationError as error:
                line = option_line(error.errors()[0], self.fields)
                raise RecipeError(f"{self.key}: {line}") from None
            own = (s.parsed() for s in made if s.method == self.method)
            if all(self._has(options, value) for options in own):
                found.append(made)
        if not found:
            raise RecipeError(
                f"{self.key}: {shown_value(value)} is no value of {self.option}, or other options"
                " of all candidates decide it"
            )
        return found

    def _changed(self, spec: Spec, value: Any) -> Spec:
        return Spec.of(spec.method, {**json.loads(spec.options), self.option: value})

    def _has(self, options: MethodOptions, value: Any) -> bool:
        return means(text(options.model_dump(mode="json")[self.option]), value)
