"""What every method must do, whatever it is: each discovered one, on each kind of unit."""

import copy
import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.kernels import dense, residual
from moesaic.methods.base import (
    OUTPUT_STATISTICS,
    SITE_STATISTICS,
    Method,
    MethodOptions,
    Repair,
    Result,
    Spec,
    Stats,
    expand,
    is_repair,
    method_module,
    methods,
    repair_module,
    repairs,
)


def module_of(name: str) -> Method | Repair:
    return repair_module(name) if is_repair(name) else method_module(name)


LINKS = [*methods(), *repairs()]
CASES = [(name, kind) for name in LINKS for kind in sorted(module_of(name).SCOPE)]
BANKS = [name for name, kind in CASES if kind == "bank"]
IN, INNER = 64, 32


@pytest.fixture
def make_unit(make_weight, make_stats):
    """Members and statistics of a unit of a kind; ``tokens`` per expert."""

    def make(kind: str, tokens: int = 100) -> tuple[dict[str, Tensor], dict[str, Stats]]:
        if kind == "linear":
            return {"weight": make_weight(10, IN)}, {"weight": make_stats(IN, tokens=tokens)}
        experts = 3
        weights = {
            "gate": make_weight(experts, INNER, IN),
            "up": make_weight(experts, INNER, IN, seed=1),
            "down": make_weight(experts, IN, INNER, seed=2),
        }
        read = make_stats(IN, experts, tokens)
        inner = make_stats(INNER, experts, tokens, seed=5)
        return weights, {"gate": read, "up": read, "down": inner}

    return make


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def options_for(name: str, weights: dict[str, Tensor], **options: object) -> MethodOptions:
    """Defaults, except what the small shapes of these tests cannot have."""
    module = module_of(name)
    fields = module.Options.model_fields
    if "group_size" in fields:
        options = {"group_size": 16, **options}
    if "rank" in fields and isinstance(fields["rank"].default, int):
        options = {"rank": 4, **options}
    chosen = module.Options(**options)
    assert module.problem(shapes_of(weights), chosen) is None
    return chosen


def every_choice(name: str) -> list[MethodOptions]:
    """The defaults, and each candidate of each field with the rest at its default."""
    module = module_of(name)
    found = [module.Options()]
    for key, field in module.Options.model_fields.items():
        found += [module.Options(**{key: value}) for value in field.json_schema_extra["candidates"]]
    return found


def apply(
    name: str, weights: dict[str, Tensor], stats: dict[str, Stats], options: MethodOptions
) -> Result:
    """What a method makes of the weights; a repair corrects a base that is half of them."""
    if not is_repair(name):
        return method_module(name).compress(weights, stats, options)
    halves = {member: dense.pack(weight / 2) for member, weight in weights.items()}
    return repair_module(name).repair(weights, halves, stats, options)


def nbytes(name: str, result: Result) -> int:
    """Bytes that a method left, or that a repair added."""
    members = result.members.values()
    if is_repair(name):
        members = [residual.members(member)[1] for member in members]
    return sum(member.nbytes for member in members)


def assert_same(a: Result, b: Result) -> None:
    assert a.events == b.events and a.members.keys() == b.members.keys()
    for name, member in a.members.items():
        assert member.parts.keys() == b.members[name].parts.keys()
        for key, part in member.parts.items():
            assert torch.equal(part, b.members[name].parts[key]), (name, key)


@pytest.mark.parametrize("name", LINKS)
def test_declarations_are_in_the_agreed_words(name):
    module = module_of(name)
    assert module.SCOPE and {"linear", "bank"} >= module.SCOPE
    assert SITE_STATISTICS.keys() | OUTPUT_STATISTICS.keys() >= module.NEEDS
    assert isinstance(module.ROWWISE, bool)
    assert issubclass(module.Options, MethodOptions)
    assert module.__doc__ and len(module.__doc__.splitlines()[0]) > 20


@pytest.mark.parametrize("name", LINKS)
def test_every_option_has_a_description_and_candidates_that_validate(name):
    module = module_of(name)
    for key, field in module.Options.model_fields.items():
        assert field.description, key
        candidates = field.json_schema_extra["candidates"]
        assert field.default in candidates, key
        specs = [Spec.of(name, options) for options in expand({key: candidates})]
        assert len(set(specs)) == len(candidates), key
        for spec in specs:
            assert Spec.of(name, spec.to_json()["options"]) == spec


