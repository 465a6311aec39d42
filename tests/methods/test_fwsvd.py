"""FWSVD: nearest in its own norm, whatever the Fisher information is like."""

import pytest
import torch
from torch import Tensor

from moesaic.methods import fwsvd, svd
from moesaic.methods.base import Result, Stats

OUT, IN, RANK = 11, 17, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compress(weight: Tensor, fisher: Tensor, rank: int = RANK) -> Result:
    return fwsvd.compress({"w": weight}, {"w": Stats({"fisher": fisher})}, fwsvd.Options(rank=rank))


def weighted_error(weight: Tensor, other: Tensor, fisher: Tensor) -> Tensor:
    """Σ_oi Î_i (w_oi - ŵ_oi)², per matrix."""
    delta = weight.double() - other.double()
    return (delta.square() * fisher.double()[..., None, :]).sum((-1, -2))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("out", "inputs"), [(OUT, IN), (IN, OUT)])
def test_the_weighted_error_is_the_least_there_is(
    batch: tuple[int, ...], out: int, inputs: int
) -> None:
    """Eckart and Young: the tail of the spectrum of W diag(√Î), in float64."""
    weight = random(*batch, out, inputs)
    fisher = random(*batch, inputs, seed=1).mul(2).exp() * 1e-9
    found = compress(weight, fisher)
    spectrum = torch.linalg.svdvals(weight.double() * fisher.double().sqrt()[..., None, :])
    least = spectrum[..., RANK:].square().sum(-1)
    error = weighted_error(weight, found.members["w"].dense(), fisher)
    torch.testing.assert_close(error, least, rtol=1e-5, atol=0)
    plain = svd.compress({"w": weight}, {}, svd.Options(rank=RANK)).members["w"].dense()
    assert bool((error < 0.9 * weighted_error(weight, plain, fisher)).all())
    assert found.events == []


def test_equal_information_everywhere_is_plain_svd() -> None:
    weight = random(OUT, IN)
    plain = svd.compress({"w": weight}, {}, svd.Options(rank=RANK)).members["w"].dense()
    found = compress(weight, torch.full((IN,), 3e-7)).members["w"].dense()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_inputs_without_information_cost_the_others_nothing() -> None:
    """Nearest on the inputs that count, finite on those that do not."""
    weight = random(OUT, IN)
    weight[:, 5] *= 1e4
    fisher = random(IN, seed=1).exp()
    fisher[[2, 5, 6]] = 0
    found = compress(weight, fisher)
    dense = found.members["w"].dense()
    assert bool(dense.isfinite().all())
    live = fisher > 0
    spectrum = torch.linalg.svdvals(weight[:, live].double() * fisher[live].double().sqrt())
    error = weighted_error(weight, dense, fisher)
    torch.testing.assert_close(error, spectrum[RANK:].square().sum(), rtol=1e-4, atol=0)


def test_no_information_at_all_is_plain_svd_and_told() -> None:
    weight, fisher = random(3, OUT, IN), torch.rand(3, IN) + 0.1
    fisher[1] = 0
    found = compress(weight, fisher)
    plain = svd.compress({"w": weight}, {}, svd.Options(rank=RANK)).members["w"].dense()
    dense = found.members["w"].dense()
    assert torch.equal(dense[1], plain[1]) and not torch.equal(dense[0], plain[0])
    assert [event.kind for event in found.events] == ["no_gradients"]
    alone = compress(weight[0], torch.zeros(IN))
    assert [event.kind for event in alone.events] == ["no_gradients"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_information_that_is_no_sum_of_squares_is_refused(value: float) -> None:
    fisher = torch.ones(IN)
    fisher[3] = value
    with pytest.raises(ValueError, match=r"^w: .* NaN or infinite"):
        compress(random(OUT, IN), fisher)
