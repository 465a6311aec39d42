"""Garbage is not collected under a run at work."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.orchestrator import run
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.run_folder import LOCK, run_folder
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import emptied


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    with emptied(monkeypatch):
        yield Project(tmp_path, make_model_folder(tmp_path / "model", "llama"), monkeypatch)


RTN = {"method": "rtn", "bits": [3, 8], "group_size": 16}


@pytest.mark.parametrize("where", ["store", None, "faulty://bucket/at-work"])
def test_a_run_at_work_is_not_robbed(project: Project, where: str | None) -> None:
    """With a store beside ``runs``, in it (the default), and at a URL."""
    project.write(store=where, candidates=[RTN], baselines={})
    project.run(stages=("calibrate",))
    recipe = load_recipe(project.folder / "recipe.yaml")
    store = recipe.store_beside(project.output)
    other = project.folder / "runs" / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    with run_folder(other, recipe):
        for kept in ([], [project.output]):
            with pytest.raises(UserError) as error:
                run.collect_garbage(store, kept, -60)
            assert str(error.value).startswith(f"{other}: a run is at work there and may need")
            assert f"add --keep {other}, or wait" in str(error.value)
            assert "\n" not in str(error.value)
        run.collect_garbage(store, [project.output, other], -60)
        # Who cannot tell does not remove.
        (other / "recipe.yaml").write_text("[")
        with pytest.raises(UserError, match="a run is at work there"):
            run.collect_garbage(store, [project.output], -60)
        # One with a store of its own is in nobody's way.
        changed = recipe.model_copy(update={"store": str(project.folder / "another")})
        (other / "recipe.yaml").write_text(changed.to_yaml(), encoding="utf-8")
        run.collect_garbage(store, [project.output], -60)
    (other / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert run.collect_garbage(store, [], -60)[0] > 0


def test_the_lock_of_a_run_that_was_killed_holds_nobody_up_for_long(project: Project) -> None:
    project.write(candidates=[RTN], baselines={})
    project.run(stages=("calibrate",))
    lock = project.output / LOCK
    lock.write_text('{"host": "elsewhere"}')
    with pytest.raises(UserError, match="a run is at work there"):
        run.collect_garbage(project.folder / "store", [], 0)
    before = lock.stat().st_mtime - 61
    os.utime(lock, (before, before))
    assert run.collect_garbage(project.folder / "store", [], -60)[0] > 0
    assert sorted(path.name for path in project.output.glob(f"{LOCK}*")) == [LOCK]
