"""The words of methods that change an expert layer itself: fewer experts, or narrower ones.

Such a method, a *reducer*, is a module of this folder that defines

``NEEDS``    names of the statistics that it wants, a frozenset of keys of ``EXPERT_STATISTICS``
``Options``  a :class:`~moesaic.methods.base.MethodOptions`
``outline``  ``(shape, options) -> Outline``: what will be left, from the shape alone
``reduce``   ``(layer, options) -> Reduction``
``allot``    ``(layers, options) -> dict[str, int]``, only where several layers share out how many
             experts each keeps; its ``Options`` then have ``window`` (see :func:`window_option`)

A reduction comes first in a chain: what it leaves is a bank like any other, whose statistics are
sums over those of the experts that went into each new one, and goes on to be quantized. (Where a
repair follows a merger at once, the layer keeps its experts: :mod:`moesaic.methods.stand_ins`.)

A pruned layer has a router row per expert that is left. A merged one may keep all rows of its
router, with a map from rows to new experts: a token that is routed to two experts of one group
reaches their common stand-in with the sum of their gates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.kernels.discovery import plugin
from moesaic.methods.base import Event, MethodOptions, Stats, option

# What calibration can keep of an expert layer with E experts, besides its linears' inputs. All are
# plain sums. f is an expert's output (bias included), g the gate that it is weighted with; "routed"
# sums run over the tokens that were routed to an expert, "all" over a sample of tokens, the same
# ones for every expert.
EXPERT_STATISTICS: Mapping[str, str] = {
    "load": "tokens routed to each expert, by text source, int64 [sources, E]",
    "gates": "routed: sum of g, float32 [E]",
    "coactivation": "number of tokens routed to both of two experts, int64 [E, E]",
    "logits": "sum of router logits over all tokens, float32 [E]",
    "logits_gram": "sum of products of two router logits over all tokens, float32 [E, E]",
    "norm": "routed: sum of ‖f‖, float32 [E]",
    "sq": "routed: sum of ‖f‖², float32 [E]",
    "gated_norm": "routed: sum of g‖f‖, float32 [E]",
    "gated_sq": "routed: sum of g²‖f‖², float32 [E]",
    "sum": "routed: sum of f, float32 [E, H]",
    "gated_sum": "routed: sum of g·f, float32 [E, H]",
    "all_tokens": "number of sampled tokens, int64 []",
    "all_sum": "all: sum of f, float32 [E, H]",
    "all_sq": "all: sum of ‖f‖², float32 [E]",
    "cosine": "all: sum of the cosine between two experts' outputs, float32 [E, E]",
    "sample": "inputs of the layer at the sampled tokens, float32 [tokens, H]",
}

Keep = int | float


@dataclass(frozen=True)
class LayerShape:
    """Sizes of an expert layer.

    Attributes:
        experts: number of experts E.
        width: intermediate width of an expert I.
        hidden: width of the hidden state H.
        top_k: experts per token.
        routing_groups: the router first chooses among so many groups of neighbouring experts, and
            a pruned layer must have equally many in each; 1 where it does not.
        least: the smallest number of router rows with which routing still works; at least top_k.
        router: tensors of the router: ``weight`` and, where there are any, ``bias`` (of the logits)
            and ``correction`` (of the choice, not of the gates).
        biased: whether gate, up and down have biases.
    """

    experts: int
    width: int
    hidden: int
    top_k: int
    routing_groups: int = 1
    least: int = 1
    router: tuple[str, ...] = ("weight",)
    biased: bool = False


@dataclass(frozen=True)
class Outline:
    """What a reduction leaves, without the numbers.

    Attributes:
        experts, width: of the new bank.
        rows: rows of the router.
        mapped: whether a map leads from rows to experts.
        constants: number of constant stand-ins (see :class:`Reduction`).
    """

    experts: int
    width: int
    rows: int
    mapped: bool = False
    constants: int = 0

    @property
    def ordinary(self) -> bool:
        """Whether it is a layer as every engine knows it."""
        return self.rows == self.experts and not self.mapped and not self.constants


@dataclass(frozen=True)
class ExpertLayer:
    """An expert layer as reducers see it: weights, router, statistics, and how it computes.

    Attributes:
        shape: its sizes.
        weights: ``gate`` and ``up`` ``[E, I, H]``, ``down`` ``[E, H, I]``, in the file's dtype.
        biases: ``gate`` and ``up`` ``[E, I]``, ``down`` ``[E, H]``; empty where there are none.
        router: ``weight [E, H]`` and what else ``shape.router`` names, ``[E]``.
        stats: sums that the reducer's ``NEEDS`` name, and ``sample`` always.
        gating: ``(x [T, H], router) -> (indices [T, k], gates [T, k])``, the model's own: whatever
            function, normalisation, correction and groups it has. ``router`` may have other rows.
        activation: ``(gate [T, I], up [T, I]) -> [T, I]``, biases included before.
    """

    shape: LayerShape
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    router: Mapping[str, Tensor]
    stats: Stats
    gating: Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    activation: Callable[[Tensor, Tensor], Tensor]

    def middle(self, expert: int, x: Tensor) -> Tensor:
        """Input of an expert's down projection, ``[T, H] -> [T, I]`` in float32."""
        halves = []
        for name in ("gate", "up"):
            y = F.linear(x.float(), self.weights[name][expert].float())
            halves.append(y + self.biases[name][expert].float() if self.biases else y)
        return self.activation(*halves).float()

    def output(self, expert: int, x: Tensor) -> Tensor:
        """Output of an expert, ``[T, H] -> [T, H]`` in float32, without its gate."""
        y = F.linear(self.middle(expert, x), self.weights["down"][expert].float())
        return y + self.biases["down"][expert].float() if self.biases else y

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Output of one expert after another."""
        for expert in range(self.weights["gate"].shape[0]):
            yield self.output(expert, x)

    @property
    def frequency(self) -> Tensor:
        """Tokens routed to each expert, float64 ``[E]``."""
        return self.stats["load"].double().sum(0)


@dataclass(frozen=True)
class LayerView:
    """What is known of a layer where several share out their experts.

    Attributes:
        shape, router, stats: as in :class:`ExpertLayer`.
    """

    shape: LayerShape
    router: Mapping[str, Tensor]
    stats: Stats


@dataclass(frozen=True)
class Reduction:
    """What a reducer makes of an expert layer with E experts.

    Attributes:
        weights: ``gate`` and ``up`` ``[M, J, H]``, ``down`` ``[M, H, J]``, dtype of the original.
        biases: of the new experts, in the same form as the layer's.
        router: the router's tensors with R rows.
        groups: new expert → the old ones that went into it; their statistics add up. Some old ones
            may be in none.
        expert_map: ``[R]``, int64: router row → new expert, or M + c for constant c. None where row
            r leads to expert r.
        constants: ``[C, H]`` float32: outputs that do not depend on the token, weighted with gates
            like those of experts; None where there are none.
        channels: ``[E, J]``, int64: which intermediate channel of each old expert stands where in
            the new one; None where they are as they were.
        events: what a person should know.
    """

    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    router: Mapping[str, Tensor]
    groups: Sequence[Sequence[int]]
    expert_map: Tensor | None = None
    constants: Tensor | None = None
    channels: Tensor | None = None
    events: Sequence[Event] = field(default_factory=tuple)

    @property
    def outline(self) -> Outline:
        experts, width, _ = self.weights["gate"].shape
        return Outline(
            experts=experts,
            width=width,
            rows=self.router["weight"].shape[0],
            mapped=self.expert_map is not None,
            constants=0 if self.constants is None else len(self.constants),
        )

    def applied(self, layer: ExpertLayer) -> ExpertLayer:
        """The layer with the new experts; its statistics are still the old ones."""
        return replace(layer, weights=self.weights, biases=self.biases, router=self.router)


class Reducer(Protocol):
    """What a reducer's module defines; see the module's docstring."""

    NEEDS: frozenset[str]
    Options: type[MethodOptions]

    def outline(self, shape: LayerShape, options: Any) -> Outline:
        """What :func:`reduce` will leave of a layer of this shape.

        Raises:
            ValueError: the layer cannot be reduced so, in one line.
        """

    def reduce(self, layer: ExpertLayer, options: Any) -> Reduction:
        """Reduces one layer."""


class Allotting(Reducer, Protocol):
    """A reducer whose layers can share out how many experts each keeps."""

    def allot(self, layers: Mapping[str, LayerView], options: Any) -> dict[str, int]:
        """How many experts each layer of a window keeps.

        Raises:
            ValueError: the layers cannot be left with so few, in one line.
        """


def mixture(layer: ExpertLayer, reduction: Reduction | None, x: Tensor) -> Tensor:
    """What the layer gives, ``[T, H] -> [T, H]`` in float32, as it is or reduced.

    Shared experts, which no reducer touches, are not part of it.
    """
    reduced = layer if reduction is None else reduction.applied(layer)
    index, gates = layer.gating(x, reduced.router)
    experts = reduced.weights["gate"].shape[0]
    constants = None if reduction is None else reduction.constants
    size = experts + (0 if constants is None else len(constants))
    expert_map = None if reduction is None else reduction.expert_map
    share, reached = combined_gates(index, gates.float(), expert_map, size)
    total = torch.zeros(len(x), x.shape[-1], device=x.device)
    for expert in range(experts):
        tokens = reached[:, expert].nonzero().flatten()
        if len(tokens):
            y = reduced.output(expert, x[tokens]) * share[tokens, expert, None]
            total.index_add_(0, tokens, y)
    if constants is not None:
        total += share[:, experts:] @ constants.float()
    return total


def combined_gates(
    index: Tensor, gates: Tensor, expert_map: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Gates by stand-in: those of a token's choices that lead to the same one add up.

    Args:
        index: ``[T, k]``, rows of the router.
        gates: ``[T, k]``.
        expert_map: ``[R]``, row → stand-in; None where they are the same.
        size: number of stand-ins S.

    Returns:
        the gates ``[T, S]``, and which stand-ins a token reaches, bool ``[T, S]``.
    """
    if expert_map is not None:
        index = expert_map.to(index.device)[index]
    share = torch.zeros(len(index), size, dtype=gates.dtype, device=index.device)
    share.scatter_add_(1, index, gates)
    reached = torch.zeros_like(share, dtype=torch.bool).scatter_(1, index, True)
    return share, reached


