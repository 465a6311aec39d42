"""MoDeGPT's cuts of an MLP and of an attention against brute force and real attentions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods import modegpt
from moesaic.methods.base import Spec, Stats
from moesaic.methods.parts import (
    Narrowed,
    Part,
    PartReduction,
    PartShape,
    cuts_parts,
    outline_part,
    whole,
)

HIDDEN, WIDTH, HEADS, KV_HEADS, SIZE = 24, 40, 6, 2, 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, width: int, seed: int) -> Tensor:
    """Correlated, of unequal size, float64."""
    return random(tokens, width, seed=seed).double() @ random(width, width, seed=seed + 1).double()


def stats(x: Tensor) -> Stats:
    return Stats(
        {
            "tokens": torch.tensor(len(x)),
            "hessian": (x.T @ x).float(),
            "abs": x.abs().sum(0).float(),
        }
    )


def mlp(tokens: int = 300, gate: bool = True) -> tuple[Part, Tensor]:
    """An MLP, and what its down projection reads, ``[tokens, width]``."""
    weights = {"up": random(WIDTH, HIDDEN, seed=1), "down": random(HIDDEN, WIDTH, seed=2)}
    if gate:
        weights["gate"] = random(WIDTH, HIDDEN, seed=3)
    x = inputs(tokens, HIDDEN, 4) / HIDDEN
    middle = x @ weights["up"].double().T
    middle = F.silu(x @ weights["gate"].double().T) * middle if gate else F.gelu(middle)
    shapes = {role: (weight.shape[0], weight.shape[1]) for role, weight in weights.items()}
    own = {role: stats(middle if role == "down" else x) for role in weights}
    return Part(PartShape("mlp", shapes), weights, {}, own), middle


def attention(
    tokens: int = 400, biases: bool = False, paired: bool = True
) -> tuple[Part, Tensor, Tensor]:
    """An attention, its inputs, and attended values ``[tokens, heads · size]`` of random
    attention patterns."""
    rows = {"query": HEADS * SIZE, "key": KV_HEADS * SIZE, "value": KV_HEADS * SIZE}
    weights = {role: random(out, HIDDEN, seed=i) for i, (role, out) in enumerate(rows.items())}
    weights["output"] = random(HIDDEN, HEADS * SIZE, seed=7)
    own = {role: random(out, seed=9 + i) for i, (role, out) in enumerate(rows.items())}
    x = inputs(tokens, HIDDEN, 4)
    values = x @ weights["value"].double().T + (own["value"].double() if biases else 0)
    per_head = values.view(tokens, KV_HEADS, 1, SIZE).expand(-1, -1, HEADS // KV_HEADS, -1)
    patterns = random(HEADS, tokens, tokens, seed=20).double().mul(2).softmax(-1)
    attended = torch.einsum("hst,thd->shd", patterns, per_head.reshape(tokens, HEADS, SIZE))
    shapes = {role: (weight.shape[0], weight.shape[1]) for role, weight in weights.items()}
    sites = {role: stats(x) for role in rows} | {"output": stats(attended.flatten(1))}
    shape = PartShape("attention", shapes, HEADS, KV_HEADS, paired)
    return Part(shape, weights, own if biases else {}, sites), x, attended.flatten(1)


def cut(part: Part, **options: Any) -> PartReduction:
    parsed = modegpt.Options(**options)
    reduction = modegpt.reduce_part(part, parsed)
    left = modegpt.outline_part(part.shape, parsed)
    assert {role: tuple(x.weight.shape) for role, x in reduction.linears.items()} == left
    for role, linear in reduction.linears.items():
        assert linear.weight.dtype == part.weights[role].dtype
        assert linear.error.shape == (len(part.weights[role]),)
        for value in vars(linear).values():
            assert value is None or value.isfinite().all()
    return reduction


def placed(linear: Narrowed, shape: tuple[int, ...]) -> Tensor:
    """The weight with zeros for what is gone, float64."""
    full = torch.zeros(shape, dtype=torch.float64)
    rows = torch.arange(shape[0]) if linear.rows is None else linear.rows
    columns = torch.arange(shape[1]) if linear.columns is None else linear.columns
    full[rows[:, None], columns] = linear.weight.double()
    return full


@pytest.mark.parametrize("gate", [True, False])
def test_mlp_errs_by_what_it_says(gate: bool) -> None:
    part, middle = mlp(gate=gate)
    errors = []
    for keep in (1.0, 0.8, 0.6, 0.4, 0.2):
        linears = cut(part, keep=keep, multiple=8).linears
        for role in part.weights.keys() - {"down"}:
            assert torch.equal(linears[role].weight, part.weights[role][linears["down"].columns])
            assert torch.equal(linears[role].rows, linears["down"].columns)  # type: ignore[arg-type]
        down = placed(linears["down"], (HIDDEN, WIDTH))
        change = middle @ (down - part.weights["down"].double()).T
        torch.testing.assert_close(
            linears["down"].error, change.square().sum(0), rtol=1e-3, atol=1e-6
        )
        errors.append(float(linears["down"].error.sum()))
    assert errors[0] == 0 and errors == sorted(errors)


def test_values_are_cut_as_the_best_product_of_that_rank_is() -> None:
    """The weighted error of every head's stacked W_O W_V against the optimum (Eckart-Young)."""
    part, x, _ = attention()
    linears = cut(part, keep=0.5, head_multiple=2).linears
    values, outputs = (
        placed(linears[role], tuple(part.weights[role].shape)) for role in ("value", "output")
    )
    root = torch.linalg.cholesky(x.T @ x)
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        own = slice(head * SIZE, (head + 1) * SIZE)
        stacks = []
        for weight in (part.weights["output"].double(), outputs):
            heads = weight.view(HIDDEN, HEADS, SIZE)[:, head * group : (head + 1) * group]
            stacks.append(heads.transpose(0, 1).reshape(-1, SIZE))
        before = stacks[0] @ part.weights["value"].double()[own] @ root
        after = stacks[1] @ values[own] @ root
        best = torch.linalg.svdvals(before)[SIZE // 2 :].square().sum()
        torch.testing.assert_close((after - before).square().sum(), best, rtol=1e-4, atol=0.0)
        plain_u, plain_s, plain_v = torch.linalg.svd(
            stacks[0] @ part.weights["value"].double()[own]
        )
        plain = (plain_u[:, : SIZE // 2] * plain_s[: SIZE // 2]) @ plain_v[: SIZE // 2] @ root
        assert (after - before).square().sum() <= (plain - before).square().sum()


@pytest.mark.parametrize("biases", [False, True])
def test_outputs_err_by_what_they_say(biases: bool) -> None:
    part, _, attended = attention(biases=biases)
    errors = []
    for keep in (1.0, 0.75, 0.5, 0.25):
        linear = cut(part, keep=keep, head_multiple=2).linears["output"]
        assert linear.inputs is not None and linear.columns is not None
        new = attended @ linear.inputs.T  # what the new values come to
        change = new @ linear.weight.double().T - attended @ part.weights["output"].double().T
        scale = float(attended.square().sum())  # the Hessian is float32
        torch.testing.assert_close(
            linear.error, change.square().sum(0), rtol=1e-3, atol=1e-7 * scale
        )
        errors.append(float(linear.error.sum()))
    assert errors == sorted(errors) and errors[0] < 1e-9 * errors[-1]


def test_new_values_are_the_old_ones_combined_and_so_are_biases_and_gradients() -> None:
    part, x, _ = attention(biases=True)
    linears = cut(part, keep=0.5, head_multiple=2).linears
    value, output = linears["value"], linears["output"]
    assert value.bias is not None and value.rows is not None
    assert value.slopes is not None and output.inputs is not None
    old = x @ part.weights["value"].double().T + part.biases["value"].double()
    new = x @ value.weight.double().T + value.bias.double()[value.rows]
    mixes = output.inputs.view(HEADS, SIZE // 2, HEADS, SIZE)
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        mix = mixes[head * group, :, head * group]
        torch.testing.assert_close(
            old[:, head * SIZE : (head + 1) * SIZE] @ mix.T,
            new[:, head * SIZE // 2 : (head + 1) * SIZE // 2],
            rtol=1e-4,
            atol=1e-4,
        )
        # A step of the new values is the shortest step of the old ones that amounts to it.
        own = value.slopes[head * SIZE // 2 : (head + 1) * SIZE // 2]
        own = own[:, head * SIZE : (head + 1) * SIZE]
        torch.testing.assert_close(own, torch.linalg.pinv(mix).T)
    gone = torch.ones(KV_HEADS * SIZE, dtype=torch.bool)
    gone[value.rows] = False
    assert not value.bias[gone].any()


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embeddings of ``[T, d]`` as Llama has them."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / 100 ** (torch.arange(half) / half)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin


def test_query_and_key_channels_go_in_pairs_and_the_largest_products_stay() -> None:
    part, x, _ = attention()
    reduction = cut(part, keep=0.5, head_multiple=2)
    query, key = reduction.linears["query"], reduction.linears["key"]
    assert query.rows is not None and key.rows is not None
    full = {role: x @ part.weights[role].double().T for role in ("query", "key")}
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        own = key.rows[(key.rows >= head * SIZE) & (key.rows < (head + 1) * SIZE)] - head * SIZE
        half = SIZE // 2
        assert set(own.tolist()) == {i for i in own.tolist() if i < half} | {
            i + half for i in own.tolist() if i < half
        }
        # The measure of a pair from real queries and keys.
        measure = []
        keys = full["key"][:, head * SIZE : (head + 1) * SIZE]
        for pair in range(half):
            columns = [pair, pair + half]
            energy = sum(
                full["query"][:, h * SIZE : (h + 1) * SIZE][:, columns].square().sum()
                for h in range(head * group, (head + 1) * group)
            )
            measure.append(float(energy * keys[:, columns].square().sum()))
        best = sorted(range(half), key=lambda pair: -measure[pair])[: half // 2]
        assert sorted(i for i in own.tolist() if i < half) == sorted(best)
        for h in range(head * group, (head + 1) * group):
            mine = query.rows[(query.rows >= h * SIZE) & (query.rows < (h + 1) * SIZE)] - h * SIZE
            assert torch.equal(mine, own)
    # With zeros for the channels that went, scores are sums over the pairs that stay.
    positions = torch.arange(20)
    queries = placed(query, tuple(part.weights["query"].shape))[:SIZE]
    keys = placed(key, tuple(part.weights["key"].shape))[:SIZE]
    q, k = (rotated(x[:20] @ w.T, positions) for w in (queries, keys))
    whole_q, whole_k = (
        rotated(x[:20] @ part.weights[role].double()[:SIZE].T, positions)
        for role in ("query", "key")
    )
    kept = key.rows[key.rows < SIZE]
    torch.testing.assert_close(q @ k.T, whole_q[:, kept] @ whole_k[:, kept].T)
    lost = full["query"].square().sum(0)
    lost[query.rows] = 0
    torch.testing.assert_close(query.error, lost, rtol=1e-3, atol=1e-3)
    assert not key.error.any()


def test_keys_are_charged_for_what_large_biases_of_queries_have_of_them() -> None:
    """What a cut does to row-centred scores, as softmax sees them, is charged as nearly as that."""
    part, x, _ = attention(biases=True)
    part.weights["query"].mul_(0.01)
    part.biases["query"].fill_(3.0)
    linears = cut(part, keep=0.5, head_multiple=2).linears
    rows = linears["key"].rows
    assert rows is not None
    keys = x @ part.weights["key"].double().T
    gone = torch.ones(KV_HEADS * SIZE, dtype=torch.bool)
    gone[rows] = False
    energy = keys.square().sum(0)
    torch.testing.assert_close(
        linears["key"].error[gone], energy[gone], rtol=0.05, atol=0.05 * float(energy.max())
    )
    assert not linears["key"].error[rows].any()
    assert linears["query"].error.sum() < 0.01 * linears["key"].error.sum()


def test_queries_stay_where_something_looks_at_single_channels() -> None:
    part, _, _ = attention(paired=False)
    reduction = cut(part, keep=0.5, head_multiple=2)
    for role in ("query", "key"):
        assert reduction.linears[role].rows is None
        assert torch.equal(reduction.linears[role].weight, part.weights[role])
    assert [event.kind for event in reduction.events] == ["queries_kept"]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_give_finite_results_and_an_event(tokens: int) -> None:
    for part in (mlp(tokens)[0], attention(tokens)[0]):
        reduction = cut(part, keep=0.5, multiple=4, head_multiple=4)
        assert "few_tokens" in [event.kind for event in reduction.events]
    exact = cut(attention(tokens)[0], keep=1.0).linears["output"]
    original = attention(tokens)[0].weights["output"].double()
    assert exact.inputs is not None
    torch.testing.assert_close(exact.weight.double() @ exact.inputs, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(wrong: float) -> None:
    for make, role in ((mlp, "up"), (mlp, "down"), (attention, "key"), (attention, "output")):
        part = make()[0]
        part.weights[role][1, 2] = wrong
        with pytest.raises(ValueError, match=f"^{role}: 1 of"):
            cut(part, keep=0.5, multiple=4, head_multiple=4)
        part = make()[0]
        for name in ("down", "value"):
            if name in part.stats:
                part.stats[name].sums["hessian"] = part.stats[name]["hessian"] * wrong
                with pytest.raises(ValueError, match=f"^{name}: the Hessian"):
                    cut(part, keep=0.5, multiple=4, head_multiple=4)


def test_silent_channels_are_the_first_to_go() -> None:
    part, middle = mlp()
    middle[:, 8:24] = 0
    part.stats["down"].sums["hessian"] = (middle.T @ middle).float()
    linears = cut(part, keep=0.6, multiple=8).linears
    assert linears["down"].error.sum() == 0
    assert not set(range(8, 24)) & set(linears["down"].columns.tolist())  # type: ignore[union-attr]


def test_statistics_of_what_is_left() -> None:
    part, middle = mlp()
    down = cut(part, keep=0.6, multiple=8).linears["down"]
    narrow = down.narrow_inputs(part.stats["down"])
    expected = stats(middle[:, down.columns])
    for name, value in expected.sums.items():
        torch.testing.assert_close(narrow[name], value)
    part, _, attended = attention()
    output = cut(part, keep=0.5, head_multiple=2).linears["output"]
    assert output.inputs is not None
    narrow = output.narrow_inputs(part.stats["output"])
    expected = stats(attended @ output.inputs.T)
    torch.testing.assert_close(narrow["hessian"], expected["hessian"], rtol=1e-3, atol=1e-2)
    assert bool((narrow["abs"] >= expected["abs"] * (1 - 1e-3)).all())
    assert whole(part.weights["key"]).narrow_inputs(part.stats["key"]) is part.stats["key"]


def test_gradients_of_what_is_left() -> None:
    part, _, _ = attention()
    linears = cut(part, keep=0.5, head_multiple=2).linears
    own = Stats({"grad_sq": torch.rand(HEADS * SIZE), "fisher": torch.rand(HIDDEN)})
    query = linears["query"].narrow_gradients(own)
    assert torch.equal(query["grad_sq"], own["grad_sq"][linears["query"].rows])
    assert torch.equal(query["fisher"], own["fisher"])
    values = Stats({"grad_sq": torch.ones(KV_HEADS * SIZE)})
    slopes = linears["value"].slopes
    assert slopes is not None
    torch.testing.assert_close(
        linears["value"].narrow_gradients(values)["grad_sq"].double(), slopes.square().sum(1)
    )
    both = Stats({"fisher": torch.rand(HEADS * SIZE), "grad_sq": torch.ones(HIDDEN)})
    assert set(linears["output"].narrow_gradients(both).sums) == {"grad_sq"}


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ("mlp", {"keep": 0.01}, "keep: 0.01 of 40 channels is none, in steps of 8"),
        ("attention", {"keep": 0.05}, "keep: 0.05 of 8 channels is none, in steps of 8"),
        ("attention", {"keep": 0.4, "head_multiple": 3}, "odd number: give an even"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(
    shape: str, options: dict[str, Any], reason: str
) -> None:
    part = mlp()[0] if shape == "mlp" else attention()[0]
    with pytest.raises(ValueError, match=reason):
        outline_part(part.shape, (Spec.of("modegpt", options),))


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_impossible_shares_are_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        Spec.of("modegpt", {"keep": keep})


def test_reducers_of_experts_cut_no_dense_part() -> None:
    assert cuts_parts("modegpt") == {"mlp", "attention"} and not cuts_parts("slim")
    with pytest.raises(ValueError, match="slim does not work on an mlp"):
        outline_part(mlp()[0].shape, (Spec.of("slim", {}),))
