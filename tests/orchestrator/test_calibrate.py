"""Calibration's sums against the whole model in transformers, and whatever interrupts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.orchestrator import calibrate, gradients, sums
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.statistics import BLOCK, SiteStats, load_stats, ranges
from moesaic.orchestrator.store import Store, digest, remove_scratch
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk, hidden_path
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.projects import VOCABULARY, make_model_folder

SEQUENCES, LENGTH, SHARDS = 7, 9, 5
# Sums in float32 over 63 tokens, in another order than the reference's.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe"), dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


@pytest.fixture
def walk(folder: Path, ids: Tensor, tmp_path: Path) -> Walk:
    save_file({"ids": ids.int()}, tmp_path / "ids.safetensors")
    return Walk(
        model=str(folder),
        dtype="float32",
        trust_remote_code=False,
        fingerprint="of the model",
        ids=str(tmp_path / "ids.safetensors"),
        ids_digest=digest(ids.tolist()),
        sequences=SEQUENCES,
        shards=SHARDS,
        batch=3,
        needs=("abs", "hessian", "tokens"),
        experts="routed",
        gradients=0,
        seed=11,
        store=str(tmp_path / "store"),
    )


BLOCKS = 2


def forward(walk: Walk, workers: int = 1) -> list[WorkerState]:
    """The whole forward pass; the workers' states after it."""
    states = [WorkerState(1) for _ in ranges(walk.shards, workers)]
    for block in range(BLOCKS):
        for state, span in zip(states, ranges(walk.shards, workers), strict=True):
            calibrate.forward(state, asdict(walk), block, span)
        sums.reduce(WorkerState(1), asdict(walk), "stats", block)
    return states


def reverse(walk: Walk, workers: int = 1) -> None:
    states = [WorkerState(1) for _ in ranges(walk.shards, workers)]
    for block in reversed(range(BLOCKS)):
        for state, span in zip(states, ranges(walk.shards, workers), strict=True):
            gradients.reverse(state, asdict(walk), block, span)
        sums.reduce(WorkerState(1), asdict(walk), "gradients", block)


def stats_of(walk: Walk, block: int, what: str = "stats") -> SiteStats:
    key = walk.stats_key(block) if what == "stats" else walk.gradients_key(block)
    entry = Store(Path(walk.store)).get(what, key)
    assert entry is not None
    return load_stats(entry.path)


def entries(walk: Walk, what: str) -> dict[str, bytes]:
    """Name → bytes of every entry of a kind."""
    return {p.name: p.read_bytes() for p in Path(walk.store).glob(f"{what}/*/*.safetensors")}


def full_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


class Experts:
    """An independent copy of the experts' mathematics that keeps what goes in and comes out."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.inputs: dict[tuple[str, int], list[Tensor]] = {}
        self.outputs: dict[tuple[str, int], list[Tensor]] = {}
        self.everything: list[Tensor] = []

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.everything.append(hidden.detach())
        width = self.module.gate_up_proj.shape[1] // 2
        rows = []
        for token, x in enumerate(hidden):
            total = torch.zeros_like(x)
            for choice, expert in enumerate(index[token].tolist()):
                gate = self.module.gate_up_proj[expert, :width] @ x
                up = self.module.gate_up_proj[expert, width:] @ x
                middle = nn.functional.silu(gate) * up
                down = self.module.down_proj[expert] @ middle
                total = total + weights[token, choice] * down
                for member, value in (("gate", x), ("down", middle)):
                    self.inputs.setdefault((member, expert), []).append(value.detach())
                for member, value in (("gate", gate), ("up", up), ("down", down)):
                    if value.requires_grad:
                        value.retain_grad()
                    self.outputs.setdefault((member, expert), []).append(value)
            rows.append(total)
        return torch.stack(rows)


@contextmanager
def watched(model: Any) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, Any], list[Experts]]]:
    """Inputs and outputs of every linear by name, and the experts of every block."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Any] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: Any, args: Any, y: Tensor, name: str = name) -> None:
                inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2))
                if y.requires_grad:
                    y.retain_grad()
                outputs.setdefault(name, []).append(y)

            hooks.append(module.register_forward_hook(hook))
    experts = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            experts.append(Experts(layer.mlp.experts))
            layer.mlp.experts.forward = experts[-1]
    yield inputs, outputs, experts
    for handle in hooks:
        handle.remove()


