"""Files that this user may not read or write: one line that names the path, exit status 2.

Root may do everything, so its tests give that up meanwhile.
"""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from moesaic.orchestrator import cli
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.forecast import inspect_model
from moesaic.orchestrator.recipe import Recipe, load_recipe
from moesaic.orchestrator.run_folder import LOCK, run_folder
from moesaic.orchestrator.store import SEAL, Store
from moesaic.orchestrator.streaming import StreamedModel
from tests.orchestrator.projects import make_model_folder, make_recipe
from tests.orchestrator.test_loop import Scripted, tasks

# Of Linux: to pass by the rights of files; see capabilities(7).
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A model folder and a recipe of it."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model_folder(folder / "model")
    return model, load_recipe(make_recipe(folder / "recipe", model))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; what rights say counts meanwhile, also for root."""
    libc, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0
    yield tmp_path
    sets[0] = effective
    assert libc.capset(header, sets) == 0
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o700)  # pytest removes it


def refused(work: Callable[[], Any], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the command line tells of ``path`` in one line."""
    capsys.readouterr()
    with pytest.raises(cli.typer.Exit) as exit:
        cli._answer(work, False, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and "Permission denied" in line, line
    assert exit.value.exit_code == 2


@pytest.mark.parametrize(
    ("closed", "told"),
    [
        (".", "model"),
        ("..", "model"),
        ("config.json", "model/config.json"),
        ("model.safetensors", "model/model.safetensors"),
    ],
)
def test_a_model_that_may_not_be_read_is_refused(
    place: Path,
    made: tuple[Path, Recipe],
    capsys: pytest.CaptureFixture[str],
    closed: str,
    told: str,
) -> None:
    copied = place / "above" / "model"
    shutil.copytree(made[0], copied)
    (copied / closed).resolve().chmod(0)
    with pytest.raises(UserError):
        Checkpoint(copied)
    refused(lambda: Checkpoint(copied), copied.parent / told, capsys)
    refused(lambda: inspect_model(str(copied)), copied.parent / told, capsys)


def test_weights_that_may_no_longer_be_read_are_refused(
    place: Path, made: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    copied = place / "model"
    shutil.copytree(made[0], copied)
    model = StreamedModel(Checkpoint(copied))
    (copied / "model.safetensors").chmod(0)
    refused(lambda: model.read_unit(model.units()[0]), copied / "model.safetensors", capsys)


def test_a_store_that_may_not_be_read_or_tidied_up_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "ab" * 20
    store = Store(place / "store")
    store.put("pieces", key, lambda path: path.write_text("x") and None, {})
    entry = store.path("pieces", key)
    seal = entry.with_name(entry.stem + SEAL)
    seal.chmod(0)
    refused(lambda: Store(place / "store").get("pieces", key), seal, capsys)
    seal.chmod(0o666)
    entry.parent.chmod(0o555)
    refused(lambda: Store(place / "store").gc([], -10.0), entry.parent, capsys)


def test_a_lock_that_may_not_be_read_is_refused(
    place: Path, made: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / LOCK).write_text("{}")
    (place / LOCK).chmod(0)

    def work() -> None:
        with run_folder(place, made[1]):
            raise AssertionError

    refused(work, place / LOCK, capsys)


def test_what_a_worker_may_not_read_is_told_with_its_task() -> None:
    cause = PermissionError(13, "Permission denied", "/data/x")
    pool = Scripted(["a"], lambda *_: (1.0, RayTaskError("work", "traceback", cause)))
    with pytest.raises(UserError, match=r"^x: /data/x: Permission denied \(for user \d+\): change"):
        pool.run(tasks(["x"], []))
