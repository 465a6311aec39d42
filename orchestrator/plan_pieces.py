"""The pieces of a plan: those of its units, cuts of them written out, and mosaics of them.

A bank whose choices differ is put together from slices of its finished pieces, as a piece in the
format ``mosaic`` (see :mod:`moesaic.orchestrator.mixtures`); plans that are only judged leave that
to the worker. What is left of a linear that was made narrower is put into its place, in the format
``channels``. All that is copying, no compression.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from moesaic.methods.base import Chain, Unit, reducing
from moesaic.orchestrator.choices import Chosen, chains_of
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.mixtures import (
    Mixture,
    described,
    mixture_of,
    mosaic_key,
    outline,
    packed,
)
from moesaic.orchestrator.narrowing import BlockPart, read_narrowed
from moesaic.orchestrator.pieces import Member, is_cut, piece_header, read_piece, write_piece
from moesaic.orchestrator.store import digest
from moesaic.orchestrator.walk import Walk


class PlanPieces:
    """The pieces of one plan after another, as workers that put mixtures together want them.

    Args:
        walk: whose statistics the pieces were made with.
    """

    def __init__(self, experiment: Experiment, walk: Walk) -> None:
        self.experiment = experiment
        self.walk = walk
        self._known: dict[tuple[str, Chain], str | None] = {}
        self._headers: dict[str, Mapping[str, Member]] = {}
        self._described: dict[str, Mapping[str, Member]] = {}

    def of(self, chosen: Chosen) -> tuple[dict[str, str], dict[str, Mixture]]:
        """Unit → file of its piece, units that stay dense left out; and what those files hold that
        need not be there.

        Args:
            chosen: choices of all units, or of those that are wanted.

        Raises:
            RunError: a piece that the plan needs is not there.
        """
        pieces: dict[str, str] = {}
        mixtures: dict[str, Mixture] = {}
        for unit in self.experiment.units:
            chains = chains_of(unit, chosen)
            if len(chains) > 1:
                paths = {chain: self._piece(unit, chain) for chain in chains}
                key = mosaic_key(unit, paths, chosen)
                name = str(self.experiment.store.path("mosaics", key))
                pieces[unit.name], mixtures[name] = name, mixture_of(unit, paths, chosen)
            elif chains and (path := self.whole(unit, chains[0])) is not None:
                pieces[unit.name] = path
        return pieces, mixtures

    def whole(self, unit: Unit, chain: Chain) -> str | None:
        """File of a unit's piece where all its choices take one chain; None where it stays dense.

        Raises:
            RunError: the piece is not there.
        """
        if (unit.name, chain) not in self._known:
            self._known[unit.name, chain] = str(self._whole(unit, chain)) if chain else None
        return self._known[unit.name, chain]

    def headers(
        self, pieces: Mapping[str, str], mixtures: Mapping[str, Mixture]
    ) -> dict[str, Mapping[str, Member]]:
        """Unit → what the file of its piece says, or will say, of itself.

        Raises:
            RunError: a file is gone, cut off, or no piece.
        """
        return {
            unit: self._header(path) if path not in mixtures else self._mixed(mixtures[path])
            for unit, path in pieces.items()
        }

    def _piece(self, unit: Unit, chain: Chain) -> Path:
        return self.experiment.store.path(
            "pieces", self.experiment.key(unit.name, chain, self.walk)
        )

    def _whole(self, unit: Unit, chain: Chain) -> Path:
        prefix, path = reducing(chain)[0], self._piece(unit, chain)
        part = self.experiment.shaping.part(unit.name)
        if prefix and part is not None:
            key = self.experiment.reduction_key(unit.name, prefix, self.walk)
            return _placed(self.experiment, unit, part, key, path)
        return _written_out(self.experiment, path)

    def _header(self, path: str) -> Mapping[str, Member]:
        if path not in self._headers:
            with _there():
                self._headers[path] = piece_header(Path(path))
        return self._headers[path]

    def _mixed(self, mixture: Mixture) -> Mapping[str, Member]:
        return described(mixture, self._source)

    def _source(self, path: str) -> Mapping[str, Member]:
        """What a piece that others are mixed from holds; it may be a cut."""
        if path not in self._described:
            with _there():
                self._described[path] = outline(path)
        return self._described[path]


def plan_pieces(experiment: Experiment, walk: Walk, chosen: Chosen) -> dict[str, str]:
    """Unit → file of its piece under a plan, mixtures written; units that stay dense are left out.

    Args:
        chosen: choices of all units, or of those that are wanted.

    Raises:
        RunError: a piece that the plan needs is not there.
    """
    pieces, mixtures = PlanPieces(experiment, walk).of(chosen)
    for path, mixture in mixtures.items():
        key = Path(path).stem
        if experiment.store.get("mosaics", key) is None:
            with _there():
                members = packed(mixture)
            experiment.store.put("mosaics", key, partial(write_piece, members=members, metadata={}))
    return pieces


@contextmanager
def _there() -> Iterator[None]:
    """A piece that is not there as one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{error.filename}: the piece is gone; run the same command again") from None


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
    with _there():
        if not is_cut(path):
            return path
        key = path.stem
        entry = experiment.store.get("cuts", key)
        if entry is None:
            members = read_piece(path)
            entry = experiment.store.put("cuts", key, lambda p: write_piece(p, members, {}))
        return entry.path