def test_sums_are_those_of_the_whole_model_in_transformers(
    walk: Walk, folder: Path, ids: Tensor
) -> None:
    forward(walk)
    model = full_model(folder)
    with torch.no_grad(), watched(model) as (inputs, _, experts):
        model(ids)
    units = StreamedModel(Checkpoint(folder)).units()
    assert {unit.kind for unit in units} == {"linear", "bank"}
    for unit in units:
        stats = stats_of(walk, unit.block)
        for member, site in unit.sites.items():
            if unit.kind == "linear":
                seen = [torch.cat(inputs[unit.name]).double()]
                sums = {name: value[None] for name, value in stats[site].sums.items()}
            else:
                own = experts[unit.block].inputs
                read = "down" if member == "down" else "gate"
                width = unit.shapes[member][-1]
                seen = [
                    torch.stack(own[read, e]).double()
                    if (read, e) in own
                    else torch.zeros(0, width)
                    for e in range(unit.shapes[member][0])
                ]
                sums = stats[site].sums
            assert sums["tokens"].tolist() == [len(x) for x in seen]
            for index, x in enumerate(seen):
                x = x.double()
                assert torch.allclose(sums["hessian"][index].double(), x.T @ x, **CLOSE)
                assert torch.allclose(sums["abs"][index].double(), x.abs().sum(0), **CLOSE)


def test_influence_of_a_block_is_that_of_the_whole_model_in_transformers(
    walk: Walk, folder: Path, ids: Tensor
) -> None:
    forward(walk)
    model = full_model(folder)
    turns: list[float] = []

    def hook(_: Any, args: Any, y: Any) -> None:
        x, y = args[0].double(), (y if isinstance(y, Tensor) else y[0]).double()
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        turns.append(float((1 - cosine).sum()))

    for layer in model.model.layers:
        layer.register_forward_hook(hook)
    with torch.no_grad():
        model(ids)
    assert len(turns) == BLOCKS and min(turns) > 0
    for block, turn in enumerate(turns):
        sums = stats_of(walk, block)[BLOCK]
        assert int(sums["tokens"]) == SEQUENCES * LENGTH
        assert float(sums["turn"]) == pytest.approx(turn, rel=1e-4)


def test_all_tokens_teach_every_expert_when_the_recipe_says_so(
    walk: Walk, folder: Path, ids: Tensor
) -> None:
    routed, everyone = walk, replace(walk, experts="all")
    forward(routed)
    forward(everyone)
    model = full_model(folder)
    with torch.no_grad(), watched(model) as (_, __, experts):
        model(ids)
    bank = next(u for u in StreamedModel(Checkpoint(folder)).units() if u.kind == "bank")
    every, some = stats_of(everyone, bank.block), stats_of(routed, bank.block)
    x = torch.cat(experts[bank.block].everything).double()
    site = every[bank.sites["gate"]]
    count = bank.shapes["gate"][0]
    assert site["tokens"].tolist() == [SEQUENCES * LENGTH] * count
    assert torch.allclose(site["hessian"].double(), (x.T @ x).expand(count, -1, -1), **CLOSE)
    # Who was really chosen is counted the same, whoever learns.
    assert torch.equal(site["routed"], some[bank.sites["gate"]]["routed"])
    assert torch.equal(site["routed"], some[bank.sites["gate"]]["tokens"])
    assert int(site["routed"].sum()) == SEQUENCES * LENGTH * 2
    # The last expert's down projection, from the formula.
    module = model.model.layers[bank.block].mlp.experts
    gate, up = module.gate_up_proj[-1].detach().double().chunk(2)
    middle = nn.functional.silu(x @ gate.T) * (x @ up.T)
    down = every[bank.sites["down"]]["hessian"][-1].double()
    assert torch.allclose(down, middle.T @ middle, **CLOSE)
    assert routed.stats_key(0) != everyone.stats_key(0)


