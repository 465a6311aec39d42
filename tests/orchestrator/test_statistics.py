"""The summation tree, statistics files, and the observers."""

from pathlib import Path

import pytest
import torch

from moesaic.methods.base import Stats
from moesaic.orchestrator.statistics import (
    InfluenceObserver,
    Node,
    SiteStats,
    add_gram,
    covered,
    load_stats,
    mirror,
    ranges,
    save_stats,
    tree_sum,
)

SIZES = [(shards, workers) for shards in range(1, 10) for workers in range(1, 6)]


def shard(index: int) -> SiteStats:
    """Sums whose order matters in float32: the shards' sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(index)
    sums = torch.randn(33, generator=generator) * 10.0 ** (index % 5)
    return {"site": Stats({"hessian": sums, "tokens": torch.tensor(1 << index)})}


def leaf(node: Node) -> SiteStats | None:
    return shard(node[0]) if node[1] - node[0] == 1 else None


@pytest.mark.parametrize(("shards", "workers"), SIZES)
def test_ranges_cut_the_shards_without_gaps_and_evenly(shards: int, workers: int) -> None:
    cut = ranges(shards, workers)
    assert len(cut) == min(shards, workers)
    assert cut[0][0] == 0 and cut[-1][1] == shards
    assert all(before[1] == after[0] for before, after in zip(cut, cut[1:], strict=False))
    sizes = [high - low for low, high in cut]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("shards", "workers"), SIZES)
def test_any_number_of_workers_gives_the_bits_of_one(shards: int, workers: int) -> None:
    root = (0, shards)
    alone = tree_sum(root, leaf)["site"]
    finished = {
        node: tree_sum(node, leaf)
        for span in ranges(shards, workers)
        for node in covered(root, span)
    }
    used: list[Node] = []

    def known(node: Node) -> SiteStats | None:
        if node in finished:
            used.append(node)
        return finished.get(node)

    together = tree_sum(root, known)["site"]
    assert torch.equal(together["hessian"], alone["hessian"])
    assert int(together["tokens"]) == (1 << shards) - 1  # every shard exactly once
    assert sorted(used) == sorted(finished)


def test_the_order_of_these_sums_matters() -> None:
    """Otherwise the test above could not fail."""
    plain = sum(shard(index)["site"]["hessian"] for index in range(9))
    assert not torch.equal(tree_sum((0, 9), leaf)["site"]["hessian"], torch.as_tensor(plain))


def test_a_range_covers_whole_subtrees() -> None:
    assert covered((0, 8), (0, 8)) == [(0, 8)]
    assert covered((0, 8), (1, 7)) == [(1, 2), (2, 4), (4, 6), (6, 7)]
    assert covered((0, 8), (8, 9)) == []


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    stats = {
        "a.b|x": Stats({"tokens": torch.tensor(3), "hessian": torch.randn(4, 4).t()}),
        "c": Stats({"tokens": torch.arange(5)}),
    }
    save_stats(tmp_path / "stats", stats)
    found = load_stats(tmp_path / "stats")
    assert found.keys() == stats.keys()
    for name, entry in stats.items():
        assert found[name].sums.keys() == entry.sums.keys()
        for statistic, value in entry.sums.items():
            assert torch.equal(found[name][statistic], value)
    assert load_stats(tmp_path / "stats", lambda name: name == "c").keys() == {"c"}


@pytest.mark.parametrize("inputs", [1, 127, 128, 129, 300])
def test_sums_of_products_equal_float64s_and_are_symmetric(inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    total = torch.zeros(2, inputs, inputs)
    batches = [torch.randn(tokens, inputs, generator=generator) for tokens in (70, 1)]
    for x in batches:
        add_gram(total[1], x)
    mirror(total)
    assert torch.equal(total[1], total[1].T) and not total[0].any()
    expected = sum((x.double().T @ x.double() for x in batches), torch.zeros(()))
    assert torch.allclose(total[1].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_far_a_block_turns_its_hidden_states(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 7, 33, generator=generator).to(dtype)
    after = (before + torch.randn(2, 7, 33, generator=generator)).to(dtype)
    after[0, 0] = 0
    observer = InfluenceObserver(torch.device("cpu"))
    for x, y in zip(before, after, strict=True):
        observer.add(x, y)
    cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    assert observer.sums["tokens"] == 14
    assert observer.sums["turn"].item() == pytest.approx((1 - cosine).sum().item(), rel=1e-6)
