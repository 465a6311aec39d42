"""Expert banks in two forms: members as methods see them, fused tensors as modules hold them.

Members: gate and up ``[E, I, H]``, down ``[E, H, I]``. Fused: ``gate_up [E, 2I, H]`` with the gate
rows first or interleaved with the up rows, and ``down [E, H, I]``; both transposed in some models.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.orchestrator.family import Bank


def split(gate_up: Tensor, down: Tensor, bank: Bank) -> dict[str, Tensor]:
    """Members from the fused tensors; views where possible."""
    if bank.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if bank.interleaved:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down}


def fuse(members: Mapping[str, Tensor], bank: Bank) -> tuple[Tensor, Tensor]:
    """``gate_up`` and ``down`` from the members; the inverse of :func:`split`."""
    gate, up, down = members["gate"], members["up"], members["down"]
    if bank.interleaved:
        gate_up = torch.stack([gate, up], dim=2).flatten(1, 2)  # [E, I, 2, H] -> [E, 2I, H]
    else:
        gate_up = torch.cat([gate, up], dim=1)
    if bank.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return gate_up.contiguous(), down.contiguous()
