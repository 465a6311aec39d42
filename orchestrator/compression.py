"""Chains applied to the units of one job, each result judged and written into the store.

A result is an entry ``pieces`` (the compressed tensors) and an entry ``errors`` (the error of every
output row). A longer chain starts from the piece of the shorter one, which is made and kept even if
nobody asked for it. Chains that differ in a rank are one piece, of the largest rank, and cuts of
it; the errors of all ranks come from one product.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.kernels import dense
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Event, Stats, Unit
from moesaic.methods.chains import (
    Family,
    apply_link,
    can_be_cut,
    cut_errors,
    cut_events,
    families,
    rowwise,
)
from moesaic.orchestrator.pieces import read_piece, write_cut, write_piece
from moesaic.orchestrator.source_statistics import error_name, source_errors
from moesaic.orchestrator.statistics import SEPARATOR
from moesaic.orchestrator.store import Entry, Store

# Experts of a bank whose errors are computed at a time: bounds the float32 copies.
ERROR_BYTES = 64 << 20

# Name in a piece's metadata of the key of the piece that it is a cut of.
CUT_OF = "cut_of"

# Chain → unit → key of its entries.
Keys = Mapping[Chain, Mapping[str, str]]
Members = Mapping[str, CompressedTensor]
Rows = dict[str, Tensor]


def row_errors(weight: Tensor, other: Tensor | None, hessian: Tensor) -> Tensor:
    """Squared output error of every row, summed over the tokens of H.

    Args:
        weight, other: ``[*batch, out, in]``; without ``other`` the squared outputs themselves.
        hessian: Σ x xᵀ ``[*batch, in, in]``.

    Returns:
        diag(ΔW H ΔWᵀ), float32 ``[*batch, out]``.
    """
    batch = hessian.shape[:-2]
    pieces = []
    step = max(1, ERROR_BYTES // (4 * hessian.shape[-1] * max(hessian.shape[-1], weight.shape[-2])))
    for index in range(0, batch[0] if batch else 1, step):
        rows = slice(index, index + step) if batch else ...
        x, h = weight[rows].float(), hessian[rows].float()
        if other is not None:
            x = x - other[rows].float()
        pieces.append(((x @ h) * x).sum(-1).clamp_min(0))
    return torch.cat(pieces) if batch else pieces[0]


@dataclass(frozen=True)
class Whole:
    """What a cut is cut from: key of that piece, and the rank that each member keeps."""

    key: str
    ranks: Mapping[str, int]


def finished_piece(store: Store, key: str) -> Entry | None:
    """A finished entry; None where it, or what it is cut from, must be made (again)."""
    entry = store.get("pieces", key)
    of = None if entry is None else entry.metadata.get(CUT_OF)
    return entry if of is None or store.get("pieces", of) is not None else None


@dataclass(frozen=True)
class Bench:
    """Units of one site with all that is known of them.

    Attributes:
        store: where results go.
        units: as reducers leave them; chains are without their reducers here.
        weights: unit → member → dense weight.
        side: what comes with a reduced bank, as it is.
        sites: site → statistics.
        stats: ``unit|member`` → what methods get.
        stages: chain → unit → key, of the shorter chains that others start from.
        device: where the work is done.
    """

    store: Store
    units: Sequence[Unit]
    weights: Mapping[str, Mapping[str, Tensor]]
    side: Mapping[str, Tensor]
    sites: Mapping[str, Stats]
    stats: Mapping[str, Stats]
    stages: Keys
    device: str

    def run(self, wanted: Keys) -> list[tuple[str, str, float]]:
        """Makes what is wanted, shorter chains first.

        Returns:
            (unit, key, seconds) of every pair.
        """
        pairs = {chain: dict(keys) for chain, keys in wanted.items()}
        for chain, keys in self.stages.items():
            lacking = {u: k for u, k in keys.items() if finished_piece(self.store, k) is None}
            pairs[chain] = {**lacking, **pairs.get(chain, {})}
        found: list[tuple[str, str, float]] = []
        for length in sorted({len(chain) for chain in pairs}):
            level = {chain: keys for chain, keys in pairs.items() if len(chain) == length}
            found += self._whole({c: keys for c, keys in level.items() if not can_be_cut(c)})
            found += self._cut({c: keys for c, keys in level.items() if can_be_cut(c)})
        return found

    def _whole(self, level: Keys) -> Iterator[tuple[str, str, float]]:
        """Chains of one length that are made one by one."""
        for chain, keys in level.items():
            todo = [unit for unit in self.units if unit.name in keys]
            for units in filter(None, [todo] if rowwise(chain) else [[unit] for unit in todo]):
                started = time.monotonic()
                members, events = self._apply(chain, units)
                seconds = (time.monotonic() - started) / len(units)
                for unit in units:
                    own, rows = members[unit.name], self._known_rows(unit)
                    for member, tensor in own.items():
                        weight, site = self.weights[unit.name][member], unit.sites[member]
                        errors = partial(row_errors, weight, tensor.effective())
                        rows[f"error|{member}"] = errors(self.sites[site]["hessian"])
                        for source, apart in enumerate(source_errors(self.sites[site], errors)):
                            rows[error_name(member, source)] = apart
                    key = keys[unit.name]
                    self._write(unit, key, own, rows, events, seconds)
                    yield unit.name, key, seconds

    def _cut(self, level: Keys) -> Iterator[tuple[str, str, float]]:
        """Chains of one length that are cuts of the largest of their family."""
        for unit in self.units:
            keys = {chain: level[chain][unit.name] for chain in level if unit.name in level[chain]}
            for family in families(keys, unit.shapes):
                yield from self._family(unit, family, keys)

    def _family(
        self, unit: Unit, family: Family, keys: Mapping[Chain, str]
    ) -> Iterator[tuple[str, str, float]]:
        started = time.monotonic()
        largest = family.largest
        members, events = self._apply(largest, [unit])
        made = members[unit.name]
        chains = [largest, *(chain for chain in family.ranks if chain != largest)]
        rows = [self._known_rows(unit) for _ in chains]
        for member, tensor in made.items():
            weight = self.weights[unit.name][member]
            stats = self.sites[unit.sites[member]]
            ranks = [family.ranks[chain][member] for chain in chains]
            curves = partial(cut_errors, weight, tensor, ranks=ranks)
            named = {f"error|{member}": curves(stats["hessian"])}
            for source, apart in enumerate(source_errors(stats, curves)):
                named[error_name(member, source)] = apart
            for name, curve in named.items():
                for own, errors in zip(rows, curve, strict=True):
                    own[name] = errors.float()
        seconds = (time.monotonic() - started) / len(chains)
        shapes = {f"{unit.name}{SEPARATOR}{member}": unit.shapes[member] for member in unit.shapes}
        for chain, own in zip(chains, rows, strict=True):
            told = cut_events(events, chain, shapes)
            if chain == largest:
                self._write(unit, keys[chain], made, own, told, seconds)
            else:
                ranks_of = family.ranks[chain]
                smaller = {member: made[member].cut(ranks_of[member]) for member in made}
                of = Whole(keys[largest], ranks_of)
                self._write(unit, keys[chain], smaller, own, told, seconds, of)
            yield unit.name, keys[chain], seconds

    def _apply(
        self, chain: Chain, units: Sequence[Unit]
    ) -> tuple[dict[str, dict[str, CompressedTensor]], list[Event]]:
        """Runs the last link on the members of units together; they are named ``unit|member``."""
        weights: dict[str, Tensor] = {}
        before: dict[str, CompressedTensor] = {}
        for unit in units:
            weights |= {
                f"{unit.name}{SEPARATOR}{member}": self.weights[unit.name][member]
                for member in unit.shapes
            }
            if len(chain) > 1:
                path = self.store.path("pieces", self.stages[chain[:-1]][unit.name])
                before |= {
                    f"{unit.name}{SEPARATOR}{member}": tensor.to(self.device)
                    for member, tensor in read_piece(path).items()
                    if member in unit.shapes
                }
        stats = {name: self.stats[name] for name in weights}
        result = apply_link(chain, weights, before, stats)
        members: dict[str, dict[str, CompressedTensor]] = {unit.name: {} for unit in units}
        for unit in units:
            for member in unit.shapes:
                members[unit.name][member] = result.members[f"{unit.name}{SEPARATOR}{member}"]
        return members, result.events

    def _known_rows(self, unit: Unit) -> Rows:
        """What every ``errors`` entry of the unit has: tokens that each member saw, and the squares
        of its outputs over them."""
        rows = {}
        for member, site in unit.sites.items():
            stats, weight = self.sites[site], self.weights[unit.name][member]
            outputs = partial(row_errors, weight, None, stats["hessian"])
            rows[f"tokens{SEPARATOR}{member}"] = stats["tokens"]
            rows[f"norm{SEPARATOR}{member}"] = stats.derived(
                ("outputs", unit.name, member), outputs
            )
        return rows

    def _write(
        self,
        unit: Unit,
        key: str,
        members: Members,
        rows: Rows,
        events: Iterable[Event],
        seconds: float,
        of: Whole | None = None,
    ) -> None:
        """Writes both entries of a pair; the piece last, because it stands for the pair.

        Args:
            of: what the members are cut from, if they are.
        """
        side = {name: dense.pack(tensor) for name, tensor in self.side.items()}
        sizes = {name: tensor.nbytes for name, tensor in {**members, **side}.items()}
        own = [
            {"kind": e.kind, "message": e.message, "unit": unit.name, "value": e.value}
            for e in events
            if e.unit in ("", unit.name) or e.unit.startswith(f"{unit.name}{SEPARATOR}")
        ]
        metadata = {"unit": unit.name, "bytes": sizes, "seconds": seconds, "events": own}
        named = {"unit": unit.name}

        def write(path: Path) -> None:
            if of is None:
                write_piece(path, {**members, **side}, named)
            else:
                write_cut(path, of.key, of.ranks, named)

        tensors = {name: value.cpu().clone() for name, value in rows.items()}
        self.store.put("errors", key, lambda path: save_file(tensors, path))
        if of is not None:
            metadata[CUT_OF] = of.key
        self.store.put("pieces", key, write, metadata)
