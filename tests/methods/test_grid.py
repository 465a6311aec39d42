"""Grids and round to nearest against exhaustive choices in float64."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.kernels import int_group
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods import rtn
from moesaic.methods.grid import GridOptions, choose_grid

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def round_nearest(weight: Tensor, **options: object) -> CompressedTensor:
    return rtn.compress({"w": weight}, {}, rtn.Options(**options)).members["w"]


def norm(weight: Tensor, packed: CompressedTensor) -> Tensor:
    """Sum of |w - ŵ|^2.4 over each group, ``[out, groups]``, from the parts in float64."""
    scale = packed.parts["weight_scale"].double()
    steps = int_group.codes(packed).double().view(*scale.shape, -1)
    zero = int_group.zero_points(packed)
    if zero is not None:
        steps = steps - zero.double()[..., None]
    error = weight.double().view(*scale.shape, -1) - steps * scale[..., None]
    return error.abs().pow(2.4).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [7, -1])
def test_every_weight_takes_the_nearest_point_of_its_grid(
    make_weight, bits, symmetric, dtype, group_size
):
    weight = make_weight(5, 21, seed=bits, dtype=dtype)
    packed = round_nearest(weight, bits=bits, symmetric=symmetric, group_size=group_size)
    scale = packed.parts["weight_scale"]
    assert scale.dtype == dtype
    points = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
    zero = int_group.zero_points(packed)
    offset = 0.0 if zero is None else zero.double()[..., None]
    grid = (points - offset) * scale.double()[..., None]  # [out, groups, codes]
    groups = weight.double().view(*scale.shape, -1)
    best = (groups[..., None] - grid[..., None, :]).abs().amin(-1)
    codes = int_group.codes(packed).double().view(groups.shape)
    error = (groups - (codes - offset) * scale.double()[..., None]).abs()
    assert torch.allclose(error, best, atol=1e-6, rtol=1e-6)
    # The grid spans the range: nothing is further off than a step (half of one, the scale being
    # rounded and a symmetric grid one code short at its upper end).
    assert float((error / scale.double()[..., None]).max()) < (
        1.01 if symmetric else 0.75 + bits / 8
    )
    if not symmetric:
        assert bool(((grid == 0).any(-1)).all()), "zero must be a point of the grid"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clip_search_finds_the_best_of_its_hundred_ranges(make_weight, bits, symmetric):
    weight = make_weight(6, 20, seed=bits, dtype=torch.float32).pow(3)  # heavy tails
    found = norm(
        weight, round_nearest(weight, bits=bits, symmetric=symmetric, group_size=10, clip="mse")
    )
    groups = weight.double().view(6, 2, 10)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = torch.full_like(low, math.inf)
    for step in range(100):
        shrink = 1 - 0.8 * step / 99
        scale = (high - low) * shrink / (2**bits - 1)
        zero = (first - low * shrink / scale).round().clamp(first, last)
        zero = torch.zeros_like(zero) if symmetric else zero
        codes = (groups / scale[..., None]).round() + zero[..., None]
        codes = codes.clamp(first, last) - zero[..., None]
        error = (groups - codes * scale[..., None]).abs().pow(2.4).sum(-1)
        best = torch.minimum(best, error)
    assert torch.allclose(found, best, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_clip_search_is_never_worse_in_its_norm(make_weight, bits, symmetric, dtype):
    weight = make_weight(16, 24, seed=bits, dtype=dtype)
    options = {"bits": bits, "symmetric": symmetric, "group_size": 8}
    plain = norm(weight, round_nearest(weight, **options))
    clipped = norm(weight, round_nearest(weight, **options, clip="mse"))
    assert bool((clipped <= plain * (1 + 1e-5)).all())
    assert bits > 3 or float(clipped.sum()) < 0.9 * float(plain.sum())


def test_clip_search_minimises_the_weighted_norm_when_weights_are_given(make_weight):
    weight = make_weight(12, 40, dtype=torch.float32)  # 40 groups of 12
    importance = torch.logspace(-3, 2, 12)[:, None]
    options = GridOptions(bits=2, group_size=12)

    def weighted(given: Tensor | None) -> Tensor:
        grid = choose_grid(weight, torch.float32, options, True, given)
        error = weight - grid.steps(weight) * grid.scale
        return (importance * error.abs().pow(2.4)).sum(0)

    assert bool((weighted(importance) <= weighted(None) * (1 + 1e-5)).all())
    assert float(weighted(importance).sum()) < 0.9 * float(weighted(None).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_zero_groups_stay_exactly_zero_with_finite_scales(make_weight, symmetric, dtype, clip):
    weight = make_weight(4, 18, dtype=dtype)
    weight[1], weight[2, 6:12] = 0, 0
    packed = round_nearest(weight, bits=3, symmetric=symmetric, group_size=6, clip=clip)
    scale = packed.parts["weight_scale"]
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    dense = packed.dense()
    assert bool((dense[1] == 0).all()) and bool((dense[2, 6:12] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("extreme", ["largest", "smallest"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_scales_stay_finite_and_positive_at_the_ends_of_the_dtype(
    symmetric, dtype, extreme, bits, clip
):
    info = torch.finfo(dtype)
    size = info.max if extreme == "largest" else info.tiny
    weight = torch.tensor([[size, -size, size, 0.0], [0.0, size, 0.0, 0.0]], dtype=dtype)
    packed = round_nearest(weight, bits=bits, symmetric=symmetric, group_size=-1, clip=clip)
    scale = packed.parts["weight_scale"]
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    if extreme == "largest":
        codes = int_group.codes(packed)
        assert codes[0, 0] > codes[0, 3] > codes[0, 1] and codes[1, 1] > codes[1, 0]


def test_one_sided_groups_use_all_codes_when_asymmetric():
    weight = torch.linspace(0.5, 4.0, 8).bfloat16()[None]
    packed = round_nearest(weight, bits=4, symmetric=False, group_size=-1)
    assert int_group.zero_points(packed).tolist() == [[-8]]
    assert int(int_group.codes(packed).max()) == 7


def test_banks_and_large_members_are_rounded_row_by_row(make_weight, monkeypatch):
    weight = make_weight(3, 4, 5, 24)
    options = {"bits": 3, "symmetric": False, "group_size": 8}
    whole = round_nearest(weight, **options)
    assert whole.shape == (3, 4, 5, 24)
    monkeypatch.setattr(rtn, "_ELEMENTS", 40)  # slices of five groups
    sliced = round_nearest(weight, **options)
    for name, part in whole.parts.items():
        assert torch.equal(sliced.parts[name], part)
    assert torch.equal(
        whole.dense()[1, 2, 3], round_nearest(weight[1, 2, 3:4], **options).dense()[0]
    )


@pytest.mark.parametrize("value", [0, -2])
def test_group_size_must_be_positive_or_minus_one(value):
    with pytest.raises(ValidationError, match=f"group_size is {value}"):
        GridOptions(group_size=value)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_two_to_eight_are_refused(bits):
    with pytest.raises(ValidationError, match="bits"):
        GridOptions(bits=bits)


def test_non_finite_weight_raises_with_the_member_named(make_weight):
    weight = make_weight(3, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="^w: 1 of 24 weights are NaN or infinite"):
        round_nearest(weight, group_size=8)
