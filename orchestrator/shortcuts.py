"""Models whose residual stream is turned between layers: blocks with a matrix per sublayer.

A sublayer f (attention, MLP) stands behind a norm and is added to what the norm was given:
x + f(norm(x)). In a sliced model with axes of its own at every place this becomes
x + T x + f(norm(x)); see :mod:`moesaic.methods.slicegpt`. The matrices T lie beside the sublayers,
as ``shortcuts.0``, ``shortcuts.1``; hooks on norm and sublayer bring x to them, so that everything
else keeps its name and any architecture its own forward.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Key of config.json that says of a checkpoint in the store that it has shortcuts.
CONFIG_KEY = "residual_shortcuts"
# Paths of a norm and of the sublayer behind it, within a block.
Pair = Sequence[str]


class Shortcut(nn.Module):
    """Adds ``T x`` to what a sublayer returns; ``weight`` is T ``[d, d]``."""

    def __init__(self, width: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, dtype=dtype), requires_grad=False)
        self._stream: Tensor | None = None

    def remember(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Hook in front of the norm."""
        self._stream = arguments[0]

    def add(self, sublayer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Hook behind the sublayer."""
        if self._stream is None:
            raise RuntimeError("a sublayer was called without the norm in front of it")
        stream, self._stream = self._stream, None
        turned = nn.functional.linear(stream, self.weight)
        if isinstance(output, tuple):
            return (output[0] + turned, *output[1:])
        return output + turned


def shortcut_name(index: int) -> str:
    """Name of the matrix of a block's sublayer ``index``, within the block."""
    return f"shortcuts.{index}.weight"


def put_shortcuts(
    blocks: Iterable[nn.Module], pairs: Sequence[Pair], width: int, dtype: torch.dtype | None = None
) -> None:
    """Gives every block its matrices ``[width, width]``, whose values are still to be loaded."""
    for block in blocks:
        own = [Shortcut(width, dtype) for _ in pairs]
        block.add_module("shortcuts", nn.ModuleList(own))
        for shortcut, (norm, sublayer) in zip(own, pairs, strict=True):
            block.get_submodule(norm).register_forward_pre_hook(shortcut.remember)
            block.get_submodule(sublayer).register_forward_hook(shortcut.add)
