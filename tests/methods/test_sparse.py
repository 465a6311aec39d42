"""Sparse weights, alone and with low rank: what is kept, and that it comes ever nearer."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moesaic.kernels import residual
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods import eora, sparse_lowrank, svd_llm, wanda
from moesaic.methods.base import Stats, is_ranked
from moesaic.methods.factors import quantize_factors
from moesaic.methods.low_rank import eigen_root
from moesaic.methods.sparsity import SparseOptions, largest

OUT, IN, RANK, DENSITY = 48, 60, 5, 0.15


@pytest.fixture
def make_unit(make_stats):
    """A weight of low rank, noise and a few large entries, float64, and its inputs' statistics."""

    def make(
        out: int = OUT, inputs: int = IN, experts: int = 0, tokens: int = 600
    ) -> tuple[Tensor, Stats]:
        generator = torch.Generator().manual_seed(7)
        batch = (experts,) if experts else ()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

        smooth = normal(out, 4) @ normal(4, inputs) / 2 + 0.3 * normal(out, inputs)
        spikes = torch.rand(*batch, out, inputs, generator=generator) < 0.04
        return smooth + 5 * spikes * normal(out, inputs), make_stats(inputs, experts, tokens)

    return make


def error(weight: Tensor, tensor: CompressedTensor, stats: Stats) -> float:
    delta = weight.double() - tensor.effective().double()
    return float(((delta @ stats["hessian"].double()) * delta).sum())


def mask_of(tensor: CompressedTensor) -> Tensor:
    return tensor.dense() != 0


# Wanda


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.97])
def test_wanda_keeps_the_largest_scores_of_each_row_as_they_are(experts, density, make_unit):
    weight, stats = make_unit(experts=experts)
    weight = weight.bfloat16()
    options = wanda.Options(density=density)
    tensor = wanda.compress({"w": weight}, {"w": stats}, options).members["w"]
    norms = stats["hessian"].diagonal(dim1=-2, dim2=-1).double().sqrt()[..., None, :]
    score, mask = weight.double().abs() * norms, mask_of(tensor)
    assert (mask.sum(-1) == math.floor(density * IN)).all()
    assert torch.equal(tensor.dense(), weight * mask)
    least = score.where(mask, math.inf).amin(-1)
    assert (score.where(~mask, 0).amax(-1) <= least).all()


@pytest.mark.parametrize(("kept", "block"), [(2, 4), (1, 3), (6, 10)])
def test_wanda_keeps_n_of_m(kept, block, make_unit):
    weight, stats = make_unit(experts=2)
    options = wanda.Options(density=kept / block, block=block)
    tensor = wanda.compress({"w": weight}, {"w": stats}, options).members["w"]
    blocks = mask_of(tensor).view(2, OUT, -1, block)
    assert (blocks.sum(-1) == kept).all()
    assert tensor.nbytes == wanda.predict_bytes({"w": weight.shape}, weight.dtype, options)


def test_equal_scores_are_taken_in_order():
    score = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0], [0.0] * 6])
    mask = largest(score, SparseOptions(density=4 / 6))
    assert mask.int().tolist() == [[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]]


def test_inputs_never_seen_are_the_first_to_go(make_unit):
    weight, stats = make_unit()
    dead = torch.arange(IN) % 3 == 0
    stats.sums["hessian"][dead] = 0
    stats.sums["hessian"][:, dead] = 0
    for density in (0.5, 0.9):
        options = wanda.Options(density=density)
        tensor = wanda.compress({"w": weight}, {"w": stats}, options).members["w"]
        count = max(0, round(density * IN) - int((~dead).sum()))
        assert (mask_of(tensor)[:, dead].sum(-1) == count).all()


def test_experts_without_tokens_keep_the_largest_weights(make_unit):
    weight, stats = make_unit(experts=3)
    stats.sums["hessian"][1] = 0
    stats.sums["tokens"][1] = 0
    result = wanda.compress({"w": weight}, {"w": stats}, wanda.Options(density=0.3))
    assert [(event.kind, event.value) for event in result.events] == [("no_tokens", 1)]
    expected = largest(weight[1].abs(), wanda.Options(density=0.3))
    assert torch.equal(mask_of(result.members["w"])[1], expected)


def test_eora_repairs_what_wanda_dropped(make_unit):
    weight, stats = make_unit(experts=2)
    pruned = wanda.compress({"w": weight}, {"w": stats}, wanda.Options(density=0.3)).members
    options = eora.Options(rank=RANK)
    repaired = eora.repair({"w": weight}, pruned, {"w": stats}, options).members["w"]
    base, _ = residual.members(repaired)
    assert base.format == "sparse"
    for expert in range(2):
        one = Stats({key: value[expert] for key, value in stats.sums.items()})
        before = error(weight[expert], pruned["w"][expert], one)
        assert error(weight[expert], repaired[expert], one) < 0.5 * before


