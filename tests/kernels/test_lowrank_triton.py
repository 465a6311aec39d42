"""The low-rank Triton kernels, in Triton's interpreter and compiled ahead of time.

Both need a process of their own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesaic.kernels import _int_group_triton, _plan, _tiles_triton, dense, int_group
from moesaic.kernels import _lowrank_attention_triton as attention
from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.kernels import _lowrank_triton as low_rank
from moesaic.kernels import _residual_triton as residual
from moesaic.kernels._lowrank_attention import Lifted, Options
from tests.kernels.test_int_group_triton import DEVICES, SHARED_LIMIT, TOLERANCE, answer, run_script

# Every one must run, and must compile.
CONFIGS = {
    "low_rank": {"decode_256", "prefill_128", "prefill_256", "wide_512", "odd"},
    "attention": {"head_64", "head_128", "head_256", "odd"},
    "mlp": {
        "plain_128",
        "plain_256",
        "gated_64",
        "gated_128",
        "gated_256",
        "wide_512",
        "odd",
    },
    "residual": {"decode", "wide", "prefill", "odd"},
}
# Compiling takes half a minute on an idle core, and many times that on a busy one.
PATIENCE_SECONDS = 600
# Largest error over largest output of what is rounded to the activations' dtype.
ROUNDED = {"float16": 2**-10, "bfloat16": 2**-7}


def by_kernel(cases: list[dict[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for case in cases:
        found.setdefault(case["kernel"], set()).add(case["config"])
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_are_close_to_float64_on_odd_shapes(device: str) -> None:
    cases = answer(run_script("run_lowrank_triton.py", device, interpret=device == "cpu"))
    for case in cases:
        assert case["finite"], case
        assert case["guard_intact"], case
        assert case["error"] <= TOLERANCE[device, case["activations"]], case
        for name in ("fused_differs", "products_differ", "format_differs"):
            assert case.get(name, 0) <= ROUNDED[case["activations"]], case
        assert case.get("shape_without_rows", True), case
    assert by_kernel(cases) == CONFIGS
    # The public functions, too.
    assert by_kernel([case for case in cases if "fused_differs" in case]) == CONFIGS
    assert all("products_differ" in case for case in cases if "fused_differs" in case)


@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_every_configuration_compiles_within_the_limits() -> None:
    process = run_script("compile_lowrank_triton.py", *map(str, SHARED_LIMIT), interpret=False)
    cases = answer(process, PATIENCE_SECONDS)
    for case in cases:
        assert case["stack_bytes"] == 0, case  # registers spill to the stack
        assert case["shared_bytes"] <= SHARED_LIMIT[case["capability"]], case
        assert case["tensor_cores"], case
    for capability in SHARED_LIMIT:
        assert by_kernel([c for c in cases if c["capability"] == capability]) == CONFIGS


def ones(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list of the times that will be measured next, instead of a GPU with ten processors."""
    times: list[float] = []
    monkeypatch.setattr(_plan, "milliseconds", lambda way: times.pop(0))
    monkeypatch.setattr(_plan, "_table", {})
    for module in (low_rank, _tiles_triton):
        monkeypatch.setattr(module, "processors", lambda device: 10)
    return times


def planned(rows: int, rank: int = 32, path: low_rank.Path | None = None) -> low_rank.Plan:
    return low_rank.plan(rows, 64, 1024, rank, torch.float16, torch.device("cpu"), path)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1.0, 2.0, 3.0], low_rank.Plan("products")),
        ([2.0, 1.0, 3.0], low_rank.Plan("fused", 1)),
        ([3.0, 2.0, 1.0], low_rank.Plan("fused", 2)),  # four blocks of rows, ten processors
    ],
)
def test_plan_is_the_fastest_that_was_measured(
    clock: list[float], times: list[float], expected: low_rank.Plan
) -> None:
    clock += times
    assert planned(200) == expected
    assert planned(250) == expected  # in the same bucket of rows: nothing more is measured
    assert not clock
    assert list(_plan.measurements().values()) == [
        dict(zip(("products", "whole", "spread"), times, strict=True))
    ]


