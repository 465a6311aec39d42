"""Layers that share out their experts: how many each keeps is decided once all are calibrated."""

from collections.abc import Mapping
from typing import cast

from moesaic.methods.base import Spec, Stats, Unit
from moesaic.methods.reduction import Allotting, LayerView, reducer_module, windows
from moesaic.orchestrator.errors import RecipeError
from moesaic.orchestrator.expert_statistics import expert_site
from moesaic.orchestrator.reductions import layer_shape
from moesaic.orchestrator.shared import open_store
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk

# (bank, reducer as the recipe has it) → the same with the number of experts that this bank keeps.
Allotted = Mapping[tuple[str, Spec], Spec]


def allotted(
    model: StreamedModel, banks: list[Unit], walk: Walk, specs: list[Spec]
) -> dict[tuple[str, Spec], Spec]:
    """What the layers agree on, for reducers that leave it open.

    Args:
        banks: that are to be reduced, in model order; all are calibrated.

    Raises:
        RecipeError: the share asked for is less than the layers need.
    """
    store, found = open_store(walk.store), {}
    for spec in specs:
        options = spec.parsed()
        reducer = cast(Allotting, reducer_module(spec.method))
        for window in windows([bank.name for bank in banks], getattr(options, "window", 1)):
            views = {
                bank.name: _view(model, bank, walk, store, reducer.NEEDS)
                for bank in banks
                if bank.name in window
            }
            try:
                keeps = reducer.allot(views, options)
            except ValueError as error:
                raise RecipeError(f"candidates: {spec}: {error}") from None
            for name, keep in keeps.items():
                closed = {**options.model_dump(mode="json"), "keep": keep, "window": 1}
                found[name, spec] = Spec.of(spec.method, closed)
    return found


def _view(
    model: StreamedModel, bank: Unit, walk: Walk, store: Store, needs: frozenset[str]
) -> LayerView:
    site = expert_site(bank.name)
    stats = load_stats(store.path("stats", walk.stats_key(bank.block)), lambda name: name == site)
    kept, names = model.read_kept(bank.block), model.router_names(bank.block)
    return LayerView(
        shape=layer_shape(model, bank),
        router={role: kept[name] for role, name in names.items()},
        stats=Stats({name: stats[site][name].clone() for name in needs}),
    )
