"""What every format must do; a new format adds its example here."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator

from moesaic.kernels import (
    channels,
    delta,
    dense,
    int_group,
    lowrank,
    mapped,
    mosaic,
    residual,
    sparse,
)
from moesaic.kernels.tensor import CompressedTensor, format_module, formats

DENSE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Example = Callable[[tuple[int, ...], torch.dtype, Generator], CompressedTensor]


def int_group_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """3 bits, groups of 6, asymmetric."""
    coarse = (*shape[:-1], shape[-1] // 6)
    return int_group.pack(
        torch.randint(-4, 4, shape, generator=generator),
        (torch.rand(coarse, generator=generator) + 0.1).to(dtype),
        torch.randint(-4, 4, coarse, generator=generator),
        bits=3,
        group_size=6,
        dtype=dtype,
    )


def channels_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """Every other row, all columns but the first."""
    *batch, out, inputs = shape
    rows, columns = torch.arange(0, out, 2), torch.arange(1, inputs)
    small = torch.randn(*batch, len(rows), len(columns), generator=generator).to(dtype)
    return channels.pack(dense.pack(small), shape, rows=rows, columns=columns)


def delta_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """Whole numbers, as for low rank."""
    base = torch.randint(-4, 4, shape[-2:], generator=generator).to(dtype)
    return delta.pack(dense.pack(base), lowrank_example(shape, dtype, generator))


def mapped_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """The first slice and the last are the same; experts have orders of their own."""
    numbers = [*range(shape[0] - 1), 0]
    stand_ins = torch.randn((shape[0] - 1, *shape[1:]), generator=generator).to(dtype)
    order = torch.rand(shape[0], shape[1], generator=generator).argsort(1)
    return mapped.pack(stand_ins, numbers, order if len(shape) == 3 else None)


def mosaic_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """Even slices in 3 bits, odd ones in 5, per channel."""
    parts = []
    for first, bits in ((0, 3), (1, 5)):
        slices = list(range(first, shape[0], 2))
        scale = (len(slices), *shape[1:-1], 1)
        codes = torch.randint(-4, 4, (len(slices), *shape[1:]), generator=generator)
        scales = (torch.rand(scale, generator=generator) + 0.1).to(dtype)
        tensor = int_group.pack(codes, scales, None, bits=bits, group_size=-1, dtype=dtype)
        parts.append((tensor, slices))
    return mosaic.pack(parts)


def dense_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    return dense.pack(torch.randn(shape, generator=generator).to(dtype))


def lowrank_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """Rank 3, of small whole numbers: every dtype holds their products exactly."""
    *batch, out, inputs = shape
    left = torch.randint(-2, 3, (*batch, out, 3), generator=generator).to(dtype)
    right = torch.randint(-2, 3, (*batch, 3, inputs), generator=generator).to(dtype)
    return lowrank.pack(dense.pack(left), dense.pack(right))


def residual_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """Codes with the scale 1, and low rank, all whole numbers for the same reason."""
    codes = torch.randint(-4, 4, shape, generator=generator)
    scale = torch.ones((*shape[:-1], 1), dtype=dtype)
    base = int_group.pack(codes, scale, None, bits=3, group_size=-1, dtype=dtype)
    return residual.pack(base, lowrank_example(shape, dtype, generator))


def sparse_example(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> CompressedTensor:
    """2 of every 6 weights."""
    order = torch.rand((*shape[:-1], shape[-1] // 6, 6), generator=generator).argsort(-1)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return sparse.pack(weight, (order < 2).view(shape), block=6)


# Random weights of any shape [*batch, out, in] whose inputs are a multiple of 6, one per format.
EXAMPLES: dict[str, Example] = {
    "channels": channels_example,
    "delta": delta_example,
    "dense": dense_example,
    "int_group": int_group_example,
    "lowrank": lowrank_example,
    "mapped": mapped_example,
    "mosaic": mosaic_example,
    "residual": residual_example,
    "sparse": sparse_example,
}


def example(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> CompressedTensor:
    assert name in EXAMPLES, f"add an example of the format {name!r} to EXAMPLES in {__file__}"
    return EXAMPLES[name](shape, dtype, Generator().manual_seed(0))


@pytest.fixture(params=formats())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DENSE_DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[(35, 42), (3, 35, 42)], ids=["linear", "bank"])
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def test_tensor_carries_its_format_shape_and_dtype(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = example(name, shape, dtype)
    assert (tensor.format, tensor.shape, tensor.dtype) == (name, shape, dtype)


def test_part_shapes_equal_the_parts(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = example(name, shape, dtype)
    told = format_module(name).part_shapes(shape, dtype, tensor.params)
    assert told == {key: (tuple(part.shape), part.dtype) for key, part in tensor.parts.items()}
    assert tensor.nbytes == sum(math.prod(size) * kind.itemsize for size, kind in told.values())


def test_parts_are_contiguous_as_safetensors_needs(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert all(part.is_contiguous() for part in example(name, shape, dtype).parts.values())


def test_unpack_gives_the_dense_shape_and_dtype(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense = example(name, shape, dtype).dense()
    assert (tuple(dense.shape), dense.dtype) == (shape, dtype)
    assert dense.isfinite().all()
    assert dense.unique().numel() > 1


def test_weight_as_products_see_it_rounds_to_the_dense_one(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = example(name, shape, dtype)
    assert torch.equal(tensor.effective().to(dtype), tensor.dense())
    assert tensor.effective().dtype in (dtype, torch.float32)


def test_slice_of_a_bank_is_the_slice_of_its_dense_weight(name: str, dtype: torch.dtype) -> None:
    bank = example(name, (3, 35, 42), dtype)
    dense = bank.dense()
    for expert in range(3):
        assert bank[expert].shape == (35, 42)
        assert torch.equal(bank[expert].dense(), dense[expert])


# Nothing is taken of what was put together, and channels are of linears.
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"mosaic", "channels"}))
def test_what_is_taken_of_a_bank_is_told_by_its_params(name: str) -> None:
    bank, slices = example(name, (5, 35, 42), torch.float32), [4, 0, 2]
    taken = mosaic.take(bank, slices)
    assert dict(taken.params) == dict(mosaic.taken_params(name, bank.params, slices))
    assert torch.equal(taken.dense(), bank.dense()[slices])


def test_slice_is_refused_when_the_weight_is_no_bank(name: str) -> None:
    with pytest.raises(IndexError, match="not a bank"):
        example(name, (35, 42), torch.float32)[0]


def test_matmul_reference_equals_the_product_with_the_dense_weight(
    name: str, dtype: torch.dtype
) -> None:
    tensor = example(name, (35, 42), dtype)
    for leading in [(), (5,), (2, 3), (0,)]:
        x = torch.randn(*leading, 42, generator=Generator().manual_seed(1)).to(dtype)
        exact = x.double() @ tensor.dense().double().T
        product = format_module(name).matmul_reference(x, tensor)
        assert (product.dtype, product.shape) == (dtype, (*leading, 35))
        # float32 accumulation, one rounding to the dtype of x
        torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_matmul_refuses_the_cpu_instead_of_falling_back(name: str) -> None:
    tensor = example(name, (35, 42), torch.float16)
    with pytest.raises(RuntimeError, match="matmul_reference"):
        format_module(name).matmul(torch.ones(2, 42, dtype=torch.float16), tensor)


def test_channels_without_places_are_all_there() -> None:
    small = dense_example((4, 6), torch.float32, Generator().manual_seed(0))
    columns = torch.tensor([1, 2, 5])
    narrow = channels.pack(dense.pack(small.dense()[:, :3]), (4, 6), columns=columns)
    assert set(narrow.parts) == {"inner_dense", "columns"}
    assert narrow.nbytes == 4 * 3 * 4 + channels.place_bytes(6, 3)
    assert torch.equal(narrow.dense()[:, columns], small.dense()[:, :3])
    assert not narrow.dense()[:, [0, 3, 4]].any()
    whole = channels.pack(small, (4, 6), rows=torch.arange(4))
    assert set(whole.parts) == {"inner_dense"} and torch.equal(whole.dense(), small.dense())


def test_channels_of_factors_are_not_rounded() -> None:
    factors = lowrank_example((4, 6), torch.bfloat16, Generator().manual_seed(0))
    placed = channels.pack(factors, (9, 6), rows=torch.tensor([0, 3, 4, 8]))
    assert placed.effective().dtype == torch.float32
    assert torch.equal(placed.effective()[[0, 3, 4, 8]], factors.effective())


@pytest.mark.parametrize("rows", [[1, 0, 2], [0, 1, 9], [0, 1], [-1, 0, 1], [0, 1, 1]])
def test_channels_refuse_places_that_do_not_fit(rows: list[int]) -> None:
    small = dense.pack(torch.ones(3, 6))
    with pytest.raises(ValueError, match="rows: "):
        channels.pack(small, (9, 6), rows=torch.tensor(rows))


def test_mosaic_of_factors_and_codes_does_not_round_the_factors_product() -> None:
    generator = Generator().manual_seed(0)
    left, right = (
        torch.randn(size, generator=generator).bfloat16() for size in ((2, 8, 3), (2, 3, 12))
    )
    factors = lowrank.pack(dense.pack(left), dense.pack(right))
    codes = int_group_example((1, 8, 12), torch.bfloat16, generator)
    tensor = mosaic.pack([(factors, [2, 0]), (codes, [1])])
    product = left.float() @ right.float()
    assert torch.equal(tensor.effective()[[2, 0]], product)
    assert torch.equal(tensor.effective()[1], codes[0].dense().float())
    assert torch.equal(tensor.dense()[[2, 0]], product.bfloat16())


@pytest.mark.parametrize("slices", [[[0, 2], [0]], [[0], [2]], []])
def test_mosaic_refuses_groups_that_do_not_cover_every_slice_once(slices: list[list[int]]) -> None:
    tensors = [example("int_group", (len(each), 4, 6), torch.float32) for each in slices]
    with pytest.raises(ValueError, match="slices|at least one"):
        mosaic.pack(list(zip(tensors, slices, strict=True)))


@pytest.fixture(params=["none", "rows", "columns"])
def mapped_bank(request: pytest.FixtureRequest) -> tuple[CompressedTensor, torch.Tensor]:
    """Five experts of three stand-ins with 6 rows and 8 columns, and what they should be."""
    generator = Generator().manual_seed(0)
    stand_ins, numbers = torch.randn(3, 6, 8, generator=generator), [3, 0, 3, 7, 0]
    experts = stand_ins[[1, 0, 1, 2, 0]].double()
    if request.param == "none":
        return mapped.pack(stand_ins, numbers), experts
    size, dim = (6, 0) if request.param == "rows" else (8, 1)
    order = torch.rand(5, size, generator=generator).argsort(1)
    moved = [e.index_select(dim, own) for e, own in zip(experts, order, strict=True)]
    return mapped.pack(stand_ins, numbers, order, request.param), torch.stack(moved)


def test_mapped_experts_are_their_stand_ins(
    mapped_bank: tuple[CompressedTensor, torch.Tensor],
) -> None:
    bank, experts = mapped_bank
    assert bank.parts["stand_ins"].shape == (3, 6, 8)
    assert torch.equal(bank.dense().double(), experts)
    factors = lowrank_example((5, 6, 8), torch.float32, Generator().manual_seed(1))
    corrected = residual.pack(bank, factors)
    x = torch.randn(4, 8, generator=Generator().manual_seed(2))
    for expert in range(5):
        assert torch.equal(bank[expert].dense().double(), experts[expert])
        exact = x.double() @ (experts[expert] + factors[expert].dense().double()).T
        product = residual.matmul_reference(x, corrected[expert]).double()
        torch.testing.assert_close(product, exact, rtol=1e-5, atol=1e-5)


def test_mapped_banks_are_taken_apart_and_put_together(
    mapped_bank: tuple[CompressedTensor, torch.Tensor],
) -> None:
    bank, experts = mapped_bank
    parts = [mosaic.take(bank, slices) for slices in ([0, 1], [2], [3, 4])]
    assert [len(part.parts["stand_ins"]) for part in parts] == [2, 1, 2]
    assert torch.equal(parts[2].dense().double(), experts[3:])
    assert torch.equal(mosaic.take(bank, [4, 0]).dense().double(), experts[[4, 0]])
    whole = mosaic.joined(parts)
    assert (whole.shape, dict(whole.params)) == (bank.shape, dict(bank.params))
    assert all(torch.equal(part, bank.parts[key]) for key, part in whole.parts.items())
    told = format_module("mapped").part_shapes(parts[0].shape, bank.dtype, parts[0].params)
    assert told == {k: (tuple(p.shape), p.dtype) for k, p in parts[0].parts.items()}


@pytest.mark.parametrize(
    ("numbers", "order", "reason"),
    [
        ([0, 1, 2], None, "3 different numbers for 2 stand-ins"),
        ([0, 1, 0], torch.zeros(3, 4), "holds not every one of 4 rows once"),
        ([0, 1, 0], torch.arange(4).expand(2, 4), "holds not every one of 4 rows once"),
    ],
)
def test_mapped_refuses_what_does_not_fit(
    numbers: list[int], order: torch.Tensor | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        mapped.pack(torch.ones(2, 4, 6), numbers, order)
    with pytest.raises(ValueError, match="a map of 3 slices, the weight has 4"):
        mapped.part_shapes((4, 4, 6), torch.float32, {"map": "[0, 1, 0]"})
