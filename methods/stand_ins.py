"""Merged experts as what the old ones are corrected from: W_e = base of e's group + L_e·R_e.

A reducer that merges finds what groups of experts have in common. Where a repair follows it at
once, the layer keeps all of its experts and its router; each expert is stored as a correction of
low rank to its group's stand-in, the best one under the expert's own inputs. With one group that is
the form of D²-MoE (Gu et al., 2502.17298) and of ResMoE (Ai et al., 2503.06881), whose base is a
barycentre of experts with matched channels; with several groups the bases are nearer to the experts
and there are more of them.

Where the merger moved intermediate channels, a stand-in's are moved back for each expert. So every
expert is what it was channel by channel, and may have any other matrix beside this one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels import mapped
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods.base import Spec, options_of, reducers
from moesaic.methods.merging import Merging

_ORDER_BYTES = torch.int32.itemsize


def is_merger(name: str) -> bool:
    """Whether the reducer called ``name`` leaves a stand-in for every expert."""
    return issubclass(options_of(name), Merging)


def mergers() -> list[str]:
    """Names of all reducers that merge."""
    return [name for name in reducers() if is_merger(name)]


def stand_ins(
    weights: Mapping[str, Tensor], group: Tensor, channels: Tensor | None
) -> dict[str, CompressedTensor]:
    """The merged experts in the places of the old ones: members ``[E, out, in]``, ``mapped``.

    Args:
        weights: ``gate``, ``up`` and ``down`` of the merged experts, ``[M, out, in]``.
        group: old expert → new one, int64 ``[E]``.
        channels: old channel at each new place, int64 ``[E, I]``; None where they stay.
    """
    numbers = group.tolist()
    # At each old place the new one of the channel there.
    order = None if channels is None else channels.argsort(dim=1)
    return {
        name: mapped.pack(weight, numbers, order, "columns" if name == "down" else "rows")
        for name, weight in weights.items()
    }


def stand_in_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, spec: Spec, count: int
) -> int:
    """Bytes of what :func:`stand_ins` makes of members ``[E, out, in]``, exactly.

    Args:
        spec: the merger.
        count: merged experts M.
    """
    options = spec.parsed()
    assert isinstance(options, Merging), f"{spec.method} merges"
    size = 0
    for name, (experts, out, inputs) in shapes.items():
        size += count * out * inputs * dtype.itemsize
        if options.moves_channels and count < experts:
            size += experts * (inputs if name == "down" else out) * _ORDER_BYTES
    return size
