"""Small random expert layers with brute-force statistics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods.base import Stats
from moesaic.methods.reduction import ExpertLayer, LayerShape


def _logits(x: Tensor, router: Mapping[str, Tensor]) -> Tensor:
    bias = router.get("bias")
    return F.linear(x.float(), router["weight"].float(), None if bias is None else bias.float())


def softmax_gating(top_k: int) -> Any:
    """Softmax over all, the k largest, normalised; with a bias where the router has one."""

    def gating(x: Tensor, router: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = _logits(x, router)
        gates, index = logits.softmax(-1).topk(top_k, dim=-1)
        return index, gates / gates.sum(-1, keepdim=True)

    return gating


def sigmoid_gating(top_k: int, groups: int, chosen_groups: int) -> Any:
    """Sigmoid gates, chosen with a correction inside the best groups, as in DeepSeek-V3."""

    def gating(x: Tensor, router: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), router["weight"].float()).sigmoid()
        choice = (scores + router["correction"]).view(len(x), groups, -1)
        best = choice.topk(2, dim=-1).values.sum(-1).topk(chosen_groups, dim=-1).indices
        masked = torch.full_like(choice, -torch.inf)
        masked.scatter_(1, best[:, :, None].expand(-1, -1, choice.shape[-1]), 0.0)
        index = (choice + masked).flatten(1).topk(top_k, dim=-1).indices
        gates = scores.gather(1, index)
        return index, gates / gates.sum(-1, keepdim=True)

    return gating


def statistics(layer: ExpertLayer, x: Tensor, sources: int = 2) -> Stats:
    """Every statistic of a layer over ``x [T, H]``, by the definitions; all tokens are sampled.

    Tokens belong to the text sources in turn.
    """
    index, gates = layer.gating(x, layer.router)
    logits = _logits(x, layer.router)
    experts = layer.shape.experts
    outputs = torch.stack(list(layer.outputs(x)))  # [E, T, H]
    routed = torch.zeros(len(x), experts, dtype=torch.bool).scatter_(1, index, True)
    gate = torch.zeros(len(x), experts).scatter_(1, index, gates.float())
    norms = outputs.norm(dim=-1).T  # [T, E]
    source = torch.arange(len(x)) % sources
    unit = F.normalize(outputs, dim=-1)
    return Stats(
        {
            "load": torch.stack([routed[source == s].sum(0) for s in range(sources)]),
            "gates": gate.sum(0),
            "coactivation": routed.T.long() @ routed.long(),
            "logits": logits.sum(0),
            "logits_gram": logits.T @ logits,
            "norm": (norms * routed).sum(0),
            "sq": (norms.square() * routed).sum(0),
            "gated_norm": (norms * gate).sum(0),
            "gated_sq": (norms * gate).square().sum(0),
            "sum": torch.einsum("te,eth->eh", routed.float(), outputs),
            "gated_sum": torch.einsum("te,eth->eh", gate, outputs),
            "all_tokens": torch.tensor(len(x)),
            "all_sum": outputs.sum(1),
            "all_sq": outputs.square().sum((1, 2)),
            "cosine": torch.einsum("eth,fth->ef", unit, unit),
            "sample": x.float(),
        }
    )


def make_layer(
    experts: int = 8,
    hidden: int = 16,
    width: int = 12,
    top_k: int = 2,
    kind: str = "softmax",
    tokens: int = 200,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    change: Any = None,
) -> ExpertLayer:
    """A random layer.

    Args:
        kind: ``softmax``, ``biased`` (router and experts have biases) or ``grouped`` (sigmoid,
            correction, two routing groups).
        change: ``(weights, router) -> None``: alters them before statistics are taken.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = {
        "gate": random(experts, width, hidden) / hidden**0.5,
        "up": random(experts, width, hidden) / hidden**0.5,
        "down": random(experts, hidden, width) / width**0.5,
    }
    router = {"weight": random(experts, hidden) / hidden**0.5}
    biases, groups, least = {}, 1, top_k
    gating = softmax_gating(top_k)
    if kind == "biased":
        router["bias"] = random(experts) * 0.3
        sizes = {"gate": width, "up": width, "down": hidden}
        biases = {name: random(experts, size) * 0.3 for name, size in sizes.items()}
    if kind == "grouped":
        router["correction"] = random(experts).float() * 0.1
        groups, least = 2, max(4, top_k)
        gating = sigmoid_gating(top_k, groups, chosen_groups=1)
        least = max(2 * groups, top_k * groups)
    if change is not None:
        change(weights, router)
    shape = LayerShape(
        experts=experts,
        width=width,
        hidden=hidden,
        top_k=top_k,
        routing_groups=groups,
        least=least,
        router=tuple(router),
        biased=bool(biases),
    )
    layer = ExpertLayer(
        shape=shape,
        weights=weights,
        biases=biases,
        router=router,
        stats=Stats({}),
        gating=gating,
        activation=lambda gate, up: F.silu(gate) * up,
    )
    layer.stats.sums.update(statistics(layer, random(tokens, hidden)).sums)
    return layer
