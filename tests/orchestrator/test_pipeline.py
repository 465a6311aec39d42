"""From a recipe to a checkpoint, without Ray: what a run leaves, and what it does not do twice."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from moesaic.methods.base import Spec, chain_text
from moesaic.orchestrator import run, store
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import load_recipe
from tests.orchestrator.inline import InlinePool, Killed
from tests.orchestrator.projects import make_model_folder, make_recipe

STAGES = ("evaluate", "assemble")
# Whole rows and symmetric: what transformers loads as well.
LOADABLE: dict[str, Any] = {
    "candidates": [
        {"method": "rtn", "bits": [3, 8], "group_size": -1, "symmetric": True},
        {"method": "gptq", "bits": 4, "group_size": -1, "symmetric": True},
    ],
    "baselines": {"rtn 4": {"method": "rtn", "bits": 4, "group_size": -1, "symmetric": True}},
    "budget": {"bits_per_weight": 5.5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_model_folder(tmp_path_factory.mktemp(name), name)
        for name in ("qwen3_moe", "llama")
    }


class Project:
    """A folder with a recipe that is run in this process."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.patch = folder, model, patch
        self.output = folder / "runs" / "small"
        self.calls: Counter[str] = Counter()

    def write(self, **changes: Any) -> Path:
        return make_recipe(self.folder, self.model, **changes)

    def run(
        self, size: int = 1, kill_at: int | None = None, stages: tuple[str, ...] = STAGES
    ) -> tuple[dict[str, Any], Counter[str]]:
        """What the run returns, and how often each function was called on a worker."""
        pool = InlinePool(size, kill_at)
        self.calls = pool.calls
        self.patch.setattr(run, "Pool", lambda compute: pool)
        result = run.run_recipe(self.folder / "recipe.yaml", self.output, stages)
        return dict(result), pool.calls

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text(encoding="utf-8"))

    def left(self) -> dict[str, bytes]:
        """Plan and checkpoint. The model card tells the scores, and these how fast it went."""
        files = [self.output / "plan.json", *(self.output / "model").iterdir()]
        return {path.name: path.read_bytes() for path in files}


@pytest.fixture
def project(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "one", models["qwen3_moe"], monkeypatch)
    made.write()
    return made


