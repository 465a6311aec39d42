"""The dtype that ``config.json`` states, which is what transformers loads everything in.

Scales of compressed weights, too: where the files hold another dtype than is stated, these would be
rounded otherwise than what was measured.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.pieces import Member
from moesaic.orchestrator.streaming import StreamedModel

# The second is what older versions of transformers wrote.
_KEYS = ("dtype", "torch_dtype")


def stated_dtype(
    model: StreamedModel, pieces: Mapping[str, Mapping[str, Member]]
) -> dict[str, str]:
    """Keys of ``config.json`` that must say which dtype was compressed, where they say another.

    Where several dtypes were compressed, nothing changes.
    """
    units = [unit for unit in model.units() if unit.name in pieces]
    found = {pieces[unit.name][member].dtype for unit in units for member in unit.shapes}
    if len(found) != 1:
        return {}
    name = str(found.pop()).removeprefix("torch.")
    config = model.checkpoint.config
    known = [key for key in _KEYS if config.get(key) is not None]
    return {key: name for key in known or _KEYS[:1] if config.get(key) != name}


def loaded_dtype(folder: Path) -> torch.dtype | None:
    """What transformers loads a folder in by itself; None where no configuration says it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = getattr(torch, _stated(config), None)
    return found if isinstance(found, torch.dtype) else None


def dtype_change(original: Checkpoint, folder: Path) -> str | None:
    """A line for people where ``folder`` states another dtype than the model it was made of."""
    before, dtype = _stated(original.config), loaded_dtype(folder)
    now = str(dtype).removeprefix("torch.")
    if not before or dtype is None or before == now:
        return None
    return f"config.json said dtype {before}, the compressed weights are {now}: it says {now} now"


def _stated(config: Mapping[str, Any]) -> str:
    found = next((config[key] for key in _KEYS if config.get(key) is not None), "")
    return found if isinstance(found, str) else ""
