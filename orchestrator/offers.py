"""Which chains of a recipe each unit is measured with, and what is wrong with the others.

Read from headers alone, before any work starts.
"""

from collections.abc import Mapping
from typing import get_args

from moesaic.methods import chains
from moesaic.methods.base import Chain, Unit, chain_text, reducing, reverse_needs
from moesaic.methods.parts import PartKind, cuts_parts
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.narrowing import block_parts
from moesaic.orchestrator.recipe import Recipe
from moesaic.orchestrator.shaping import Shaping
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import allowed

# Chains shown of those that have the same fault.
_SHOWN_CHAINS = 3


class Offering:
    """Offers the chains of a recipe to the units that it compresses.

    Args:
        model: the whole model.
        shaping: of the units.

    Attributes:
        unloadable: reason → how many units a candidate is not offered on because of it.
    """

    def __init__(self, recipe: Recipe, model: StreamedModel, shaping: Shaping) -> None:
        self.recipe, self.model, self.shaping = recipe, model, shaping
        self.units = shaping.units
        self.unloadable: dict[str, int] = {}

    def offers(self) -> dict[str, list[Chain]]:
        """Unit → chains that it is measured with.

        A candidate that the target cannot load on some unit is not offered there, and counted in
        ``unloadable``. Anything else that does not fit is the user's mistake.

        Raises:
            UserError: a chain does not fit a unit's shape (each chain once), a baseline or what a
                candidate makes of any bank cannot be loaded, or a unit has no candidate left.
        """
        self._check_dtypes()
        self._check_reductions()
        self._check_gradients()
        self._check_refits()
        faults: dict[tuple[str, str], list[Chain]] = {}
        offers: dict[str, list[Chain]] = {}
        nothing: dict[str, str] = {}
        baselines = set(self.recipe.baselines.values())
        for unit in self.units:
            offers[unit.name] = offered = []
            refusals = []
            for method in self._not_meant(unit):
                why = (
                    f"{method} cuts a part of a block as a whole, and the linears of this one are"
                    " not all named by the family, or some are kept"
                )
                self.unloadable[why] = self.unloadable.get(why, 0) + 1
            for chain in self._chains_for(unit):
                misfit = self._misfit(unit, chain)
                reason = misfit or self._unloadable(unit, chain)
                if reason is None:
                    offered.append(chain)
                elif misfit or chain in baselines:
                    key = self.recipe.key_of(chain)
                    if not any(chain in chains for chains in faults.values()):
                        fault = (key, f"cannot be used on {unit.name}: {reason}")
                        faults.setdefault(fault, []).append(chain)
                else:
                    self.unloadable[reason] = self.unloadable.get(reason, 0) + 1
                    refusals.append(reason)
            if refusals and not set(offered) & set(self.recipe.candidates):
                nothing.setdefault(refusals[-1], unit.name)
        advice = "change that, or leave such units as they are with keep: [pattern]"
        problems = [
            f"{key}: {_listed(chains)} {reason}; {advice}"
            for (key, reason), chains in faults.items()
        ]
        problems += [
            f"candidates: none of them can be used on {name}: {reason}; {advice}"
            for reason, name in nothing.items()
        ]
        problems = problems or self._useless_reductions(offers)
        if problems:
            raise RecipeError(*problems)
        return offers

    def _check_dtypes(self) -> None:
        """Raises a RecipeError for weights of several dtypes: those of a unit are compressed in
        one, and transformers loads all in one, which rounds scales otherwise than they were
        measured."""
        held = {
            unit.name: [
                str(dtype).removeprefix("torch.") for dtype in self.model.stored_dtypes(unit)
            ]
            for unit in self.units
        }
        for name, dtypes in held.items():
            if len(dtypes) > 1:
                raise RecipeError(
                    f"model: its files hold {name} in {' and '.join(dtypes)}: save the model in one"
                    f" dtype, or leave this part as it is with keep: [{name}]"
                )
        first = {dtype: name for name, (dtype,) in reversed(held.items())}
        if len(first) > 1 and self.recipe.serve != "moesaic":
            known = ", ".join(f"{dtype} ({name} …)" for dtype, name in reversed(first.items()))
            raise RecipeError(
                f"model: its files hold weights in {known}: serve: {self.recipe.serve} loads one"
                " dtype: save the model in one, leave the others as they are with keep:"
                " [pattern], or give serve: moesaic"
            )

    def _useless_reductions(self, offers: Mapping[str, list[Chain]]) -> list[str]:
        """A line for every reason why candidates that reduce anything can be loaded nowhere."""
        offered = {chain for unit in self.units for chain in offers[unit.name]}
        reasons: dict[str, list[Chain]] = {}
        for chain in self.recipe.candidates:
            prefix = reducing(chain)[0]
            if not prefix or chain in offered:
                continue
            meant = [unit for unit in self.units if self.shaping.meant(unit, prefix)]
            if any(self._misfit(unit, chain) for unit in meant):
                continue
            found = [self.shaping.unservable(unit, prefix) for unit in meant]
            if all(found):
                reasons.setdefault(found[0] or "", []).append(chain)
        return [
            f"candidates: {_listed(chains)}: {reason}; or take that out"
            for reason, chains in reasons.items()
        ]

    def _check_gradients(self) -> None:
        """Raises a RecipeError for methods that want the reverse pass where there is none."""
        found = [s for chain in self.recipe.chains() for s in chain if reverse_needs((s,))]
        if found and not self.recipe.calibration.gradient_sequences:
            raise RecipeError(
                f"calibration.gradient_sequences: 0, but {found[0].method} needs gradients: give 16"
                f" or more, or take {found[0].method} out"
            )

    def _check_refits(self) -> None:
        """Raises a RecipeError for fits to compressed predecessors where there are none."""
        found = [chain for chain in self.recipe.chains() if chains.refits(chain)]
        if found and not self.recipe.propagate:
            raise RecipeError(
                f"candidates: {chain_text(found[0])}: refit fits factors to what compressed"
                " predecessors leave: propagate: true, or take refit out"
            )

    def _check_reductions(self) -> None:
        """Raises a RecipeError for reductions, and methods for banks, that nothing can use."""
        reductions = {c[0]: c for c in self.recipe.chains() if reducing(c)[0]}
        banks = [unit for unit in self.model.units() if unit.kind == "bank"]
        meant = {method for chain in self.recipe.chains() for method in chains.for_banks(chain)}
        if meant and not banks:
            raise RecipeError(
                f"candidates: {', '.join(sorted(meant))}: for experts only, and"
                f" {self.model.family.model_type} has none: take it out"
            )
        names = ", ".join(map(str, reductions))
        tried = any(reducing(chain)[0] for chain in self.recipe.candidates)
        key = "candidates" if tried else "baselines"
        if not (reductions and banks) and self.recipe.router_calibration is not None:
            raise RecipeError(
                "router_calibration: nothing in this recipe reduces experts: add such a candidate"
                " (moesaic list methods), or take it out"
            )
        if not reductions:
            return
        kinds = {part.shape.kind for part in self.shaping.parts.values()}
        useless = [s for s in reductions if not (banks or cuts_parts(s.method) & kinds)]
        if useless:
            what = f"for experts only, and {self.model.family.model_type} has none"
            if any(cuts_parts(spec.method) for spec in useless):
                what = "there is nothing that it could cut: no experts, and no part of a block that"
                what += f" the family {self.model.family.model_type} names and keep leaves whole"
            raise RecipeError(f"{key}: {', '.join(map(str, useless))}: {what}: take it out")
        kept = [unit.name for unit in banks if self.recipe.kept(unit.name)]
        if kept and self.recipe.serve != "moesaic":
            raise RecipeError(
                f"{key}: {names}: serve: {self.recipe.serve} needs equally many experts in"
                f" all blocks, but keep leaves {kept[0]} as it is: serve: moesaic, or keep none"
            )
        mlps = [part.name for part in block_parts(self.model) if part.shape.kind == "mlp"]
        whole = [name for name in mlps if name not in self.shaping.parts]
        cut = any("mlp" in cuts_parts(spec.method) for spec in reductions)
        if cut and 0 < len(whole) < len(mlps) and self.recipe.serve != "moesaic":
            raise RecipeError(
                f"{key}: {names}: serve: {self.recipe.serve} needs MLPs of one width, but keep"
                f" leaves {whole[0]} or some of it as it is: serve: moesaic, or keep all or none"
            )

    def _chains_for(self, unit: Unit) -> list[Chain]:
        """The chains of the recipe that are meant for a unit.

        A baseline that reduces something else gives a linear what comes after that. Methods for
        banks alone are not meant for linears.
        """
        found = self.recipe.chains()
        if unit.kind == "bank":
            return found
        meant = [c for c in found if self.shaping.meant(unit, reducing(c)[0])]
        rest = [
            reducing(chain)[1] for chain in self.recipe.baselines.values() if chain not in meant
        ]
        wanted = dict.fromkeys([*meant, *filter(None, rest)])
        return [chain for chain in wanted if not chains.for_banks(chain)]

    def _not_meant(self, unit: Unit) -> list[str]:
        """Reducers of parts among the candidates that leave a linear of such a part out."""
        if unit.kind == "bank" or unit.part not in get_args(PartKind):
            return []
        prefixes = [reducing(chain)[0] for chain in self.recipe.candidates]
        methods = [p[0].method for p in prefixes if p and not self.shaping.meant(unit, p)]
        return [name for name in dict.fromkeys(methods) if cuts_parts(name)]

    def _misfit(self, unit: Unit, chain: Chain) -> str | None:
        """Why a unit of this kind and shape cannot be compressed so."""
        prefix, rest = reducing(chain)
        try:
            shapes = self.shaping.reduced(unit, prefix).shapes
            self.shaping.stand_ins(unit, rest)
        except ValueError as error:
            return str(error)
        return self.shaping.unknown(unit, prefix, rest) or chains.misfit(unit.kind, shapes, rest)

    def _unloadable(self, unit: Unit, chain: Chain) -> str | None:
        """Why the target cannot load a unit compressed so."""
        prefix, rest = reducing(chain)
        reason = self.shaping.unservable(unit, prefix) if prefix else None
        if reason is not None:
            return reason
        shaped = self.shaping.reduced(unit, prefix)
        return allowed(shaped, rest, self.recipe.serve, self.model.family)


def _listed(chains: list[Chain]) -> str:
    """The first few chains as people read them, and how many more there are."""
    shown = ", ".join(map(chain_text, chains[:_SHOWN_CHAINS]))
    more = len(chains) - _SHOWN_CHAINS
    return f"{shown} and {more} more" if more > 0 else shown