@pytest.mark.parametrize("serve", ["moesaic", "transformers"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_a_run_leaves_what_it_promises(
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    serve: str,
) -> None:
    project = Project(tmp_path, models[model_type], monkeypatch)
    recipe = load_recipe(project.write(serve=serve, **LOADABLE))
    result, _ = project.run(size=2)
    experiment = Experiment(recipe, project.output)

    plan = project.json("plan.json")
    names = [choice.name for unit in experiment.units for choice in choices(unit)]
    assert list(plan["units"]) == names
    allowed = {(), *recipe.candidates}
    chosen = {
        name: tuple(Spec.of(s["method"], s["options"]) for s in specs)
        for name, specs in plan["units"].items()
    }
    assert set(chosen.values()) <= allowed
    assert len(set(chosen.values())) > 1  # the budget lies between two candidates
    for tie in experiment.ties():
        assert len({chosen[name] for name in tie}) == 1

    weights = list((project.output / "model").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    assert plan["bytes"] == size
    assert plan["budget_bytes"] == experiment.budget.total_bytes >= size
    assert plan["budget_bytes"] - size < 0.1 * size  # and little of it is left over
    assert result["plan"]["bytes"] == size
    assert result["model"] == str(project.output / "model")

    scores = project.json("scores.json")
    assert list(scores) == ["dense", "rtn 4", "plan"] == list(result["scores"])
    for name, score in scores.items():
        assert {"bytes", "bits_per_weight", "perplexity", "kl"} <= score.keys()
        assert math.isfinite(score["kl"]) and score["perplexity"] > 1
        assert (score["kl"] == 0) == (name == "dense")
    assert scores["plan"]["bytes"] == size
    assert scores["dense"]["bits_per_weight"] == 16
    original = [path.stat().st_size for path in project.model.glob("*.safetensors")]
    assert scores["dense"]["bytes"] == sum(original)
    assert 4 < scores["rtn 4"]["bits_per_weight"] < 5.3
    assert scores["plan"]["bits_per_weight"] <= 5.5

    table = pd.read_parquet(project.output / "measurements.parquet")
    dense_offered = serve == "transformers" or model_type == "llama"
    for unit in experiment.units:
        for choice in choices(unit):
            rows = table[table["unit"] == choice.name]
            dense = {()} if dense_offered or unit.kind == "linear" else set()
            wanted = {chain_text(c) for c in {*recipe.chains(), *dense}}
            assert set(rows["chain"]) == wanted and len(rows) == len(wanted)
            assert (rows["bytes"] > 0).all() and (rows["predicted_kl"] >= 0).all()
            least = rows.sort_values("bits_per_weight").iloc[0]
            assert least["predicted_kl"] == rows["predicted_kl"].max()

    again = load_recipe(project.output / "recipe.yaml")
    assert again == recipe


def test_several_workers_leave_the_bytes_of_one(
    project: Project, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run(size=1)
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write()
    other.run(size=3)
    one, two = project.left(), other.left()
    assert one.keys() == two.keys() >= {"plan.json", "model.safetensors", "config.json"}
    different = {name for name in one if one[name] != two[name]}
    # The card holds the recipe as resolved, and so the folder that it lies in.
    assert different <= {"README.md"}


def test_nothing_is_done_again(project: Project) -> None:
    _, calls = project.run()
    assert {name.partition(":")[2] for name in calls} == {
        "forward",
        "reduce",
        "reverse",
        "compress_job",
        "evaluate_rows",
    }
    left, scores = project.left(), project.json("scores.json")
    _, calls = project.run(size=2)
    assert calls.total() == 0
    assert project.left() == left
    assert project.json("scores.json") == scores


def test_another_budget_is_only_a_choice_among_finished_pieces(project: Project) -> None:
    project.run()
    before = project.json("plan.json")
    project.write(budget={"bits_per_weight": 6.5})
    _, calls = project.run()
    assert calls.keys() <= {"evaluate:evaluate_rows"}
    after = project.json("plan.json")
    assert before["bytes"] < after["bytes"] <= after["budget_bytes"]
    assert after["loss"] < before["loss"]


def test_another_candidate_is_measured_alone(project: Project) -> None:
    project.run()
    candidates = [
        {"method": "rtn", "bits": [3, 8, 5], "group_size": 16},
        {"method": "gptq", "bits": 4, "group_size": 16},
    ]
    before = set((project.folder / "store").glob("pieces/*/*.safetensors"))
    project.write(candidates=candidates)
    _, calls = project.run(stages=("measure",))
    assert calls.keys() == {"measure:compress_job"}
    added = set((project.folder / "store").glob("pieces/*/*.safetensors")) - before
    experiment = Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
    assert len(added) == len(experiment.units)


@pytest.mark.parametrize("kind", ["pieces", "errors", "stats", "gradients"])
def test_a_damaged_entry_is_made_again_and_changes_nothing(project: Project, kind: str) -> None:
    project.run()
    left = project.left()
    path = sorted((project.folder / "store").glob(f"{kind}/*/*.safetensors"))[0]
    good = path.read_bytes()
    path.write_bytes(good[:-2] + bytes(byte ^ 0xFF for byte in good[-2:]))
    _, calls = project.run()
    needed = {
        "pieces": {"compress_job"},
        "errors": {"compress_job"},
        "stats": {"forward", "reduce"},
        "gradients": {"forward", "reverse", "reduce"},
    }
    assert {name.partition(":")[2] for name in calls} == needed[kind]
    assert path.read_bytes() == good
    assert project.left() == left


def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    project: Project, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again, each time after three calls of a worker."""
    _, whole = project.run(size=2)
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write()
    done: Counter[str] = Counter()
    kills = 0
    while True:
        try:
            other.run(size=2, kill_at=4)
        except Killed:
            kills += 1
        else:
            break
        finally:
            done += other.calls
    assert kills == (whole.total() - 1) // 3  # not one call was made twice
    assert done == whole
    one, two = project.left(), other.left()
    assert {name for name in one if one[name] != two.get(name)} <= {"README.md"}
    scores = project.json("scores.json")
    for name, score in other.json("scores.json").items():
        assert (score["kl"], score["perplexity"]) == (
            scores[name]["kl"],
            scores[name]["perplexity"],
        )
    assert not list((other.folder / "store" / "scratch").glob("*/*"))


@pytest.mark.parametrize("gradients", [0, 4])
def test_a_run_killed_amid_its_writing_ends_with_the_same_bytes(
    project: Project,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    gradients: int,
) -> None:
    """Each run dies when it has written so many files, wherever that is."""
    changes = {"calibration": {"gradient_sequences": gradients}}
    project.write(**changes)
    project.run()
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write(**changes)
    sync, written, kills = os.fsync, 0, 0

    def die_sometimes(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == 31 + kills % 3:
            raise Killed
        sync(descriptor)

    monkeypatch.setattr(store.os, "fsync", die_sometimes)
    while True:
        written = 0
        try:
            other.run(size=1 + kills % 3)
        except Killed:
            kills += 1
            assert kills < 40
        else:
            break
    assert kills > 3
    one, two = project.left(), other.left()
    assert {name for name in one if one[name] != two.get(name)} <= {"README.md"}
    assert not [p for p in (other.folder / "store").rglob("*") if ".tmp-" in p.name]


@pytest.mark.parametrize("kill_at", [None, 5])
def test_propagated_plans_learn_from_compressed_predecessors(
    project: Project,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int | None,
) -> None:
    plain, _ = project.run()
    keys = set((project.folder / "store").glob("stats/*/*.safetensors"))
    project.write(propagate=True)
    calls: Counter[str] = Counter()
    if kill_at is not None:
        for _ in range(60):
            try:
                propagated, _ = project.run(size=2, kill_at=kill_at)
                break
            except Killed:
                continue
    else:
        propagated, calls = project.run(size=2)
        assert calls["calibrate:forward"] == calls["calibrate:reverse"] == 0
        assert min(calls["calibrate:collect"], calls["calibrate:advance"]) > 0
    # The first block's statistics are the dense model's, the second block's each plan's own.
    assert len(set((project.folder / "store").glob("stats/*/*.safetensors")) - keys) == 2
    assert propagated["plan"]["bytes"] == plain["plan"]["bytes"]
    for name in ("rtn 4", "plan"):
        assert math.isfinite(propagated["scores"][name]["kl"])
    # rtn does not look at statistics; what gptq makes of the second block has changed.
    assert propagated["scores"]["rtn 4"]["kl"] == plain["scores"]["rtn 4"]["kl"]
    left = project.left()
    _, calls = project.run(size=1)
    assert calls.total() == 0
    assert project.left() == left


def test_propagation_gives_other_statistics_after_the_first_block_only(project: Project) -> None:
    project.write(
        propagate=True,
        candidates=[{"method": "gptq", "bits": [3, 4], "group_size": 16}],
        baselines=None,
        budget={"bits_per_weight": 4.5},
    )
    project.run()
    by_block: dict[int, list[Path]] = {}
    for seal in (project.folder / "store").glob("stats/*/*.seal.json"):
        block = json.loads(seal.read_text())["metadata"]["block"]
        by_block.setdefault(block, []).append(
            seal.with_name(seal.name.replace(".seal.json", ".safetensors"))
        )
    assert {block: len(paths) for block, paths in by_block.items()} == {0: 1, 1: 2}
    with safe_open(by_block[1][0], "pt") as one, safe_open(by_block[1][1], "pt") as two:
        names = [key for key in one.keys() if key.endswith("|hessian")]  # noqa: SIM118
        assert len(names) > 2
        for name in names:
            assert not torch.equal(one.get_tensor(name), two.get_tensor(name))


def test_units_that_the_recipe_keeps_stay_as_they_are(project: Project) -> None:
    project.write(keep=["o_proj$", r"layers\.1\.mlp"], budget={"bits_per_weight": 5})
    project.run()
    plan = project.json("plan.json")
    assert not [name for name in plan["units"] if "o_proj" in name or "layers.1.mlp" in name]
    with (
        safe_open(project.model / "model.safetensors", "pt") as old,
        safe_open(project.output / "model" / "model.safetensors", "pt") as new,
    ):
        names = [n for n in old.keys() if "o_proj" in n or "layers.1.mlp.experts" in n]  # noqa: SIM118
        assert len(names) > 10
        for name in names:
            assert torch.equal(old.get_tensor(name), new.get_tensor(name))


@pytest.mark.parametrize("propagate", [False, True])
def test_gc_keeps_what_a_named_run_needs_to_go_on(project: Project, propagate: bool) -> None:
    project.write(propagate=propagate)
    project.run()
    left = project.left()
    folder = project.folder / "store"
    kinds = ("pieces", "errors", "stats", "gradients", "ids")
    before = {path for kind in kinds for path in folder.glob(f"{kind}/*/*")}
    project.write(propagate=propagate, name="other", calibration={"seed": 5})
    other = project.folder / "runs" / "other"
    run.run_recipe(project.folder / "recipe.yaml", other, ("measure",))
    after = {path for kind in kinds for path in folder.glob(f"{kind}/*/*")}
    assert len(after) > len(before)
    removed, freed = run.collect_garbage(folder, [project.output], 0)
    assert removed > 0 < freed
    assert {path for kind in kinds for path in folder.glob(f"{kind}/*/*")} == before
    project.write(propagate=propagate)
    _, calls = project.run()
    assert calls.keys() <= {"evaluate:evaluate_rows"}
    assert project.left().keys() == left.keys()
    assert project.left()["model.safetensors"] == left["model.safetensors"]


def test_gc_of_what_is_no_store_or_no_run_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no store of moesaic"):
        run.collect_garbage(project.folder, [], 0)
    project.run(stages=("calibrate",))
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        run.collect_garbage(project.folder / "store", [tmp_path], 0)


def refused(project: Project, **changes: Any) -> str:
    """The answer to a recipe before anything starts."""
    project.write(**changes)
    with pytest.raises(UserError) as error:
        project.run()
    assert not list((project.folder / "store").glob("stats/*/*"))
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


def test_a_budget_below_the_smallest_plan_is_told_what_would_do(project: Project) -> None:
    message = refused(project, budget={"bits_per_weight": 2})
    assert "too few" in message and "not compressed" in message
    bits = float(message.partition("(")[2].partition(" bits per weight")[0])
    smallest = int(message.partition("allow has ")[2].partition(" bytes")[0].replace(",", ""))
    project.write(budget={"bits_per_weight": bits})
    project.run(stages=("search",))  # what the message says is enough
    assert project.json("plan.json")["bytes"] <= smallest + 1000
    project.write(budget={"bits_per_weight": None, "bytes": smallest})
    project.run(stages=("search",))
    assert project.json("plan.json")["bytes"] <= smallest


def test_a_budget_above_the_dense_model_is_refused(project: Project) -> None:
    message = refused(project, budget={"bits_per_weight": None, "bytes": "1 GB"})
    assert "1,000,000,000 bytes hold the whole dense model" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"candidates": [{"method": "rtn", "bits": 4, "group_size": 32}]},
            ["group", "32", "48", "keep"],
        ),
        ({"keep": ["."]}, ["keep", "no unit"]),
        ({"model": "/no/such/folder"}, ["model", "/no/such/folder"]),
        ({"calibration": {"length": 40000}}, ["calibration", "first.txt", "tokens"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    project: Project, changes: dict[str, Any], words: list[str]
) -> None:
    message = refused(project, **changes)
    for word in words:
        assert word in message


def test_candidates_that_the_target_cannot_load_are_refused_where_none_is_left(
    project: Project,
) -> None:
    asymmetric = {"method": "rtn", "bits": [4, 8], "group_size": 16, "symmetric": False}
    symmetric = {"rtn 4": {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": True}}
    message = refused(project, serve="transformers", candidates=[asymmetric], baselines=symmetric)
    assert "transformers" in message and "symmetric" in message
