"""What GPTQ must do with banks, odd inputs and odd statistics."""

import itertools

import pytest
import torch
from torch import Tensor

from moesaic.methods import column_loop, gptq, rtn
from moesaic.methods.base import Result, Stats


def quantize(weight: Tensor, stats: Stats, **options: object) -> Result:
    return gptq.compress({"w": weight}, {"w": stats}, gptq.Options(**options))


def loss(weight: Tensor, result: Result, stats: Stats) -> float:
    error = (weight.float() - result.members["w"].dense().float()).double()
    return float(((error @ stats["hessian"].double()) * error).sum())


def one(stats: Stats, expert: int) -> Stats:
    return Stats({name: value[expert] for name, value in stats.sums.items()})


def same_bytes(a: Result, b: Result) -> bool:
    return a.members.keys() == b.members.keys() and all(
        torch.equal(part, b.members[name].parts[key])
        for name, member in a.members.items()
        for key, part in member.parts.items()
    )


ORDERS = [{}, {"static_groups": True}, {"act_order": True}]


@pytest.mark.parametrize("block_size", [1, 3, 16, 50, 1000])
@pytest.mark.parametrize("leaf", [1, 5, 16])
def test_block_sizes_change_nothing(make_weight, make_stats, monkeypatch, block_size, leaf):
    weight, stats = make_weight(6, 48), make_stats(48)
    whole = quantize(weight, stats, bits=3, group_size=12)
    monkeypatch.setattr(column_loop, "LEAF", leaf)
    assert same_bytes(whole, quantize(weight, stats, bits=3, group_size=12, block_size=block_size))


def test_identity_hessian_is_round_to_nearest(make_weight):
    weight = make_weight(9, 40)
    stats = Stats({"hessian": 17.0 * torch.eye(40), "tokens": torch.tensor(17)})
    for options in ({}, {"clip": "mse"}, {"symmetric": False, "act_order": True}):
        options = {"group_size": 8, "bits": 3, **options}
        nearest = {k: v for k, v in options.items() if k != "act_order"}
        expected = rtn.compress({"w": weight}, {}, rtn.Options(**nearest))
        assert same_bytes(quantize(weight, stats, **options), expected)


