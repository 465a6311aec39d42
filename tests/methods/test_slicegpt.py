"""Slicing as mathematics: axes, rotations and shortcuts against float64 and plain definitions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.methods.slicegpt import (
    Options,
    added,
    aligned,
    principal_axes,
    projected,
    read,
    shortcut,
    wanted_width,
    written,
)

FULL, WIDTH = 37, 19


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def axes(seed: int, width: int = WIDTH) -> Tensor:
    return torch.linalg.qr(randn(FULL, FULL, seed=seed)).Q[:, :width]


def normed(x: Tensor, eps: float = 0.1) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize(
    ("hidden", "width"),
    [(1.0, 50), (0.99, 48), (0.8, 40), (0.7, 32), (0.64, 32), (0.16, 8), (48, 48), (8, 8)],
)
def test_width_is_rounded_down_to_a_multiple_of_eight(hidden: int | float, width: int) -> None:
    assert wanted_width(50, hidden) == width


@pytest.mark.parametrize(
    ("hidden", "said"),
    [(56, "56 is above 50"), (0.1, "leaves no multiple of 8")],
)
def test_width_that_cannot_be_is_refused(hidden: int | float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wanted_width(50, hidden)


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (0, "0 is no multiple of 8"),
        (0.0, "0.0 is no share"),
        (1.01, "1.01 is no share"),
        (-8, "-8 is no multiple"),
        (500, "500 is no multiple of 8"),
        (True, "True is neither a width"),
        ("half", "'half' is neither a width"),
        (float("nan"), "nan is no share"),
    ],
)
def test_options_refuse_what_is_no_width(hidden: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Options(hidden=hidden)


def test_axes_keep_as_much_of_the_stream_as_any_can() -> None:
    rows = normed(
        randn(400, FULL) @ torch.diag(torch.linspace(0.1, 3, FULL).double()) @ axes(1, FULL)
    )
    gram = rows.T @ rows
    basis, dropped, events = principal_axes(gram, WIDTH, len(rows))
    assert basis.dtype == torch.float64 and not events
    assert torch.allclose(basis.T @ basis, torch.eye(WIDTH).double(), atol=1e-12)
    left = rows - rows @ basis @ basis.T
    singular = np.linalg.svd(rows.numpy(), compute_uv=False)
    least = (singular[WIDTH:] ** 2).sum()
    assert float(left.square().sum()) == pytest.approx(least, rel=1e-9)
    assert dropped == pytest.approx(least / (singular**2).sum(), rel=1e-9)


@pytest.mark.parametrize(("tokens", "kind"), [(5, "few_tokens"), (60, "rank_deficient")])
def test_axes_that_nothing_spans_are_told_and_finite(tokens: int, kind: str) -> None:
    rows = normed(randn(5, FULL)).repeat(tokens // 5, 1)
    basis, dropped, events = principal_axes(rows.T @ rows, WIDTH, tokens)
    assert [(event.kind, event.value) for event in events] == [(kind, 5.0)]
    assert torch.allclose(basis.T @ basis, torch.eye(WIDTH).double(), atol=1e-12)
    assert dropped < 1e-6
    assert torch.allclose(rows @ basis @ basis.T, rows, atol=1e-5)


def test_a_stream_of_zeros_has_axes_all_the_same() -> None:
    basis, dropped, events = principal_axes(torch.zeros(FULL, FULL).double(), WIDTH, 3)
    assert basis.isfinite().all() and dropped == 0 and len(events) == 1


def test_a_sum_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        principal_axes(torch.full((4, 4), math.nan).double(), 2, 3)


def test_aligned_axes_span_the_same_and_are_nearest() -> None:
    basis, before = axes(1), axes(2)
    turned = aligned(basis, before)
    assert torch.allclose(turned @ turned.T, basis @ basis.T, atol=1e-12)
    distance = float((turned - before).norm())
    for seed in range(20):
        other = basis @ torch.linalg.qr(randn(WIDTH, WIDTH, seed=seed)).Q
        assert distance < float((other - before).norm())
    assert torch.allclose(aligned(before, before), before, atol=1e-12)


def test_a_projected_sum_lies_in_the_axes_span() -> None:
    x, output, basis = randn(3, 7, FULL), randn(3, 7, FULL, seed=1), axes(3)
    found = x + projected(x, output, basis).double()
    assert torch.allclose(found, (x + output) @ basis @ basis.T, atol=1e-5)


def test_a_narrow_block_computes_what_the_wide_one_does_between_projections() -> None:
    """A norm with weight and epsilon, a linear behind it, a linear and a bias that are added."""
    before, after = axes(1), axes(2)
    norm, up = 1 + 0.3 * randn(FULL), randn(11, FULL, seed=4)
    down, bias = randn(2, FULL, 11, seed=5), randn(FULL, seed=6)  # a bank of two
    x = randn(8, FULL, seed=7) @ before @ before.T

    def block(stream: Tensor) -> Tensor:
        inner = (normed(stream) * norm) @ up.T
        return stream + inner @ down[1].T + bias

    wide = block(x) @ after @ after.T

    narrow = added(x, before)  # as an embedding would be
    inner = normed(narrow) @ read(up, norm, before).T
    turned = narrow + narrow @ shortcut(before, after).T
    found = turned + inner @ written(down, after)[1].T + added(bias, after)
    assert found.shape == (8, WIDTH)
    back = found @ after.T * math.sqrt(FULL / WIDTH)
    assert torch.allclose(back, wide, atol=1e-12)
    logits = normed(found) @ read(up, norm, after).T
    assert torch.allclose(logits, (normed(wide) * norm) @ up.T, atol=1e-12)


def test_one_basis_for_all_places_needs_no_shortcut() -> None:
    assert shortcut(axes(1), axes(1)).abs().max() < 1e-12


def test_weights_keep_dtype_and_shape_and_are_rounded_once() -> None:
    weight, norm, basis = randn(3, 5, FULL).bfloat16(), 1 + 0.3 * randn(FULL), axes(1)
    found = read(weight, norm.bfloat16(), basis)
    exact = (weight.double() * norm.bfloat16().double()) @ basis * math.sqrt(FULL / WIDTH)
    assert found.shape == (3, 5, WIDTH) and torch.equal(found, exact.bfloat16())
