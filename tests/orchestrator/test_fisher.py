"""The empirical Fisher information: sums against autograd, who waits for them, whole runs."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.methods.base import OUTPUT_STATISTICS, Stats, Unit
from moesaic.orchestrator import calibrate, gradients, sums
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.machine import crew
from moesaic.orchestrator.memory import Sizes, predict_memory
from moesaic.orchestrator.pool import Task
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.reductions import ReducedBank
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.statistics import SiteStats, load_stats, ranges, squared_gradients
from moesaic.orchestrator.store import Entry, Store
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.walk import Walk
from moesaic.orchestrator.worker import WorkerState
from tests.orchestrator.conftest import MakeWalk
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder

SEQUENCES, LENGTH, SHARDS, BLOCKS, KEPT = 5, 9, 3, 2, 1
VOCABULARY = 97
WALK: dict[str, Any] = {
    "shards": SHARDS,
    "needs": ("tokens",),
    "gradients": KEPT,
    "fisher": True,
}


@pytest.fixture
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


def run(walk: Walk, workers: int = 1) -> list[SiteStats]:
    """Forward and back; what the reverse pass left of every block."""
    spans = ranges(walk.shards, workers)
    states = [WorkerState(1) for _ in spans]
    for block in range(BLOCKS):
        for state, span in zip(states, spans, strict=True):
            calibrate.forward(state, asdict(walk), block, span)
    for block in reversed(range(BLOCKS)):
        for state, span in zip(states, spans, strict=True):
            gradients.reverse(state, asdict(walk), block, span)
        sums.reduce(WorkerState(1), asdict(walk), "gradients", block)
    found = []
    for block in range(BLOCKS):
        entry = Store(Path(walk.store)).get("gradients", walk.gradients_key(block))
        assert entry is not None
        found.append(load_stats(entry.path))
    return found


def by_autograd(walk: Walk, ids: Tensor, folder: Path) -> StreamedModel:
    """A checkpoint that holds every weight's squared gradients, computed in float64, in its place.

    So the family tells which tensor is whose, as it does for weights.
    """
    model = AutoModelForCausalLM.from_pretrained(
        walk.model, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for shard in range(SHARDS):
        row = walk.shard_rows(shard)[0]
        logits = model(ids[row : row + 1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[row, 1:], reduction="sum")
        model.zero_grad()
        loss.backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                squares[name] += value.grad.square()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(squares[name])
    model.float().save_pretrained(folder)
    return StreamedModel(Checkpoint(folder))


def test_gradients_that_overflow_are_told_with_the_site_and_where_to_look(
    make_walk: MakeWalk, tmp_path: Path
) -> None:
    walk = make_walk("llama")
    model = AutoModelForCausalLM.from_pretrained(walk.model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e22)
        model.lm_head.weight.mul_(1e-3)
    model.save_pretrained(tmp_path / "loud")
    told = (
        r"^\S+loud: block 1: fisher of model\.layers\.1\.\S+\|\S+ overflow: look at the weights"
        r" behind it for values that are far too large$"
    )
    with pytest.raises(RunError, match=told):
        run(replace(walk, model=str(tmp_path / "loud")))
    assert not list((Path(walk.store) / "gradients").rglob("*.safetensors"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_oss"])
def test_sums_are_those_of_autograd_through_the_whole_model(
    make_walk: MakeWalk, ids: Tensor, tmp_path: Path, model_type: str
) -> None:
    walk = make_walk(model_type)
    found = run(walk)
    reference = by_autograd(walk, ids, tmp_path / "squares")
    checked = 0
    for unit in reference.units():
        for member, squares in reference.read_unit(unit).items():
            expected = squares.double().sum(-2)  # [*batch, in]
            fisher = found[unit.block][f"{unit.name}|{member}"]["fisher"].double()
            assert fisher.shape == expected.shape and expected.max() > 0
            close = {"rtol": 2e-3, "atol": 1e-6 * float(expected.max())}
            torch.testing.assert_close(fisher, expected, **close)
            if unit.kind == "bank":  # an expert that no sequence reached
                idle = expected.sum(-1) == 0
                assert torch.equal(fisher[idle], expected[idle])
            checked += 1
    assert checked >= 14


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    make_walk: MakeWalk, tmp_path: Path, workers: int
) -> None:
    one, many = make_walk(), make_walk(store=str(tmp_path / "other"))
    run(one)
    run(many, workers)

    def files(walk: Walk) -> dict[str, bytes]:
        paths = Path(walk.store).glob("gradients/*/*.safetensors")
        return {path.name: path.read_bytes() for path in paths}

    assert len(files(one)) == BLOCKS and files(one) == files(many)


def test_other_recipes_sums_are_what_they_were(make_walk: MakeWalk) -> None:
    """Nothing but the Fisher information is added, and nothing else has another value."""
    walk, plain = make_walk(), make_walk(fisher=False)
    for more, less in zip(run(walk), run(plain), strict=True):
        assert more.keys() == less.keys()
        for name, stats in less.items():
            assert stats.sums.keys() == {"grad_tokens", "grad_sq"}
            extra = set() if name.endswith("|output") else {"fisher"}
            assert more[name].sums.keys() == stats.sums.keys() | extra
            assert more[name].sums.keys() <= OUTPUT_STATISTICS.keys()
            for key, value in stats.sums.items():
                assert torch.equal(more[name][key], value)
    assert walk.stats_key(0) == plain.stats_key(0)
    assert walk.gradients_key(0) != plain.gradients_key(0) and walk.scratch != plain.scratch


@pytest.mark.parametrize(
    ("tokens", "out", "inputs"), [(1, 7, 5), (3, 40, 30), (50, 7, 5), (0, 4, 6)]
)
def test_both_ways_to_the_squares_give_the_definition(tokens: int, out: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    g = torch.randn(tokens, out, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator)
    x[:, 2] = 0
    expected = (g.double().T @ x.double()).square().sum(0)
    found = squared_gradients(g, x)
    assert found[2] == 0 and bool((found >= 0).all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_merged_experts_have_the_sums_of_those_that_went_into_them() -> None:
    """Channels are what gate and up give, and what down reads."""
    hidden, width, kept = 5, 4, 2
    shapes = {"gate": (2, kept, hidden), "up": (2, kept, hidden), "down": (2, hidden, kept)}
    channels = torch.tensor([[0, 3], [1, 2], [2, 0]])
    bank = ReducedBank(
        unit=Unit("bank", "bank", 0, "experts", shapes, {}),
        members={},
        side={},
        group=torch.tensor([1, 0, 1]),
        channels=channels,
        error=torch.zeros(hidden),
        norm=torch.zeros(hidden),
        entry=Entry(Path(), 0, {}),
    )
    inner, outer = torch.rand(3, width), torch.rand(3, hidden)
    up = Stats({"grad_tokens": torch.tensor([1, 2, 4]), "grad_sq": inner, "fisher": outer})
    down = Stats({"grad_tokens": torch.tensor([1, 2, 4]), "grad_sq": outer, "fisher": inner})
    found = bank.gradients({"bank|gate": up, "bank|up": up, "bank|down": down}, "bank")
    cut = inner.gather(1, channels)
    inside, outside = (torch.stack([v[1], v[0] + v[2]]) for v in (cut, outer))
    for member in shapes:
        squares, fisher = (outside, inside) if member == "down" else (inside, outside)
        own = found[f"bank|{member}"]
        assert own["grad_tokens"].tolist() == [2, 5]
        torch.testing.assert_close(own["grad_sq"], squares)
        torch.testing.assert_close(own["fisher"], fisher)


# Whole runs

FWSVD = {"method": "fwsvd", "rank": [6, 10]}
CHOICES: dict[str, Any] = {
    "candidates": [{"method": "svd", "rank": [6, 10]}, FWSVD],
    "baselines": None,
    "budget": {"bits_per_weight": 9},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make_model_folder(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return model


@pytest.fixture
def make_project(
    tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Project]:
    def make(name: str = "one", model_type: str = "qwen3_moe", **changes: Any) -> Project:
        project = Project(tmp_path / name, models(model_type), monkeypatch)
        project.write(**{**CHOICES, **changes})
        return project

    return make


def made_by(project: Project) -> dict[str, set[str]]:
    """Unit → methods that it was compressed by."""
    found: dict[str, set[str]] = {}
    for row in pd.read_parquet(project.output / "measurements.parquet").to_dict("records"):
        found.setdefault(row["unit"], set()).update(s["method"] for s in json.loads(row["specs"]))
    return found


def test_a_run_chooses_between_plain_and_weighted_factors(
    make_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project()
    waited = {"svd": 0, "fwsvd": 0}
    released = Calibration._released

    def recorded(calibration: Calibration) -> list[Task]:
        found = released(calibration)
        for task in found:
            job = task.arguments["job"]
            (method,) = {m for own in job["missing"].values() for links, _ in own for m, _ in links}
            assert job["block"] in calibration.stats
            # Jobs that want nothing of the reverse pass do not wait for it.
            assert (job["block"] in calibration.gradients) == (method == "fwsvd")
            waited[method] += 1
        return found

    monkeypatch.setattr(Calibration, "_released", recorded)
    project.run(size=2, stages=("evaluate",))
    assert waited["svd"] == waited["fwsvd"] >= 2 * 3
    units = made_by(project)
    assert units and all(found >= {"svd", "fwsvd"} for found in units.values())
    scores = project.json("scores.json")
    assert scores["plan"]["bytes"] <= project.json("plan.json")["budget_bytes"]
    _, calls = project.run(stages=("evaluate",))
    assert calls.total() == 0


def test_recipes_that_need_no_fisher_information_collect_none(
    make_project: Callable[..., Project],
) -> None:
    project = make_project(candidates=[{"method": "svd", "rank": [6, 10]}])
    project.run(stages=("search",))
    (path, *_) = project.folder.glob("store/gradients/*/*.safetensors")
    assert all("fisher" not in stats for stats in load_stats(path).values())


def test_a_killed_run_leaves_the_bytes_of_one_that_was_not(
    make_project: Callable[..., Project],
) -> None:
    changes = {"model_type": "llama", "candidates": [{**FWSVD, "rank": 6}]}
    whole, killed = make_project("one", **changes), make_project("two", **changes)
    _, calls = whole.run(stages=("search",))
    assert calls["gradients:reverse"] == calls["calibrate:forward"] == BLOCKS
    # With two workers: in the reverse pass, and after one of its sums.
    for kill_at, reversed_before in ((8, 1), (4, 2)):
        with pytest.raises(Killed):
            killed.run(size=2, kill_at=kill_at, stages=("search",))
        assert killed.calls["gradients:reverse"] == reversed_before
    killed.run(size=3, stages=("search",))
    for kind in ("gradients", "pieces"):
        one, two = (
            {p.name: p.read_bytes() for p in project.folder.glob(f"store/{kind}/*/*.safetensors")}
            for project in (whole, killed)
        )
        assert one and one == two


def test_it_goes_with_propagation_and_after_a_reduction(
    make_project: Callable[..., Project],
) -> None:
    """The information is always that of the dense model."""
    project = make_project(
        candidates=[FWSVD, [{"method": "reap", "keep": 0.5}, FWSVD]], propagate=True
    )
    project.run(stages=("evaluate",))
    assert project.json("scores.json")["plan"]["kl"] > 0


def test_a_forecast_reckons_with_the_second_loss(make_project: Callable[..., Project]) -> None:
    found = []
    for name, candidates in (("one", [{**FWSVD, "method": "svd"}]), ("two", [FWSVD])):
        project = make_project(name, candidates=candidates)
        experiment = Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
        sizes = Sizes(experiment, crew(experiment.recipe.compute, experiment.workers_per_gpu))
        found.append(predict_memory(sizes))
    for part in ("statistics", "hidden states", "activations"):
        assert found[1]["gradients"][part] > found[0]["gradients"][part]
    assert found[1]["calibrate"] == found[0]["calibrate"]


def test_no_reverse_pass_is_told_in_one_line(make_project: Callable[..., Project]) -> None:
    project = make_project(calibration={"gradient_sequences": 0})
    with pytest.raises(UserError) as failure:
        Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
    (line,) = str(failure.value).splitlines()
    assert line == (
        "calibration.gradient_sequences: 0, but fwsvd needs gradients: give 16 or more, or take"
        " fwsvd out"
    )