def test_exhaustive_search_is_never_beaten_and_gptq_lies_between(make_weight, make_stats):
    """All 4^5 code words of a row on the grid that per-channel GPTQ and RTN share."""
    totals = {"best": 0.0, "gptq": 0.0, "rtn": 0.0}
    for seed in range(12):
        weight = make_weight(3, 5, seed=seed, dtype=torch.float32)
        stats = make_stats(5, seed=seed)
        options = {"bits": 2, "group_size": -1}
        feedback = quantize(weight, stats, damp=1e-6, **options)
        nearest = rtn.compress({"w": weight}, {}, rtn.Options(**options))
        scale = nearest.members["w"].parts["weight_scale"].double()
        words = torch.tensor(list(itertools.product(range(-2, 2), repeat=5))).double()
        error = weight.double()[:, None] - words * scale[:, None]  # [out, words, in]
        best = float(((error @ stats["hessian"].double()) * error).sum(-1).amin(-1).sum())
        losses = loss(weight, feedback, stats), loss(weight, nearest, stats)
        assert best <= min(losses) * (1 + 1e-6)
        for name, value in zip(totals, (best, *losses), strict=True):
            totals[name] += value
    assert totals["best"] < totals["gptq"] < 0.8 * totals["rtn"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_beats_round_to_nearest_on_correlated_inputs(make_weight, make_stats, symmetric, clip):
    options = {"bits": 3, "group_size": 16, "symmetric": symmetric, "clip": clip}
    ratios = []
    for seed in range(5):
        weight, stats = make_weight(20, 64, seed=seed), make_stats(64, seed=seed)
        nearest = rtn.compress({"w": weight}, {}, rtn.Options(**options))
        ratios.append(loss(weight, quantize(weight, stats, **options), stats))
        ratios[-1] /= loss(weight, nearest, stats)
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("order", ORDERS, ids=["dynamic", "static", "act_order"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "weighted"])
@pytest.mark.parametrize("slice_bytes", [1, 120_000, 1 << 30])
def test_bank_equals_its_experts_one_by_one(
    make_weight, make_stats, monkeypatch, order, symmetric, clip, slice_bytes
):
    monkeypatch.setitem(gptq.WORK_BYTES, "cpu", slice_bytes)
    weight, stats = make_weight(5, 7, 36), make_stats(36, experts=5)
    options = {"bits": 3, "group_size": 12, "symmetric": symmetric, "clip": clip, **order}
    bank = quantize(weight, stats, **options).members["w"]
    for expert in range(5):
        alone = quantize(weight[expert], one(stats, expert), **options).members["w"]
        for name, part in alone.parts.items():
            assert torch.equal(bank[expert].parts[name], part), name


def test_members_of_one_site_share_one_factorisation(make_weight, make_stats, monkeypatch):
    calls = []
    original = gptq.factorise
    monkeypatch.setattr(gptq, "factorise", lambda *args: calls.append(args) or original(*args))
    weights = {
        "gate": make_weight(3, 9, 24),
        "up": make_weight(3, 5, 24, seed=1),
        "down": make_weight(3, 24, 9, seed=2),
    }
    read, inner = make_stats(24, experts=3), make_stats(9, experts=3)
    stats = {"gate": read, "up": read, "down": inner}
    options = gptq.Options(bits=3, group_size=-1, symmetric=False)
    together = gptq.compress(weights, stats, options)
    assert len(calls) == 2
    assert list(together.members) == ["gate", "up", "down"]
    gptq.compress(weights, stats, gptq.Options(bits=5, group_size=3))
    assert len(calls) == 2, "a second candidate must not factorise again"
    for name in weights:
        alone = gptq.compress({name: weights[name]}, {name: Stats(stats[name].sums)}, options)
        for key, part in alone.members[name].parts.items():
            assert torch.equal(together.members[name].parts[key], part), (name, key)


def test_factors_are_not_kept_when_large(make_weight, make_stats, monkeypatch):
    monkeypatch.setattr(gptq, "KEEP_BYTES", 100)
    stats = make_stats(24)
    kept = quantize(make_weight(4, 24), stats, group_size=8)
    assert stats.derived(("factor", 0.01, False, 0, 100), lambda: "nothing") == "nothing"
    monkeypatch.undo()
    assert same_bytes(kept, quantize(make_weight(4, 24), stats, group_size=8))


def test_expert_without_tokens_is_rounded_to_nearest_with_an_event(make_weight, make_stats):
    weight, stats = make_weight(4, 6, 20), make_stats(20, experts=4)
    stats["hessian"][2] = 0
    stats["tokens"][2] = 0
    result = quantize(weight, stats, bits=3, group_size=10)
    assert [(e.kind, e.value) for e in result.events] == [("no_tokens", 2)]
    assert "expert 2" in result.events[0].message and "0 tokens" in result.events[0].message
    nearest = rtn.compress({"w": weight[2]}, {}, rtn.Options(bits=3, group_size=10))
    for name, part in nearest.members["w"].parts.items():
        assert torch.equal(result.members["w"][2].parts[name], part)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_get_zero_weights_and_disturb_nothing(make_weight, make_stats, act_order):
    weight, stats = make_weight(6, 30), make_stats(30)
    dead, live = [4, 17, 29], [j for j in range(30) if j not in (4, 17, 29)]
    stats["hessian"][dead] = 0
    stats["hessian"][:, dead] = 0
    options = {"bits": 3, "group_size": -1, "act_order": act_order}
    result = quantize(weight, stats, **options)
    assert [(e.kind, e.value) for e in result.events] == [("dead_inputs", 3)]
    assert "3 of 30" in result.events[0].message
    dense = result.members["w"].dense()
    assert torch.equal(dense[:, dead], torch.zeros(6, 3, dtype=dense.dtype))
    small = Stats({"hessian": stats["hessian"][live][:, live], "tokens": stats["tokens"]})
    assert torch.equal(
        dense[:, live], quantize(weight[:, live], small, **options).members["w"].dense()
    )


@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_fewer_tokens_than_inputs_work_with_the_damping_asked_for(make_weight, make_stats, tokens):
    weight, stats = make_weight(6, 24), make_stats(24, tokens=tokens)
    result = quantize(weight, stats, bits=4, group_size=8)
    nearest = rtn.compress({"w": weight}, {}, rtn.Options(bits=4, group_size=8))
    assert result.events == []
    assert loss(weight, result, stats) < loss(weight, nearest, stats)


def test_damping_grows_with_an_event_when_the_hessian_is_indefinite(make_weight, make_stats):
    weight, stats = make_weight(3, 6, 20), make_stats(20, experts=3)
    broken = stats["hessian"][1]
    mean = float(broken.diagonal().mean())
    broken.fill_(1.05 * mean).diagonal().fill_(mean)  # smallest eigenvalue -0.05 mean
    result = quantize(weight, stats, bits=3, group_size=10)
    assert [e.kind for e in result.events] == ["damping_grew"]
    assert result.events[0].value == pytest.approx(0.1)
    assert "expert 1" in result.events[0].message and "0.01 to 0.1" in result.events[0].message
    expected = quantize(weight[1], one(stats, 1), bits=3, group_size=10, damp=0.1)
    assert expected.events == []
    for name, part in expected.members["w"].parts.items():
        assert torch.equal(result.members["w"][1].parts[name], part)
    untouched = quantize(weight[0], one(stats, 0), bits=3, group_size=10).members["w"]
    assert torch.equal(result.members["w"][0].dense(), untouched.dense())


def test_number_of_tokens_does_not_scale_the_damping(make_weight, make_stats):
    weight, stats = make_weight(6, 24), make_stats(24)
    more = Stats({"hessian": 1024 * stats["hessian"], "tokens": 1024 * stats["tokens"]})
    assert same_bytes(
        quantize(weight, stats, bits=3, group_size=8), quantize(weight, more, bits=3, group_size=8)
    )


def test_weighted_clip_helps_where_inputs_are_unequal(make_weight):
    weight = make_weight(40, 32)
    size = torch.logspace(-2, 1, 32)
    stats = Stats({"hessian": size.square().diag(), "tokens": torch.tensor(9)})
    plain = quantize(weight, stats, bits=2, group_size=-1, clip="mse")
    weighted = quantize(weight, stats, bits=2, group_size=-1, clip="weighted")
    assert loss(weight, weighted, stats) < 0.9 * loss(weight, plain, stats)


def test_act_order_implies_static_groups():
    assert gptq.Options(act_order=True) == gptq.Options(act_order=True, static_groups=True)
    assert gptq.Options(act_order=True).static_groups


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_raise_with_the_member_named(make_weight, make_stats, value):
    weight, stats = make_weight(6, 24), make_stats(24)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="^w: 1 of 144 weights are NaN or infinite"):
        quantize(weight, stats, group_size=8)
    stats["hessian"][2, 2] = value
    with pytest.raises(ValueError, match="^w: the Hessian has NaN or infinite"):
        quantize(make_weight(6, 24), stats, group_size=8)


def test_negative_diagonal_raises(make_weight, make_stats):
    stats = make_stats(24)
    stats["hessian"][2, 2] = -1
    with pytest.raises(ValueError, match="negative diagonal"):
        quantize(make_weight(6, 24), stats, group_size=8)
