"""Expert banks in two forms: members as methods see them, fused tensors as modules hold them.

Members: gate and up ``[E, I, H]``, down ``[E, H, I]``. Fused: ``gate_up [E, 2I, H]`` with the gate
rows first or interleaved with the up rows, and ``down [E, H, I]``; both transposed in some models.

A reduced bank comes with more than its members: the router's rows, biases, where rows lead. In a
piece these are further members, in the format ``dense``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.methods.reduction import Reduction
from moesaic.orchestrator.family import Bank

MEMBERS = ("gate", "up", "down")
# Names of what comes with a reduced bank: a role of the router or a member follows the first two.
ROUTER, BIAS, EXPERT_MAP, CONSTANTS = "router_", "bias_", "expert_map", "constants"


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


def split_biases(gate_up: Tensor, down: Tensor, bank: Bank) -> dict[str, Tensor]:
    """Biases of the members ``[E, I]``, ``[E, I]``, ``[E, H]`` from the fused ones."""
    if bank.interleaved:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down}


def fuse_biases(members: Mapping[str, Tensor], bank: Bank) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`split_biases`."""
    pair = [members["gate"], members["up"]]
    gate_up = torch.stack(pair, dim=2).flatten(1) if bank.interleaved else torch.cat(pair, dim=1)
    return gate_up, members["down"]


def side_members(reduction: Reduction) -> dict[str, Tensor]:
    """What comes with a reduced bank, by member name."""
    members = {f"{ROUTER}{role}": value for role, value in reduction.router.items()}
    members |= {f"{BIAS}{name}": value for name, value in reduction.biases.items()}
    if reduction.expert_map is not None:
        members[EXPERT_MAP] = reduction.expert_map
    if reduction.constants is not None:
        members[CONSTANTS] = reduction.constants
    return members


def is_reduced(members: Mapping[str, object]) -> bool:
    """Whether these are members of a reduced bank."""
    return f"{ROUTER}weight" in members