def test_plan_measures_nothing_when_there_is_no_choice(clock: list[float]) -> None:
    assert planned(16, path="products") == low_rank.Plan("products")
    assert planned(16, path="fused") == low_rank.Plan("fused", 10)
    assert planned(16, rank=low_rank.MAX_RANK + 16) == low_rank.Plan("products")
    assert planned(0) == low_rank.Plan("products")


def plans() -> dict[str, Callable[[], str]]:
    """What every other kernel would do with 60 rows, or a sequence of 60 tokens."""
    codes = torch.zeros((8, 16), dtype=torch.int8)
    dtype = torch.float16
    base = int_group.pack(codes, ones(8, 1), None, bits=4, group_size=-1, dtype=dtype)
    up = mlp.Factors(ones(3, 16), ones(8, 3))
    layer = mlp.Layer(up, mlp.Factors(ones(2, 8), ones(5, 2)), gate=up)
    lifted = Lifted(ones(1, 60, 3), ones(8, 3))
    table = ones(60, 2, dtype=torch.float32)
    options = Options(4, True, 0.5, table, table, torch.tensor([9]))
    return {
        "residual": lambda: residual.plan(60, base, 3, dtype),
        "mlp": lambda: mlp.plan(60, 16, layer),
        "attention": lambda: attention.plan(lifted, lifted, lifted, options),
    }


@pytest.mark.parametrize(
    ("kernel", "times", "expected"),
    [
        ("residual", [1.0, 2.0], "products"),
        ("residual", [2.0, 1.0], "fused"),
        ("attention", [1.0, 2.0], "products"),
        ("attention", [2.0, 1.0], "fused"),
        ("mlp", [1.0, 2.0, 3.0], "products"),
        ("mlp", [3.0, 1.0, 2.0], "linears"),
        ("mlp", [3.0, 2.0, 1.0], "fused"),
    ],
)
def test_every_plan_is_the_fastest_way(
    clock: list[float], kernel: str, times: list[float], expected: str
) -> None:
    clock += times
    plan = plans()[kernel]
    assert [plan(), plan()] == [expected, expected]
    assert not clock


@pytest.mark.parametrize(
    ("rows", "times", "expected"),
    [
        (2, [2.0, 1.0, 3.0, 4.0], ("vector", 2)),  # two sections: more would be empty
        (2, [4.0, 3.0, 1.0, 2.0], ("decode", 1)),
        (1, [1.0, 2.0, 3.0, 4.0], ("vector", 1)),
        (3, [2.0, 1.0], ("decode", 8)),
    ],
)
def test_few_rows_of_integers_go_the_fastest_way(
    clock: list[float], rows: int, times: list[float], expected: tuple[str, int]
) -> None:
    codes = torch.zeros((16, 2048), dtype=torch.int8)
    scale = ones(16, 16)
    base = int_group.pack(codes, scale, None, bits=4, group_size=128, dtype=torch.float16)
    clock += times
    for _ in range(2):  # measured once
        config, sections = _int_group_triton.plan(rows, base, torch.float16)
        assert (config, sections) == (_int_group_triton.CONFIGS[expected[0]], expected[1])
    assert not clock


def test_row_buckets_are_powers_of_two_up_to_a_limit() -> None:
    rows = (1, 2, 3, 64, 65, 10**6)
    assert [_plan.row_bucket(n) for n in rows] == [1, 2, 4, 64, 128, _plan.LARGEST_BUCKET]


