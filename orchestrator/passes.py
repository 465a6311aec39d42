"""In which parts a block is walked where it does not fit its device: decided from bytes, before.

Weights, statistics (once for every partial sum that is held) and activations of a block are
counted. Where they exceed what the device has, experts are visited in slices, and what linears read
is summed for some sites at a time. Both give the same sums, bit by bit: each expert, and each site,
sees the same tokens in the same order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moesaic.methods import gptq
from moesaic.methods.base import Unit
from moesaic.orchestrator.block_sizes import BlockSizes
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.expert_statistics import expert_site


@dataclass(frozen=True)
class Passes:
    """The parts of a block.

    Attributes:
        experts: of the bank that are on the device at a time; 0 in a block without one.
        groups: sites of linears whose statistics are summed together, pass after pass.
        whole: bytes that the block would take in one.
        need: bytes that it takes so.
        room: bytes that there are.
    """

    experts: int
    groups: tuple[tuple[str, ...], ...]
    whole: int
    need: int
    room: int

    def text(self, bank: Unit | None) -> str:
        """In words."""
        parts = []
        if bank is not None and self.experts:
            experts = bank.shapes["gate"][0]
            parts.append(f"{self.experts} of {experts} experts at a time")
        if len(self.groups) > 1:
            parts.append(f"sums of its linears in {len(self.groups)} passes")
        takes, room = _gigabytes(self.whole), _gigabytes(self.room)
        return f"takes {takes}, there are {room}: walked in parts, {', '.join(parts)}"


def bank_of(units: Iterable[Unit]) -> Unit | None:
    """The bank among a block's units."""
    return next((unit for unit in units if unit.kind == "bank"), None)


def planned_passes(
    sizes: BlockSizes, block: int, held: int, room: int, beside: int, kept: int
) -> Passes | None:
    """How a block is walked; None where it fits at once.

    Args:
        held: partial sums that are held at a time.
        room: bytes for the block, and what is beside it.
        beside: bytes of what else is on the device.
        kept: bytes on the device of what enters and leaves the expert layer, kept from pass to
            pass.

    Raises:
        RunError: not even one linear, or one expert, fits.
    """
    units = sizes.block_units(block)
    fixed = beside + sizes.activations(block, sizes.batch_tokens()) + sizes.outputs(block)
    whole = fixed + sizes.weights(block) + held * sizes.sums(block)
    if whole <= room:
        return None
    if sizes.walk.by_source:
        raise _too_large(
            block, "all of it, with sums for every text (calibration.per_source),", whole, room
        )
    bank, sums = bank_of(units), sizes.statistics(units)
    fixed += sizes.weights_but_bank(block)
    experts, slices = 0, 0
    if bank is not None:
        count = bank.shapes["gate"][0]
        own = sum(sums[site] for site in set(bank.sites.values()))
        each = sizes.expert_weights(bank) + held * -(-own // count)
        experts = min(count, (room - fixed - kept) // each)
        if experts < 1:
            raise _too_large(block, f"one expert of {bank.name}", fixed + kept + each, room)
        experts = -(-count // -(-count // experts))  # slices of about one size
        fixed += kept
        slices = fixed + experts * each
    # Where experts are compared, all of them pass by while the linears' sums are taken.
    extra = 0
    if bank is not None and sizes.walk.sources:
        extra = experts * sizes.expert_weights(bank) + held * sums[expert_site(bank.name)]
    groups: list[list[str]] = [[]]
    most, filled = 0, fixed + extra
    for unit in units:
        if unit.kind == "bank":
            continue
        site = unit.sites["weight"]
        if any(site in group for group in groups):
            continue
        if groups[-1] and filled + held * sums[site] > room:
            groups.append([])
            filled = fixed
        filled += held * sums[site]
        if filled > room:
            raise _too_large(block, unit.name, filled, room)
        groups[-1].append(site)
        most = max(most, filled)
    return Passes(experts, tuple(map(tuple, groups)), whole, max(most, slices), room)


def experts_at_a_time(sizes: BlockSizes, block: int, room: int, beside: int) -> int:
    """How many experts are on the device at a time where only their weights count; 0 for all.

    Args:
        beside: bytes of everything but weights.

    Raises:
        RunError: not even one fits.
    """
    bank = bank_of(sizes.block_units(block))
    if beside + sizes.weights(block) <= room:
        return 0
    fixed = beside + sizes.weights_but_bank(block)
    if bank is None:
        largest = max(sizes.block_units(block), key=lambda unit: unit.parameters)
        raise _too_large(block, f"the block with {largest.name}", fixed, room)
    each, count = sizes.expert_weights(bank), int(bank.shapes["gate"][0])
    experts = min(count, (room - fixed) // each)
    if experts < 1:
        raise _too_large(block, f"one expert of {bank.name}", fixed + each, room)
    return -(-count // -(-count // experts))


def solved_at_a_time(
    units: Sequence[Unit], weights: int, stats: int, device: str, room: int
) -> int:
    """How many experts of a bank are compressed at a time; 0 where all that there is fits.

    Args:
        units: that share their sites.
        weights, stats: their bytes.

    Raises:
        RunError: not even a linear, or one expert, fits.
    """
    bank = units[0] if units[0].kind == "bank" else None
    count = 1 if bank is None else int(bank.shapes["gate"][0])
    # Weights as they are, compressed, and in float32 while errors are computed; codes twice.
    rest = 4 * weights + stats
    solving = 0
    for member, shape in units[0].shapes.items():
        rows, inputs = int(shape[-2]), int(shape[-1])
        rows *= len(units) * (2 if member == "gate" else 1)
        alone = inputs * (20 * inputs + 12 * rows)
        solving = max(solving, alone, min(gptq.WORK_BYTES[device], count * alone))
    factors = 0 if stats > gptq.KEEP_BYTES else 2 * stats
    if rest + solving + factors <= room:
        return 0
    experts = (room - solving) * count // rest
    if experts < 1 or bank is None:
        what = units[0].name if bank is None else f"one expert of {bank.name}"
        raise _too_large(units[0].block, what, solving + rest // count, room)
    return -(-count // -(-count // min(count, experts)))


def _too_large(block: int, what: str, need: int, room: int) -> RunError:
    return RunError(
        f"block {block}: {what} takes {_gigabytes(need)} with all that must be beside it, a worker"
        f" has {_gigabytes(room)}: fewer workers per node or GPU (compute.workers,"
        " compute.gpus_per_worker), a larger device, a smaller calibration.batch, or what"
        " compute.memory_per_worker allows"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.2f} MB"
