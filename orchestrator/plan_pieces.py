"""The pieces of a plan: those of its units, cuts of them written out, and mosaics of them.

A bank whose choices differ is put together from slices of its finished pieces, as a piece in the
format ``mosaic``. What is left of a linear that was made narrower is put into its place, in the
format ``channels``. All that is copying, no compression.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from moesaic.kernels import mosaic
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Unit, reducing
from moesaic.orchestrator.calibrate import Walk
from moesaic.orchestrator.choices import Chosen, chains_of, choices_in
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.narrowing import BlockPart, read_narrowed
from moesaic.orchestrator.pieces import is_cut, read_piece, write_piece
from moesaic.orchestrator.store import digest


def plan_pieces(experiment: Experiment, walk: Walk, chosen: Chosen) -> dict[str, str]:
    """Unit → file of its piece under a plan; units that stay dense are left out.

    Args:
        chosen: choices of all units, or of those that are wanted.

    Raises:
        RunError: a piece that the plan needs is not there.
    """
    return {
        unit.name: path
        for unit in experiment.units
        if chains_of(unit, chosen)
        for path in _unit_piece(experiment, walk, unit, chosen)
    }


def _unit_piece(experiment: Experiment, walk: Walk, unit: Unit, chosen: Chosen) -> Iterator[str]:
    chains = chains_of(unit, chosen)
    paths = {
        chain: experiment.store.path("pieces", experiment.key(unit.name, chain, walk))
        for chain in chains
        if chain
    }
    prefix = reducing(chains[0])[0]
    part = experiment.shaping.part(unit.name)
    if prefix and part is not None:
        key = experiment.reduction_key(unit.name, prefix, walk)
        yield str(_placed(experiment, unit, part, key, paths[chains[0]]))
        return
    if len(chains) == 1:
        yield from (str(_written_out(experiment, path)) for path in paths.values())
        return
    key = mosaic_key(unit, paths, chosen)
    entry = experiment.store.get("mosaics", key)
    if entry is None:
        members = _mosaic(unit, paths, chosen)
        entry = experiment.store.put("mosaics", key, lambda p: write_piece(p, members, {}))
    yield str(entry.path)


def mosaic_key(unit: Unit, paths: Mapping[Chain, Path], chosen: Chosen) -> str:
    """Names a mixture of the pieces of a bank.

    Args:
        paths: piece of every chain that the choices take.
    """
    parts = [[c.member, c.expert, paths[chosen[c.name]].stem] for c in choices_in(unit, chosen)]
    return digest(["mosaic", parts])


def _placed(
    experiment: Experiment, unit: Unit, part: BlockPart, reduction: str, path: Path
) -> Path:
    """The piece of what is left of a linear, in its place."""
    key = digest(["channels", reduction, path.stem])
    entry = experiment.store.get("mosaics", key)
    if entry is None:
        narrowed = read_narrowed(experiment.store, reduction, part)
        if narrowed is None:
            raise RunError(f"{part.name}: its reduction is gone; run the same command again")
        members = narrowed.placed(unit.name, read_piece(path)["weight"])
        entry = experiment.store.put("mosaics", key, lambda p: write_piece(p, members, {}))
    return entry.path


def _written_out(experiment: Experiment, path: Path) -> Path:
    """A piece that has its tensors in its own file: itself, or what a cut stands for."""
    try:
        if not is_cut(path):
            return path
        key = path.stem
        entry = experiment.store.get("cuts", key)
        if entry is None:
            members = read_piece(path)
            entry = experiment.store.put("cuts", key, lambda p: write_piece(p, members, {}))
        return entry.path
    except FileNotFoundError as error:
        raise RunError(f"{error.filename}: the piece is gone; run the same command again") from None


def _mosaic(unit: Unit, paths: Mapping[Chain, Path], chosen: Chosen) -> dict[str, CompressedTensor]:
    """Every member of a bank from slices of the pieces of its chains."""
    try:
        pieces = {chain: read_piece(path) for chain, path in paths.items()}
    except FileNotFoundError as error:
        raise RunError(f"{error.filename}: the piece is gone; run the same command again") from None
    members = {}
    for member in unit.shapes:
        experts: dict[Chain, list[int]] = {}
        for choice in choices_in(unit, chosen):
            if choice.member == member and choice.expert is not None:
                experts.setdefault(chosen[choice.name], []).append(choice.expert)
        groups = [
            (mosaic.take(pieces[chain][member], slices), slices)
            for chain, slices in sorted(experts.items())
        ]
        members[member] = groups[0][0] if len(groups) == 1 else mosaic.pack(groups)
    # What comes with a reduced bank is the same in all pieces.
    first = next(iter(pieces.values()))
    return members | {name: value for name, value in first.items() if name not in unit.shapes}
