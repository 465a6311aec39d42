"""When Ray starts before the driver is ready, and when it does not."""

from pathlib import Path
from typing import Any

import pytest

from moesaic.orchestrator import headstart
from moesaic.orchestrator.errors import RecipeError, RunError
from moesaic.orchestrator.headstart import head_start
from tests.orchestrator.projects import make_model_folder, make_recipe

DRIVER = "json"


class Recorder:
    """A pool that only notes what is asked of it."""

    calls: list[str]
    failure: Exception | None = None

    def __init__(self, compute: Any) -> None:
        type(self).calls = []

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *failure: object) -> None:
        self.calls.append("close")

    def begin(self) -> None:
        self.calls.append("begin")
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(headstart, "Pool", Recorder)
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    return make_recipe(tmp_path, make_model_folder(tmp_path / "model", "qwen3_moe"))


def test_a_run_with_all_to_do_starts_workers_at_once_and_ends_them(recipe: Path) -> None:
    with head_start(recipe, recipe.parent / "run", DRIVER) as pool:
        assert isinstance(pool, Recorder) and pool.calls == ["begin"]
    assert Recorder.calls == ["begin", "close"]


def test_a_run_that_may_have_nothing_to_do_starts_nothing(recipe: Path) -> None:
    (recipe.parent / "store" / "pieces").mkdir(parents=True)
    with head_start(recipe, recipe.parent / "run", DRIVER) as pool:
        assert pool is None
    assert Recorder.calls == []


def test_a_cluster_is_left_until_the_recipe_was_checked(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with head_start(recipe, None, DRIVER) as pool:
        assert pool is None
    assert Recorder.calls == []


@pytest.mark.parametrize("failure", [RunError("no Ray"), RecipeError("too many workers")])
def test_what_fails_is_left_to_the_run_to_tell(
    recipe: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "failure", failure)
    with head_start(recipe, recipe.parent / "run", DRIVER) as pool:
        assert pool is None
    assert Recorder.calls == ["begin", "close"]
