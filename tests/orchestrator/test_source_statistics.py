"""Text sources told apart: second moments, shares of losses, weights as knobs of a study."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from moesaic.methods.base import of_source
from moesaic.orchestrator import calibrate, results, sums
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.memory import Sizes
from moesaic.orchestrator.pieces import dense_members
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.statistics import SiteStats, load_stats, ranges
from moesaic.orchestrator.store import Store, digest
from moesaic.orchestrator.walk import Walk
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.inline import Killed, Project, measured_store
from tests.orchestrator.projects import VOCABULARY, make_model_folder

SOURCES, LENGTH, SHARDS = (1, 0, 0, 2, 1, 0, 2), 9, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BITS = {"method": "rtn", "bits": [2, 4], "group_size": -1}
APART: dict[str, Any] = {
    "calibration": {"per_source": True},
    "candidates": [
        BITS,
        {"method": "svd_llm", "rank": [4, 8]},
        [{"method": "reap", "keep": 0.5}, {**BITS, "bits": 4}],
        [{"method": "modegpt", "keep": 0.5}, {**BITS, "bits": 4}],
    ],
    "baselines": {},
    "budget": {"bits_per_weight": 3.5},
    "evaluation": {"sequences": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model_folder(folder, "qwen3_moe", dtype=torch.float32, mlp_only_layers=[0])


@pytest.fixture
def walk_of(model: Path, tmp_path: Path) -> Callable[..., Walk]:
    """``walk_of(rows, **changes)``: over some of the sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (len(SOURCES), LENGTH), generator=generator)

    def walk(rows: list[int], shards: int, **changes: Any) -> Walk:
        own = ids[rows].int()
        name = digest(own.tolist())
        save_file({"ids": own}, tmp_path / f"{name}.safetensors")
        made = Walk(
            model=str(model),
            dtype="float32",
            trust_remote_code=False,
            fingerprint="of the model",
            ids=str(tmp_path / f"{name}.safetensors"),
            ids_digest=name,
            sequences=len(rows),
            shards=shards,
            batch=2,
            needs=("abs", "hessian", "tokens"),
            experts="routed",
            gradients=0,
            seed=11,
            store=str(tmp_path / "store"),
        )
        return replace(made, **changes)

    return walk


def summed(walk: Walk, workers: int = 1) -> list[tuple[bytes, SiteStats]]:
    """The statistics of every block, as bytes too."""
    found = []
    spans = ranges(walk.shards, workers)
    states = [WorkerState(1) for _ in spans]
    for block in range(2):
        for state, span in zip(states, spans, strict=True):
            calibrate.forward(state, asdict(walk), block, span)
        sums.reduce(WorkerState(1), asdict(walk), "stats", block)
        entry = Store(Path(walk.store)).get("stats", walk.stats_key(block))
        assert entry is not None
        found.append((entry.path.read_bytes(), load_stats(entry.path)))
    return found


def test_second_moments_of_a_source_are_those_of_its_sequences_alone(
    walk_of: Callable[..., Walk],
) -> None:
    everything = list(range(len(SOURCES)))
    apart = summed(walk_of(everything, SHARDS, by_source=SOURCES))
    pooled = summed(walk_of(everything, SHARDS))
    for (_, own), (_, all_text) in zip(apart, pooled, strict=True):
        for site in all_text:
            for name, value in all_text[site].sums.items():
                torch.testing.assert_close(own[site][name], value, **CLOSE)
            assert of_source(0) not in all_text[site]
    for source in range(3):
        rows = [row for row in everything if SOURCES[row] == source]
        alone = summed(walk_of(rows, 1))
        for (_, own), (_, reference) in zip(apart, alone, strict=True):
            for site in (site for site in reference if "hessian" in reference[site]):
                hessian = reference[site]["hessian"]
                torch.testing.assert_close(own[site][of_source(source)], hessian, **CLOSE)


def test_any_number_of_workers_gives_the_same_bytes(
    walk_of: Callable[..., Walk], tmp_path: Path
) -> None:
    rows = list(range(len(SOURCES)))
    one, two = (
        summed(walk_of(rows, SHARDS, by_source=SOURCES, store=str(tmp_path / str(n))), n)
        for n in (1, 2)
    )
    assert [content for content, _ in one] == [content for content, _ in two]


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_store(tmp_path_factory.mktemp("measured"), model, **APART).parent