@pytest.mark.parametrize("name", LINKS)
def test_unknown_option_raises(name):
    with pytest.raises(ValidationError, match="no_such_option"):
        module_of(name).Options(no_such_option=1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_choice_restores_shapes_and_predicts_bytes_or_says_why_not(name, kind, make_unit):
    module = module_of(name)
    weights, stats = make_unit(kind)
    shapes = shapes_of(weights)
    done = 0
    for options in [options_for(name, weights), *every_choice(name)]:
        reason = module.problem(shapes, options)
        if reason is not None:
            assert reason and "\n" not in reason
            with pytest.raises(ValueError):
                apply(name, weights, stats, options)
            continue
        done += 1
        result = apply(name, weights, stats, options)
        assert list(result.members) == list(weights)
        for member, packed in result.members.items():
            dense = packed.dense()
            assert packed.shape == shapes[member] == tuple(dense.shape)
            assert packed.dtype == weights[member].dtype == dense.dtype
            assert bool(torch.isfinite(dense).all())
        predicted = module.predict_bytes(shapes, torch.bfloat16, options)
        assert predicted == nbytes(name, result), options
    assert done > 0


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_predicted_bytes_are_exact_in_other_dtypes(name, kind, dtype, make_unit):
    weights, stats = make_unit(kind)
    weights = {member: weight.to(dtype) for member, weight in weights.items()}
    options = options_for(name, weights)
    result = apply(name, weights, stats, options)
    predicted = module_of(name).predict_bytes(shapes_of(weights), dtype, options)
    assert predicted == nbytes(name, result)
    assert all(packed.dense().dtype == dtype for packed in result.members.values())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_same_input_gives_same_bytes_and_stays_as_it_was(name, kind, make_unit):
    weights, stats = make_unit(kind)
    options = options_for(name, weights)
    before = {member: weight.clone() for member, weight in weights.items()}
    sums = {member: copy.deepcopy(site.sums) for member, site in stats.items()}
    first = apply(name, weights, stats, options)
    assert_same(first, apply(name, weights, stats, options))
    assert_same(first, apply(name, *make_unit(kind), options))
    for member, weight in before.items():
        assert torch.equal(weights[member], weight)
        for key, value in sums[member].items():
            assert torch.equal(stats[member][key], value)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_result_is_finite_when_statistics_are_rank_deficient(name, kind, tokens, make_unit):
    weights, stats = make_unit(kind, tokens)
    result = apply(name, weights, stats, options_for(name, weights))
    for packed in result.members.values():
        assert bool(torch.isfinite(packed.dense()).all())


@pytest.mark.parametrize("name", BANKS)
def test_bank_with_an_expert_without_tokens_is_finite(name, make_unit):
    weights, stats = make_unit("bank")
    for site in stats.values():
        for value in site.sums.values():
            value[1] = 0
    result = apply(name, weights, stats, options_for(name, weights))
    for member, packed in result.members.items():
        dense = packed.dense()
        assert bool(torch.isfinite(dense).all()), member
        assert float(dense[1].float().norm()) > 0.5 * float(weights[member][1].float().norm())


@pytest.mark.parametrize("name", BANKS)
def test_member_of_a_bank_result_is_that_experts_weight(name, make_unit):
    weights, stats = make_unit("bank")
    result = apply(name, weights, stats, options_for(name, weights))
    for packed in result.members.values():
        assert torch.equal(packed[2].dense(), packed.dense()[2])


@pytest.mark.parametrize("name", [name for name in LINKS if module_of(name).ROWWISE])
def test_rows_together_equal_rows_apart_when_rowwise(name, make_weight, make_stats):
    site = make_stats(IN)
    parts = {"q": make_weight(9, IN), "k": make_weight(3, IN, seed=1)}
    rows = {"weight": torch.cat(list(parts.values()))}
    options = options_for(name, rows)
    joined = apply(name, rows, {"weight": site}, options).members["weight"].dense()
    members = apply(name, parts, dict.fromkeys(parts, site), options).members
    assert torch.equal(torch.cat([members[member].dense() for member in parts]), joined)
    for member, weight in parts.items():
        alone = apply(name, {"weight": weight}, {"weight": site}, options)
        assert torch.equal(alone.members["weight"].dense(), members[member].dense())


@pytest.mark.parametrize(
    "name", [name for name in LINKS if "bits" in module_of(name).Options.model_fields]
)
@pytest.mark.parametrize("kind", ["linear", "bank"])
def test_more_bits_give_less_error_and_more_bytes(name, kind, make_unit):
    module = module_of(name)
    weights, stats = make_unit(kind)
    errors, sizes = [], []
    for bits in module.Options.model_fields["bits"].json_schema_extra["candidates"]:
        result = apply(name, weights, stats, options_for(name, weights, bits=bits))
        total = 0.0
        for member, packed in result.members.items():
            error = (packed.dense().float() - weights[member].float()).double()
            total += float(((error @ stats[member]["hessian"].double()) * error).sum())
        errors.append(total)
        sizes.append(nbytes(name, result))
    for (worse, better), (small, large) in zip(
        itertools.pairwise(errors), itertools.pairwise(sizes), strict=True
    ):
        assert better < 0.7 * worse and small < large
    assert math.isfinite(errors[0])


@pytest.mark.parametrize(
    "name", [name for name in LINKS if "group_size" in module_of(name).Options.model_fields]
)
def test_group_size_that_does_not_divide_is_told_in_one_line(name):
    module = module_of(name)
    reason = module.problem({"down": (4, 8, 96)}, module.Options(group_size=64))
    assert reason is not None and "64" in reason and "96" in reason and "down" in reason
    assert "\n" not in reason
    assert module.problem({"down": (4, 8, 96)}, module.Options(group_size=32)) is None
    assert module.problem({"down": (4, 8, 97)}, module.Options(group_size=-1)) is None
