"""Plans and their pieces for tests: every unit compressed with the options a test wants."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.methods import rtn
from moesaic.methods.base import Unit
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.pieces import Member, dense_members, piece_header, write_piece
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


def headers(chosen: Mapping[str, Path | None]) -> dict[str, dict[str, Member]]:
    """Unit → what the file of its piece says of itself, dense ones left out."""
    return {unit: piece_header(path) for unit, path in chosen.items() if path is not None}


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


@torch.no_grad()
def streamed_logits(model: StreamedModel, pieces: Mapping[str, Path]) -> Tensor:
    """Logits of ``IDS`` under a plan, unit → file of its piece."""
    hidden = model.embed(IDS)
    replaced = dense_members({unit: str(path) for unit, path in pieces.items()})
    for index in range(model.blocks):
        hidden = model.run_block(index, model.load_block(index, replaced), hidden)
    return model.logits(model.final_norm(hidden))


def logits_without_us(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Logits of ``IDS`` by the models in ``folder``, in a process that never imports moesaic."""
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for name in {list(names)!r}:
    model, report = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, experts_implementation="eager", output_loading_info=True)
    assert not any(report.values()), (name, report)
    with torch.no_grad():
        torch.save(model(torch.tensor({IDS.tolist()})).logits, name + ".pt")
assert not [name for name in sys.modules if name.startswith("moesaic")]
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: torch.load(folder / f"{name}.pt") for name in names}
