"""Sums about expert layers against transformers' own modules, and what they may cost."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moesaic.methods.reduction import EXPERT_STATISTICS
from moesaic.orchestrator import calibrate, expert_statistics, gradients, sums
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.expert_statistics import expert_site, sampled_tokens
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.statistics import SiteStats, load_stats, ranges
from moesaic.orchestrator.store import Store
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.conftest import MakeWalk
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

SEQUENCES, LENGTH, SHARDS, SAMPLED = 7, 9, 5, 20
TOKENS = SEQUENCES * LENGTH
SOURCES = (0, 2, 1, 0, 0, 1, 2)
FAMILIES = [name for name in families() if load_family(name).experts is not None]
# Sums in float32 over 63 tokens, in another order than the reference's.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

WALK: dict[str, Any] = {
    "shards": SHARDS,
    "needs": ("hessian", "tokens", *EXPERT_STATISTICS),
    "gradients": 0,
    "sampled": SAMPLED,
    "sources": SOURCES,
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (SEQUENCES, LENGTH), generator=generator)


def opened(walk: Walk) -> StreamedModel:
    return StreamedModel(Checkpoint(Path(walk.model)))


def forward(walk: Walk, workers: int = 1) -> list[SiteStats]:
    """Statistics of every block."""
    states = [WorkerState(1) for _ in ranges(walk.shards, workers)]
    found = []
    for block in range(opened(walk).blocks):
        for state, span in zip(states, ranges(walk.shards, workers), strict=True):
            calibrate.forward(state, asdict(walk), block, span)
        sums.reduce(WorkerState(1), asdict(walk), "stats", block)
        entry = Store(Path(walk.store)).get("stats", walk.stats_key(block))
        assert entry is not None
        found.append(load_stats(entry.path))
    return found


@dataclass
class Seen:
    """What went through the expert layer of a block of the whole model, tokens in order."""

    module: Any
    hidden: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def experts(self, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        for values, value in zip((self.hidden, self.index, self.gates), args, strict=True):
            values.append(value.detach())
        if output.requires_grad:
            output.retain_grad()
        self.outputs.append(output)

    @torch.no_grad()
    def expert(self, number: int, x: Tensor) -> Tensor:
        """One expert's output, by the model's own code."""
        chosen = torch.full((len(x), 1), number)
        output: Tensor = self.module(x, chosen, torch.ones(len(x), 1))
        return output


def watched(model: Any, streamed: StreamedModel) -> dict[int, Seen]:
    """Block → what is seen there from now on."""
    found = {}
    for unit in streamed.units():
        if unit.kind != "bank":
            continue
        block = model.get_submodule(streamed.family.block.format(block=unit.block))
        experts = block.get_submodule(streamed.unit_module(unit))
        seen = found[unit.block] = Seen(experts)

        def router_hook(_: Any, __: Any, output: Any, seen: Seen = seen) -> None:
            seen.logits.append(output[0].detach())

        def experts_hook(_: Any, args: Any, output: Tensor, seen: Seen = seen) -> None:
            if len(args[1].T) > 1:  # not one of ours
                seen.experts(args, output)

        block.get_submodule(streamed.router_module).register_forward_hook(router_hook)
        experts.register_forward_hook(experts_hook)
    return found


def whole_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def expected(seen: Seen, count: int) -> dict[str, Tensor]:
    """Every statistic by its definition, in float64."""
    x, index = torch.cat(seen.hidden), torch.cat(seen.index)
    gates, logits = torch.cat(seen.gates).double(), torch.cat(seen.logits).double()
    routed = torch.zeros(TOKENS, count, dtype=torch.float64).scatter_(1, index, 1.0)
    gate = torch.zeros(TOKENS, count, dtype=torch.float64).scatter_(1, index, gates)
    f = torch.stack([seen.expert(number, x).double() for number in range(count)])  # [E, T, H]
    norms = f.norm(dim=-1).T  # [T, E]
    source = torch.tensor(SOURCES).repeat_interleave(LENGTH)
    every = torch.tensor([(2 * n + 1) * TOKENS // (2 * SAMPLED) for n in range(SAMPLED)])
    g = F.normalize(f[:, every], dim=-1)
    return {
        "load": torch.stack([routed[source == kind].sum(0) for kind in range(3)]),
        "gates": gate.sum(0),
        "coactivation": routed.T @ routed,
        "logits": logits.sum(0),
        "logits_gram": logits.T @ logits,
        "norm": (routed * norms).sum(0),
        "sq": (routed * norms.square()).sum(0),
        "gated_norm": (gate * norms).sum(0),
        "gated_sq": (gate * norms).square().sum(0),
        "sum": torch.einsum("te,eth->eh", routed, f),
        "gated_sum": torch.einsum("te,eth->eh", gate, f),
        "all_tokens": torch.tensor(float(SAMPLED)),
        "all_sum": f[:, every].sum(1),
        "all_sq": f[:, every].square().sum((1, 2)),
        "cosine": torch.einsum("eth,fth->ef", g, g),
        "sample": x[every].double(),
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sums_are_those_of_the_whole_model_in_transformers(
    model_type: str, make_walk: MakeWalk, ids: Tensor
) -> None:
    walk = make_walk(model_type)
    blocks = forward(walk)
    streamed, model = opened(walk), whole_model(walk.model)
    layers = watched(model, streamed)
    with torch.no_grad():
        model(ids)
    banks = [unit for unit in streamed.units() if unit.kind == "bank"]
    assert layers.keys() == {bank.block for bank in banks}
    for bank in banks:
        sums = blocks[bank.block][expert_site(bank.name)].sums
        wanted = expected(layers[bank.block], bank.shapes["gate"][0])
        assert sums.keys() == wanted.keys() == EXPERT_STATISTICS.keys()
        for name, value in wanted.items():
            assert torch.allclose(sums[name].double(), value.double(), **CLOSE), name
        assert int(sums["load"].sum()) == TOKENS * layers[bank.block].index[0].shape[1]
        assert sums["load"].dtype == sums["coactivation"].dtype == torch.int64
    for block, stats in enumerate(blocks):
        own = [site for site in stats if site.endswith(":experts")]
        assert len(own) == (block in layers)


def test_gradients_at_the_layers_output_are_those_of_autograd(
    make_walk: MakeWalk, ids: Tensor
) -> None:
    walk = make_walk("qwen2_moe", gradients=1)
    forward(walk)
    streamed, model = opened(walk), whole_model(walk.model)
    for block in reversed(range(streamed.blocks)):
        gradients.reverse(WorkerState(1), asdict(walk), block, (0, SHARDS))
        sums.reduce(WorkerState(1), asdict(walk), "gradients", block)
    layers = watched(model, streamed)
    for shard in range(SHARDS):
        row = walk.shard_rows(shard)[0]
        logits = model(ids[row : row + 1]).logits[0]
        generator = torch.Generator().manual_seed(walk.seed * 1_000_003 + shard)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
    for bank in (unit for unit in streamed.units() if unit.kind == "bank"):
        entry = Store(Path(walk.store)).get("gradients", walk.gradients_key(bank.block))
        assert entry is not None
        found = load_stats(entry.path)[f"{bank.name}|output"]
        squares: Any = sum(y.grad.double().square().sum(0) for y in layers[bank.block].outputs)
        assert int(found["grad_tokens"]) == SHARDS * LENGTH
        assert squares.max() > 0
        assert torch.allclose(
            found["grad_sq"].double(), squares, rtol=1e-3, atol=1e-6 * squares.max()
        )


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bits(
    make_walk: MakeWalk, tmp_path: Path, workers: int
) -> None:
    one, many = make_walk(), make_walk(store=str(tmp_path / "other"))
    for first, second in zip(forward(one), forward(many, workers), strict=True):
        assert first.keys() == second.keys()
        for site, stats in first.items():
            for name, value in stats.sums.items():
                assert torch.equal(value, second[site][name]), (site, name)


def test_another_cut_into_shards_samples_the_same_tokens(
    make_walk: MakeWalk, tmp_path: Path
) -> None:
    five, two = forward(make_walk()), forward(make_walk(shards=2, store=str(tmp_path / "other")))
    for first, second in zip(five, two, strict=True):
        (site,) = (name for name in first if name.endswith(":experts"))
        for name, value in first[site].sums.items():
            torch.testing.assert_close(second[site][name], value, rtol=1e-4, atol=1e-5)


def test_memory_is_bounded_by_slices_of_the_sample(
    make_walk: MakeWalk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forward(make_walk())
    slices: list[int] = []
    compare = expert_statistics.ExpertStatistics._compare

    def watch(self: Any, x: Tensor, output: Any) -> None:
        slices.append(self.experts * x.numel() * 4)
        compare(self, x, output)

    monkeypatch.setattr(expert_statistics.ExpertStatistics, "_compare", watch)
    limit = 2 * 8 * 48 * 4  # outputs of eight experts for two tokens
    monkeypatch.setattr(expert_statistics, "SLICE_BYTES", limit + 3)
    sliced = forward(make_walk(store=str(tmp_path / "other")))
    assert max(slices) == limit and sum(slices) == 2 * SAMPLED * 8 * 48 * 4
    for first, second in zip(whole, sliced, strict=True):
        (site,) = (name for name in first if name.endswith(":experts"))
        for name, value in first[site].sums.items():
            torch.testing.assert_close(second[site][name], value, rtol=1e-4, atol=1e-5)


def test_only_what_is_wanted_is_summed(make_walk: MakeWalk) -> None:
    first, *_ = forward(make_walk(needs=("tokens", "gated_norm")))
    (site,) = (name for name in first if name.endswith(":experts"))
    assert first[site].sums.keys() == {"gated_norm", "load", "sample"}


@pytest.mark.parametrize("wanted", [1, 7, 20, 62, 63, 64, 5000])
def test_sampled_tokens_are_spread_evenly_over_all_shards(wanted: int) -> None:
    places, rows = [], []
    for shard in range(SHARDS):
        low, high = (s * SEQUENCES // SHARDS * LENGTH for s in (shard, shard + 1))
        here, numbers = sampled_tokens(low, high, TOKENS, wanted)
        assert all(0 <= place < high - low for place in here)
        places += [low + place for place in here]
        rows += numbers
    count = min(wanted, TOKENS)
    assert rows == list(range(count)) and len(set(places)) == count
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert abs(places[0] - (TOKENS - 1 - places[-1])) <= 1  # as far from the end as from the start


def test_all_tokens_are_sampled_where_there_are_fewer_than_wanted(make_walk: MakeWalk) -> None:
    first, *_ = forward(make_walk(sampled=5000, needs=("all_tokens", "tokens")))
    (site,) = (name for name in first if name.endswith(":experts"))
    assert int(first[site]["all_tokens"]) == len(first[site]["sample"]) == TOKENS
    assert bool(first[site]["sample"].abs().sum(1).gt(0).all())


def test_without_reducers_nothing_is_collected_of_expert_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("statistics that nobody wants")

    project = Project(tmp_path / "project", make_model_folder(tmp_path / "model"), monkeypatch)
    project.write()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "ExpertStatistics", never)
        project.run(stages=("calibrate",))
    files = set((project.folder / "store").glob("stats/*/*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert not [site for site in load_stats(file) if site.endswith(":experts")]
    chain = [{"method": "reap", "keep": 0.5}, {"method": "rtn", "bits": 4, "group_size": 16}]
    project.write(candidates=[chain, chain[1]], calibration={"expert_tokens": 50})
    project.run(stages=("calibrate",))
    for file in set((project.folder / "store").glob("stats/*/*.safetensors")) - files:
        stats = load_stats(file)
        (site,) = (name for name in stats if name.endswith(":experts"))
        assert stats[site]["sample"].shape == (50, 48)
        assert stats[site]["load"].shape == (2, 8)  # two text files
        assert bool(stats[site]["load"].sum(1).gt(0).all())
