"""What all reductions in the store have in common, of banks and of dense parts.

An entry ``reductions`` is written like a piece whose members are all dense, with how long it took
and what happened on the way beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import dense
from moesaic.methods.base import Event, Stats, Unit
from moesaic.orchestrator.pieces import read_piece, write_piece
from moesaic.orchestrator.store import Entry, Store

KIND = "reductions"


@dataclass(frozen=True)
class Reduced(ABC):
    """A bank or part after a reduction.

    Attributes:
        entry: of the store.
    """

    entry: Entry

    @property
    def seconds(self) -> float:
        return float(self.entry.metadata["seconds"])

    @property
    def events(self) -> list[Event]:
        return [Event(**event) for event in self.entry.metadata["events"]]

    @abstractmethod
    def shaped(self, unit: str) -> Unit:
        """A unit with its new shapes."""

    @abstractmethod
    def gradients(self, stats: Mapping[str, Stats], unit: str) -> dict[str, Stats]:
        """What the reverse pass left of a unit's members, ``unit|member``, for what is left of
        them."""

    @abstractmethod
    def loss(self, gradients: Mapping[str, Stats], all_tokens: int) -> float:
        """Second-order estimate of the KL that the reduction costs by itself, in nats per token.

        Args:
            gradients: ``unit|member`` → sums of the reverse pass.
            all_tokens: of the reverse pass.
        """

    @property
    @abstractmethod
    def relative_error(self) -> float:
        """Part of the outputs' square that changes."""


def put_reduction(
    store: Store,
    key: str,
    owner: str,
    tensors: Mapping[str, Tensor],
    events: Sequence[Event],
    seconds: float,
    **more: int,
) -> None:
    """Makes the entry.

    Args:
        owner: name of the bank or part.
        more: further metadata.

    Raises:
        ValueError: a tensor has NaN or infinite values.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{owner}: the reduction's {name} is not finite")
    members = {name: dense.pack(tensor.contiguous()) for name, tensor in tensors.items()}
    told = [{"kind": e.kind, "message": e.message, "unit": owner, "value": e.value} for e in events]
    metadata = {"unit": owner, "seconds": seconds, "events": told, **more}
    store.put(KIND, key, lambda path: write_piece(path, members, {"unit": owner}), metadata)


def get_reduction(store: Store, key: str) -> tuple[Entry, dict[str, Tensor]] | None:
    """A finished entry and its tensors, which are mapped; None where there is none."""
    entry = store.get(KIND, key)
    if entry is None:
        return None
    return entry, {name: member.dense() for name, member in read_piece(entry.path).items()}
