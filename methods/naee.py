"""NAEE: the experts to keep, by trying every subset (expert pruning of Lu et al., 2402.14800).

Of all subsets of the wanted size it takes the one with which the layer's output on the sampled
tokens is nearest to the whole layer's, in squared error. There are C(E, M) of them: that is for
layers of at most 8 experts.

Each expert runs once. A token's output is Σ_e c_e f_e, with c the gates, so the error of a subset
at this token is dᵀGd: G = [f_e·f_e'] of all experts, d what the subset changes in the gates. The
gates come from the model's own gating over the router rows that are left.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

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
    unreached,
)

NEEDS = frozenset({"load"})

# The most experts whose subsets are tried: of 8, at most C(8, 4) = 70.
MOST_EXPERTS = 8
# Tokens at a time.
_CHUNK = 512


class Options(MethodOptions):
    """Options of NAEE."""

    SHOWN = ("keep",)

    keep: Keep = keep_option()


def outline(shape: LayerShape, options: Options) -> Outline:
    """As many experts as asked for, with a router row each."""
    if shape.experts > MOST_EXPERTS:
        raise ValueError(
            f"naee: {shape.experts} experts have too many subsets to try, at most {MOST_EXPERTS}"
        )
    count = kept_experts(shape, options.keep)
    return Outline(experts=count, width=shape.width, rows=count)


def reduce(layer: ExpertLayer, options: Options) -> Reduction:
    """Keeps the subset of least error; of equal ones, the first in lexicographic order."""
    candidates = list(subsets(layer.shape, outline(layer.shape, options).experts))
    errors = subset_errors(layer, candidates)
    return prune(layer, candidates[int(errors.argmin())], unreached(layer))


def subsets(shape: LayerShape, count: int) -> Iterator[list[int]]:
    """Every choice of ``count`` experts, equally many of each routing group."""
    groups = shape.routing_groups
    size = shape.experts // groups
    choices = [
        itertools.combinations(range(group * size, (group + 1) * size), count // groups)
        for group in range(groups)
    ]
    for parts in itertools.product(*choices):
        yield list(itertools.chain(*parts))


def subset_errors(layer: ExpertLayer, candidates: list[list[int]]) -> Tensor:
    """Squared error on the sample of the layer with each subset alone, float64 ``[subsets]``."""
    experts = layer.shape.experts
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for x in layer.stats["sample"].split(_CHUNK):
        outputs = torch.stack(list(layer.outputs(x)), dim=1).double()  # [T, E, H]
        gram = outputs @ outputs.mT  # [T, E, E]
        dense = _shares(layer, x, list(range(experts)))
        for number, rows in enumerate(candidates):
            change = _shares(layer, x, rows) - dense  # [T, E]
            errors[number] += torch.einsum("te,tef,tf->", change, gram, change).item()
    return errors


def _shares(layer: ExpertLayer, x: Tensor, rows: list[int]) -> Tensor:
    """Gates of all experts where the router has these rows alone, float64 ``[T, E]``."""
    index, gates = layer.gating(x, {name: value[rows] for name, value in layer.router.items()})
    experts = torch.tensor(rows, device=index.device)[index]
    shares = torch.zeros(len(x), layer.shape.experts, dtype=torch.float64, device=x.device)
    return shares.scatter_add_(1, experts, gates.double())
