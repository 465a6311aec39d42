"""What may be planned for which engine."""

import pytest

from moesaic.kernels.tensor import Param
from moesaic.methods.base import Spec, Unit
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.targets import (
    SERVES,
    Serve,
    allowed,
    can_be_packed,
    plan_problem,
    ties,
)
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import open_model

QWEN = load_family("qwen3_moe")


def linear(name: str, block: int = 0, fused: str = "") -> Unit:
    shapes = {"weight": (8, 64)}
    return Unit(f"{block}.{name}", "linear", block, "attention", shapes, {"weight": "x"}, fused)


def bank(block: int = 0) -> Unit:
    shapes = {"gate": (4, 8, 64), "up": (4, 8, 64), "down": (4, 64, 8)}
    return Unit(f"{block}.experts", "bank", block, "experts", shapes, dict.fromkeys(shapes, "x"))


UNITS = [
    unit
    for block in range(3)
    for unit in (
        *(linear(name, block, "qkv") for name in ("q", "k", "v")),
        linear("o", block),
        bank(block),
        linear("gate", block, "gate_up"),
        linear("up", block, "gate_up"),
    )
]


def scheme(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> dict[str, Param]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


def chain(**options: Param) -> tuple[Spec, ...]:
    return (Spec.of("rtn", options),)


def test_ties_are_what_the_engine_fuses() -> None:
    assert ties(UNITS, "moesaic") == []
    assert ties(UNITS, "transformers") == [["0.experts", "1.experts", "2.experts"]]
    assert ties(UNITS, "vllm") == [
        group
        for block in range(3)
        for group in ([f"{block}.{n}" for n in "qkv"], [f"{block}.gate", f"{block}.up"])
    ]


def test_ties_leave_single_units_out() -> None:
    assert ties([linear("q", 0, "qkv"), bank()], "vllm") == []
    assert ties([linear("q", 0, "qkv"), bank()], "transformers") == []


@pytest.mark.parametrize("serve", SERVES)
@pytest.mark.parametrize("model_type", families())
def test_ties_of_every_family_name_its_units_once(
    model_type: str, serve: Serve, tiny: Tiny
) -> None:
    units = open_model(tiny(model_type)).units()
    tied = [name for group in ties(units, serve) for name in group]
    assert len(tied) == len(set(tied))
    assert set(tied) <= {unit.name for unit in units}
    if serve == "vllm" and model_type == "llama":
        parts = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        assert {name.rpartition(".")[2] for name in tied} == parts
        assert len(tied) == 2 * len(parts)


@pytest.mark.parametrize("unit", [linear("q"), bank()], ids=["linear", "bank"])
def test_everything_is_allowed_for_moesaic_and_dense_for_all(unit: Unit) -> None:
    odd = chain(bits=7, group_size=8, symmetric=False)
    assert allowed(unit, odd, "moesaic", load_family("gpt_oss")) is None
    for serve in SERVES:
        assert allowed(unit, (), serve, load_family("gpt_oss")) is None


@pytest.mark.parametrize(
    ("serve", "unit", "options", "reason"),
    [
        ("transformers", linear("q"), {"bits": 2, "group_size": -1}, None),
        ("transformers", bank(), {"bits": 7, "group_size": 8}, None),
        ("transformers", linear("q"), {"symmetric": False}, "zero points"),
        ("transformers", bank(), {"symmetric": False}, "zero points"),
        ("vllm", linear("q"), {"bits": 3, "group_size": 64}, None),
        ("vllm", linear("q"), {"bits": 8, "group_size": -1, "symmetric": False}, None),
        ("vllm", linear("q"), {"bits": 3, "symmetric": False}, r"\(4, 8\) bits, not 3"),
        ("vllm", linear("q"), {"group_size": 16}, "not 16"),
        ("vllm", bank(), {"bits": 8, "group_size": 128}, None),
        ("vllm", bank(), {"bits": 3}, r"\(4, 8\) bits, not 3"),
        ("vllm", bank(), {"bits": 4, "symmetric": False}, "without zero points"),
    ],
)
def test_allowed_names_the_reason(
    serve: Serve, unit: Unit, options: dict[str, Param], reason: str | None
) -> None:
    told = allowed(unit, chain(**options), serve, QWEN)
    if reason is None:
        assert told is None
    else:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(told)
        assert "\n" not in str(told)


@pytest.mark.parametrize("serve", ["vllm", "transformers"])
def test_experts_in_one_tensor_stay_dense(serve: Serve) -> None:
    for model_type in ("granitemoe", "gpt_oss"):
        family = load_family(model_type)
        told = allowed(bank(), chain(bits=4, group_size=-1), serve, family)
        assert told is not None
        assert model_type in told
        assert not can_be_packed(bank(), serve, family)
        assert allowed(linear("q"), chain(bits=4, group_size=-1), serve, family) is None


@pytest.mark.parametrize("serve", ["vllm", "transformers"])
def test_chains_of_two_methods_are_not_for_other_engines(serve: Serve) -> None:
    two = chain(bits=4) + chain(bits=4)
    assert "chain of 2" in str(allowed(linear("q"), two, serve, QWEN))
    assert allowed(linear("q"), two, "moesaic", QWEN) is None


def test_plan_problem_names_the_units_that_differ() -> None:
    plan = {unit.name: dict.fromkeys(unit.shapes, scheme()) for unit in UNITS}
    for serve in SERVES:
        assert plan_problem(UNITS, plan, serve, QWEN) is None
    other = {**plan, "1.k": {"weight": scheme(8)}, "2.experts": None}
    assert plan_problem(UNITS, other, "moesaic", QWEN) is None
    assert str(plan_problem(UNITS, other, "vllm", QWEN)).startswith("1.q and 1.k")
    experts = str(plan_problem(UNITS, other, "transformers", QWEN))
    assert experts.startswith("0.experts and 2.experts")
    half = {**plan, "0.up": None}
    assert str(plan_problem(UNITS, half, "vllm", QWEN)).startswith("0.gate and 0.up")
    uneven = {**plan, "1.experts": {"gate": scheme(), "up": scheme(), "down": scheme(8)}}
    assert str(plan_problem(UNITS, uneven, "vllm", QWEN)).startswith("1.experts: ")
