"""What was finished is not done again, whatever killed a run or damaged its store."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import assemble as assemble_module
from moesaic.orchestrator import run
from moesaic.orchestrator.errors import RunError, UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import load_recipe
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_model_folder(tmp_path_factory.mktemp(name), name)
        for name in ("qwen3_moe", "llama")
    }


@pytest.fixture
def project(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "one", models["qwen3_moe"], monkeypatch)
    made.write()
    return made


@pytest.fixture(scope="module")
def complete(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Counter[str]]:
    """Folder of a project whose run nobody disturbed, and how often it called what."""
    with pytest.MonkeyPatch.context() as patch:
        made = Project(tmp_path_factory.mktemp("complete"), models["qwen3_moe"], patch)
        made.write()
        _, calls = made.run()
    return made.folder, calls


def others(one: dict[str, bytes], two: dict[str, bytes]) -> set[str]:
    """Files that differ. The card holds the recipe as resolved, and so the folder that it lies
    in."""
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} - {
        "README.md"
    }


@pytest.fixture
def finished(
    tmp_path: Path,
    models: dict[str, Path],
    complete: tuple[Path, Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """A copy of it."""
    folder, calls = complete
    made = Project(tmp_path / "one", models["qwen3_moe"], monkeypatch)
    shutil.copytree(folder, made.folder)
    made.write()
    made.calls = calls
    return made


def test_several_workers_leave_the_bytes_of_one(
    finished: Project, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write()
    other.run(size=3)
    one, two = finished.left(), other.left()
    assert one.keys() >= {"plan.json", "model.safetensors", "config.json", "README.md"}
    assert not others(one, two)


def test_nothing_is_done_again(finished: Project) -> None:
    assert {name.partition(":")[2] for name in finished.calls} == {
        "forward",
        "reverse",
        "compress_job",
        "evaluate_rows",
    }
    left, scores = finished.left(), finished.json("scores.json")
    _, calls = finished.run(size=2)
    assert calls.total() == 0
    assert not others(finished.left(), left)
    assert finished.json("scores.json") == scores


def test_another_budget_is_only_a_choice_among_finished_pieces(finished: Project) -> None:
    before = finished.json("plan.json")
    finished.write(budget={"bits_per_weight": 6.5})
    _, calls = finished.run()
    assert calls.keys() <= {"evaluate:evaluate_rows"}
    after = finished.json("plan.json")
    assert before["bytes"] < after["bytes"] <= after["budget_bytes"]
    assert after["loss"] < before["loss"]


def test_another_candidate_is_measured_alone(finished: Project) -> None:
    candidates = [
        {"method": "rtn", "bits": [3, 8, 5], "group_size": 16},
        {"method": "gptq", "bits": 4, "group_size": 16},
    ]
    before = set((finished.folder / "store").glob("pieces/*/*.safetensors"))
    finished.write(candidates=candidates)
    _, calls = finished.run(stages=("measure",))
    assert calls.keys() == {"measure:compress_job"}
    added = set((finished.folder / "store").glob("pieces/*/*.safetensors")) - before
    experiment = Experiment(load_recipe(finished.folder / "recipe.yaml"), finished.output)
    assert len(added) == len(experiment.units)


@pytest.mark.parametrize("kind", ["pieces", "errors", "stats", "gradients"])
def test_a_damaged_entry_is_made_again_and_changes_nothing(finished: Project, kind: str) -> None:
    left = finished.left()
    path = sorted((finished.folder / "store").glob(f"{kind}/*/*.safetensors"))[0]
    good = path.read_bytes()
    path.write_bytes(good[:-2] + bytes(byte ^ 0xFF for byte in good[-2:]))
    _, calls = finished.run()
    needed = {
        "pieces": {"compress_job"},
        "errors": {"compress_job"},
        "stats": {"forward"},
        "gradients": {"forward", "reverse"},
    }
    assert {name.partition(":")[2] for name in calls} == needed[kind]
    assert path.read_bytes() == good
    assert not others(finished.left(), left)


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
    assert not others(project.left(), other.left())
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
    rename, written, kills = Path.replace, 0, 0

    def die_sometimes(temporary: Path, target: Path) -> Path:
        nonlocal written
        written += 1
        if written == 31 + kills % 3:
            raise Killed
        return rename(temporary, target)

    monkeypatch.setattr(Path, "replace", die_sometimes)
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
    assert not others(project.left(), other.left())
    assert not [p for p in (other.folder / "store").rglob("*") if ".tmp-" in p.name]


@pytest.mark.parametrize("calls", [4, 9])
def test_damaged_unfinished_work_is_made_anew(
    finished: Project,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
) -> None:
    """Every file of it is cut off; a run may stop once for each, but must not stop for ever."""
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write()
    with pytest.raises(Killed):
        other.run(size=2, kill_at=calls)
    files = [path for path in (other.folder / "store" / "scratch").glob("*/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for _ in range(1 + len(files)):
        try:
            other.run(size=2)
        except RunError as error:
            assert "run the same command again" in str(error) or "missing" in str(error)
        else:
            break
    assert not others(finished.left(), other.left())


def test_a_run_killed_between_two_stages_ends_with_the_same_bytes(
    finished: Project, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the search, then when the evaluation, has just put its result in place."""
    whole = finished.calls
    other = Project(tmp_path / "two", models["qwen3_moe"], monkeypatch)
    other.write()
    rename, done = Path.replace, Counter[str]()
    for name in ("plan.json", "scores.json"):

        def die(temporary: Path, target: Path, name: str = name) -> Path:
            rename(temporary, target)
            if target == other.output / name:
                raise Killed
            return target

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", die)
            other.run()
        done += other.calls
        assert (other.output / name).exists() and not (other.output / "model").exists()
    other.run()
    assert done + other.calls == whole
    assert not others(finished.left(), other.left())


def test_the_checkpoint_assembled_alone_is_that_of_the_run(project: Project) -> None:
    project.run(stages=("assemble",))
    assert "perplexity" not in (project.output / "model" / "README.md").read_text(encoding="utf-8")
    project.run()
    left = project.left()
    project.run(stages=("assemble",))
    assert project.left() == left


def test_a_wrong_checkpoint_does_not_take_the_place_of_a_good_one(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {name: data for name, data in finished.left().items() if name != "plan.json"}
    finished.write(budget={"bits_per_weight": 6.5})
    write = assemble_module._write_shards

    def break_last_tensor(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-2000] + bytes(2000))

    monkeypatch.setattr(assemble_module, "_write_shards", break_last_tensor)
    with pytest.raises(RunError) as error:
        finished.run()
    message = str(error.value)
    assert message.startswith(
        f"{finished.output / 'model'}: read by transformers, its logits differ"
    )
    assert message.endswith("what was written is removed; the earlier one is still there")
    left = finished.left()
    assert left.pop("plan.json") and left == model
    assert not list(finished.output.glob(".*"))
    monkeypatch.undo()
    finished.run()
    assert finished.left()["model.safetensors"] != model["model.safetensors"]


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