def test_gradients_are_those_of_autograd_through_the_whole_model(
    walk: Walk, folder: Path, ids: Tensor
) -> None:
    walk = replace(walk, gradients=1)
    forward(walk)
    reverse(walk)
    model = full_model(folder)
    rows = [walk.shard_rows(shard)[0] for shard in range(SHARDS)]
    with watched(model) as (_, outputs, experts):
        for shard, row in enumerate(rows):
            logits = model(ids[row : row + 1]).logits[0].float()
            generator = torch.Generator().manual_seed(walk.seed * 1_000_003 + shard)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    checked = 0
    for unit in StreamedModel(Checkpoint(folder)).units():
        sums = stats_of(walk, unit.block, "gradients")
        for member, shape in unit.shapes.items():
            own = sums[f"{unit.name}|{member}"]
            if unit.kind == "linear":
                wanted = torch.cat([y.grad.flatten(0, -2) for y in outputs[unit.name]])
                assert int(own["grad_tokens"]) == len(wanted) == SHARDS * LENGTH
                pairs = [(own["grad_sq"], wanted)]
            else:
                found = experts[unit.block].outputs
                seen = {e: found[member, e] for e in range(shape[0]) if (member, e) in found}
                assert own["grad_tokens"].tolist() == [
                    len(seen.get(e, [])) for e in range(shape[0])
                ]
                pairs = [
                    (own["grad_sq"][e], torch.stack([y.grad for y in ys])) for e, ys in seen.items()
                ]
            for sums_of_squares, seen_gradients in pairs:
                reference = seen_gradients.double().square().sum(0)
                assert reference.abs().max() > 0
                assert torch.allclose(
                    sums_of_squares.double(), reference, rtol=1e-3, atol=1e-6 * reference.max()
                )
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_writes_the_same_files(
    walk: Walk, tmp_path: Path, workers: int
) -> None:
    walk = replace(walk, gradients=1)
    other = replace(walk, store=str(tmp_path / "other"))
    for one, count in ((walk, 1), (other, workers)):
        forward(one, count)
        reverse(one, count)
    for what in ("stats", "gradients"):
        assert len(entries(walk, what)) == BLOCKS
        assert entries(walk, what) == entries(other, what)


def test_a_worker_goes_on_where_another_one_died(walk: Walk, tmp_path: Path) -> None:
    undisturbed = replace(walk, store=str(tmp_path / "other"))
    forward(undisturbed)
    spans = ranges(SHARDS, 2)
    for span in spans:
        calibrate.forward(WorkerState(1), asdict(walk), 0, span)
    sums.reduce(WorkerState(1), asdict(walk), "stats", 0)
    # The next worker knows only the files, and one of them is gone: it is computed again.
    hidden_path(walk, 1, 3).unlink()
    for span in spans:
        calibrate.forward(WorkerState(1), asdict(walk), 1, span)
    sums.reduce(WorkerState(1), asdict(walk), "stats", 1)
    assert entries(walk, "stats") == entries(undisturbed, "stats")


def test_statistics_come_out_right_when_all_hidden_states_are_lost(
    walk: Walk, tmp_path: Path
) -> None:
    undisturbed = replace(walk, store=str(tmp_path / "other"))
    forward(undisturbed)
    calibrate.forward(WorkerState(1), asdict(walk), 0, (0, SHARDS))
    remove_scratch(walk.scratch)
    calibrate.forward(WorkerState(1), asdict(walk), 1, (0, SHARDS))
    sums.reduce(WorkerState(1), asdict(walk), "stats", 1)
    (name, content), *_ = entries(walk, "stats").items()
    assert entries(undisturbed, "stats")[name] == content