@pytest.fixture
def project(measured: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(measured, model, monkeypatch)


def test_shares_are_the_losses_under_each_source(project: Project) -> None:
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    walk, table = experiment.walk, results.measurements(experiment)
    checked = 0
    for unit in experiment.units:
        stats = load_stats(experiment.store.path("stats", walk.stats_key(unit.block)))
        slopes = load_stats(experiment.store.path("gradients", walk.gradients_key(unit.block)))
        weights = experiment.model.read_unit(unit)
        for measurement in table.measurements:
            owner, expert, member = (measurement.unit, None, "weight")
            if unit.kind == "bank":
                owner, number, member = (*measurement.unit.rsplit(".", 2), "", "")[:3]
                expert = int(number) if number.isdigit() else None
            whole = all(spec.method in ("rtn", "svd_llm") for spec in measurement.chain)
            if owner != unit.name or not measurement.chain or not whole:
                continue
            index = ... if expert is None else expert
            key = experiment.key(unit.name, measurement.chain, walk)
            path = str(experiment.store.path("pieces", key))
            made = dense_members({unit.name: path})[unit.name][member][index].double()
            change = weights[member][index].double() - made
            squares = slopes[f"{unit.name}|{member}"]["grad_sq"][index].double()
            sums = stats[unit.sites[member]].sums
            losses = []
            for source in range(2):
                hessian = sums[of_source(source)][index].double()
                losses.append(float((squares * ((change @ hessian) * change).sum(-1)).sum()))
            if sum(losses) > 0:
                wanted = [loss / sum(losses) for loss in losses]
                assert measurement.shares == pytest.approx(wanted, rel=1e-3, abs=1e-4)
                checked += 1
    assert checked > 50


def test_pieces_of_all_kinds_are_measured_under_each_source(project: Project) -> None:
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    seen = set()
    for measurement in results.measurements(experiment).measurements:
        if measurement.chain:
            assert len(measurement.shares) == 2
            assert sum(measurement.shares) == pytest.approx(1) or not any(measurement.shares)
            seen |= {spec.method for spec in measurement.chain if any(measurement.shares)}
    assert seen == {"rtn", "svd_llm", "reap", "modegpt"}


def test_a_run_killed_again_and_again_measures_the_same(
    project: Project, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Project(tmp_path, model, monkeypatch)
    killed.write(**APART)
    kills = 0
    while True:
        try:
            killed.run(size=2, kill_at=4, stages=("measure",))
        except Killed:
            kills += 1
        else:
            break
    assert kills > 3
    one, two = (
        {file.relative_to(p.folder): file.read_bytes() for file in p.folder.rglob("*.safetensors")}
        for p in (project, killed)
    )
    kinds = ("stats", "gradients", "reductions", "pieces", "errors")
    for kind in kinds:
        own = {name for name in one if name.parts[1] == kind}
        assert own and own == {name for name in two if name.parts[1] == kind}
        assert all(one[name] == two[name] for name in own)
    ours, theirs = (
        results.measurements(open_experiment(p.folder / "recipe.yaml", p.output)).measurements
        for p in (project, killed)
    )
    assert [(m.unit, m.shares) for m in ours] == [(m.unit, m.shares) for m in theirs]


def test_the_plan_without_weights_is_that_of_pooled_statistics(
    project: Project, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = Project(tmp_path, model, monkeypatch)
    pooled.write(**{**APART, "calibration": {"per_source": False}})
    pooled.run(stages=("search",))
    project.run(stages=("search",))
    assert project.json("plan.json")["units"] == pooled.json("plan.json")["units"]
    ours, theirs = (
        results.measurements(open_experiment(p.folder / "recipe.yaml", p.output)).measurements
        for p in (project, pooled)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.unit == other.unit and one.chain == other.chain and not other.shares
        if all(spec.method == "rtn" for spec in one.chain):  # the same piece, whatever was rounded
            assert one.loss == pytest.approx(other.loss, rel=1e-3, abs=1e-9)


def test_weights_of_texts_are_knobs_of_a_study(project: Project) -> None:
    fixed = {"depth_slope": 0, "mix": 0, "score_exponent": 1, "charge.reductions": 1}
    about = {"prune": False, "sequences": 2, "knobs": {**fixed, "source.second.txt": [0.5, 100]}}
    project.write(**APART, tune=about)
    project.tune(6)
    table = pd.read_parquet(project.output / "trials.parquet")
    varied = table["knob source.second.txt"].dropna()
    assert varied.between(0.5, 100).all() and varied.nunique() > 1
    assert "knob source.first.txt" not in table


def test_what_a_study_cannot_weigh_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = Project(tmp_path, model, patch)
        made.write(candidates=[BITS], tune={"knobs": {"source.second.txt": 2}})
        with pytest.raises(UserError, match=r"tune.knobs.source.second.txt: .*per_source: true"):
            made.tune(2)
        texts = [{"file": "first.txt"}]
        made.write(candidates=[BITS], calibration={"per_source": True, "texts": texts})
        with pytest.raises(UserError, match="per_source: there is one text"):
            made.tune(2)


def test_memory_of_the_sums_is_known_beforehand(project: Project) -> None:
    experiment = open_experiment(project.folder / "recipe.yaml", project.output)
    sizes = Sizes(experiment, crew(experiment.recipe.compute, experiment.workers_per_gpu))
    for block in range(2):
        stats = load_stats(experiment.store.path("stats", experiment.walk.stats_key(block)))
        assert sizes.sums(block) == sum(entry.nbytes for entry in stats.values())
