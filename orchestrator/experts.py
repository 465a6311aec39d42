"""Watching a block compute: the inputs and outputs of its linears and experts.

Linears are watched by forward hooks. Experts have no module of their own in transformers; all its
Mixture-of-Experts models call one replaceable function instead, and :func:`forward` is registered
there. It goes through the experts one by one, so that each one's inputs and outputs can be seen,
and adds up their results in this order; an expert meets a token at most once, so the sum is
deterministic on every device and the same whether somebody watches or not. Measured on a CPU
(16 to 128 experts, one thread, float32 and bfloat16) this loop takes 0.5 to 1.1 times as long as
grouped_mm, which also refuses bfloat16 weights whose rows are no multiple of 16 bytes; padding the
rows of an expert's batch to multiples of 32 or 64 gains nothing.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.methods.base import Unit
from moesaic.methods.reduction import combined_gates

if TYPE_CHECKING:
    from moesaic.orchestrator.expert_statistics import ExpertStatistics
    from moesaic.orchestrator.streaming import StreamedModel

# Name of our function in transformers' table of expert implementations.
NAME = "moesaic"
# Attribute of an experts module that holds its watcher while one is there.
_WATCHER = "_moesaic_watcher"
# Attribute of a reduced experts module that holds its stand-ins.
_STAND_INS = "_moesaic_stand_ins"
# Attribute of an experts module that holds what is called in its place.
_DETOUR = "_moesaic_detour"

Experts = Literal["routed", "all"]


class Observer(Protocol):
    """What is told of a block's computation. ``expert`` is None for linears."""

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        """``x [tokens, in]``: what the members of this site read."""

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        """``y [tokens, out]``: what a member gives, bias included. It is part of the graph: where
        gradients are on, ``y.register_hook`` sees the gradient of the loss. The member ``output``
        of a bank, with no expert, is what all of its experts give together."""


@dataclass(frozen=True)
class StandIns:
    """Where the router's rows lead in a reduced layer.

    Attributes:
        expert_map: ``[rows]``: expert, or M + c for constant c.
        constants: ``[C, H]``, or None.
    """

    expert_map: Tensor
    constants: Tensor | None

    def put_into(self, module: nn.Module) -> None:
        """Makes :func:`forward` heed them in an experts module."""
        setattr(module, _STAND_INS, self)


@dataclass(frozen=True)
class _Watcher:
    """Tells ``observer`` about the experts of ``unit``, and ``layer`` about their layer."""

    unit: Unit
    observer: Observer
    everything: bool
    layer: "ExpertStatistics | None"

    def inputs(self, member: str, expert: int, x: Tensor) -> None:
        """Reports the inputs of a routed expert, unless those of all tokens have been."""
        if not self.everything:
            self.observer.inputs(self.unit.sites[member], x.detach(), expert)

    def gate_up(self, module: Any, expert: int, gate_up: Tensor) -> Tensor:
        """Reports gate and up of one expert; returns their joint tensor, which goes on."""
        parts = [gate_up[:, ::2], gate_up[:, 1::2]]
        if module.is_concatenated:
            parts = list(gate_up.chunk(2, dim=-1))
        for member, part in zip(("gate", "up"), parts, strict=True):
            self.observer.outputs(self.unit.name, member, part, expert)
        if not gate_up.requires_grad:
            return gate_up
        # The reported slices must lie on the way to the loss, or they would get no gradient.
        joined = torch.cat if module.is_concatenated else torch.stack
        return joined(parts, dim=-1).reshape(gate_up.shape)

    @torch.no_grad()
    def see_all(self, module: Any, hidden: Tensor, span: range) -> None:
        """Inputs of experts if all tokens were routed to each; no effect on the result."""
        for expert in span:
            self.observer.inputs(self.unit.sites["gate"], hidden, expert)
            middle = module._apply_gate(_linear(module, "gate_up_proj", expert, hidden))
            self.observer.inputs(self.unit.sites["down"], middle, expert)


def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' part of a block.

    Args:
        module: holds ``gate_up_proj`` and ``down_proj``.
        hidden: ``[T, H]``.
        index: ``[T, k]``, the experts of each token.
        weights: ``[T, k]``, how much each counts.

    Returns:
        ``[T, H]``.
    """
    detour: Callable[[Tensor, Tensor, Tensor], Tensor] | None = getattr(module, _DETOUR, None)
    if detour is not None:
        return detour(hidden, index, weights)
    watcher: _Watcher | None = getattr(module, _WATCHER, None)
    if watcher is not None and watcher.layer is not None:
        watcher.layer.inputs(hidden, lambda expert, x: one_expert(module, expert, x))
    stand_ins: StandIns | None = getattr(module, _STAND_INS, None)
    if stand_ins is not None:
        return _with_stand_ins(module, stand_ins, hidden, index, weights)
    result = torch.zeros_like(hidden)
    _visit(module, watcher, Routed(hidden, index, weights), range(module.num_experts), result)
    if watcher is not None:
        watcher.observer.outputs(watcher.unit.name, "output", result, None)
    return result


@dataclass(frozen=True)
class Routed:
    """What an experts module is called with; see :func:`forward`."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def to(self, device: torch.device | str) -> "Routed":
        """The same on a device."""
        return Routed(self.hidden.to(device), self.index.to(device), self.weights.to(device))


