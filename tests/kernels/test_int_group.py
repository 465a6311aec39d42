"""The format ``int_group`` on the CPU: bytes against compressed-tensors, values against float64."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import int_group
from moesaic.kernels.tensor import CompressedTensor

BITS = range(2, 9)
# out, in, group size: sizes that leave partial words, partial chunks of 32, and one of each
SHAPES = [(1, 1, -1), (7, 33, -1), (13, 45, 5), (5, 96, 32), (33, 128, 128), (40, 24, 24)]


def draw(
    bits: int,
    shape: tuple[int, ...],
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and zero points over their whole range; scales are powers of two (see below)."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    coarse = (*shape[:-1], int_group.group_count(shape[-1], group_size))
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    exponent = torch.randint(-6, 2, coarse, generator=generator)
    zero_point = torch.randint(low, high, coarse, generator=generator, dtype=torch.int8)
    return codes, torch.exp2(exponent).to(dtype), None if symmetric else zero_point


def packed(
    bits: int,
    shape: tuple[int, ...],
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CompressedTensor:
    drawn = draw(bits, shape, group_size, symmetric, dtype, seed)
    return int_group.pack(*drawn, bits=bits, group_size=group_size, dtype=dtype)


def their_scheme(tensor: CompressedTensor) -> QuantizationScheme:
    args = QuantizationArgs(**int_group.quantization_args(tensor.params))
    return QuantizationScheme(targets=["Linear"], weights=args)


def float64_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> Tensor:
    """(code - zero point) · scale, written out per column."""
    columns = torch.arange(codes.shape[-1])
    group = columns * 0 if group_size == -1 else columns // group_size
    zero = 0 if zero_point is None else zero_point.double()[..., group]
    return (codes.double() - zero) * scale.double()[..., group]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_pack_equals_what_compressed_tensors_writes(
    bits: int, out: int, inputs: int, group_size: int, symmetric: bool
) -> None:
    dtype = torch.bfloat16
    codes, scale, zero_point = draw(bits, (out, inputs), group_size, symmetric, dtype)
    ours = int_group.pack(codes, scale, zero_point, bits=bits, group_size=group_size, dtype=dtype)
    # Scales are powers of two, so that their quantization of this weight gives back the codes.
    weight = float64_weight(codes, scale, zero_point, group_size).to(dtype)
    state = {"weight": weight, "weight_scale": scale}
    if zero_point is not None:
        state["weight_zero_point"] = zero_point
    theirs = PackedQuantizationCompressor.compress(state, their_scheme(ours))
    assert ours.parts.keys() == theirs.keys()
    for name, part in theirs.items():
        assert (ours.parts[name].dtype, ours.parts[name].shape) == (part.dtype, part.shape), name
        assert torch.equal(ours.parts[name], part), name
        assert ours.parts[name].is_contiguous(), name  # safetensors asks for it
    back = CompressedTensor("int_group", theirs, (out, inputs), dtype, ours.params)
    assert torch.equal(int_group.codes(back), codes)
    assert torch.equal(int_group.unpack(back), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack_equals_what_compressed_tensors_reads(
    dtype: torch.dtype, bits: int, out: int, inputs: int, group_size: int, symmetric: bool
) -> None:
    codes, scale, zero_point = draw(bits, (out, inputs), group_size, symmetric, dtype)
    scale *= 1 + torch.rand(scale.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = int_group.pack(codes, scale, zero_point, bits=bits, group_size=group_size, dtype=dtype)
    theirs = PackedQuantizationCompressor.decompress(dict(ours.parts), their_scheme(ours))
    assert torch.equal(int_group.unpack(ours), theirs["weight"])
    if zero_point is not None:
        assert torch.equal(int_group.zero_points(ours), theirs["weight_zero_point"])
    exact = float64_weight(codes, scale, zero_point, group_size)
    assert torch.equal(int_group.unpack(ours), exact.to(dtype))  # rounded once


@given(
    bits=st.integers(2, 8),
    out=st.integers(1, 40),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    per_channel=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_little_endian_bit_streams(
    bits: int,
    out: int,
    groups: int,
    group_size: int,
    per_channel: bool,
    symmetric: bool,
    seed: int,
) -> None:
    shape = (out, groups * group_size)
    group_size = -1 if per_channel else group_size
    codes, scale, zero_point = draw(bits, shape, group_size, symmetric, seed=seed)
    tensor = int_group.pack(
        codes, scale, zero_point, bits=bits, group_size=group_size, dtype=torch.float32
    )
    for row, words in zip(codes.tolist(), tensor.parts["weight_packed"].tolist(), strict=True):
        stream = sum((code + (1 << (bits - 1))) << (bits * i) for i, code in enumerate(row))
        assert stream == sum((word % (1 << 32)) << (32 * i) for i, word in enumerate(words))
    assert torch.equal(int_group.codes(tensor), codes)
    read = int_group.zero_points(tensor)
    assert read is None if zero_point is None else torch.equal(read, zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_pack_of_a_bank_equals_packing_each_expert(bits: int, symmetric: bool) -> None:
    bank = draw(bits, (4, 9, 40), 8, symmetric)
    whole = int_group.pack(*bank, bits=bits, group_size=8, dtype=torch.float32)
    for expert in range(4):
        codes, scale, zero_point = (None if part is None else part[expert] for part in bank)
        alone = int_group.pack(
            codes, scale, zero_point, bits=bits, group_size=8, dtype=torch.float32
        )
        assert whole[expert].parts.keys() == alone.parts.keys()
        for name, part in alone.parts.items():
            assert torch.equal(whole.parts[name][expert], part), name


def test_pack_gives_the_same_bytes_when_rows_are_handled_in_many_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = packed(5, (11, 100), 20, symmetric=False)
    monkeypatch.setattr(int_group, "_BLOCK_VALUES", 256)  # two rows at a time
    blocks = packed(5, (11, 100), 20, symmetric=False)
    assert all(torch.equal(whole.parts[name], blocks.parts[name]) for name in whole.parts)
    assert torch.equal(int_group.unpack(whole), int_group.unpack(blocks))


@pytest.mark.parametrize("code_dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_pack_takes_integers_of_any_width(code_dtype: torch.dtype) -> None:
    codes, scale, _ = draw(8, (3, 37), -1, symmetric=True)
    tensor = int_group.pack(
        codes.to(code_dtype), scale, None, bits=8, group_size=-1, dtype=torch.float32
    )
    assert torch.equal(int_group.codes(tensor), codes)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # One rounding of the weight and one of the output, each half a unit in the last place.
    [(torch.float32, 1e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_reference_is_close_to_float64(
    symmetric: bool, dtype: torch.dtype, tolerance: float
) -> None:
    codes, scale, zero_point = draw(4, (37, 120), 24, symmetric, dtype)
    tensor = int_group.pack(codes, scale, zero_point, bits=4, group_size=24, dtype=dtype)
    x = torch.randn(2, 3, 120, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ float64_weight(codes, scale, zero_point, 24).T
    product = int_group.matmul_reference(x, tensor)
    assert (product.dtype, product.shape) == (dtype, (2, 3, 37))
    assert (product.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_quantization_args_name_the_strategy() -> None:
    params = packed(3, (4, 64), 32, symmetric=False).params
    common = {"num_bits": 3, "type": "int", "symmetric": False, "dynamic": False}
    grouped = {**common, "strategy": "group", "group_size": 32}
    assert int_group.quantization_args(params) == grouped
    channel = {**common, "strategy": "channel", "group_size": None}
    assert int_group.quantization_args({**params, "group_size": -1}) == channel


def test_nbytes_count_everything_of_a_3_bit_weight() -> None:
    tensor = packed(3, (64, 128), 32, symmetric=False, dtype=torch.bfloat16)
    # codes, four bfloat16 scales per row, 64 rows of 3-bit zero points in 6 words, two int64
    assert tensor.nbytes == 64 * 128 * 3 // 8 + 64 * 4 * 2 + 6 * 4 * 4 + 2 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 3}, "codes reach from -8 to 7, 3 bits hold -4 to 3"),
        ({"group_size": 5}, "group size 5 does not divide the 64 inputs"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": 32}, r"needs torch.float32 \(6, 2\)"),
        ({"dtype": torch.bfloat16}, "needs torch.bfloat16"),
        ({"dtype": torch.float64}, "dense dtype is torch.float64"),
        ({"codes": torch.zeros(6, 64)}, "codes are torch.float32, not integers"),
        ({"codes": torch.zeros(64, dtype=torch.int8)}, "no matrix"),
        ({"zero_point": torch.zeros(6, 1, dtype=torch.int8)}, "zero_point is"),
        ({"zero_point": torch.full((6, 4), 8)}, "zero points reach from 8 to 8"),
    ],
)
def test_pack_names_what_does_not_fit(change: dict[str, object], message: str) -> None:
    codes = torch.arange(6 * 64).remainder(16).sub(8).view(6, 64)
    arguments = {
        "codes": codes,
        "scale": torch.ones(6, 4),
        "zero_point": None,
        "bits": 4,
        "group_size": 16,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        int_group.pack(**{**arguments, **change})


@pytest.mark.parametrize("product", [int_group.matmul, int_group.matmul_reference])
def test_matmul_names_operands_that_do_not_fit(product: object) -> None:
    with pytest.raises(ValueError, match="one member of a bank"):
        product(torch.zeros(2, 64).half(), packed(4, (3, 6, 64), 16, True))
    with pytest.raises(ValueError, match=r"x is \(2, 63\)"):
        product(torch.zeros(2, 63).half(), packed(4, (6, 64), 16, True))


def test_matmul_refuses_float32_activations() -> None:
    with pytest.raises(ValueError, match="x is torch.float32"):
        int_group.matmul(torch.zeros(2, 64), packed(4, (6, 64), 16, True))
