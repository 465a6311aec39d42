"""What every method must do, whatever it is: each discovered one, on each kind of unit."""

import copy
import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.methods.base import (
    OUTPUT_STATISTICS,
    SITE_STATISTICS,
    MethodOptions,
    Result,
    Spec,
    Stats,
    expand,
    method_module,
    methods,
)

CASES = [(name, kind) for name in methods() for kind in sorted(method_module(name).SCOPE)]
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
    module = method_module(name)
    if "group_size" in module.Options.model_fields:
        options = {"group_size": 16, **options}
    chosen = module.Options(**options)
    assert module.problem(shapes_of(weights), chosen) is None
    return chosen


def every_choice(name: str) -> list[MethodOptions]:
    """The defaults, and each candidate of each field with the rest at its default."""
    module = method_module(name)
    found = [module.Options()]
    for key, field in module.Options.model_fields.items():
        found += [module.Options(**{key: value}) for value in field.json_schema_extra["candidates"]]
    return found


def nbytes(result: Result) -> int:
    return sum(member.nbytes for member in result.members.values())


def assert_same(a: Result, b: Result) -> None:
    assert a.events == b.events and a.members.keys() == b.members.keys()
    for name, member in a.members.items():
        assert member.parts.keys() == b.members[name].parts.keys()
        for key, part in member.parts.items():
            assert torch.equal(part, b.members[name].parts[key]), (name, key)


@pytest.mark.parametrize("name", methods())
def test_declarations_are_in_the_agreed_words(name):
    module = method_module(name)
    assert module.SCOPE and {"linear", "bank"} >= module.SCOPE
    assert SITE_STATISTICS.keys() | OUTPUT_STATISTICS.keys() >= module.NEEDS
    assert isinstance(module.ROWWISE, bool)
    assert issubclass(module.Options, MethodOptions)
    assert module.__doc__ and len(module.__doc__.splitlines()[0]) > 20


@pytest.mark.parametrize("name", methods())
def test_every_option_has_a_description_and_candidates_that_validate(name):
    module = method_module(name)
    for key, field in module.Options.model_fields.items():
        assert field.description, key
        candidates = field.json_schema_extra["candidates"]
        assert field.default in candidates, key
        specs = [Spec.of(name, options) for options in expand({key: candidates})]
        assert len(set(specs)) == len(candidates), key
        for spec in specs:
            assert Spec.of(name, spec.to_json()["options"]) == spec


