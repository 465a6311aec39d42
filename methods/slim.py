"""Slim: keeps all experts and cuts their intermediate width, after SlimMoE (Li et al., 2506.18349,
section 3), without its training.

Channels of least importance go, an expert's on its own: E[a_c²]·‖W_D[:,c]‖², with a the input of
the down projection W_D, or, as MoDeGPT does, their ridge leverage: what the others cannot make up
for. What is left of W_D is refitted on the sampled tokens: see :mod:`moesaic.methods.nystrom`.

Every expert runs on all sampled tokens. A token counts g² / mean of g² over those routed to the
expert, g its gate, plus a small share for being a token at all: few are routed to one of many
experts.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from moesaic.methods import nystrom
from moesaic.methods.base import Event, MethodOptions, option
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    Outline,
    Reduction,
    combined_gates,
    unreached,
)

NEEDS = frozenset({"load"})


class Options(MethodOptions):
    """Options of slim."""

    SHOWN = ("width",)

    width: Keep = option(
        0.75,
        "intermediate channels that stay in each expert: their share (0.5, at most 1.0) or their"
        " number (a whole number)",
        [0.875, 0.75, 0.5],
        gt=0,
    )
    multiple: int = option(
        32,
        "the new width stays a multiple of this as far as the old one is one, so that quantization"
        " groups still divide it",
        ge=1,
    )
    channels: Literal["energy", "leverage"] = option(
        "energy",
        "which channels stay: those that add most to the output, or those of the largest ridge"
        " leverage score (MoDeGPT)",
        ["energy", "leverage"],
    )
    spread: float = option(
        0.01,
        "weight of a token that is not routed to the expert, where one that is has 1 on average",
        [0.01, 0.1],
        ge=0,
    )
    # C + λI has a condition number of at most 1 + channels / ridge: float64 always solves it.
    ridge: float = option(
        0.1,
        "ridge of the refit and of leverage scores, relative to the mean of diag C",
        [1e-2, 1e-1],
        ge=1e-8,
    )


def kept_width(shape: LayerShape, options: Options) -> int:
    """The new width; raises ValueError, in one line, where there is none such."""
    if isinstance(options.width, float):
        return nystrom.kept_channels(shape.width, options.width, options.multiple, "width")
    step = math.gcd(options.multiple, shape.width)
    if options.width > shape.width:
        raise ValueError(f"width: {options.width} channels are more than the {shape.width}")
    if options.width % step:
        raise ValueError(
            f"width: {options.width} of {shape.width} channels is no multiple of {step}"
            f" (multiple: {options.multiple})"
        )
    return options.width


def outline(shape: LayerShape, options: Options) -> Outline:
    """All experts, narrower."""
    return Outline(experts=shape.experts, width=kept_width(shape, options), rows=shape.experts)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Cuts and refits one expert after another."""
    shape, x = layer.shape, layer.stats["sample"]
    width = kept_width(shape, options)
    weights = {
        "gate": layer.weights["gate"].new_empty(shape.experts, width, shape.hidden),
        "up": layer.weights["up"].new_empty(shape.experts, width, shape.hidden),
        "down": layer.weights["down"].new_empty(shape.experts, shape.hidden, width),
    }
    channels = torch.empty(shape.experts, width, dtype=torch.int64)
    index, gates = layer.gating(x, layer.router)
    gate, _ = combined_gates(index, gates.double(), None, shape.experts)  # [T, E]
    for expert in range(shape.experts):
        a = layer.middle(expert, x).double()  # [T, I]
        covariance = a.T @ (a * token_weights(gate[:, expert], options.spread)[:, None])
        down = layer.weights["down"][expert].double()
        if options.channels == "energy":
            scores = nystrom.energy(covariance, down)
        else:
            scores = nystrom.leverage(covariance, down, options.ridge)
        kept = nystrom.top_channels(scores, width)
        fitted = nystrom.refit(covariance, down, kept, options.ridge)
        weights["gate"][expert] = layer.weights["gate"][expert][kept]
        weights["up"][expert] = layer.weights["up"][expert][kept]
        weights["down"][expert] = fitted.to(weights["down"].dtype)
        channels[expert] = kept
    moved = {
        name: bias if name == "down" else bias.gather(1, channels.to(bias.device))
        for name, bias in layer.biases.items()
    }
    return Reduction(
        weights=weights,
        biases=moved,
        router=dict(layer.router),
        groups=[[expert] for expert in range(shape.experts)],
        channels=channels,
        events=unreached(layer) + _few_tokens(gate, shape, width),
    )


def token_weights(gate: Tensor, spread: float) -> Tensor:
    """How much each token counts for an expert, float64 ``[T]``, from its gates ``[T]`` (0: not
    routed). All count alike where none is routed."""
    square = gate.double().square()
    routed = int((square > 0).sum())
    if not routed:
        return torch.ones_like(square)
    return square * (routed / square.sum()) + spread


def _few_tokens(gate: Tensor, shape: LayerShape, width: int) -> list[Event]:
    """An event if some experts are refitted on fewer routed tokens than channels.

    Args:
        gate: ``[T, E]``, 0 where a sampled token is not routed to an expert.
    """
    tokens = (gate > 0).sum(0)
    few = int((tokens < width).sum())
    if width == shape.width or not few:
        return []
    text = (
        f"{few} of {shape.experts} experts have fewer sampled tokens than the {width} channels"
        f" to refit, the least {int(tokens.min())}"
    )
    return [Event("few_tokens", text, value=few)]
