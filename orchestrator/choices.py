"""What a search chooses for: linears as a whole, banks by expert and member.

A bank is compressed as one batch under each candidate, but its experts need not take the same one:
a *choice* of a bank is one member of one expert, ``BANK.EXPERT.MEMBER``. What the target cannot
load mixed is tied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.methods.base import Chain, Unit

# Name of a choice → what is done there.
Chosen = Mapping[str, Chain]


@dataclass(frozen=True)
class Choice:
    """One choice.

    Attributes:
        name: as plans have it.
        member: of the unit.
        expert: index along the first dimension of a bank; None for a linear.
    """

    name: str
    member: str
    expert: int | None


def choices(unit: Unit) -> list[Choice]:
    """The choices of a unit, expert by expert."""
    if unit.kind == "linear":
        return [Choice(unit.name, "weight", None)]
    experts = next(iter(unit.shapes.values()))[0]
    return [
        Choice(f"{unit.name}.{expert}.{member}", member, expert)
        for expert in range(experts)
        for member in unit.shapes
    ]


def member_choices(unit: Unit) -> list[list[str]]:
    """The names of the choices of a bank, member by member; [] for a linear."""
    if unit.kind == "linear":
        return []
    found = choices(unit)
    return [[c.name for c in found if c.member == member] for member in unit.shapes]


def choices_in(unit: Unit, chosen: Chosen) -> list[Choice]:
    """The choices of a unit under a plan, which may leave it fewer experts; [] if not chosen."""
    return [choice for choice in choices(unit) if choice.name in chosen]


def chains_of(unit: Unit, chosen: Chosen) -> list[Chain]:
    """The distinct chains that a plan uses in a unit, in the order of its choices."""
    return list(dict.fromkeys(chosen[choice.name] for choice in choices_in(unit, chosen)))


def tied_choices(
    units: Sequence[Unit], tied: Sequence[Sequence[str]], mixed_banks: bool
) -> list[list[str]]:
    """Ties between units as ties between choices.

    Args:
        tied: groups of units that must share a chain.
        mixed_banks: whether the experts of a bank may differ.
    """
    by_name = {unit.name: unit for unit in units}
    groups = [list(group) for group in tied]
    if not mixed_banks:
        inside = {name for group in groups for name in group}
        groups += [[u.name] for u in units if u.kind == "bank" and u.name not in inside]
    names = [[c.name for name in group for c in choices(by_name[name])] for group in groups]
    return [group for group in names if len(group) > 1]
