"""Runs the ``int_group`` kernel on odd shapes and prints what came out, as JSON.

A program of its own because Triton reads TRITON_INTERPRET once, when it is imported:

    TRITON_INTERPRET=1 python tests/kernels/run_triton.py cpu
    TRITON_INTERPRET=0 python tests/kernels/run_triton.py cuda
"""

import json
import sys

import torch
from torch import Tensor

from moesaic.kernels import _int_group_triton as kernel
from moesaic.kernels import int_group
from moesaic.kernels._tiles_triton import group_span
from moesaic.kernels.tensor import CompressedTensor

GUARD = 512  # poisoned elements behind the output
# bits, group size, symmetric, (rows of x, outputs, inputs), activations, scales
CASES = [
    (2, 32, True, (1, 33, 96), "float16", "float16"),
    (2, -1, False, (3, 5, 31), "bfloat16", "bfloat16"),
    (3, 128, False, (5, 70, 384), "float16", "float16"),
    (3, 64, True, (17, 65, 320), "bfloat16", "bfloat16"),
    (4, 16, False, (2, 37, 112), "float16", "float32"),
    (4, 128, True, (70, 129, 128), "float16", "float16"),
    (5, 11, False, (7, 39, 77), "bfloat16", "bfloat16"),
    (5, -1, True, (65, 3, 176), "float16", "float16"),
    (6, 48, False, (16, 34, 144), "bfloat16", "float32"),
    (6, 96, True, (1, 1, 96), "float16", "float16"),
    (7, 7, False, (9, 61, 35), "float16", "float16"),
    (7, -1, False, (33, 97, 1), "bfloat16", "bfloat16"),
    (8, 64, False, (4, 45, 192), "float16", "float16"),
    (8, -1, False, (130, 131, 80), "bfloat16", "bfloat16"),
]


def run(index: int, device: str) -> dict[str, object]:
    """One case: largest error over largest output, in float64, and what became of the poison."""
    bits, group_size, symmetric, (rows, outputs, inputs), activations, scales = CASES[index]
    draw = torch.Generator().manual_seed(index)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = int_group.group_count(inputs, group_size)
    dtype = getattr(torch, scales)
    zero_point = torch.randint(low, high, (outputs, groups), generator=draw)
    weight = int_group.pack(
        torch.randint(low, high, (outputs, inputs), generator=draw).to(device),
        (torch.rand(outputs, groups, generator=draw) * 0.1 + 0.01).to(dtype).to(device),
        None if symmetric else zero_point.to(device),
        bits=bits,
        group_size=group_size,
        dtype=dtype,
    )
    x = torch.randn(rows, inputs, generator=draw).to(getattr(torch, activations)).to(device)
    buffer = torch.full((rows * outputs + GUARD,), float("nan"), device=device)
    out = buffer[: rows * outputs].view(rows, outputs)
    kernel.launch(x, weight, out)
    exact = x.double() @ exact_weight(weight).T
    product = int_group.matmul(x.view(1, rows, inputs), weight)
    config = kernel.config_for(rows, inputs, group_span(max(0, group_size)))
    return {
        "config": next(name for name, known in kernel.CONFIGS.items() if known is config),
        "activations": activations,
        "finite": bool(out.isfinite().all()),
        "guard_intact": bool(buffer[rows * outputs :].isnan().all()),
        "error": float((out.double() - exact).abs().max() / exact.abs().max()),
        "matmul_equals_launch": torch.equal(product[0], out.to(x.dtype)),
        "shape_without_rows": list(int_group.matmul(x[:0], weight).shape) == [0, outputs],
    }


def exact_weight(weight: CompressedTensor) -> Tensor:
    """The dense weight in float64, without any rounding."""
    scale = weight.parts["weight_scale"].double().unsqueeze(-1)
    code = int_group.codes(weight).double().unflatten(-1, (scale.shape[1], -1))
    zero_point = int_group.zero_points(weight)
    if zero_point is not None:
        code = code - zero_point.double().unsqueeze(-1)
    return (code * scale).flatten(-2)


if __name__ == "__main__":
    print(json.dumps([run(index, sys.argv[1]) for index in range(len(CASES))]))
