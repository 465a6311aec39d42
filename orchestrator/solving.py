"""What compressing takes: chains are run on small layers and on a small bank of experts."""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.kernels import dense
from moesaic.methods import chains
from moesaic.methods.base import (
    OUTPUT_STATISTICS,
    Chain,
    Result,
    Stats,
    Unit,
    compressing,
    link_module,
)
from moesaic.orchestrator.probes import shortest
from moesaic.orchestrator.statistics import StatisticsObserver

# A layer to compress: inputs (at least) and numbers of rows.
_LAYER_INPUTS, _LAYER_ROWS = 256, (32, 256, 1024)
# Experts and rows of each of a bank to compress.
_BANK = (8, 128)
# How far inputs differ in size: standard deviation of the logarithm of their root mean squares, 0.2
# to 0.6 in the bundled model, SmolLM2 and random ones. Where they are alike, clipping is found in
# half the time.
_SPREAD = 0.4


@dataclass(frozen=True)
class Compressing:
    """What a chain takes.

    Attributes:
        rows: (rows of a linear, seconds per input of theirs), by rising rows; between and beyond
            them time grows evenly.
        bank: seconds per weight of experts that are solved together; 0 where the chain takes none.
        dense: seconds per weight to make dense again.
        cube: seconds per weight and singular value, where weights are factorised; there is nothing
            in ``rows`` then.
    """

    rows: tuple[tuple[int, float], ...]
    bank: float
    dense: float
    cube: float = 0.0

    def seconds(self, experts: int, rows: int, inputs: int) -> float:
        """Of weights ``[experts, rows, inputs]`` that are solved together; 0 experts: a linear."""
        if experts:
            alike = self.seconds(0, experts * rows, inputs)
            return max(alike, self.bank * experts * rows * inputs)
        if not self.rows:
            return 0.0
        if rows <= self.rows[0][0] or len(self.rows) == 1:
            return inputs * self.rows[0][1]
        place = min(bisect.bisect_left(self.rows, (rows, 0.0)), len(self.rows) - 1)
        (low, first), (high, last) = self.rows[place - 1 : place + 1]
        return inputs * (first + (rows - low) * max(0.0, last - first) / (high - low))


def solving_times(
    offered: Iterable[Chain], dtype: torch.dtype, device: str, units: Sequence[Unit]
) -> dict[Chain, Compressing]:
    """Measures one chain of every method and setting of its switches, that with the middle number
    of bits.

    Flags and names among the options (act-order, clipping) change the time most.
    """
    alike: dict[tuple[tuple[str, object], ...], list[Chain]] = {}
    found: dict[Chain, Compressing] = {}
    for chain in offered:
        rest = compressing(chain)
        if not rest:
            continue
        alike.setdefault(tuple(switches(rest)), []).append(chain)
    for own in alike.values():
        middle = sorted(own, key=_bits)[len(own) // 2]
        rest = compressing(middle)
        speed = probe_compress(rest, dtype, device, units)
        found |= dict.fromkeys(own, speed)
    return found


def _bits(chain: Chain) -> int:
    return sum(getattr(spec.parsed(), "bits", 0) for spec in compressing(chain))


def switches(chain: Chain) -> Iterator[tuple[str, object]]:
    for spec in chain:
        yield spec.method, ""
        for name, value in spec.parsed().model_dump().items():
            if isinstance(value, bool | str):
                yield name, value


def probe_compress(
    chain: Chain, dtype: torch.dtype, device: str, units: Sequence[Unit]
) -> Compressing:
    counts = list(_LAYER_ROWS)
    widths = [*range(_LAYER_INPUTS, 4 * _LAYER_INPUTS, 8)]
    widths += sorted({shape[-1] for unit in units for shape in unit.shapes.values()})
    factoring = any(chains.can_be_cut(chain[: end + 1]) for end in range(len(chain)))
    if factoring:  # ranks are given for layers as large as the model's
        square = max(_LAYER_INPUTS, *(min(s[-2:]) for u in units for s in u.shapes.values()))
        counts = [square]
    # What works on banks alone is given one.
    kind = "linear" if all("linear" in link_module(s.method).SCOPE for s in chain) else "bank"
    whole = (_BANK[0],) if kind == "bank" else ()
    fits = (w for w in widths if not chains.misfit(kind, {"weight": (*whole, counts[0], w)}, chain))
    inputs = next(fits)
    made: list[Result] = []

    def layer(rows: int, batch: tuple[int, ...] = ()) -> Callable[[], None]:
        shape = (rows, inputs)
        unit = Unit("probe", "linear", 0, "mlp", {"weight": shape}, {"weight": "probe"})
        needed = tuple(chains.needs(chain) - OUTPUT_STATISTICS.keys())
        observer = StatisticsObserver([unit], needed, torch.device(device))
        sizes = (_SPREAD * torch.randn(inputs, device=device)).exp()
        observer.inputs("probe", torch.randn(2 * inputs, inputs, device=device) * sizes, None)
        sums = observer.finish()["probe"].sums
        if "fisher" in chains.needs(chain):
            sums = {**sums, "fisher": torch.rand(inputs, device=device)}
        sums = {name: value.expand((*batch, *value.shape)).clone() for name, value in sums.items()}
        weights = {"weight": torch.randn(*batch, *shape, device=device).to(dtype)}
        # What a correction that comes first is asked to correct.
        nothing = Result({"weight": dense.pack(torch.zeros_like(weights["weight"]))})

        def run() -> None:
            # New Stats every time: what a method derives from them would be reused.
            stats = {"weight": Stats(sums)}
            result = nothing
            for end in range(len(chain)):
                result = chains.apply_link(chain[: end + 1], weights, result.members, stats)
            made.append(result)

        return run

    experts = math.prod(whole)
    times = [shortest(layer(rows, whole), device) / experts for rows in counts]
    unpack = shortest(made[-1].members["weight"].dense, device) / (experts * counts[-1] * inputs)
    if factoring:
        cube = times[0] / (square * inputs * min(square, inputs))
        return Compressing((), 0.0, unpack, cube=cube)
    each = tuple((rows, seconds / inputs) for rows, seconds in zip(counts, times, strict=True))
    bank = 0.0
    if all("bank" in link_module(spec.method).SCOPE for spec in chain):
        experts, rows = _BANK
        bank = shortest(layer(rows, (experts,)), device) / (experts * rows * inputs)
    return Compressing(each, bank, unpack)


def wants_hessian(chain: Chain) -> bool:
    """Whether a chain factorises, or goes by, the Hessians of its inputs."""
    return any("hessian" in link_module(spec.method).NEEDS for spec in compressing(chain))


def factoring(options: object) -> tuple[Any, ...]:
    """Options that a Hessian's factors depend on."""
    return getattr(options, "damp", None), getattr(options, "act_order", None)