def test_what_is_there_is_not_done_again(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate.forward(WorkerState(1), asdict(walk), 0, (0, SHARDS))

    def never(*_: Any) -> Any:
        raise AssertionError("a finished block was computed again")

    monkeypatch.setattr(StreamedModel, "load_block", never)
    calibrate.forward(WorkerState(1), asdict(walk), 0, (0, SHARDS))


def test_a_sum_that_was_made_is_not_missed_when_its_parts_are_gone(walk: Walk) -> None:
    """A worker that died after it had written the sum has removed some of its parts."""
    for span in ranges(SHARDS, 3):
        calibrate.forward(WorkerState(1), asdict(walk), 0, span)
    sums.reduce(WorkerState(1), asdict(walk), "stats", 0)
    before = entries(walk, "stats")
    sums.reduce(WorkerState(1), asdict(walk), "stats", 0)
    assert entries(walk, "stats") == before


def test_a_missing_part_of_a_sum_is_an_error_that_names_it(walk: Walk) -> None:
    calibrate.forward(WorkerState(1), asdict(walk), 0, (0, 2))
    with pytest.raises(RunError, match="block 0: the stats of shard 2 are missing"):
        sums.reduce(WorkerState(1), asdict(walk), "stats", 0)


def test_the_reverse_pass_of_another_length_starts_from_its_own_files(
    walk: Walk, tmp_path: Path
) -> None:
    """A run was killed with one sequence per shard; the recipe now wants two."""
    forward(replace(walk, gradients=1))
    two = replace(walk, gradients=2)
    fresh = replace(two, store=str(tmp_path / "other"))
    for one in (two, fresh):
        forward(one)
        reverse(one)
    assert entries(two, "gradients") == entries(fresh, "gradients")


def test_collecting_leaves_the_states_before_the_block(walk: Walk, tmp_path: Path) -> None:
    """With ``propagate`` statistics come first; without changed weights they are the same."""
    dense = replace(walk, store=str(tmp_path / "dense"))
    forward(dense)
    prefixed = replace(walk, prefixes=("a", "b"))
    for block in range(BLOCKS):
        for span in ranges(SHARDS, 2):
            calibrate.collect(WorkerState(1), asdict(prefixed), block, span)
        sums.reduce(WorkerState(1), asdict(prefixed), "stats", block)
        if block + 1 < BLOCKS:
            calibrate.advance(WorkerState(1), asdict(prefixed), block, (0, SHARDS), {})
    for block in range(BLOCKS):
        expected, found = stats_of(dense, block), stats_of(prefixed, block)
        for site, stats in expected.items():
            for name, value in stats.sums.items():
                assert torch.equal(found[site][name], value)
    assert entries(dense, "stats").keys().isdisjoint(entries(prefixed, "stats"))


def test_keys_depend_on_everything_that_decides_the_sums(walk: Walk) -> None:
    changes: list[dict[str, Any]] = [
        {"fingerprint": "x"},
        {"dtype": "bfloat16"},
        {"ids_digest": "x"},
        {"sequences": 6},
        {"shards": 4},
        {"batch": 2},
        {"needs": ("hessian", "tokens")},
        {"experts": "all"},
    ]
    keys = {walk.stats_key(0), walk.stats_key(1)}
    keys |= {replace(walk, **change).stats_key(0) for change in changes}
    keys |= {replace(walk, prefixes=(prefix, "")).stats_key(0) for prefix in "ab"}
    assert len(keys) == 12
    assert replace(walk, store="elsewhere", model="moved", gradients=3).stats_key(0) == (
        walk.stats_key(0)
    )
    gradients = {walk.gradients_key(0)}
    gradients |= {replace(walk, gradients=n).gradients_key(0) for n in (1, 2)}
    gradients |= {replace(walk, seed=5).gradients_key(0)}
    assert len(gradients) == 4


def test_values_that_overflow_are_told_with_the_block(walk: Walk, tmp_path: Path) -> None:
    folder = tmp_path / "loud"
    model = full_model(Path(walk.model))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e38)
    model.save_pretrained(folder)
    loud = replace(walk, model=str(folder))
    with pytest.raises(RunError, match="block 0: its output has NaN or Inf values in torch"):
        calibrate.forward(WorkerState(1), asdict(loud), 0, (0, 1))


def test_sums_that_overflow_are_told_with_the_block_and_what_helps(
    walk: Walk, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    model = full_model(Path(walk.model))
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e22)
    model.save_pretrained(folder)
    large = replace(walk, model=str(folder), shards=2)
    state = WorkerState(1)
    told = r"large: block 0: hessian of \S+self_attn:out overflow: look at the weights before it"
    for shard in range(2):
        calibrate.forward(state, asdict(large), 0, (shard, shard + 1))
    with pytest.raises(RunError, match=told):
        sums.reduce(state, asdict(large), "stats", 0)
    with pytest.raises(RunError, match=told):  # who walks all leaves the entry at once
        calibrate.forward(state, asdict(replace(large, shards=1)), 0, (0, 1))
    assert "try compute.dtype: float32" in sums._overflow(
        replace(large, dtype="bfloat16"), "stats", 0, sums.BLOCK, "turn"
    )


def test_weights_that_are_not_finite_are_told_with_the_tensor(walk: Walk, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    model = full_model(Path(walk.model))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 2] = torch.nan
    model.save_pretrained(folder)
    broken = replace(walk, model=str(folder))
    state = WorkerState(1)
    calibrate.forward(state, asdict(broken), 0, (0, 1))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        calibrate.forward(state, asdict(broken), 1, (0, 1))