@pytest.mark.parametrize("name", methods())
def test_unknown_option_raises(name):
    with pytest.raises(ValidationError, match="no_such_option"):
        method_module(name).Options(no_such_option=1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_choice_restores_shapes_and_predicts_bytes_or_says_why_not(name, kind, make_unit):
    module = method_module(name)
    weights, stats = make_unit(kind)
    shapes = shapes_of(weights)
    done = 0
    for options in [options_for(name, weights), *every_choice(name)]:
        reason = module.problem(shapes, options)
        if reason is not None:
            assert reason and "\n" not in reason
            with pytest.raises(ValueError):
                module.compress(weights, stats, options)
            continue
        done += 1
        result = module.compress(weights, stats, options)
        assert list(result.members) == list(weights)
        for member, packed in result.members.items():
            dense = packed.dense()
            assert packed.shape == shapes[member] == tuple(dense.shape)
            assert packed.dtype == weights[member].dtype == dense.dtype
            assert bool(torch.isfinite(dense).all())
        assert module.predict_bytes(shapes, torch.bfloat16, options) == nbytes(result), options
    assert done > 0


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_predicted_bytes_are_exact_in_other_dtypes(name, kind, dtype, make_unit):
    weights, stats = make_unit(kind)
    weights = {member: weight.to(dtype) for member, weight in weights.items()}
    options = options_for(name, weights)
    result = method_module(name).compress(weights, stats, options)
    predicted = method_module(name).predict_bytes(shapes_of(weights), dtype, options)
    assert predicted == nbytes(result)
    assert all(packed.dense().dtype == dtype for packed in result.members.values())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_same_input_gives_same_bytes_and_stays_as_it_was(name, kind, make_unit):
    weights, stats = make_unit(kind)
    options = options_for(name, weights)
    before = {member: weight.clone() for member, weight in weights.items()}
    sums = {member: copy.deepcopy(site.sums) for member, site in stats.items()}
    first = method_module(name).compress(weights, stats, options)
    assert_same(first, method_module(name).compress(weights, stats, options))
    assert_same(first, method_module(name).compress(*make_unit(kind), options))
    for member, weight in before.items():
        assert torch.equal(weights[member], weight)
        for key, value in sums[member].items():
            assert torch.equal(stats[member][key], value)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_result_is_finite_when_statistics_are_rank_deficient(name, kind, tokens, make_unit):
    weights, stats = make_unit(kind, tokens)
    result = method_module(name).compress(weights, stats, options_for(name, weights))
    for packed in result.members.values():
        assert bool(torch.isfinite(packed.dense()).all())


@pytest.mark.parametrize("name", BANKS)
def test_bank_with_an_expert_without_tokens_is_finite(name, make_unit):
    weights, stats = make_unit("bank")
    for site in stats.values():
        for value in site.sums.values():
            value[1] = 0
    result = method_module(name).compress(weights, stats, options_for(name, weights))
    for member, packed in result.members.items():
        dense = packed.dense()
        assert bool(torch.isfinite(dense).all()), member
        assert float(dense[1].float().norm()) > 0.5 * float(weights[member][1].float().norm())


@pytest.mark.parametrize("name", BANKS)
def test_member_of_a_bank_result_is_that_experts_weight(name, make_unit):
    weights, stats = make_unit("bank")
    result = method_module(name).compress(weights, stats, options_for(name, weights))
    for packed in result.members.values():
        assert torch.equal(packed[2].dense(), packed.dense()[2])


@pytest.mark.parametrize("name", [name for name in methods() if method_module(name).ROWWISE])
def test_rows_together_equal_rows_apart_when_rowwise(name, make_weight, make_stats):
    module = method_module(name)
    site = make_stats(IN)
    parts = {"q": make_weight(9, IN), "k": make_weight(3, IN, seed=1)}
    rows = {"weight": torch.cat(list(parts.values()))}
    options = options_for(name, rows)
    joined = module.compress(rows, {"weight": site}, options).members["weight"].dense()
    members = module.compress(parts, dict.fromkeys(parts, site), options).members
    assert torch.equal(torch.cat([members[member].dense() for member in parts]), joined)
    for member, weight in parts.items():
        alone = module.compress({"weight": weight}, {"weight": site}, options)
        assert torch.equal(alone.members["weight"].dense(), members[member].dense())


@pytest.mark.parametrize(
    "name", [name for name in methods() if "bits" in method_module(name).Options.model_fields]
)
@pytest.mark.parametrize("kind", ["linear", "bank"])
def test_more_bits_give_less_error_and_more_bytes(name, kind, make_unit):
    module = method_module(name)
    weights, stats = make_unit(kind)
    errors, sizes = [], []
    for bits in module.Options.model_fields["bits"].json_schema_extra["candidates"]:
        result = module.compress(weights, stats, options_for(name, weights, bits=bits))
        total = 0.0
        for member, packed in result.members.items():
            error = (packed.dense().float() - weights[member].float()).double()
            total += float(((error @ stats[member]["hessian"].double()) * error).sum())
        errors.append(total)
        sizes.append(nbytes(result))
    for (worse, better), (small, large) in zip(
        itertools.pairwise(errors), itertools.pairwise(sizes), strict=True
    ):
        assert better < 0.7 * worse and small < large
    assert math.isfinite(errors[0])


@pytest.mark.parametrize(
    "name", [name for name in methods() if "group_size" in method_module(name).Options.model_fields]
)
def test_group_size_that_does_not_divide_is_told_in_one_line(name):
    module = method_module(name)
    reason = module.problem({"down": (4, 8, 96)}, module.Options(group_size=64))
    assert reason is not None and "64" in reason and "96" in reason and "down" in reason
    assert "\n" not in reason
    assert module.problem({"down": (4, 8, 96)}, module.Options(group_size=32)) is None
    assert module.problem({"down": (4, 8, 97)}, module.Options(group_size=-1)) is None
