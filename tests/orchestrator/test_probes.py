"""What probes count, and what is made of their times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesaic.methods.base import Spec, Unit
from moesaic.orchestrator import experts, probes, solving
from moesaic.orchestrator.solving import Compressing, probe_compress

COLD = probes._COLD_MATRICES
F32 = torch.float32


@pytest.fixture
def a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a second, and is done once."""

    def shortest(call: Callable[[], object], device: str) -> float:
        call()
        return 1.0

    monkeypatch.setattr(probes, "shortest", shortest)


@pytest.mark.usefixtures("a_second")
@pytest.mark.parametrize(
    ("speed", "operations"),
    [
        (lambda: probes.probe_matmul(5, 24, 7, F32, "cpu"), COLD * 2 * 5 * 24 * 7),
        (lambda: probes.probe_gram(5, 24, F32, "cpu"), COLD * 2 * 5 * 24 * 24),
        (lambda: probes.probe_experts(5, 24, 7, F32, "cpu"), COLD * 5 * 3 * 2 * 24 * 7),
        (lambda: probes.probe_reverse(5, 24, 7, F32, "cpu"), COLD * 2 * 5 * 3 * 2 * 24 * 7),
        (lambda: probes.probe_product(24, "cpu"), COLD * 2 * 24**3),
        (lambda: probes.probe_factor(24, "cpu"), 24**3),
        (lambda: 1 / probes.probe_attention(9, 3, 4, F32, "cpu"), 9 * 9 * 3 * 4),
    ],
)
def test_operations_are_counted_for_all_matrices(
    speed: Callable[[], float], operations: float
) -> None:
    assert speed() == pytest.approx(operations)


@pytest.mark.usefixtures("a_second")
def test_large_matrices_are_fewer_but_no_cache_holds_them() -> None:
    side = 2048
    operations = 2.0 * 3 * side * side
    count = probes.probe_matmul(3, side, side, F32, "cpu") / operations
    assert 1 < count == probes._COLD_BYTES // (4 * side * side)
    sums = probes.probe_sums(side, "cpu")
    assert sums == 4 * side * side  # at least one, however large


@pytest.mark.usefixtures("a_second")
def test_every_expert_sees_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = experts.visit

    def visit(module: Any, unit: Any, observer: Any, *rest: Any) -> None:
        real(module, unit, observer, *rest)
        seen.append((observer, unit))

    monkeypatch.setattr(experts, "visit", visit)
    probes.probe_reverse(5, 24, 7, F32, "cpu")
    ((observer, unit),) = seen
    # Gradients came back to every member of every expert.
    for member in unit.shapes:
        sums = observer.stats[f"{unit.name}|{member}"].sums
        assert sums["grad_tokens"].tolist() == [5] * COLD
        assert (sums["grad_sq"] > 0).any(-1).all()


def test_probes_leave_positive_times_on_this_machine() -> None:
    assert 0 < probes.probe_wide("cpu") < 1
    assert probes.shortest(lambda: None, "disk") > 0


def test_time_of_a_layer_lies_between_those_that_were_measured() -> None:
    speed = Compressing(((32, 1.0), (64, 3.0), (128, 3.5)), 0.25, 0.0)
    assert speed.seconds(0, 32, 10) == pytest.approx(10.0)
    assert speed.seconds(0, 8, 10) == pytest.approx(10.0)  # calls, not weights
    assert speed.seconds(0, 48, 10) == pytest.approx(20.0)
    assert speed.seconds(0, 96, 1) == pytest.approx(3.25)
    assert speed.seconds(0, 192, 1) == pytest.approx(4.0)  # as from 64 to 128
    # Weights of a bank cost what they did in a bank, calls what they do in a linear.
    assert speed.seconds(4, 16, 1) == pytest.approx(16.0)
    assert Compressing(((32, 1.0), (64, 3.0)), 0.0, 0.0).seconds(4, 16, 1) == pytest.approx(3.0)
    assert Compressing((), 0.0, 0.0, cube=1.0).seconds(0, 8, 8) == 0.0


def test_factorisations_are_measured_by_their_cube_others_by_rows_and_in_a_bank() -> None:
    units = [Unit("probe", "linear", 0, "mlp", {"weight": (64, 64)}, {"weight": "probe"})]
    rounded = probe_compress((Spec.of("rtn", {"bits": 4, "group_size": 16}),), F32, "cpu", units)
    assert rounded.bank > 0 and rounded.cube == 0 and len(rounded.rows) == 3
    factors = probe_compress((Spec.of("svd", {"rank": 8}),), F32, "cpu", units)
    assert factors.bank == 0 and factors.cube > 0 and factors.rows == ()


def test_what_works_on_banks_alone_is_measured_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_LAYER_INPUTS", 64)
    monkeypatch.setattr(solving, "_BANK", (3, 32))
    units = [Unit("u", "bank", 0, "experts", {"weight": (4, 48, 64)}, {"weight": "s"})]
    shared = Spec.of("delta_moe", {"rank": 8})
    for chain in ((shared,), (shared, Spec.of("rtn", {"bits": 4, "group_size": 8}))):
        found = probe_compress(chain, F32, "cpu", units)
        assert not found.rows and found.cube > 0 and found.dense > 0