def _visit(
    module: Any, watcher: _Watcher | None, call: Routed, span: range, result: Tensor
) -> None:
    """Adds to ``result [T, H]`` what the experts of ``span``, one after another, give.

    Experts that are visited in several spans, in rising order, give the same as in one.
    """
    if watcher is not None and watcher.everything:
        watcher.see_all(module, call.hidden, span)
    # [k·T] by expert, then by place in the top-k list, then by token: the order of transformers'
    # own loop, so that even its rounding is the same.
    experts, order = torch.sort(call.index.T.flatten(), stable=True)
    counts = torch.bincount(experts, minlength=module.num_experts).tolist()
    factors = torch.split(call.weights.T.flatten()[order, None], counts)
    reached = torch.split(order % len(call.hidden), counts)
    for expert in span:
        tokens = reached[expert]
        if len(tokens):
            y = _one_expert(module, watcher, expert, call.hidden[tokens])
            if watcher is not None and watcher.layer is not None:
                watcher.layer.routed_output(expert, y, factors[expert])
            result.index_add_(0, tokens, (y * factors[expert]).to(result.dtype))


def visit(
    module: Any,
    unit: Unit,
    observer: Observer,
    experts: Experts,
    layer: "ExpertStatistics | None",
    call: Routed,
    span: range,
    result: Tensor,
) -> None:
    """Runs some experts of a bank outside of their block; see :func:`observing` for who is told.

    Args:
        call: what the experts module was called with in the block.
        span: the experts.
        result: ``[T, H]``, what the experts before them gave; theirs is added.
    """
    _visit(module, _Watcher(unit, observer, experts == "all", layer), call, span, result)


@contextmanager
def detour(module: Any, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While this is open, ``function(hidden, index, weights)`` is called in the experts' place."""
    setattr(module, _DETOUR, function)
    try:
        yield
    finally:
        delattr(module, _DETOUR)


def one_expert(module: Any, expert: int, x: Tensor) -> Tensor:
    """What one expert gives, ``[tokens, H] -> [tokens, H]``; nobody is told."""
    return _one_expert(module, None, expert, x)


def _with_stand_ins(
    module: Any, stand_ins: StandIns, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """As :func:`forward`; a token meets each stand-in once, with the sum of its gates."""
    constants = stand_ins.constants
    size = module.num_experts + (0 if constants is None else len(constants))
    share, reached = combined_gates(index, weights, stand_ins.expert_map, size)
    result = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        tokens = reached[:, expert].nonzero().flatten()
        if len(tokens):
            y = _one_expert(module, None, expert, hidden[tokens]) * share[tokens, expert, None]
            result.index_add_(0, tokens, y.to(result.dtype))
    if constants is not None:
        result += (share[:, module.num_experts :] @ constants.to(share)).to(result.dtype)
    return result


def _one_expert(module: Any, watcher: _Watcher | None, expert: int, x: Tensor) -> Tensor:
    """``[tokens, H] -> [tokens, H]``"""
    gate_up = _linear(module, "gate_up_proj", expert, x)
    if watcher is not None:
        watcher.inputs("gate", expert, x)
        gate_up = watcher.gate_up(module, expert, gate_up)
    middle = module._apply_gate(gate_up)
    down = _linear(module, "down_proj", expert, middle)
    if watcher is not None:
        watcher.inputs("down", expert, middle)
        watcher.observer.outputs(watcher.unit.name, "down", down, expert)
    return down


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    y = x @ weight if module.is_transposed else F.linear(x, weight)
    # The bias is added after rounding, as transformers does.
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def clips(config: Any) -> bool:
    """Whether attention clips queries, keys and values, in their place."""
    return getattr(config, "clip_qkv", None) is not None


@contextmanager
def observing(
    model: "StreamedModel",
    index: int,
    block: nn.Module,
    observer: Observer,
    experts: Experts = "routed",
    layer: "ExpertStatistics | None" = None,
    only: Collection[Unit] | None = None,
) -> Iterator[None]:
    """While this is open, ``observer`` is told what ``block`` computes.

    Inputs are told once per site, outputs once per unit and member. Experts that no token reaches
    are not mentioned.

    Args:
        model: whose block it is.
        index: which block.
        block: from ``model.load_block(index)``.
        observer: told in the order of the computation.
        experts: ``all``: inputs of the experts' sites are told for every expert as if all tokens
            were routed to it (``x`` of the first site is then the same tensor for all of them);
            the block's result and the outputs told are those of the routed tokens all the same.
        layer: told of the expert layer as a whole: routing, gated outputs, inputs.
        only: the linears that are watched; by default all of them.
    """
    seen: set[str] = set()
    altered = clips(model.config)
    with ExitStack() as stack:
        for unit in model.layouts[index].units:
            module = block.get_submodule(model.unit_module(unit))
            if unit.kind == "bank":
                setattr(module, _WATCHER, _Watcher(unit, observer, experts == "all", layer))
                stack.callback(delattr, module, _WATCHER)
                if layer is not None:
                    router = block.get_submodule(model.router_module)
                    stack.callback(router.register_forward_hook(_router_hook(layer)).remove)
                continue
            if only is not None and unit not in only:
                continue
            site = unit.sites["weight"]
            if site not in seen:
                seen.add(site)
                stack.callback(module.register_forward_pre_hook(_input_hook(site, observer)).remove)
            hook = _output_hook(unit, observer, altered)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _input_hook(site: str, observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        observer.inputs(site, args[0].detach().flatten(0, -2), None)

    return hook


def _router_hook(
    layer: "ExpertStatistics",
) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        layer.routing(*output)  # every router of transformers gives logits, gates and index

    return hook


def _output_hook(
    unit: Unit, observer: Observer, altered: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        flat = output.flatten(0, -2)
        observer.outputs(unit.name, "weight", flat, None)
        # What was reported goes on, so that it gets gradients; a copy where that is altered.
        return (flat.clone() if altered else flat).view(output.shape)

    return hook
