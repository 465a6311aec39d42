"""GPTQ against explicit elimination: the inverse Hessian kept in full, one input removed at a time.

The reference is float64 with loops in Python, and shares nothing with the implementation.
"""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import int_group
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods import gptq
from moesaic.methods.base import Stats


def min_max_grid(group: Tensor, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale (rounded to bfloat16) and zero point of one group of weights of one row."""
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    if low == high == 0:
        return 1.0, 0 if symmetric else -(2 ** (bits - 1))
    width = 2 * max(-low, high) if symmetric else high - low
    scale = float(torch.tensor(width / (2**bits - 1)).to(torch.bfloat16))
    if symmetric:
        return scale, 0
    zero = round(-(2 ** (bits - 1)) - low / scale)
    return scale, max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, zero))


def slow_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, scales and zero points ``[out, groups]``; every input must be live."""
    work, hessian = weight.double().clone(), hessian.double()
    out, inputs = work.shape
    size = inputs if group_size == -1 else group_size
    diagonal = hessian.diagonal()
    inverse = torch.linalg.inv(hessian + damp * diagonal.mean() * torch.eye(inputs).double())
    order = sorted(range(inputs), key=lambda j: -float(diagonal[j])) if act_order else range(inputs)

    scale = torch.zeros(out, inputs // size).double()
    zero = torch.zeros(out, inputs // size).double()

    def fill(group: int, source: Tensor) -> None:
        for row in range(out):
            part = source[row, group * size : (group + 1) * size]
            scale[row, group], zero[row, group] = min_max_grid(part, bits, symmetric)

    if static_groups or act_order:
        for group in range(inputs // size):
            fill(group, work)
    codes = torch.zeros(out, inputs).double()
    for j in order:
        group = j // size
        if not (static_groups or act_order) and j % size == 0:
            fill(group, work)
        code = (work[:, j] / scale[:, group]).round() + zero[:, group]
        codes[:, j] = code.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounded = (codes[:, j] - zero[:, group]) * scale[:, group]
        step = (work[:, j] - rounded) / inverse[j, j]
        work -= step[:, None] * inverse[j]
        work[:, j] = rounded
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
        inverse[j, :], inverse[:, j] = 0, 0
    return codes, scale, zero


def quantize(weight: Tensor, stats: Stats, **options: object) -> CompressedTensor:
    return gptq.compress({"w": weight}, {"w": stats}, gptq.Options(**options)).members["w"]


ORDERS = [{}, {"static_groups": True}, {"act_order": True}]


@pytest.mark.parametrize("order", ORDERS, ids=["dynamic", "static", "act_order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("inputs", "group_size"), [(39, 13), (39, 39), (39, -1), (42, 7)])
def test_codes_equal_explicit_elimination(
    make_weight, make_stats, bits, symmetric, order, inputs, group_size
):
    weight, stats = make_weight(5, inputs, seed=bits), make_stats(inputs, seed=bits)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, **order}
    # Blocks of 16 and leaves of 16 put boundaries inside and outside the groups.
    packed = quantize(weight, stats, block_size=16, **options)
    codes, scale, zero = slow_gptq(weight, stats["hessian"], **options)
    assert torch.equal(packed.parts["weight_scale"].double(), scale)
    assert torch.equal(int_group.codes(packed).double(), codes)
    if not symmetric:
        assert torch.equal(int_group.zero_points(packed).double(), zero)


def test_codes_equal_explicit_elimination_when_damping_differs(make_weight, make_stats):
    weight, stats = make_weight(7, 33), make_stats(33, tokens=9)
    options = {"bits": 3, "group_size": 11, "symmetric": True, "damp": 0.3}
    packed = quantize(weight, stats, **options)
    codes, _, _ = slow_gptq(weight, stats["hessian"], **options)
    assert torch.equal(int_group.codes(packed).double(), codes)
    other = quantize(weight, stats, **{**options, "damp": 0.01})
    assert not torch.equal(int_group.codes(other).double(), codes)