def test_factors_can_be_pruned_too(make_unit):
    weight, stats = make_unit(56)
    weight = weight.float()
    whole = svd_llm.compress({"w": weight}, {"w": stats}, svd_llm.Options(rank=20)).members
    errors = []
    for density in (0.3, 0.6, 1.0):
        options = wanda.Options(density=density)
        pruned = quantize_factors("wanda", whole, {"w": stats}, options).members["w"]
        errors.append(error(weight, pruned, stats))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(error(weight, whole["w"], stats), rel=1e-4)


# Sparse and low rank


def sparse_plus(weight: Tensor, stats: Stats, **options: object) -> CompressedTensor:
    chosen = sparse_lowrank.Options(**{"density": DENSITY, "rank": RANK, **options})
    return sparse_lowrank.compress({"w": weight}, {"w": stats}, chosen).members["w"]


@pytest.mark.parametrize(("out", "inputs"), [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("block", [-1, 6])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_error_never_rises_and_falls_below_either_alone(
    out, inputs, block, plain, dtype, tolerance, make_unit
):
    weight, stats = make_unit(out, inputs)
    weight = weight.to(dtype)
    transform = None if plain else eigen_root(stats, 0).transform
    options = sparse_lowrank.Options(density=1 / 6, block=block, steps=12)
    found = sparse_lowrank.split(weight, transform, RANK, options)
    assert len(found.errors) > 5
    for more, less in itertools.pairwise(found.errors):
        assert less <= more * (1 + tolerance)
    assert found.errors[-1] < 0.25 * found.errors[0]
    delta = weight - found.sparse - found.left @ found.right
    seen = delta if transform is None else delta @ transform
    assert found.errors[-1] == pytest.approx(float(seen.square().sum()), rel=1e3 * tolerance)
    assert found.sparse.dtype == dtype and found.left.dtype == torch.float64
    assert found.left.shape == (out, RANK) and found.right.shape == (RANK, inputs)
    blocks = found.mask.view(out, -1, inputs if block == -1 else block)
    assert (blocks.sum(-1) == blocks.shape[-1] // 6).all()
    assert not found.sparse[~found.mask].any()


def test_fit_tends_to_least_squares_on_the_supports(make_unit, monkeypatch):
    """With many steps and the supports held fast: the normal equations, row by row."""
    weight, stats = make_unit()
    gram = stats["hessian"].double()
    mask = largest(weight.abs(), SparseOptions(density=0.3))
    monkeypatch.setattr(sparse_lowrank, "_FIT_STEPS", 100)
    rows = sparse_lowrank._Rows(weight, gram, torch.zeros_like(weight), mask)
    rows.fit()
    for row, kept, found in zip(weight, mask, rows.sparse, strict=True):
        best = torch.linalg.solve(gram[kept][:, kept], (gram @ row)[kept])
        torch.testing.assert_close(found[kept], best, rtol=1e-6, atol=1e-8)
    assert rows.error == pytest.approx(
        float((((weight - rows.sparse) @ gram) * (weight - rows.sparse)).sum()), rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearer_than_wanda_and_svd_llm_at_the_same_bytes(dtype, make_unit):
    weight, stats = make_unit()
    weight = weight.to(dtype)
    both = sparse_plus(weight, stats)
    per_row = both.nbytes / OUT - math.ceil(IN / 8)
    options = wanda.Options(density=math.ceil(per_row / dtype.itemsize) / IN)
    pruned = wanda.compress({"w": weight}, {"w": stats}, options).members["w"]
    rank = math.ceil(both.nbytes / dtype.itemsize / (OUT + IN))
    factors = svd_llm.compress({"w": weight}, {"w": stats}, svd_llm.Options(rank=rank))
    others = [pruned, factors.members["w"]]
    assert all(both.nbytes <= other.nbytes < 1.15 * both.nbytes for other in others)
    assert error(weight, both, stats) < 0.5 * min(error(weight, t, stats) for t in others)


def test_nearer_than_the_chain_of_the_same_parts(make_unit):
    weight, stats = make_unit()
    both = sparse_plus(weight, stats)
    pruned = wanda.compress({"w": weight}, {"w": stats}, wanda.Options(density=DENSITY)).members
    chain = eora.repair({"w": weight}, pruned, {"w": stats}, eora.Options(rank=RANK)).members["w"]
    assert both.nbytes == chain.nbytes
    assert error(weight, both, stats) < 0.7 * error(weight, chain, stats)


def test_more_steps_are_nearer(make_unit):
    weight, stats = make_unit()
    errors = [error(weight, sparse_plus(weight, stats, steps=n), stats) for n in (1, 3, 10)]
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]


def test_larger_ranks_and_densities_are_nearer(make_unit):
    weight, stats = make_unit()
    for name, steps in (("rank", (1, 4, 8, 14, 22)), ("density", (0.02, 0.1, 0.25, 0.5, 0.8))):
        errors = [error(weight, sparse_plus(weight, stats, **{name: n}), stats) for n in steps]
        assert all(less < 0.9 * more for more, less in itertools.pairwise(errors))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e34])
def test_how_large_the_inputs_are_changes_nothing(size, make_unit):
    """Fitted in float32, whose range the sums over tokens may come near to."""
    weight, stats = make_unit()
    weight = weight.float()
    scaled = Stats({**stats.sums, "hessian": stats["hessian"] * size})
    found, wanted = sparse_plus(weight, scaled), sparse_plus(weight, stats)
    assert found.dense().isfinite().all()
    assert error(weight, found, stats) == pytest.approx(error(weight, wanted, stats), rel=1e-2)


def test_damping_generalises_where_tokens_are_few(make_unit):
    """Errors on all the inputs, when both are chosen for a few of them."""
    weight, stats = make_unit()
    few = Stats({"hessian": 0 * stats["hessian"], "tokens": torch.tensor(IN // 2)})
    values, vectors = torch.linalg.eigh(stats["hessian"])
    draw = torch.randn(IN // 2, IN, generator=torch.Generator().manual_seed(3))
    inputs = draw * values.clamp(min=0).sqrt() @ vectors.T
    few.sums["hessian"] += inputs.T @ inputs
    damped, bare = (error(weight, sparse_plus(weight, few, damp=d), stats) for d in (0.3, 0))
    assert damped < 0.7 * bare


@pytest.mark.parametrize("options", [{"density": 1.0}, {"rank": min(OUT, IN)}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_full_density_or_full_rank_is_the_weight(options, dtype, make_unit):
    weight, stats = make_unit()
    weight = weight.to(dtype)
    again = sparse_plus(weight, stats, **options).dense()
    assert again.dtype == dtype
    assert (again - weight).norm() < 8 * torch.finfo(dtype).eps * weight.norm()


def test_expert_of_a_bank_equals_the_expert_alone(make_unit):
    weight, stats = make_unit(experts=3)
    bank = sparse_plus(weight.bfloat16(), stats)
    for expert in range(3):
        one = Stats({key: value[expert] for key, value in stats.sums.items()})
        alone = sparse_plus(weight[expert].bfloat16(), one)
        assert bank[expert].parts.keys() == alone.parts.keys()
        for key, part in alone.parts.items():
            assert torch.equal(bank[expert].parts[key], part), key


def test_result_is_a_residual_that_is_not_cut_to_smaller_ranks(make_unit):
    weight, stats = make_unit()
    tensor = sparse_plus(weight.half(), stats)
    base, correction = residual.members(tensor)
    assert (tensor.format, base.format, correction.format) == ("residual", "sparse", "lowrank")
    assert not is_ranked("sparse_lowrank")


# Both


@pytest.mark.parametrize("module", [wanda, sparse_lowrank])
def test_bytes_are_predicted_for_odd_widths_shares_and_blocks(module, make_unit):
    weight, stats = make_unit(11, 35, experts=2)
    weight, shapes = weight.half(), {"w": (2, 11, 35)}
    for density, block in [(0.01, -1), (0.3, -1), (0.3, 5), (4 / 7, 7), (0.95, -1), (1.0, 35)]:
        options = module.Options(density=density, block=block)
        result = module.compress({"w": weight}, {"w": stats}, options)
        tensor = result.members["w"]
        assert module.predict_bytes(shapes, torch.float16, options) == tensor.nbytes
        grows = tensor.nbytes > 2 * weight.numel()
        assert grows == any(event.kind == "above_break_even" for event in result.events)


@pytest.mark.parametrize("module", [wanda, sparse_lowrank])
def test_blocks_and_ranks_that_do_not_fit_are_told(module, make_unit):
    weight, stats = make_unit()
    cases = [{"block": 7}] + [{"rank": rank} for rank in (0, OUT + 1)] * (module is sparse_lowrank)
    for case in cases:
        options = module.Options(**case)
        reason = module.problem({"w": (OUT, IN)}, options)
        assert reason and "w" in reason and str(next(iter(case.values()))) in reason
        with pytest.raises(ValueError, match="w: "):
            module.compress({"w": weight}, {"w": stats}, options)
    for wrong in ({"density": 0.0}, {"density": 1.1}, {"block": 0}, {"block": -2}):
        with pytest.raises(ValidationError):
            module.Options(**wrong)


@pytest.mark.parametrize("module", [wanda, sparse_lowrank])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(module, wrong, make_unit):
    weight, stats = make_unit()
    hessian = stats["hessian"].clone()
    hessian[1, 1] = wrong
    broken = Stats({**stats.sums, "hessian": hessian})
    with pytest.raises(ValueError, match="^w: the Hessian"):
        module.compress({"w": weight}, {"w": broken}, module.Options())
    weight[1, 2] = wrong
    with pytest.raises(ValueError, match="^w: 1 of"):
        module.compress({"w": weight}, {"w": stats}, module.Options())