@pytest.mark.parametrize(
    ("operands", "match"),
    [
        ((ones(2, 8, dtype=torch.float32), ones(3, 8), ones(5, 3)), "x is torch.float32"),
        ((ones(2, 8), ones(3, 8, dtype=torch.bfloat16), ones(5, 3)), "right is torch.bfloat16"),
        ((ones(2, 8), ones(3, 8), ones(5, 3, device="meta")), "left is torch.float16 on meta"),
        ((ones(2, 9), ones(3, 8), ones(5, 3)), r"\(5, 3\) times \(3, 8\), x has 9 inputs"),
        ((ones(2, 8), ones(3, 8), ones(5, 4)), r"left \[out, r\] times right \[r, in\]"),
        ((ones(2, 8), ones(0, 8), ones(5, 0)), "r at least 1"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, operands: tuple[torch.Tensor, ...], match: str
) -> None:
    monkeypatch.setattr(low_rank, "INTERPRETED", True)  # the CPU would be fine
    with pytest.raises(ValueError, match=match):
        low_rank.matmul(*operands)


def test_base_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="in the format dense, not int_group"):
        residual.matmul(ones(2, 8), dense.pack(ones(5, 8)), ones(3, 8), ones(5, 3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gate": mlp.Factors(ones(3, 8), ones(5, 3))}, "gate has 5 outputs, up has 7"),
        ({"down": mlp.Factors(ones(2, 8), ones(5, 2))}, r"down is .*, x has 7 inputs"),
        ({"gate": None, "up_bias": ones(8)}, r"up_bias is \(8,\), not \(7,\)"),
        ({"down_bias": ones(7)}, r"down_bias is \(7,\), not \(5,\)"),
        ({"down_bias": ones(5, dtype=torch.bfloat16)}, "down_bias is torch.bfloat16"),
        ({"up_bias": ones(7)}, "a gated layer has no bias"),
    ],
)
def test_layer_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(low_rank, "INTERPRETED", True)  # the CPU would be fine
    up = mlp.Factors(ones(3, 8), ones(7, 3))
    layer = mlp.Layer(up, mlp.Factors(ones(2, 7), ones(5, 2)), gate=up)
    mlp.check(ones(2, 8), layer)
    with pytest.raises(ValueError, match=match):
        mlp.check(ones(2, 8), layer._replace(**changes))


LIFTED = Lifted(ones(2, 5, 3), ones(8, 3))  # two sequences of 5, two heads of 4

TABLE = ones(5, 2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": LIFTED._replace(left=ones(8, 4))}, r"q: states are \(2, 5, 3\), left is \(8, 4\)"),
        ({"k": LIFTED._replace(left=ones(6, 3))}, "k: 6 features are no heads of 4"),
        ({"v": LIFTED._replace(bias=ones(4))}, r"v: bias is \(4,\), not \(8,\)"),
        ({"v": LIFTED._replace(left=ones(4, 3))}, r"heads of q, k, v are \(2, 2, 1\)"),
        ({"q": LIFTED._replace(states=ones(2, 6, 3))}, "q, k, v have .* sequences and tokens"),
        ({"k": LIFTED._replace(states=ones(2, 5, 3).double())}, "k.states is torch.float64"),
        (
            {"rotary": (ones(4, 2).float(), ones(5, 2).float())},
            r"cos is \(4, 2\), at least \(5, 2\)",
        ),
        ({"rotary": (ones(5, 2).float(), ones(5, 2))}, "sin is torch.float16 on cpu: float32"),
        ({"lengths": ones(2)}, "lengths are torch.float16"),
        ({"head_dim": 7}, "head_dim is 7, it must be even"),
        ({"path": "fast"}, "path is 'fast'"),
    ],
)
def test_attention_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(low_rank, "INTERPRETED", True)  # the CPU would be fine
    fine: dict[str, Any] = {"q": LIFTED, "k": LIFTED, "v": LIFTED, "head_dim": 4, "causal": True}
    attended = attention.attention(**{**fine, "path": "products"})
    assert attended.shape == (2, 5, 2, 4)
    with pytest.raises(ValueError, match=match):
        attention.attention(**{**fine, **changes})


def test_cpu_is_refused_without_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="need a GPU, x is on cpu: matmul_reference"):
        low_rank.matmul(ones(2, 8), ones(3, 8), ones(5, 3))


@pytest.mark.parametrize(
    ("rank", "path", "match"),
    [
        (300, "fused", "rank is 300, the fused kernel takes up to 256"),
        (3, "fast", "path is 'fast'"),
    ],
)
def test_paths_that_cannot_be_gone_are_refused(rank: int, path: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        planned(16, rank, path)
