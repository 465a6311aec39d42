"""Corrections straight after a merger: every old expert from its group's stand-in."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import residual
from moesaic.kernels.tensor import CompressedTensor
from moesaic.methods import chains, eora, svd
from moesaic.methods.base import Chain, Spec, Stats, compressing, merge_of, reducers, reducing
from moesaic.methods.reduction import ExpertLayer, Reduction, reducer_module
from moesaic.methods.stand_ins import mergers, stand_ins
from tests.methods.layers import make_layer

EXPERTS, HIDDEN, WIDTH = 8, 16, 12
MERGERS = {name: {"keep": 0.5} for name in mergers()} | {"sub_moe": {"keep": 0.5, "rank": 0.75}}


@pytest.fixture
def layer() -> ExpertLayer:
    return make_layer(EXPERTS, HIDDEN, WIDTH, dtype=torch.float64)


@pytest.fixture
def stats(make_stats) -> dict[str, Stats]:
    sites = {"in": make_stats(HIDDEN, EXPERTS), "mid": make_stats(WIDTH, EXPERTS, seed=1)}
    return {"gate": sites["in"], "up": sites["in"], "down": sites["mid"]}


def chain(name: str, rank: int, **options: object) -> Chain:
    merger = Spec.of(name, {**MERGERS.get(name, {}), **options})
    return merger, Spec.of("eora", {"rank": rank})


def merged(layer: ExpertLayer, of: Chain) -> tuple[Reduction, dict[str, CompressedTensor]]:
    """What the merger of a chain leaves, and that in the places of the old experts."""
    reduction = reducer_module(of[0].method).reduce(layer, of[0].parsed())
    group = torch.empty(EXPERTS, dtype=torch.int64)
    for number, old in enumerate(reduction.groups):
        group[list(old)] = number
    return reduction, stand_ins(reduction.weights, group, reduction.channels)


def error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """‖(W - Ŵ)x‖² summed over the tokens, of every expert."""
    change = weight.double() - other.double()
    return ((change @ hessian.double()) * change).sum((-1, -2))


def moved(expert: Tensor, channels: Tensor, name: str) -> Tensor:
    """An old expert's matrix with its intermediate channels where the merger put them."""
    return expert[:, channels] if name == "down" else expert[channels]


@pytest.mark.parametrize("name", mergers())
def test_stand_ins_are_the_merged_experts_with_channels_moved_back(
    name: str, layer: ExpertLayer
) -> None:
    reduction, bases = merged(layer, chain(name, 2))
    assert len(reduction.groups) == EXPERTS // 2
    for member, base in bases.items():
        assert base.shape == layer.weights[member].shape
        for number, group in enumerate(reduction.groups):
            for expert in group:
                own = base[expert].dense()
                if reduction.channels is not None:
                    own = moved(own, reduction.channels[expert], member)
                assert torch.equal(own, reduction.weights[member][number])
    if reduction.channels is not None:
        assert not torch.equal(reduction.channels, reduction.channels.sort(1).values)


@pytest.mark.parametrize("name", mergers())
def test_every_expert_is_reproduced_at_full_rank_and_nearer_with_every_rank(
    name: str, layer: ExpertLayer, stats: dict[str, Stats]
) -> None:
    _, bases = merged(layer, chain(name, WIDTH))
    before = {m: error(w, bases[m].dense(), stats[m]["hessian"]) for m, w in layer.weights.items()}
    for rank in (1, 2, 4, 8, WIDTH):
        of = chain(name, rank)
        result = chains.apply_link(of, layer.weights, bases, stats).members
        shapes = {m: tuple(w.shape) for m, w in layer.weights.items()}
        told = chains.predict_bytes(shapes, torch.float64, of, EXPERTS // 2)
        assert told == sum(tensor.nbytes for tensor in result.values())
        for member, weight in layer.weights.items():
            made, hessian = result[member], stats[member]["hessian"]
            own = error(weight, made.effective(), hessian)
            whole = error(weight, bases[member].dense(), hessian)
            rows = chains.cut_errors(weight, made, hessian, [0, rank]).sum(-1)
            near = {"rtol": 1e-6, "atol": 1e-9 * float(whole.max())}
            torch.testing.assert_close(rows, torch.stack([whole, own]), **near)
            assert (own <= before[member] * (1 + 1e-9)).all()
            before[member] = own
            # Never worse than plain SVD of what is left, in the norm of the expert's own inputs.
            rest = weight - bases[member].dense()
            plain = svd.compress({"w": rest}, {}, svd.Options(rank=rank)).members["w"]
            assert (own <= error(rest, plain.effective(), hessian) * (1 + 1e-9) + 1e-18).all()
            if rank == WIDTH:
                torch.testing.assert_close(made.dense(), weight, rtol=1e-12, atol=1e-12)


def test_smaller_ranks_are_cuts_and_experts_are_residuals(
    layer: ExpertLayer, stats: dict[str, Stats]
) -> None:
    _, bases = merged(layer, chain("m_smoe", 6))
    large = eora.repair(layer.weights, bases, stats, eora.Options(rank=6)).members
    small = eora.repair(layer.weights, bases, stats, eora.Options(rank=2)).members
    for member, made in small.items():
        cut = large[member].cut(2)
        assert dict(cut.params) == dict(made.params)
        assert all(torch.equal(part, made.parts[key]) for key, part in cut.parts.items())
        assert (made[3].format, made[3].shape) == ("residual", made.shape[1:])
        base, _ = residual.members(made[3])
        assert torch.equal(base.dense(), bases[member][3].dense())


@pytest.mark.parametrize("name", ["m_smoe", "hc_smoe"])
def test_a_merger_that_merges_nothing_leaves_nothing_to_correct(
    name: str, layer: ExpertLayer, stats: dict[str, Stats]
) -> None:
    of = chain(name, 2, keep=1.0)
    _, bases = merged(layer, of)
    result = chains.apply_link(of, layer.weights, bases, stats).members
    shapes = {m: tuple(w.shape) for m, w in layer.weights.items()}
    size = sum(tensor.nbytes for tensor in result.values())
    assert size == chains.predict_bytes(shapes, torch.float64, of, EXPERTS)
    assert all(torch.equal(result[m].dense(), weight) for m, weight in layer.weights.items())


def test_all_experts_stay_where_a_correction_follows_a_merger_at_once() -> None:
    gptq, correction = Spec.of("gptq"), Spec.of("eora", {"rank": 2})
    for name in reducers():
        merger = Spec.of(name)
        assert reducing((merger, gptq, correction)) == ((merger,), (gptq, correction))
        assert not merge_of((merger, gptq, correction))
        kept = (merger, correction)
        assert (reducing(kept), compressing(kept)) == (((), kept), (correction,))
        assert merge_of(kept) == (merger,)
        assert (chains.order_problem(kept) is None) == (name in mergers())
    kept = chain("hc_smoe", 2)
    assert chains.ties_experts(kept) and not chains.ties_experts((kept[0], gptq, correction))
    assert chains.for_banks(kept) == ["hc_smoe"]
    assert chains.needs(kept) == eora.NEEDS
    shapes = {"gate": (4, 12, 16)}
    assert (
        chains.misfit("linear", {"weight": (12, 16)}, kept) == "hc_smoe does not work on a linear"
    )
    assert chains.misfit("bank", shapes, kept) is None
    assert "rank 13 is above 12" in (chains.misfit("bank", shapes, chain("hc_smoe", 13)) or "")
