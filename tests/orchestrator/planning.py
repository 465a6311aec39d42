"""Plans and their pieces for tests: every unit compressed with the options a test wants."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.methods import rtn
from moesaic.methods.base import Unit
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.pieces import write_piece
from moesaic.orchestrator.streaming import StreamedModel

# Options of a method for a whole unit, or member → options; None leaves the unit dense.
Choice = Mapping[str, Any] | None
Choose = Callable[[int, Unit], Choice]

IDS = torch.arange(3, 25).view(2, 11)


def channel(bits: int, symmetric: bool = True) -> dict[str, Any]:
    """Whole rows."""
    return {"bits": bits, "group_size": -1, "symmetric": symmetric}


def grouped(bits: int, group_size: int = 16, symmetric: bool = True) -> dict[str, Any]:
    """Groups of inputs."""
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


def open_model(folder: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(folder))


def make_pieces(
    model: StreamedModel, choose: Choose, folder: Path, method: Any = rtn
) -> dict[str, Path | None]:
    """Unit → the file of its piece; ``choose`` is given the unit and its place in the model.

    Args:
        method: a module whose options are chosen, and which wants no statistics.
    """
    chosen: dict[str, Path | None] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for index, unit in enumerate(model.units()):
        choice = choose(index, unit)
        chosen[unit.name] = None
        if choice is None:
            continue
        members = {}
        for name, weight in model.read_unit(unit).items():
            options = method.Options(**choice.get(name, choice))
            members |= method.compress({name: weight}, {}, options).members
        path = chosen[unit.name] = folder / f"{index}.safetensors"
        write_piece(path, members, {"unit": unit.name})
    return chosen


def mixed(index: int, unit: Unit) -> Choice:
    """Every freedom of our own format: by unit, by member, with zero points, partly dense."""
    if index % 5 == 3:
        return None
    if unit.kind == "bank":
        up = grouped(4, 8, symmetric=False)
        return {"gate": channel(3), "up": up, "down": channel(5)}
    return channel(2 + index % 7, symmetric=index % 2 == 0)


def loadable(index: int, unit: Unit) -> Choice:
    """What transformers can load: one scheme for all experts, any symmetric one for linears."""
    if unit.kind == "bank":
        return channel(3)
    return None if index % 5 == 3 else channel(2 + index % 7)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Name → content of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
