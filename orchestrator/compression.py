"""Chains applied to the units of one job, each result judged and written into the store.

A result is an entry ``pieces`` (the compressed tensors) and an entry ``errors`` (the error of every
output row). A longer chain starts from the piece of the shorter one, which is made and kept even if
nobody asked for it. Chains that differ in a rank are one piece, of the largest rank, and cuts of
it; the errors of all ranks come from one product.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.kernels import dense, mosaic
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Chain, Event, Stats, Unit, chain_text, is_reducer, is_whole
from moesaic.methods.chains import (
    Family,
    apply_link,
    can_be_cut,
    cut_errors,
    cut_events,
    families,
    rowwise,
)
from moesaic.orchestrator.errors import RunError
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


# Name ``unit|member``, dense weight, what was made of it, and Hessian → errors of every row under
# one or several cuts, float32 ``[cuts, *batch, out]``.
Judge = Callable[[str, Tensor, CompressedTensor, Tensor], Tensor]


def _errors_of(name: str, weight: Tensor, tensor: CompressedTensor, hessian: Tensor) -> Tensor:
    return row_errors(weight, tensor.effective(), hessian)[None]


@dataclass(frozen=True)
class Made:
    """What a link made of members, which are named ``unit|member``.

    Attributes:
        members: the compressed tensors.
        judged: name → under every Hessian of its site, over all text and then of each source, the
            errors; see :data:`Judge`.
        seconds: of the link.
    """

    members: Mapping[str, CompressedTensor]
    judged: Mapping[str, Sequence[Tensor]]
    events: list[Event]
    seconds: float

    def of(self, unit: Unit) -> dict[str, CompressedTensor]:
        """The members of one unit."""
        return {m: self.members[f"{unit.name}{SEPARATOR}{m}"] for m in unit.shapes}

    def errors_of(self, unit: Unit) -> Rows:
        """The errors of one unit by their names in an ``errors`` entry."""
        found = {}
        for member in unit.shapes:
            errors, *apart = self.judged[f"{unit.name}{SEPARATOR}{member}"]
            found[f"error|{member}"] = errors
            found |= {error_name(member, k): own for k, own in enumerate(apart)}
        return found


@dataclass(frozen=True)
class Bench:
    """Units of one site with all that is known of them.

    Attributes:
        store: where results go.
        units: as reducers leave them; chains are without the reducers that did so here.
        weights: unit → member → dense weight.
        side: what comes with a reduced bank, as it is.
        sites: site → statistics.
        stats: ``unit|member`` → what methods get.
        stages: chain → unit → key, of the shorter chains that others start from.
        merged: ``unit|member`` → what a merger left that chains begin with and correct.
        device: where the work is done.
        experts: of a bank that are there at a time, if weights and statistics lie elsewhere; 0
            where all of them are there.
    """

    store: Store
    units: Sequence[Unit]
    weights: Mapping[str, Mapping[str, Tensor]]
    side: Mapping[str, Tensor]
    sites: Mapping[str, Stats]
    stats: Mapping[str, Stats]
    stages: Keys
    device: str
    experts: int = 0
    merged: Members = field(default_factory=dict)

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
                made = self._apply(chain, units, _errors_of)
                seconds = made.seconds / len(units)
                for unit in units:
                    rows = self._known_rows(unit)
                    for name, errors in made.errors_of(unit).items():
                        rows[name] = errors[0]
                    key = keys[unit.name]
                    self._write(unit, key, made.of(unit), rows, made.events, seconds)
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
        chains = [largest, *(chain for chain in family.ranks if chain != largest)]

        def judge(name: str, weight: Tensor, tensor: CompressedTensor, hessian: Tensor) -> Tensor:
            member = name.rpartition(SEPARATOR)[2]
            ranks = [family.ranks[chain][member] for chain in chains]
            return cut_errors(weight, tensor, hessian, ranks).float()

        whole = self._apply(largest, [unit], judge)
        made, events = whole.of(unit), whole.events
        rows = [self._known_rows(unit) for _ in chains]
        for name, curves in whole.errors_of(unit).items():
            for own, errors in zip(rows, curves, strict=True):
                own[name] = errors
        seconds = (time.monotonic() - started) / len(chains)
        for chain, own in zip(chains, rows, strict=True):
            if chain == largest:
                self._write(unit, keys[chain], made, own, events, seconds)
            else:
                ranks_of = family.ranks[chain]
                smaller = {member: made[member].cut(ranks_of[member]) for member in made}
                named = {f"{unit.name}{SEPARATOR}{m}": tensor for m, tensor in smaller.items()}
                told, of = cut_events(events, named), Whole(keys[largest], ranks_of)
                self._write(unit, keys[chain], smaller, own, told, seconds, of)
            yield unit.name, keys[chain], seconds

    def _apply(self, chain: Chain, units: Sequence[Unit], judge: Judge) -> Made:
        """Runs the last link on the members of units together; they are named ``unit|member``."""
        made: list[dict[str, CompressedTensor]] = []
        judged: list[dict[str, list[Tensor]]] = []
        events: list[Event] = []
        seconds = 0.0
        before: dict[str, CompressedTensor] = {}
        for unit in units if len(chain) > 1 else ():
            before |= self._before(chain[:-1], unit)
        spans = self._spans(units)
        if len(spans) > 1 and any(is_whole(spec.method) for spec in chain):
            raise RunError(
                f"{units[0].name}: {chain_text(chain)} takes all experts together, and they do not"
                " fit the worker's device: a larger one, or another method"
            )
        for span in spans:
            weights, stats = self._there(units, span)
            earlier = {
                name: (tensor if span is None else mosaic.take(tensor, span)).to(self.device)
                for name, tensor in before.items()
            }
            started = time.monotonic()
            result = apply_link(chain, weights, earlier, stats)
            seconds += time.monotonic() - started
            rows = {}
            for name, tensor in result.members.items():
                under = partial(judge, name, weights[name], tensor)
                apart = source_errors(stats[name], under)
                rows[name] = [under(stats[name]["hessian"]), *apart]
            events += result.events
            if span is None:
                made.append(dict(result.members))
                judged.append(rows)
            else:
                made.append({name: tensor.to("cpu") for name, tensor in result.members.items()})
                judged.append({name: [e.cpu() for e in errors] for name, errors in rows.items()})
        return Made(
            {name: mosaic.joined([part[name] for part in made]) for name in made[0]},
            {
                name: [torch.cat(own, 1) for own in zip(*(p[name] for p in judged), strict=True)]
                for name in judged[0]
            },
            events,
            seconds,
        )

    def _before(self, chain: Chain, unit: Unit) -> Members:
        """What a shorter chain left of a unit's members."""
        if is_reducer(chain[-1].method):
            return self.merged
        path = self.store.path("pieces", self.stages[chain][unit.name])
        return {
            f"{unit.name}{SEPARATOR}{member}": tensor
            for member, tensor in read_piece(path).items()
            if member in unit.shapes
        }

    def _spans(self, units: Sequence[Unit]) -> list[range] | list[None]:
        """Experts that are there together; None for all that there is."""
        if not self.experts or units[0].kind != "bank":
            return [None]
        (bank,) = units
        count, step = bank.shapes["gate"][0], self.experts
        return [range(low, min(low + step, count)) for low in range(0, count, step)]

    def _there(
        self, units: Sequence[Unit], span: range | None
    ) -> tuple[dict[str, Tensor], dict[str, Stats]]:
        """Weights and statistics of members, or of some of their experts, on the device."""
        weights = {
            f"{unit.name}{SEPARATOR}{member}": self.weights[unit.name][member]
            for unit in units
            for member in unit.shapes
        }
        if span is None:
            return weights, {name: self.stats[name] for name in weights}
        rows = slice(span[0], span[-1] + 1)
        shared: dict[int, Stats] = {}  # members of one site share an object, as they did
        for name in weights:
            own = self.stats[name]
            if id(own) not in shared:
                # What concerns the bank's outputs together has no row for each expert.
                sums = {n: v[rows].to(self.device) for n, v in own.sums.items()}
                shared[id(own)] = Stats(sums, span[0])
        return (
            {name: weight[rows].to(self.device) for name, weight in weights.items()},
            {name: shared[id(self.stats[name])] for name in weights},
        )

    def _known_rows(self, unit: Unit) -> Rows:
        """What every ``errors`` entry of the unit has: tokens that each member saw, and the squares
        of its outputs over them."""
        rows = {}

        def outputs(member: str) -> Tensor:
            name, found = f"{unit.name}{SEPARATOR}{member}", []
            for span in self._spans([unit]):
                weights, stats = self._there([unit], span)
                part = row_errors(weights[name], None, stats[name]["hessian"])
                found.append(part if span is None else part.cpu())
            return torch.cat(found) if len(found) > 1 else found[0]

        for member, site in unit.sites.items():
            stats = self.sites[site]
            rows[f"tokens{SEPARATOR}{member}"] = stats["tokens"]
            rows[f"norm{SEPARATOR}{member}"] = stats.derived(
                ("outputs", unit.name, member), partial(outputs, member)
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
