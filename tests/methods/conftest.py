"""Weights and statistics for tests of methods."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.methods.base import Stats

MakeWeight = Callable[..., Tensor]
MakeStats = Callable[..., Stats]


@pytest.fixture
def make_weight() -> MakeWeight:
    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return make


@pytest.fixture
def make_stats() -> MakeStats:
    """Statistics of correlated inputs of unequal size, ``[tokens, in]`` per expert."""

    def make(inputs: int, experts: int = 0, tokens: int = 0, seed: int = 0) -> Stats:
        generator = torch.Generator().manual_seed(seed + 1)
        batch = (experts,) if experts else ()
        tokens = tokens or 3 * inputs
        x = torch.randn(*batch, tokens, inputs, generator=generator)
        mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
        x = (x + x @ mix * 2) * (0.2 + torch.rand(inputs, generator=generator))
        return Stats(
            {
                "tokens": torch.full(batch, tokens),
                "hessian": x.mT @ x,
                "abs": x.abs().sum(-2),
                "fisher": torch.rand(*batch, inputs, generator=generator) * x.abs().mean(-2),
            }
        )

    return make
