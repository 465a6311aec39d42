"""What methods of low rank must do: optimal, nested in the rank, unmoved by bad statistics."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import scipy.linalg
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.kernels import delta, dense, lowrank, mosaic, residual
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods import eora, factors, gptq, low_rank, rtn, svd, svd_llm
from moesaic.methods.base import (
    Result,
    Stats,
    is_ranked,
    is_repair,
    is_whole,
    method_module,
    methods,
    of_dense_model,
    options_of,
    repair_module,
    repairs,
)
from moesaic.methods.chains import cut_events
from moesaic.methods.factors import (
    factor_bytes,
    factor_problem,
    is_factoring,
    quantize_factors,
    quantize_shared,
)

FACTORING = [name for name in methods() if is_factoring(name)]
# Those whose results are more than factors, or not cut to smaller ranks, too.
RANKED = [name for name in [*methods(), *repairs()] if "rank" in options_of(name).model_fields]
WHITENING = ["svd_llm", "eora", "delta_moe", "sparse_lowrank"]
OUT, IN = 24, 40


@pytest.fixture
def make_unit(make_weight, make_stats):
    """A weight ``[*batch, out, in]`` in float64 and statistics of its inputs, all of them."""

    def make(
        out: int = OUT, inputs: int = IN, experts: int = 0, tokens: int = 200
    ) -> tuple[Tensor, Stats]:
        batch = (experts,) if experts else ()
        weight = make_weight(*batch, out, inputs, dtype=torch.float64)
        # Singular values that fall, as those of trained weights do.
        weight = weight * torch.linspace(1, 0.05, inputs) ** 2
        stats = make_stats(inputs, experts, tokens)
        fisher = stats["hessian"].diagonal(dim1=-2, dim2=-1).clone()
        sums = {name: value.double() for name, value in stats.sums.items() if name != "tokens"}
        return weight, Stats({**sums, "tokens": stats["tokens"], "fisher": fisher.double()})

    return make


def make_own(make_unit, name: str, **size: int) -> tuple[Tensor, Stats]:
    """What a method takes: a bank of two experts where it wants all of a bank's."""
    return make_unit(experts=2 if is_whole(name) else 0, **size)


def run(name: str, weight: Tensor, stats: Stats, **options: object) -> Result:
    """A method on a member ``w``; repairs correct a base of 3 bits."""
    chosen = options_of(name)(**options)
    if is_repair(name):
        base = {"w": rounded(weight)}
        return repair_module(name).repair({"w": weight}, base, {"w": stats}, chosen)
    return method_module(name).compress({"w": weight}, {"w": stats}, chosen)


def rounded(weight: Tensor) -> CompressedTensor:
    """Round to nearest in 3 bits per channel, kept dense: the integer format has no float64."""
    options = rtn.Options(bits=3, group_size=-1)
    packed = rtn.compress({"w": weight.float()}, {}, options).members["w"]
    return dense.pack(packed.dense().to(weight.dtype))


def correction(result: Result) -> CompressedTensor:
    """The factors alone."""
    tensor = result.members["w"]
    return residual.members(tensor)[1] if tensor.format == "residual" else tensor


def target(name: str, weight: Tensor) -> Tensor:
    """What the factors of a method stand for."""
    return weight - rounded(weight).dense() if is_repair(name) else weight


def error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    delta = weight.double() - other.double()
    return float(((delta @ hessian.double()) * delta).sum())


def best_error(weight: Tensor, hessian: Tensor, rank: int) -> float:
    """Eckart and Young in the whitened space, by numpy and scipy's square root."""
    root = scipy.linalg.sqrtm(hessian.double().numpy()).real
    values = np.linalg.svd(weight.double().numpy() @ root, compute_uv=False)
    return float((values[rank:] ** 2).sum())


def same(a: CompressedTensor, b: CompressedTensor) -> bool:
    return (a.format, a.shape, a.dtype, dict(a.params)) == (
        b.format,
        b.shape,
        b.dtype,
        dict(b.params),
    ) and all(torch.equal(part, b.parts[key]) for key, part in a.parts.items())


