"""What a plan makes of the experts, gathered from the store for the report."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.methods.base import Chain, Stats, Unit, chain_text, reducing
from moesaic.orchestrator.bank import CONSTANTS, EXPERT_MAP, ROUTER
from moesaic.orchestrator.choices import Chosen, chains_of
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.expert_statistics import expert_site
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.reductions import open_gating, read_reduction
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.summary import LayerExperts
from moesaic.orchestrator.walk import Walk


def expert_layers(
    experiment: Experiment, walk: Walk, chosen: Chosen, pieces: Mapping[str, str]
) -> list[LayerExperts]:
    """Every bank under a plan; [] where the recipe reduces none.

    Args:
        walk: that the plan's pieces were made with.
        pieces: unit → file of its piece; routers are those that are in there.
    """
    found = []
    for unit in experiment.units:
        if unit.kind != "bank" or not walk.sources:
            continue
        site = expert_site(unit.name)
        path = experiment.store.path("stats", walk.stats_key(unit.block))
        stats = load_stats(path, site.__eq__).get(site)
        if stats is not None:
            prefix = reducing(chains_of(unit, chosen)[0])[0]
            found.append(_layer(experiment, walk, unit, prefix, stats, pieces.get(unit.name)))
    return found


def _layer(
    experiment: Experiment, walk: Walk, unit: Unit, prefix: Chain, stats: Stats, piece: str | None
) -> LayerExperts:
    model = experiment.model
    gating = open_gating(model, unit.block)
    kept = model.read_kept(unit.block)
    router = {role: kept[name] for role, name in model.router_names(unit.block).items()}
    sample = stats["sample"]
    before = after = choice_shares(gating(sample, router)[0], None, unit.shapes["gate"][0])
    clusters, constants = [[expert] for expert in range(len(before))], list[list[int]]()
    if prefix and piece is not None:
        bank = read_reduction(
            experiment.store, experiment.reduction_key(unit.name, prefix, walk), unit
        )
        if bank is None:
            raise RunError(f"{unit.name}: its reduction is gone; run the same command again")
        side = read_piece(Path(piece))
        rows = {role: side[f"{ROUTER}{role}"].dense() for role in router}
        expert_map = side[EXPERT_MAP].dense() if EXPERT_MAP in side else None
        count = bank.unit.shapes["gate"][0]
        stand_ins = side[CONSTANTS].shape[0] if CONSTANTS in side else 0
        after = choice_shares(gating(sample, rows)[0], expert_map, count + stand_ins)
        clusters = [_members(bank.group, new) for new in range(count)]
        # Rows lead to constants only where all of them stay, one per old expert.
        leads = torch.empty(0) if expert_map is None else expert_map
        constants = [_members(leads, count + number) for number in range(stand_ins)]
    load = stats["load"].numpy()
    similarity = None
    if "cosine" in stats and "all_tokens" in stats:
        tokens = max(1, int(stats["all_tokens"]))
        similarity = np.nan_to_num(stats["cosine"].double().numpy() / tokens)
    return LayerExperts(
        block=unit.block,
        reduction=chain_text(prefix) if prefix else "",
        clusters=clusters,
        constants=constants,
        load=load,
        sources=experiment.calibration.labels[: len(load)],
        before=before.numpy(),
        after=after.numpy(),
        similarity=similarity,
    )


def choice_shares(index: Tensor, expert_map: Tensor | None, size: int) -> Tensor:
    """Share of a router's choices that leads to each of ``size`` experts, float64.

    Args:
        index: ``[T, k]``, rows of the router.
        expert_map: ``[R]``, row → expert; None where they are the same.
    """
    leads = index if expert_map is None else expert_map[index]
    return torch.bincount(leads.flatten(), minlength=size).double() / max(1, leads.numel())


def _members(group: Tensor, number: int) -> list[int]:
    """Places of a number."""
    return [int(place) for place in (group == number).nonzero().flatten()]
