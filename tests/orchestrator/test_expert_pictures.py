"""Pictures of experts: what they are drawn from against brute force, and how much there is."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from moesaic.methods.base import Chain, Spec, chain_text
from moesaic.orchestrator import expert_pictures
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.expert_layers import choice_shares, expert_layers
from moesaic.orchestrator.expert_pictures import (
    CONSTANT,
    DROPPED,
    KEPT,
    MERGED,
    SHOWN,
    caption,
    chosen_layers,
    draw_experts,
    fates,
    groups,
    inside_and_between,
    order,
    spans,
    tree,
    use,
)
from moesaic.orchestrator.expert_statistics import expert_site
from moesaic.orchestrator.measure import needs
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.reductions import open_layer
from moesaic.orchestrator.report import write_report
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.summary import LayerExperts
from tests.orchestrator.inline import InlinePool, Project
from tests.orchestrator.projects import make_model_folder, make_recipe
from tests.orchestrator.summaries import summary
from tests.orchestrator.test_report import Page

RTN = {"method": "rtn", "bits": [4, 8], "group_size": -1}
REDUCERS: dict[str, dict[str, Any]] = {
    "reap": {"method": "reap", "keep": 0.5},
    "hc_smoe": {"method": "hc_smoe", "keep": 0.5},
    "mone": {"method": "mone", "keep": 0.75},
    "slim": {"method": "slim", "width": 0.75},
}


def made_up(
    experts: int,
    clusters: list[list[int]] | None = None,
    constants: list[list[int]] | None = None,
    block: int = 0,
    sources: int = 3,
    compared: bool = True,
) -> LayerExperts:
    """A layer of random experts under a reduction that is none if no clusters are given."""
    generator = np.random.default_rng(block)
    points = generator.normal(size=(experts, 6)) + 0.6
    points /= np.linalg.norm(points, axis=1)[:, None]
    load = generator.integers(1, 500, size=(sources, experts))
    before = load.sum(0) / load.sum()
    kept = clusters or [[expert] for expert in range(experts)]
    stand_ins = [*kept, *(constants or [])]
    after = np.array([before[group].sum() for group in stand_ins])
    return LayerExperts(
        block=block,
        reduction="" if clusters is None else "made_up(keep=0.5)",
        clusters=kept,
        constants=constants or [],
        load=load,
        sources=[f"source-{number}.txt" for number in range(sources)],
        before=before,
        after=after / after.sum(),
        similarity=points @ points.T if compared else None,
    )


MIXED = made_up(8, [[0, 5], [1], [2, 4, 7]], [[3]])


# What the pictures are drawn from


def test_every_expert_has_its_fate() -> None:
    found = fates(MIXED).tolist()
    assert found == [MERGED, KEPT, MERGED, CONSTANT, MERGED, MERGED, DROPPED, MERGED]
    assert MIXED.dropped == [6]
    assert set(fates(made_up(5))) == {KEPT}


def test_without_clusters_the_order_is_that_of_average_linkage() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    layer = made_up(9)
    joins = tree(layer)
    assert joins is not None and layer.similarity is not None
    distance = 1 - layer.similarity
    np.fill_diagonal(distance, 0)
    plain = linkage(squareform(distance, checks=False), "average")
    assert np.allclose(np.sort(joins[:, 2]), np.sort(plain[:, 2]))
    rows = order(layer, joins)
    assert sorted(rows) == list(range(9))
    for count in range(2, 9):
        label = fcluster(plain, count, "maxclust")[rows]
        assert (np.diff(label) != 0).sum() == count - 1  # every group of the cut lies together


def test_clusters_lie_together_and_have_their_own_tree() -> None:
    joins = tree(MIXED)
    assert joins is not None and MIXED.similarity is not None
    rows = order(MIXED, joins)
    found = spans(MIXED, rows)
    assert [first for first, _, _ in found] == list(np.cumsum([0, *(n for _, n, _ in found)]))[:-1]
    for first, count, group in found:
        assert sorted(rows[first : first + count]) == sorted(group)
    # Heights are mean distances of the two sides, within clusters and between them.
    members = {expert: [expert] for expert in range(8)}
    for step, (one, two, height, _) in enumerate(joins):
        left, right = members[int(one)], members[int(two)]
        assert height == pytest.approx(1 - MIXED.similarity[np.ix_(left, right)].mean())
        members[8 + step] = left + right
    assert sorted(members[8]) in [[0, 5], [2, 4], [2, 7], [4, 7]]


def test_order_without_similarity_and_of_a_single_expert() -> None:
    blind = made_up(6, [[0, 4], [1, 2]], compared=False)
    assert tree(blind) is None
    assert order(blind, None) == [0, 4, 1, 2, 3, 5]
    assert inside_and_between(blind) == (None, None)
    assert order(made_up(1), tree(made_up(1))) == [0]


def test_mean_cosines_against_brute_force() -> None:
    label = {expert: n for n, group in enumerate(groups(MIXED)) for expert in group}
    pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
    assert MIXED.similarity is not None
    same = [MIXED.similarity[a, b] for a, b in pairs if label[a] == label[b]]
    other = [MIXED.similarity[a, b] for a, b in pairs if label[a] != label[b]]
    assert inside_and_between(MIXED) == pytest.approx((np.mean(same), np.mean(other)))
    inside, _ = inside_and_between(made_up(4))
    assert inside is None


def test_use_is_a_share_of_tokens() -> None:
    names, shares, total = use(MIXED)
    assert names == MIXED.sources and shares.shape == (3, len(groups(MIXED)))
    assert np.allclose(shares.sum(0), 1) and total.sum() == pytest.approx(1)
    first = MIXED.load[:, [0, 5]].sum(1)
    assert np.allclose(shares[:, 0], first / first.sum())


def test_many_sources_are_taken_together_and_no_tokens_give_zeros() -> None:
    many = made_up(4, sources=20)
    names, shares, total = use(many)
    assert len(names) == len(total) == 6 and names[-1] == "15 others"
    assert np.allclose(shares.sum(0), 1) and total.sum() == pytest.approx(1)
    largest = [many.sources[n] for n in sorted(np.argsort(-many.load.sum(1))[:5])]
    assert names[:-1] == largest
    silent = replace(many, load=np.zeros_like(many.load))
    _, shares, total = use(silent)
    assert not shares.any() and not total.any()


def test_choice_shares_against_counting() -> None:
    index = torch.randint(6, (50, 2), generator=torch.Generator().manual_seed(0))
    expert_map = torch.tensor([0, 1, 0, 2, 1, 2])
    found = choice_shares(index, expert_map, 4)
    pairs = [int(expert_map[row]) for token in index.tolist() for row in token]
    assert found.tolist() == pytest.approx([pairs.count(n) / 100 for n in range(4)])
    assert float(found.sum()) == pytest.approx(1)
    assert choice_shares(index[:0], None, 3).tolist() == [0, 0, 0]


# From the store


def experiment_in(folder: Path, model: Path, **changes: Any) -> Experiment:
    recipe = load_recipe(make_recipe(folder, model, **changes))
    return Experiment(recipe, folder / "runs" / "small")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Experiment:
    chains = [[reducer, RTN] for reducer in REDUCERS.values()]
    folder = tmp_path_factory.mktemp("measured")
    experiment = experiment_in(folder, model, candidates=[RTN, *chains], baselines={})
    Calibration(experiment, InlinePool(), View(), experiment.offers).run()
    return experiment


def planned(experiment: Experiment, reducer: str | None) -> Mapping[str, Chain]:
    """A reducer everywhere, 4 and 8 bits mixed inside; None reduces nothing."""
    bits = [Spec.of("rtn", {"bits": n, "group_size": -1}) for n in (4, 8)]
    own: tuple[Spec, ...] = ()
    if reducer is not None:
        options = {k: v for k, v in REDUCERS[reducer].items() if k != "method"}
        own = (Spec.of(reducer, options),)
    chosen = experiment.space.everywhere((*own, bits[0]))
    mixed = {name for place, name in enumerate(chosen) if place % 5 == 0}
    return {
        name: (*chain[:-1], bits[1]) if name in mixed else chain for name, chain in chosen.items()
    }


@pytest.mark.parametrize("reducer", [None, *REDUCERS])
def test_layers_against_routing_run_by_hand(measured: Experiment, reducer: str | None) -> None:
    chosen = planned(measured, reducer)
    pieces = plan_pieces(measured, measured.walk, chosen)
    layers = expert_layers(measured, measured.walk, chosen, pieces)
    banks = [unit for unit in measured.units if unit.kind == "bank"]
    assert [layer.block for layer in layers] == [bank.block for bank in banks]
    for layer, bank in zip(layers, banks, strict=True):
        path = measured.store.path("stats", measured.walk.stats_key(bank.block))
        stats = load_stats(path)[expert_site(bank.name)]
        opened = open_layer(measured.model, bank, stats)
        experts = bank.shapes["gate"][0]
        router, expert_map, size = dict(opened.router), None, experts
        if reducer is not None:
            side = {
                name: member.dense() for name, member in read_piece(Path(pieces[bank.name])).items()
            }
            router = {role: side[f"router_{role}"] for role in router}
            expert_map = side.get("expert_map")
            size = len(layer.clusters) + len(side.get("constants", ()))
        for rows, leads, shares in (
            (opened.router, None, layer.before),
            (router, expert_map, layer.after),
        ):
            count = [0] * len(shares)
            for row in opened.gating(stats["sample"], rows)[0].flatten().tolist():
                count[row if leads is None else int(leads[row])] += 1
            assert shares.tolist() == pytest.approx([n / sum(count) for n in count])
        assert len(layer.before) == layer.count == experts and len(layer.after) == size
        assert layer.before.sum() == pytest.approx(1) and layer.after.sum() == pytest.approx(1)
        assert layer.similarity is not None
        assert np.allclose(layer.similarity, layer.similarity.T)
        assert np.allclose(np.diag(layer.similarity), 1, atol=1e-4)
        assert layer.sources == ["first.txt", "second.txt"]
        assert np.array_equal(layer.load, stats["load"].numpy())
        expected = {
            None: (experts, 0, 0),
            "reap": (experts // 2, 0, experts // 2),
            "hc_smoe": (experts // 2, 0, 0),
            "mone": (experts * 3 // 4, experts // 4, 0),
            "slim": (experts, 0, 0),
        }[reducer]
        assert (len(layer.clusters), len(layer.constants), len(layer.dropped)) == expected
        assert layer.reduction.startswith(reducer or "")
        assert bool(layer.reduction) == (reducer is not None)
        if reducer in (None, "slim"):  # nothing is routed elsewhere
            assert layer.after.tolist() == layer.before.tolist()
        if reducer == "hc_smoe":  # all rows stay: what a group gets is what its members got
            sums = [layer.before[list(group)].sum() for group in layer.clusters]
            assert layer.after.tolist() == pytest.approx(sums)


def test_a_bank_that_stays_and_one_that_is_kept(tmp_path: Path, model: Path) -> None:
    experiment = experiment_in(
        tmp_path,
        model,
        keep=["layers.0.mlp.experts"],
        candidates=[RTN, [REDUCERS["reap"], RTN]],
        baselines={},
    )
    Calibration(experiment, InlinePool(), View(), experiment.offers).run()
    chosen = planned(experiment, None)
    pieces = plan_pieces(experiment, experiment.walk, chosen)
    layers = expert_layers(experiment, experiment.walk, chosen, pieces)
    assert layers and all(layer.block > 0 for layer in layers)
    assert all(not layer.reduction and not layer.dropped for layer in layers)


def test_statistics_are_collected_for_reducers_only() -> None:
    rtn, reap = Spec.of("rtn"), Spec.of("reap")
    assert {"cosine", "all_tokens"} <= set(needs([(reap, rtn)]))
    assert not {"cosine", "all_tokens"} & set(needs([(rtn,)]))


def test_no_reducer_no_layers(tmp_path: Path, model: Path) -> None:
    experiment = experiment_in(tmp_path, model)
    assert expert_layers(experiment, experiment.walk, {}, {}) == []


# The pictures


def test_pictures_of_a_run_are_in_its_report(tmp_path: Path) -> None:
    layers = [
        MIXED,
        made_up(8, block=1),
        made_up(8, [[0], [1, 2], [3]], block=2, compared=False),
        made_up(8, [[n] for n in range(6)], [[6], [7]], block=3),
    ]
    run = replace(summary(blocks=2, experts=8), experts=layers)
    page = Page(write_report(run, tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    found = sorted(path.name for path in (tmp_path / "pictures").glob("experts*.png"))
    assert found == ["experts.png", *(f"experts_block_00{n}.png" for n in range(4))]
    assert len(page.loaded) == 5 + len(found)
    assert "Experts" in page.text and caption(MIXED) in page.text
    for name in found:
        image = imread(tmp_path / "pictures" / name)
        assert image.shape[0] > 200 and image.shape[1] > 500
        assert len(np.unique((image[..., :3] * 255).astype(int) @ [1, 256, 65536])) > 20


def test_section_is_absent_where_no_experts_are_reduced(tmp_path: Path) -> None:
    page = Page(write_report(summary(blocks=2, experts=8), tmp_path).read_text(encoding="utf-8"))
    assert len(page.loaded) == 5 and "Similarity" not in page.text


def test_pictures_of_an_earlier_run_go(tmp_path: Path) -> None:
    run = summary(blocks=2)
    draw_experts(replace(run, experts=[made_up(4, block=7)]), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"experts.png", "experts_block_007.png"}
    draw_experts(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_captions_say_what_is_there() -> None:
    assert caption(MIXED).startswith("Block 0: 3 of 8 experts and 1 constant, made_up(keep=0.5).")
    assert "within clusters" in caption(MIXED)
    assert "all 8 experts" in caption(made_up(8)) and "after" not in caption(made_up(8))
    assert "cosine" not in caption(made_up(8, compared=False))


def test_strange_layers_can_be_drawn(tmp_path: Path) -> None:
    plain = made_up(8)
    twins = replace(plain, similarity=np.ones((8, 8)))
    silent = replace(
        plain,
        load=np.zeros_like(plain.load),
        similarity=np.zeros((8, 8)),
        before=np.zeros(8),
        after=np.zeros(8),
    )
    layers = [
        made_up(1),
        replace(twins, block=1),
        replace(silent, block=2),
        made_up(6, [[0, 1, 2, 3, 4, 5]], block=3),
        made_up(2, [[1]], block=4, sources=12),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw_experts(replace(summary(blocks=2), experts=layers), tmp_path)
    assert len(found) == 6


def test_many_layers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [replace(MIXED, block=block) for block in range(48)]
    chosen = [layer.block for layer in chosen_layers(layers)]
    assert len(chosen) == SHOWN == 12 and chosen[0] == 0 and chosen[-1] == 47
    assert set(np.diff(chosen)) <= {4, 5}
    monkeypatch.setattr(expert_pictures, "SHOWN", 2)
    wide = made_up(128, [[n, n + 64] for n in range(64)])
    run = replace(summary(blocks=2), experts=[replace(wide, block=block) for block in range(48)])
    found = draw_experts(run, tmp_path)
    assert len(found) == 3
    for path, _ in found.values():
        assert path.stat().st_size < 600_000
        height, width, _ = imread(path).shape
        assert height < 2000 and width < 2400


def test_a_run_shows_what_it_reduced(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, model, monkeypatch)
    project.write(
        candidates=[RTN, [REDUCERS["hc_smoe"], RTN]],
        baselines={},
        budget={"bits_per_weight": 3.0},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )
    project.run(stages=("evaluate", "assemble", "report"))
    text = (project.output / "report.html").read_text(encoding="utf-8")
    assert 'id="picture-experts"' in text and "hc_smoe" in Page(text).text
    assert chain_text((Spec.of("hc_smoe", {"keep": 0.5}),)) in Page(text).text
    artifacts = {path.name for path in tmp_path.rglob("mlartifacts/**/experts*.png")}
    assert artifacts == {path.name for path in (project.output / "pictures").glob("experts*.png")}
    assert len(artifacts) > 1