# Every method


@pytest.mark.parametrize("name", [*FACTORING, *repairs()])
@pytest.mark.parametrize("out", [OUT, IN, 56])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_the_weight(name, out, dtype, make_unit):
    weight, stats = make_unit(out)
    weight = weight.to(dtype)
    dense_again = run(name, weight, stats, rank=min(out, IN)).members["w"].dense()
    assert dense_again.dtype == dtype
    assert (dense_again - weight).norm() < 8 * torch.finfo(dtype).eps * weight.norm()


@pytest.mark.parametrize("name", [*FACTORING, *repairs()])
@pytest.mark.parametrize(("out", "experts"), [(OUT, 0), (56, 0), (OUT, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cut_is_the_result_of_the_smaller_rank(name, out, experts, dtype, make_unit):
    assert is_ranked(name)
    weight, stats = make_unit(out, experts=experts)
    weight = weight.to(dtype)
    largest = run(name, weight, stats, rank=20).members["w"]
    for rank in (20, 19, 8, 1):
        smaller = run(name, weight, stats, rank=rank).members["w"]
        assert same(largest.cut(rank), smaller)


@pytest.mark.parametrize("name", [*FACTORING, *repairs()])
def test_expert_of_a_bank_equals_the_expert_alone(name, make_unit):
    weight, stats = make_unit(experts=3)
    bank = run(name, weight, stats, rank=6).members["w"]
    for expert in range(3):
        one = Stats({key: value[expert] for key, value in stats.sums.items()})
        assert same(bank[expert], run(name, weight[expert], one, rank=6).members["w"])
        assert torch.equal(bank[expert].dense(), bank.dense()[expert])


@pytest.mark.parametrize("name", [*FACTORING, *repairs()])
def test_error_in_its_norm_falls_with_the_rank_and_is_the_least(name, make_unit):
    weight, stats = make_unit()
    wanted = target(name, weight)
    norm = claimed_norm(name, stats)
    errors = [
        error(wanted, correction(run(name, weight, stats, rank=rank)).dense(), norm)
        for rank in range(1, OUT)
    ]
    assert all(less < more for more, less in itertools.pairwise(errors))
    for rank, found in enumerate(errors, start=1):
        assert found == pytest.approx(best_error(wanted, norm, rank), rel=1e-5)
        plain = run("svd", wanted, stats, rank=rank).members["w"].dense()
        assert found <= error(wanted, plain, norm) * (1 + 1e-9)


def claimed_norm(name: str, stats: Stats) -> Tensor:
    """The matrix of the norm that a method claims to minimise."""
    norms: Mapping[str, Callable[[], Tensor]] = {
        "svd": lambda: torch.eye(IN).double(),
        "asvd": lambda: torch.diag(stats["abs"]),  # (mean |x|)^½, squared, up to a factor
        "fwsvd": lambda: torch.diag(stats["fisher"]),
    }
    return norms[name]() if name in norms else stats["hessian"]


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("case", ["zero", "rank_deficient", "ill_conditioned", "dead_inputs"])
def test_result_is_finite_and_full_rank_exact_whatever_the_statistics_are(name, case, make_unit):
    weight, stats = make_own(make_unit, name, tokens=3 if case == "rank_deficient" else 200)
    sums = dict(stats.sums)
    if case == "zero":
        sums = {key: torch.zeros_like(value) for key, value in sums.items()}
    elif case in ("ill_conditioned", "dead_inputs"):
        scale = torch.logspace(0, -12, IN).double()
        if case == "dead_inputs":
            scale = (torch.arange(IN) % 2).double()
        sums["hessian"] = sums["hessian"] * scale * scale[:, None]
        sums["abs"] = sums["abs"] * scale
        sums["fisher"] = sums["fisher"] * scale**2
    for rank in (5, OUT):
        result = run(name, weight, Stats(sums), rank=rank)
        assert result.members["w"].dense().isfinite().all()
    assert (result.members["w"].dense() - weight).norm() < 1e-13 * weight.norm()
    kinds = {event.kind for event in result.events} - {"above_break_even"}
    whitening = {"zero": {"no_tokens"}, "rank_deficient": {"few_tokens"}}
    dead = {"dead_inputs": {"rank_deficient"}}
    told = {
        "svd": {},
        # The power of ½ lets inputs count that are 10⁻¹² as large as others.
        "asvd": {"zero": {"no_tokens"}, **dead},
        "fwsvd": {"zero": {"no_gradients"}, "ill_conditioned": {"rank_deficient"}, **dead},
        **dict.fromkeys(WHITENING, {**whitening, **dead, "ill_conditioned": {"rank_deficient"}}),
    }
    assert kinds == told[name].get(case, set())


@pytest.mark.parametrize("name", FACTORING)
def test_bytes_are_predicted_for_shares_and_numbers(name, make_unit):
    weight, stats = make_unit(experts=2)
    shapes, module = {"w": tuple(weight.shape)}, method_module(name)
    for rank in (0.05, 0.5, 1.0, 1, 7, 15, OUT):
        options = module.Options(rank=rank)
        result = module.compress({"w": weight.half()}, {"w": stats}, options)
        assert module.predict_bytes(shapes, torch.float16, options) == result.members["w"].nbytes
        grows = result.members["w"].nbytes > 2 * weight.numel()
        assert grows == any(event.kind == "above_break_even" for event in result.events)
        assert not (grows and isinstance(rank, float))


def test_what_is_larger_than_the_dense_weight_is_told_together_with_what_is_corrected(make_unit):
    weight, stats = make_unit(experts=3)
    bytes_of_dense = 8 * weight.numel()
    for name in ("eora", "delta_moe"):
        for rank in (1, 4, 9, 12, 15):
            result = run(name, weight, stats, rank=rank)
            grown = [event.value for event in result.events if event.kind == "above_break_even"]
            size = result.members["w"].nbytes
            assert grown == ([size] if size > bytes_of_dense else [])
        assert grown
    base = rtn.compress({"w": weight.float()}, {}, rtn.Options(bits=4, group_size=-1)).members
    for rank in (4, 20):
        made = eora.repair({"w": weight.float()}, base, {"w": stats}, eora.Options(rank=rank))
        assert ("above_break_even" in [event.kind for event in made.events]) == (rank == 20)


def test_cuts_that_are_small_enough_are_not_told_to_be_too_large(make_unit):
    weight, stats = make_unit()
    result = run("svd_llm", weight, stats, rank=OUT)
    assert [event.kind for event in result.events] == ["above_break_even"]
    largest = result.members["w"]
    for rank, told in ((14, []), (15, []), (16, ["above_break_even"])):  # 15 is 24·40/64
        events = cut_events(result.events, {"w": largest.cut(rank)})
        assert [event.kind for event in events] == told


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("rank", [0, OUT + 1, 1000])
def test_rank_that_no_member_has_is_a_problem(name, rank, make_unit):
    weight, stats = make_own(make_unit, name)
    module = repair_module(name) if is_repair(name) else method_module(name)
    reason = module.problem({"up": (2, IN, IN), "w": (OUT, IN)}, options_of(name)(rank=rank))
    assert reason is not None and str(rank) in reason and "\n" not in reason
    with pytest.raises(ValueError, match="w: rank"):
        run(name, weight, stats, rank=rank)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(name, wrong, make_unit):
    weight, stats = make_own(make_unit, name)
    module = repair_module(name) if is_repair(name) else method_module(name)
    for key in sorted(module.NEEDS - {"tokens"}):
        sums = {key: value.clone() for key, value in stats.sums.items()}
        sums[key].view(-1)[3] = wrong
        with pytest.raises(ValueError, match=r"^w: "):
            run(name, weight, Stats(sums), rank=4)
    base = {"w": rounded(weight)}
    weight.view(-1)[IN + 2] = wrong
    with pytest.raises(ValueError, match=r"^w: 1 of"):
        if is_repair(name):
            repair_module(name).repair({"w": weight}, base, {"w": stats}, eora.Options(rank=4))
        else:
            run(name, weight, stats, rank=4)


# Ranks


def test_rank_is_a_number_or_a_share():
    assert svd.Options(rank=1).rank == 1 and isinstance(svd.Options(rank=1).rank, int)
    assert isinstance(svd.Options(rank=1.0).rank, float)
    for wrong in (True, "3", 0.0, 1.01, -1, -0.5, float("nan")):
        with pytest.raises(ValidationError):
            svd.Options(rank=wrong)


@pytest.mark.parametrize(
    ("shape", "rank", "columns"),
    [
        ((100, 100), 1.0, 48),  # 50, down to a multiple of 8
        ((100, 100), 0.2, 8),
        ((100, 100), 0.14, 7),
        ((100, 100), 0.001, 1),
        ((5, 160, 480), 0.3, 32),  # 36
        ((160, 160), 0.3, 24),  # 0.3 · 80 is a little less than 24
        ((100, 100), 77, 77),
    ],
)
def test_shares_become_ranks(shape, rank, columns):
    assert low_rank.resolved_rank(shape, rank) == columns


# Errors of all ranks


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("based", [False, True])
def test_errors_of_all_ranks_equal_those_one_by_one(experts, based, make_unit):
    weight, stats = make_unit(experts=experts)
    base = rounded(weight).dense() if based else None
    whole = weight if base is None else weight - base
    result = svd_llm.compress({"w": whole.float()}, {"w": stats}, svd_llm.Options(rank=OUT))
    left, right = (factor.dense().double() for factor in lowrank.factors(result.members["w"]))
    ranks = [0, 1, 2, 7, 23, OUT]
    errors = low_rank.rank_errors(weight, left, right, stats["hessian"], ranks, base)
    assert (errors.shape, errors.dtype) == ((len(ranks), *weight.shape[:-1]), torch.float64)
    largest = errors[0].max()
    for found, rank in zip(errors, ranks, strict=True):
        delta = whole - left[..., :rank] @ right[..., :rank, :]
        expected = ((delta @ stats["hessian"]) * delta).sum(-1)
        assert (found - expected).abs().max() < 1e-13 * largest
        assert (found >= 0).all()


# Single methods


@pytest.mark.parametrize("case", ["plain", "few_tokens", "no_tokens", "indefinite"])
def test_cholesky_tells_of_few_tokens_and_of_its_damping_where_it_grew(case, make_unit):
    weight, stats = make_unit(tokens=3 if case == "few_tokens" else 200)
    hessian = stats["hessian"]
    if case == "no_tokens":
        hessian = torch.zeros_like(hessian)
    elif case == "indefinite":
        hessian = hessian + hessian.diagonal().mean() * (1 - torch.eye(IN).double())
    stats = Stats({**stats.sums, "hessian": hessian})
    result = run("svd_llm", weight, stats, rank=9, variant="cholesky")
    told = {"indefinite": "damping_grew", "no_tokens": "no_tokens", "few_tokens": "few_tokens"}
    assert [event.kind for event in result.events] == [told[k] for k in told if k == case]
    assert result.members["w"].dense().isfinite().all()


def test_variants_agree_where_the_hessian_is_well_conditioned(make_unit):
    weight, stats = make_unit()
    eigen = run("svd_llm", weight, stats, rank=10)
    cholesky = run("svd_llm", weight, stats, rank=10, variant="cholesky", damp=1e-9)
    assert (eigen.members["w"].dense() - cholesky.members["w"].dense()).norm() < 1e-6
    least = best_error(weight, stats["hessian"], 10)
    damped = run("svd_llm", weight, stats, rank=10, variant="cholesky").members["w"].dense()
    assert least < error(weight, damped, stats["hessian"]) < 1.02 * least


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["int_group", "lowrank", "mosaic"])
def test_eora_never_does_worse_than_no_repair_whatever_the_base_is(bits, kind, make_unit):
    weight, stats = make_unit(experts=3)
    weight = weight.bfloat16()
    fine, coarse = (
        gptq.compress({"w": weight}, {"w": stats}, gptq.Options(bits=b, group_size=8)).members["w"]
        for b in (bits + 1, bits)
    )
    if kind == "mosaic":
        groups = [(mosaic.take(fine, [0, 2]), [0, 2]), (mosaic.take(coarse, [1]), [1])]
    bases: Mapping[str, Callable[[], CompressedTensor]] = {
        "int_group": lambda: coarse,
        "lowrank": lambda: run("svd", weight, stats, rank=8).members["w"],
        "mosaic": lambda: mosaic.pack(groups),
    }
    base = bases[kind]()
    result = eora.repair({"w": weight}, {"w": base}, {"w": stats}, eora.Options(rank=6))
    tensor = result.members["w"]
    assert tensor.format == "residual"
    added = eora.predict_bytes({"w": tuple(weight.shape)}, weight.dtype, eora.Options(rank=6))
    assert tensor.nbytes == base.nbytes + added
    for expert in range(3):
        h = stats["hessian"][expert]
        before, after = (error(weight[expert], t[expert].dense(), h) for t in (base, tensor))
        least = best_error(weight[expert].double() - base[expert].dense().double(), h, 6)
        assert after < 0.9 * before
        assert (
            least * 0.98
            < after
            < 1.05 * least + 1e-4 * error(weight[expert], 0 * weight[expert], h)
        )


def test_experts_without_tokens_get_plain_svd_and_one_event(make_unit):
    weight, stats = make_unit(experts=4)
    for value in stats.sums.values():
        value[1:3] = 0
    plain = run("svd", weight, stats, rank=5).members["w"]
    result = run("svd_llm", weight, stats, rank=5)
    assert [(event.kind, event.value) for event in result.events] == [("no_tokens", 2)]
    assert "expert 1" in result.events[0].message
    for expert in (1, 2):
        assert same(result.members["w"][expert], plain[expert])
    assert not same(result.members["w"][0], plain[0])


# Left factors fitted to other inputs


@pytest.fixture
def make_both(make_unit, make_stats):
    """A weight, and statistics of the dense model's inputs and of others."""

    def make(experts: int = 0, tokens: int = 200) -> tuple[Tensor, Stats, Stats]:
        weight, seen = make_unit(experts=experts)
        other = make_stats(IN, experts, tokens)
        sums = {name: other[name] for name in ("hessian", "tokens")}
        turn = torch.eye(IN).double() + 0.3 * make_unit(IN, IN)[0]
        sums["hessian"] = turn @ sums["hessian"].double() @ turn.mT
        beside = {of_dense_model(name): seen[name] for name in ("hessian", "tokens")}
        return weight, seen, Stats({**sums, **beside})

    return make


@pytest.mark.parametrize("variant", ["eigen", "cholesky"])
def test_refit_keeps_the_rows_and_has_the_best_left_factor(variant, make_both):
    weight, seen, both = make_both()
    both_new = run("svd_llm", weight, both, rank=7, variant=variant).members["w"].dense()
    before = run("svd_llm", weight, seen, rank=7, variant=variant).members["w"]
    fitted = run("svd_llm", weight, both, rank=7, variant=variant, refit=True).members["w"]
    right = lowrank.factors(before)[1].dense()
    again = lowrank.factors(fitted)[1].dense()
    # Each row is a combination of the same rows.
    assert (again - again @ torch.linalg.pinv(right) @ right).norm() < 1e-9 * again.norm()
    # Independent of how it is made: least squares by numpy, whitened by scipy's root.
    root = scipy.linalg.sqrtm(both["hessian"].double().numpy()).real
    left, *_ = np.linalg.lstsq((right.numpy() @ root).T, (weight.numpy() @ root).T, rcond=None)
    least = error(weight, torch.from_numpy(left.T) @ right, both["hessian"])
    assert error(weight, fitted.dense(), both["hessian"]) == pytest.approx(least, rel=1e-6)
    assert least < 0.99 * error(weight, before.dense(), both["hessian"])
    assert error(weight, both_new, both["hessian"]) <= least * (1 + 1e-6)


def test_refit_is_nested_in_the_rank_and_exact_at_full_rank(make_both):
    weight, _, both = make_both(experts=2)
    largest = run("svd_llm", weight, both, rank=OUT, refit=True).members["w"]
    assert (largest.dense() - weight).norm() < 1e-12 * weight.norm()
    for rank in (1, 5, 20):
        own = run("svd_llm", weight, both, rank=rank, refit=True).members["w"]
        assert same(largest.cut(rank), own)


@pytest.mark.parametrize("case", ["none", "few", "rank_deficient"])
def test_refit_survives_whatever_the_other_inputs_are(case, make_both):
    weight, seen, both = make_both(tokens=3 if case == "few" else 200)
    if case == "none":
        for name in ("hessian", "tokens"):
            both.sums[name] = torch.zeros_like(both[name])
    if case == "rank_deficient":
        weight[5:] = 0
    for rank in (2, OUT):
        result = run("svd_llm", weight, both, rank=rank, refit=True)
        fitted = result.members["w"]
        assert fitted.dense().isfinite().all()
        told = {"none": "no_tokens", "few": "few_tokens"}
        kinds = [event.kind for event in result.events if event.kind != "above_break_even"]
        assert kinds == [told[k] for k in told if k == case]
        if case == "none":
            # Nothing to fit to: what the dense model's inputs give stays.
            assert same(fitted, run("svd_llm", weight, seen, rank=rank).members["w"])
    assert (fitted.dense() - weight).norm() < 1e-8 * weight.norm()


def test_refit_without_other_inputs_changes_nothing(make_unit):
    weight, stats = make_unit()
    plain = run("svd_llm", weight, stats, rank=5).members["w"]
    assert same(run("svd_llm", weight, stats, rank=5, refit=True).members["w"], plain)


# Deltas of a shared base


@pytest.fixture
def make_alike(make_unit):
    """Experts that differ in rank 4, and little else."""

    def make(experts: int = 4) -> tuple[Tensor, Stats]:
        weight, stats = make_unit(experts=experts)
        common, own = make_unit()[0], weight[..., :4] @ weight[:, :4]
        return common + 0.1 * own + 1e-3 * weight, stats

    return make


def test_base_is_the_mean_by_tokens_and_lies_there_once(make_alike):
    weight, stats = make_alike()
    stats.sums["tokens"] = torch.tensor([0, 1, 0, 3])
    bank = run("delta_moe", weight, stats, rank=2).members["w"]
    base, deltas = delta.members(bank)
    assert torch.allclose(base.dense(), weight[1] / 4 + weight[3] * 3 / 4, rtol=1e-14)
    assert bank.nbytes == 8 * (OUT * IN + 4 * 2 * (OUT + IN)) == base.nbytes + deltas.nbytes
    assert [bank[2].format, bank[2].shape] == ["residual", (OUT, IN)]
    assert bank[2].parts["base_dense"].data_ptr() == base.dense().data_ptr()
    stats.sums["tokens"] = torch.zeros(4, dtype=torch.int64)
    base, _ = delta.members(run("delta_moe", weight, stats, rank=2).members["w"])
    assert torch.allclose(base.dense(), weight.mean(0), rtol=1e-12)


def test_deltas_are_optimal_nested_and_exact_at_full_rank(make_alike):
    weight, stats = make_alike()
    largest = run("delta_moe", weight, stats, rank=OUT).members["w"]
    assert (largest.dense() - weight).norm() < 1e-14 * weight.norm()
    base = delta.members(largest)[0].dense()
    for rank in (1, 3, 8):
        bank = run("delta_moe", weight, stats, rank=rank).members["w"]
        assert is_ranked("delta_moe") and same(largest.cut(rank), bank)
        for expert, hessian in enumerate(stats["hessian"]):
            least = best_error(weight[expert] - base, hessian, rank)
            found = error(weight[expert], bank[expert].dense(), hessian)
            assert found == pytest.approx(least, rel=1e-5)


def test_shared_base_beats_factors_of_the_same_bytes_where_experts_are_alike(make_alike):
    weight, stats = make_alike()
    shared = run("delta_moe", weight, stats, rank=4).members["w"]
    apart = run("svd_llm", weight, stats, rank=8).members["w"]
    assert shared.nbytes <= apart.nbytes
    errors = [
        sum(error(w, t.dense(), h) for w, t, h in zip(weight, bank, stats["hessian"], strict=True))
        for bank in ([shared[e] for e in range(4)], [apart[e] for e in range(4)])
    ]
    assert errors[0] < 0.05 * errors[1]


def test_experts_taken_from_a_shared_base_bring_all_of_it(make_alike):
    weight, stats = make_alike()
    bank = run("delta_moe", weight, stats, rank=4).members["w"]
    repaired = eora.repair({"w": weight}, {"w": bank}, {"w": stats}, eora.Options(rank=2))
    for whole in (bank, repaired.members["w"]):
        some, rest = mosaic.take(whole, [3, 0]), mosaic.take(whole, [1, 2])
        assert torch.equal(some.dense(), whole.dense()[[3, 0]])
        assert some.nbytes + rest.nbytes == whole.nbytes + 8 * OUT * IN
        joined = mosaic.pack([(some, [3, 0]), (rest, [1, 2])])
        assert torch.equal(joined.dense(), whole.dense())
        assert torch.equal(joined.effective(), whole.effective())
    assert is_whole("delta_moe") and not is_whole("svd")


# Formats


def test_bank_of_factors_is_taken_apart_and_put_together(make_unit):
    weight, stats = make_unit(experts=4)
    for name in ("svd", "eora"):
        bank = run(name, weight, stats, rank=5).members["w"]
        joined = mosaic.pack([(mosaic.take(bank, part), part) for part in ([2, 0], [1, 3])])
        assert torch.equal(joined.dense(), bank.dense())
        assert same(joined[2], bank[2])


def test_factors_that_cannot_be_cut_say_why(make_unit):
    weight, stats = make_unit()
    tensor = run("svd", weight.half(), stats, rank=8).members["w"]
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            tensor.cut(rank)
    quantized = quantize_factors("rtn", {"w": tensor}, {"w": stats}, rtn.Options(group_size=8))
    with pytest.raises(ValueError, match="int_group"):
        quantized.members["w"].cut(4)
    with pytest.raises(ValueError, match="dense"):
        dense.pack(weight).cut(4)


# Quantized factors


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("experts", [0, 3])
def test_quantized_factors_are_near_and_have_the_bytes_predicted(method, experts, make_unit):
    weight, stats = make_unit(56, experts=experts)
    weights = {"a": weight.bfloat16(), "b": weight.flip(-1).bfloat16()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    sites = dict.fromkeys(weights, stats)
    whole = svd_llm.compress(weights, sites, svd_llm.Options(rank=16)).members
    previous = None
    for bits in (3, 5, 8):
        options = options_of(method)(bits=bits, group_size=8)
        assert factor_problem(shapes, 16, False, method, options) is None
        result = quantize_factors(method, whole, sites, options)
        assert list(result.members) == list(weights)
        size = sum(tensor.nbytes for tensor in result.members.values())
        assert size == factor_bytes(shapes, 16, False, torch.bfloat16, method, options)
        total = 0.0
        for name, tensor in result.members.items():
            assert tensor.format == "lowrank"
            assert {factor.format for factor in lowrank.factors(tensor)} == {"int_group"}
            delta = whole[name].dense().double() - tensor.dense().double()
            total += float(((delta @ stats["hessian"]) * delta).sum())
        assert previous is None or total < 0.4 * previous
        previous = total
    assert total < 1e-3 * float(((weight @ stats["hessian"]) * weight).sum())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_factors_make_up_for_a_rounded_shared_base(method, make_alike):
    weight, stats = make_alike()
    weights = {"w": weight.bfloat16()}
    shapes = {"w": tuple(weight.shape)}
    whole = run("delta_moe", weights["w"], stats, rank=16).members
    previous = None
    for bits in (3, 5, 8):
        options = options_of(method)(bits=bits, group_size=8)
        assert factor_problem(shapes, 16, True, method, options) is None
        bank = quantize_shared(method, weights, whole, {"w": stats}, options).members["w"]
        base, deltas = delta.members(bank)
        left, right = lowrank.factors(deltas)
        assert bank.format == "delta"
        assert {t.format for t in (base, left, right)} == {"int_group"}
        assert bank.nbytes == factor_bytes(shapes, 16, True, torch.bfloat16, method, options)
        # Had the same factors been rounded, the base's error would be there as a whole.
        exact = {"w": delta.members(whole["w"])[1]}
        same_factors = quantize_factors(method, exact, {"w": stats}, options)
        worse = delta.pack(base, same_factors.members["w"])
        total, kept = (
            sum(
                error(weight[e], tensor[e].dense(), hessian)
                for e, hessian in enumerate(stats["hessian"])
            )
            for tensor in (bank, worse)
        )
        assert total < kept
        assert previous is None or total < 0.4 * previous
        previous = total
    reason = factor_problem({"w": (4, OUT, 44)}, 8, True, method, options)
    assert reason is not None and "44" in reason


def test_left_factor_makes_up_for_the_rounded_right_one(make_unit, monkeypatch):
    weight, stats = make_unit(56)
    whole = {
        "w": svd_llm.compress(
            {"w": weight.float()}, {"w": stats}, svd_llm.Options(rank=16)
        ).members["w"]
    }
    options = gptq.Options(bits=3, group_size=8)
    fitted = quantize_factors("gptq", whole, {"w": stats}, options).members["w"].dense()

    def as_it_is(
        name: str, left: Tensor, right: Tensor, rounded: Tensor, stats: Stats
    ) -> tuple[Tensor, Stats]:
        return left, seen(name, left, right, rounded, stats)[1]

    seen = factors._seen_by_left
    monkeypatch.setattr(factors, "_seen_by_left", as_it_is)
    plain = quantize_factors("gptq", whole, {"w": stats}, options).members["w"].dense()
    exact = whole["w"].dense()
    assert error(exact, fitted, stats["hessian"]) < error(exact, plain, stats["hessian"])


def test_what_factors_cannot_have_is_told(make_unit):
    options = rtn.Options(group_size=16)
    reason = factor_problem({"w": (OUT, IN)}, 16, False, "rtn", options)
    assert reason is not None and "w (right factor)" in reason and "40" in reason
    reason = factor_problem({"w": (OUT, 48)}, 8, False, "rtn", options)
    assert reason is not None and "w (left factor)" in reason and "8" in reason
    weight, stats = make_unit()
    with pytest.raises(ValueError, match="w: the format is dense"):
        quantize_factors("rtn", {"w": dense.pack(weight)}, {"w": stats}, options)


def test_only_quantizers_that_need_no_more_than_the_hessian_round_factors():
    others = ("svd", "eora", "reap", "wanda", "sparse_lowrank")
    found = {name for name in ("rtn", "gptq", *others) if factors.is_quantizer(name)}
    assert found == {"rtn", "gptq"}
    assert {"svd", "asvd", "svd_llm"} <= set(FACTORING)
    assert not is_factoring("eora") and not is_factoring("gptq")
