"""Transformers' expert layers made ready for another number of experts, or narrower ones.

Only sizes change; the model's own gating and activation stay. What the new parameters hold is for
the caller to load.
"""

from typing import Any

import torch
from torch import Tensor, nn


def resize_experts(module: Any, experts: int, width: int) -> None:
    """Gives an experts module empty parameters for ``experts`` of intermediate ``width``."""
    down = module.down_proj
    hidden = down.shape[2] if module.is_transposed else down.shape[1]
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    for name, (rows, columns) in shapes.items():
        shape = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
        _resize(module, name, shape)
    if module.has_bias:
        _resize(module, "gate_up_proj_bias", (experts, 2 * width))
        _resize(module, "down_proj_bias", (experts, hidden))
    module.num_experts = experts


def resize_router(module: Any, rows: int) -> None:
    """Gives a router empty parameters and buffers for ``rows`` experts."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in tensors.items():
        _resize(module, name, (rows, *tensor.shape[1:]))
    module.num_experts = rows
    if isinstance(module, nn.Linear):
        module.out_features = rows


def _resize(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old: Tensor = getattr(module, name)
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(empty, False) if isinstance(old, nn.Parameter) else empty)
