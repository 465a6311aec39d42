"""The format ``sparse``: bytes as compressed-tensors has them, odd widths, blocks, refusals."""

import pytest
import torch
from compressed_tensors.utils.helpers import pack_bitmasks, unpack_bitmasks
from torch import Tensor

from moesaic.kernels import sparse

WIDTHS = [1, 7, 8, 9, 64, 67]


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random(*shape: int, kept: int) -> tuple[Tensor, Tensor]:
    """A weight without zeros, and a mask of ``kept`` weights per row."""
    weight = scores(*shape, seed=1) + 0.5
    order = scores(*shape).argsort(-1).argsort(-1)
    return weight, order < kept


def described_bits(mask: Tensor) -> Tensor:
    """The bitmask ``[out, ceil(in/8)]`` bit by bit, as the docstring describes it."""
    out, inputs = mask.shape
    found = torch.zeros(out, -(-inputs // 8), dtype=torch.uint8)
    for row, column in mask.nonzero().tolist():
        found[row, column // 8] += 1 << (column % 8)
    return found


@pytest.mark.parametrize("inputs", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_sparse_bitmask(inputs: int, dtype: torch.dtype) -> None:
    """Both ways: what is packed here and unpacked there, and what is packed there."""
    weight, mask = random(5, inputs, kept=max(1, inputs // 3))
    weight = weight.to(dtype)
    tensor = sparse.pack(weight, mask)
    bitmask = tensor.parts["bitmask"]
    assert torch.equal(bitmask, pack_bitmasks(mask))
    assert torch.equal(bitmask, described_bits(mask))
    kept = weight.where(mask, 0)
    assert torch.equal(tensor.parts["compressed"].flatten(), kept[kept != 0])
    theirs = torch.zeros(5, inputs, dtype=dtype)
    theirs[unpack_bitmasks(bitmask, [5, inputs])] = tensor.parts["compressed"].flatten()
    assert torch.equal(theirs, tensor.dense())


@pytest.mark.parametrize("inputs", WIDTHS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_what_is_kept_comes_back_and_all_else_is_zero(inputs: int, batch: tuple[int, ...]) -> None:
    weight, mask = random(*batch, 6, inputs, kept=1 + inputs // 2)
    weight[..., 0, :] = 0  # zeros that are kept count as kept
    tensor = sparse.pack(weight, mask)
    assert torch.equal(tensor.dense(), weight * mask)
    assert tensor.nbytes == weight[..., 0].numel() * (4 * (1 + inputs // 2) + (inputs + 7) // 8)


@pytest.mark.parametrize(("kept", "block"), [(2, 4), (1, 4), (3, 6), (5, 10), (30, 60), (60, 60)])
def test_blocks_keep_n_of_m(kept: int, block: int) -> None:
    weight, mask = random(2, 3, 60 // block, block, kept=kept)
    weight, mask = weight.view(2, 3, 60), mask.view(2, 3, 60)
    tensor = sparse.pack(weight, mask, block=block)
    assert dict(tensor.params) == {"kept": kept, "block": block}
    assert tensor.parts["compressed"].shape == (2, 3, kept * 60 // block)
    assert torch.equal(tensor.dense(), weight * mask)
    assert torch.equal(tensor[1].dense(), weight[1] * mask[1])


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    weight, mask = random(3, 12, kept=6)
    with pytest.raises(ValueError, match="bool"):
        sparse.pack(weight, mask.int())
    with pytest.raises(ValueError, match=r"\(3, 11\)"):
        sparse.pack(weight, mask[:, :11])
    for block in (0, 5, 24, -2):
        with pytest.raises(ValueError, match=f"{block} do not divide 12"):
            sparse.pack(weight, mask, block=block)
    mask[1] = False
    with pytest.raises(ValueError, match="keeps 0 weights, another 6"):
        sparse.pack(weight, mask)
    uneven = torch.tensor([[True] * 6 + [False] * 6])
    with pytest.raises(ValueError, match="4 inputs keeps 0 weights, another 4"):
        sparse.pack(weight[:1], uneven, block=4)


def test_bank_is_multiplied_member_by_member() -> None:
    weight, mask = random(3, 4, 10, kept=5)
    bank = sparse.pack(weight, mask)
    x = scores(2, 10, seed=3)
    with pytest.raises(ValueError, match="one member"):
        sparse.matmul_reference(x, bank)
    product = sparse.matmul_reference(x, bank[2])
    torch.testing.assert_close(product, x @ (weight * mask)[2].T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_product_on_a_gpu_is_the_reference() -> None:
    weight, mask = random(37, 67, kept=20)
    tensor = sparse.pack(weight.bfloat16(), mask).to("cuda")
    assert torch.equal(tensor.dense().cpu(), weight.bfloat16() * mask)
    x = scores(5, 67, seed=3).bfloat16().cuda()
    expected = x.double() @ tensor.dense().double().T
    torch.testing.assert_close(sparse.matmul(x, tensor).double(), expected, rtol=8e-3, atol=1e-2)
