"""MoNE: constants instead of experts that say nearly the same to every token.

After Zhang et al., 2507.00390. A dropped expert is replaced by its mean output over the tokens
routed to it. Its router row stays and leads to the constant, so that no token is routed otherwise
than before.

The paper ranks experts by how often they are used and how much their outputs vary. Here the two are
one number: use × variance = Σ‖f − mean f‖² over the tokens routed to an expert, which is the
squared error (before gates) that its constant makes. The least are replaced.
"""

from dataclasses import replace

import torch

from moesaic.methods.base import MethodOptions
from moesaic.methods.reduction import (
    ExpertLayer,
    Keep,
    LayerShape,
    Outline,
    Reduction,
    keep_option,
    kept_experts,
    prune,
    top_experts,
    unreached,
)

NEEDS = frozenset({"load", "sum", "sq", "all_sum", "all_tokens"})


class Options(MethodOptions):
    """Options of MoNE."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, a constant for each of the others, and all router rows."""
    count = kept_experts(shape, options.keep, mapped=True)
    return Outline(
        experts=count,
        width=shape.width,
        rows=shape.experts,
        mapped=True,
        constants=shape.experts - count,
    )


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Replaces the experts of least use × variance.

    One that no token reached is among the first, and its constant is its mean over all sampled
    tokens.
    """
    experts = layer.shape.experts
    count = kept_experts(layer.shape, options.keep, mapped=True)
    total, tokens = layer.stats["sum"].double(), layer.frequency[:, None]  # [E, H], [E, 1]
    mean = total / tokens.clamp_min(1)
    deviation = layer.stats["sq"].double() - (total * mean).sum(1)
    # All rows stay, so the kept experts may lie in any routing group.
    ungrouped = replace(layer.shape, routing_groups=1)
    kept = top_experts(ungrouped, deviation.clamp_min(0), count)
    dropped = sorted(set(range(experts)) - set(kept))

    everywhere = layer.stats["all_sum"].double() / layer.stats["all_tokens"].double().clamp_min(1)
    constants = torch.where(tokens > 0, mean, everywhere)[dropped]
    expert_map = torch.empty(experts, dtype=torch.int64)
    expert_map[kept + dropped] = torch.arange(experts)
    return replace(
        prune(layer, kept, unreached(layer)),
        router=dict(layer.router),
        expert_map=expert_map,
        constants=constants.float() if dropped else None,
    )