def reducer_module(name: str) -> Reducer:
    """The reducer called ``name``; raises ``UnknownName`` with the list of known ones."""
    return cast(Reducer, plugin("moesaic.methods", ("reduce",), name))


# How many experts stay


def keep_option(default: Keep = 0.75) -> Any:
    """The option of every reducer that leaves fewer experts."""
    return option(
        default,
        "experts that stay: their share (0.5, at most 1.0) or their number (a whole number)",
        [0.875, 0.75, 0.625, 0.5],
        gt=0,
    )


def window_option() -> Any:
    """The option of reducers whose layers can share out how many experts each keeps."""
    return option(
        1,
        "neighbouring layers that share out the experts that stay: 1, each keeps its share; 0, all"
        " layers together",
        [1, 0],
        ge=0,
    )


def windows(names: Sequence[str], window: int) -> list[list[str]]:
    """The layers that share out their experts, in order."""
    size = window or max(1, len(names))
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def is_open(options: MethodOptions) -> bool:
    """Whether layers are still to share out how many experts each keeps."""
    return getattr(options, "window", 1) != 1


def open_outline(shape: LayerShape, keep: Keep) -> int:
    """The fewest experts that a layer can be left with while that is open.

    Raises:
        ValueError: ``keep`` is no share, in one line.
    """
    if not isinstance(keep, float):
        raise ValueError(f"keep: {keep} is a number of experts: with a window, give their share")
    kept_experts(shape, keep)
    groups = shape.routing_groups
    return -(-max(shape.least, shape.top_k) // groups) * groups


def kept_experts(shape: LayerShape, keep: Keep, mapped: bool = False) -> int:
    """The number of experts that ``keep`` asks for.

    Args:
        mapped: all rows of the router stay, so that its groups need not be heeded.

    Raises:
        ValueError: it is none, more than there are, or too few for the router, in one line.
    """
    groups = 1 if mapped else shape.routing_groups
    if isinstance(keep, float):
        if keep > 1:
            raise ValueError(f"keep: {keep:g} is no share of the experts: at most 1.0")
        count = groups * int(keep * shape.experts / groups + 0.5)
    else:
        count = keep
    if count > shape.experts:
        raise ValueError(f"keep: {count} experts are more than the {shape.experts} there are")
    if count % groups:
        raise ValueError(
            f"keep: {count} experts do not divide into the router's {groups} groups of equal size"
        )
    least = shape.top_k if mapped else max(shape.least, shape.top_k)
    if count < least:
        raise ValueError(
            f"keep: {count} of {shape.experts} experts are too few: the router chooses"
            f" {shape.top_k} per token and needs at least {least}"
        )
    return count


def top_experts(shape: LayerShape, scores: Tensor, count: int) -> list[int]:
    """The ``count`` experts of the highest scores, in their order; equally many of every routing
    group. Of equal scores the earlier expert is taken."""
    groups = shape.routing_groups
    order = scores.double().view(groups, -1).sort(dim=1, descending=True, stable=True).indices
    size = shape.experts // groups
    chosen = order[:, : count // groups] + size * torch.arange(groups, device=order.device)[:, None]
    return sorted(int(expert) for expert in chosen.flatten())


# Ways to put a reduction together


def prune(layer: ExpertLayer, kept: Sequence[int], events: Sequence[Event] = ()) -> Reduction:
    """Only the ``kept`` experts with their router rows; the model's gating does the rest."""
    rows = list(kept)
    return Reduction(
        weights={name: weight[rows] for name, weight in layer.weights.items()},
        biases={name: bias[rows] for name, bias in layer.biases.items()},
        router={name: value[rows] for name, value in layer.router.items()},
        groups=[[expert] for expert in rows],
        events=events,
    )


def group_shares(frequency: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Weight of every member in its group, float64, summing to 1.

    A group of whose members none has any weight counts them alike.

    Args:
        frequency: ``[E]``, not negative.
    """
    shares = []
    for group in groups:
        weight = frequency[list(group)].double()
        total = weight.sum()
        even = torch.full_like(weight, 1 / len(group))
        shares.append(weight / total if total > 0 else even)
    return shares


def group_mean(value: Tensor, groups: Sequence[Sequence[int]], shares: Sequence[Tensor]) -> Tensor:
    """``[E, …] -> [M, …]``: weighted means, summed in float64, in the dtype of ``value``."""
    means = []
    for group, share in zip(groups, shares, strict=True):
        if len(group) == 1:
            means.append(value[group[0]])
            continue
        total = torch.zeros_like(value[group[0]], dtype=torch.float64)
        for expert, weight in zip(group, share.tolist(), strict=True):
            total.add_(value[expert].double(), alpha=weight)
        means.append(total.to(value.dtype))
    return torch.stack(means)


def merge(
    layer: ExpertLayer,
    groups: Sequence[Sequence[int]],
    weights: Mapping[str, Tensor],
    shares: Sequence[Tensor],
    router: str,
    channels: Tensor | None = None,
    biases: Mapping[str, Tensor] | None = None,
    events: Sequence[Event] = (),
) -> Reduction:
    """One new expert per group.

    Args:
        groups: every old expert in exactly one.
        weights: of the new experts.
        shares: of the members in each group.
        router: ``map``: all rows stay, gates of a group add up. ``mean``: one row per group, the
            mean of its members'.
        channels: see :class:`Reduction`.
        biases: of the new experts; by default the means of the old ones, moved along ``channels``.
    """
    experts = layer.shape.experts
    if sorted(expert for group in groups for expert in group) != list(range(experts)):
        raise ValueError(f"the groups {groups} do not hold every one of {experts} experts once")
    rows, expert_map = dict(layer.router), None
    if router == "map":
        expert_map = torch.empty(experts, dtype=torch.int64)
        for number, group in enumerate(groups):
            expert_map[list(group)] = number
    else:
        rows = {name: group_mean(value, groups, shares) for name, value in rows.items()}
    if biases is None:
        moved = dict(layer.biases)
        if channels is not None:
            for name in moved.keys() & {"gate", "up"}:
                moved[name] = moved[name].gather(1, channels.to(moved[name].device))
        biases = {name: group_mean(value, groups, shares) for name, value in moved.items()}
    return Reduction(
        weights=weights,
        biases=biases,
        router=rows,
        groups=[list(group) for group in groups],
        expert_map=expert_map,
        channels=channels,
        events=events,
    )


def unreached(layer: ExpertLayer) -> list[Event]:
    """An event if calibration routed no token to some experts: nothing is known of them."""
    silent = (layer.frequency == 0).nonzero().flatten().tolist()
    if not silent:
        return []
    text = f"{len(silent)} of {layer.shape.experts} experts saw no token, expert {silent[0]} first"
    return [Event("unreached_experts", text, value=len(silent))]
