"""A model that only the driver's node has: a real cluster whose second node sees other folders.

The second node is a raylet in a mount namespace, where one folder is empty and one holds another
model.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from moesaic.orchestrator import run
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.cluster import connect
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.model_source import (
    DriverFiles,
    FolderReader,
    ModelPlace,
    ModelSource,
    model_files,
    offer_model,
)
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.remote_model import (
    ComparedCheckpoint,
    FetchedCheckpoint,
    open_checkpoint,
)
from moesaic.orchestrator.shared import CachePlace
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder
from tests.orchestrator.remote import MANY

WEIGHTS = "tests.orchestrator.pool_tasks:weights"
_RAY = 'import sys; from ray.scripts.scripts import main; sys.argv[0] = "ray"; main()'
# Empties the first folder, puts the second in the place of the third, and becomes what follows.
_ELSEWHERE = 'mount -t tmpfs none "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that the second node does not have, and one in whose place it has another."""
    root = tmp_path_factory.mktemp("models")
    here = make_model_folder(root / "here", "llama", max_shard_size="20KB")
    other = make_model_folder(root / "other", "llama", hidden_size=32, intermediate_size=64)
    return here, other


@pytest.fixture(scope="module")
def second(
    cluster: Cluster, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The second node, with one core."""
    here, other = models
    longer = make_model_folder(tmp_path_factory.mktemp("longer"), "llama")
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "-r", "--mount"]
    if subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "none", str(here)], check=False
    ).returncode:
        pytest.skip("no mount namespaces here")
    command = [*unshare, "sh", "-c", _ELSEWHERE, "sh", str(here), str(longer), str(other)]
    command += [sys.executable, "-c", _RAY, "start", "--block", f"--address={cluster.address}"]
    command += ["--num-cpus=1", f"--object-store-memory={100 << 20}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]
    try:
        yield
    finally:
        own = psutil.Process(process.pid)
        for each in [*own.children(recursive=True), own]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(30)


@contextlib.contextmanager
def two_nodes(cluster: Cluster, model: Path, cache: Path) -> Iterator[Pool]:
    connect(Compute(address=cluster.address))
    until = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) < 2:
        assert time.monotonic() < until, "the second node did not come"
        time.sleep(0.2)
    with Pool(Compute(address=cluster.address, workers=2), place_of(model, cache)) as pool:
        yield pool


def test_a_node_without_the_model_fetches_it_from_the_driver(
    cluster: Cluster,
    second: None,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[dict[str, Any]] = []
    model, cache = models[0], tmp_path / "cache"

    def done(result: dict[str, Any]) -> tuple[()]:
        found.append(result)
        return ()

    with two_nodes(cluster, model, cache) as pool:
        assert pool.size == 2
        pool.run(
            [Task(WEIGHTS, {"model": str(model)}, "all", affinity=n, done=done) for n in (0, 1)]
        )
    own, fetched = sorted(found, key=lambda result: result["path"] != str(model))
    assert own["path"] == str(model) and own["node"] != fetched["node"]
    checkpoint = Checkpoint(model)
    assert (
        own["sums"]
        == fetched["sums"]
        == {name: float(checkpoint.read(name).double().sum()) for name in checkpoint.names()}
    )
    copies = Path(fetched["path"])
    assert copies.is_relative_to(cache)
    for file in checkpoint.files:
        assert (copies / file.name).read_bytes() == file.read_bytes()
    lines = [line for line in capsys.readouterr().err.splitlines() if "fetches" in line]
    assert len(lines) == 1 and f"does not have {model}: it fetches what it needs" in lines[0]


def test_a_run_of_which_one_node_fetches_leaves_the_bytes_of_another(
    cluster: Cluster,
    second: None,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Walk, reverse pass and compression on both nodes; a worker that fetches is killed."""
    alone = Project(tmp_path / "alone", models[0], monkeypatch)
    alone.write()
    alone.run(stages=("assemble",))
    both = Project(tmp_path / "both", models[0], monkeypatch)
    compute = {"address": cluster.address, "workers": 2}
    recipe = both.write(compute={**compute, "dtype": "float32"})
    with two_nodes(cluster, models[0], tmp_path / "cache") as pool:
        assert pool.size == 2
        fetching = next(slot for slot in pool.roster.slots if slot.node != ray_node())
        fetching.actor.__ray_call__.remote(lambda worker: os.kill(os.getpid(), 9))
        run.run_recipe(recipe, both.output, ("assemble",), pool=pool)
        assert pool.replaced == 1
    left = [{**project.left(), "README.md": b""} for project in (both, alone)]  # has the recipe
    assert left[0] == left[1]


def ray_node() -> str:
    own: str = ray.get_runtime_context().get_node_id()
    return own


def test_a_node_with_another_model_in_the_folder_is_refused(
    cluster: Cluster, second: None, models: tuple[Path, Path], tmp_path: Path
) -> None:
    model = models[1]
    with two_nodes(cluster, model, tmp_path) as pool, pytest.raises(RunError) as error:
        _ = pool.size
    text = str(error.value)
    assert text.startswith(f"{model}/") and "give all nodes the same" in text and "\n" not in text


def place_of(model: Path, cache: Path, code: bool = False) -> ModelPlace:
    weights = [file.name for file in Checkpoint(model).files]
    return ModelPlace(model, CachePlace(cache, MANY), weights, code)


@pytest.fixture
def source(cluster: Cluster, models: tuple[Path, Path], tmp_path: Path) -> Iterator[ModelSource]:
    connect(Compute(address=cluster.address))
    found = offer_model(place_of(models[0], tmp_path / "cache"))
    assert found is not None
    yield found
    found.close()


def test_parts_of_files_are_those_of_the_files(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, folder = DriverFiles(source), source.place.folder
    name = Checkpoint(folder).files[0].name
    whole = (folder / name).read_bytes()
    assert files.cat_file(f"/{name}") == whole
    assert files.cat_file(f"/{name}", start=8, end=20) == whole[8:20]
    assert files.cat_file(f"/{name}", start=len(whole) - 3, end=len(whole) + 9) == whole[-3:]
    for size in (1000, len(whole), 1 << 20):
        monkeypatch.setattr("moesaic.orchestrator.model_source._PART_BYTES", size)
        files.get_file(f"/{name}", str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == whole


def test_a_source_that_dies_is_started_anew(source: ModelSource) -> None:
    found = FetchedCheckpoint(source)
    pid = ray.get(source.actor.__ray_call__.remote(lambda reader: os.getpid()))
    psutil.Process(pid).kill()
    name = found.names()[0]
    assert found.read(name).equal(Checkpoint(source.place.folder).read(name))


def test_a_model_that_changes_meanwhile_ends_the_run(
    cluster: Cluster, models: tuple[Path, Path], tmp_path: Path
) -> None:
    model = make_model_folder(tmp_path / "model", "llama")
    connect(Compute(address=cluster.address))
    source = offer_model(place_of(model, tmp_path / "cache"))
    assert source is not None
    try:
        found = FetchedCheckpoint(source)
        (file,) = Checkpoint(model).files
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(RunError, match="changed while the model was read"):
            found.read(found.names()[0])
    finally:
        source.close()


def test_files_of_the_same_size_are_compared_before_they_are_read(source: ModelSource) -> None:
    """As on a node that has a copy of the folder, with a value that differs."""
    elsewhere, folder = replace(source, node="another"), source.place.folder
    (file, *_) = Checkpoint(folder).files
    raw = file.read_bytes()
    file.write_bytes(raw)  # the same content, at another time
    checkpoint = open_checkpoint(folder, elsewhere)
    assert isinstance(checkpoint, ComparedCheckpoint)
    for name in checkpoint.names():
        assert checkpoint.read(name).equal(Checkpoint(folder).read(name))
    other = bytearray(raw)
    other[-1] ^= 1
    file.write_bytes(other)
    try:
        assert not elsewhere.is_needed()
        checkpoint = open_checkpoint(folder, elsewhere)
        name = next(name for name, entry in checkpoint.entries().items() if entry.file == file)
        with pytest.raises(RunError, match=f"{file.name}: is another file on node .* fetched"):
            checkpoint.read(name)
        file.write_bytes(raw[:-1])
        with pytest.raises(RunError, match=f"{file.name}: is another file on node"):
            elsewhere.is_needed()
        file.unlink()
        assert elsewhere.is_needed()
    finally:
        file.write_bytes(raw)


def test_only_the_files_of_the_model_are_offered(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "llama", max_shard_size="20KB")
    expected = {file.name for file in folder.iterdir()}
    (folder / "runs" / "mine").mkdir(parents=True)
    for name in ("runs/mine/log.txt", "runs/x.safetensors", "other.safetensors", "code.py"):
        (folder / name).write_text("1")
    assert model_files(place_of(folder, tmp_path)).keys() == expected
    trusted = model_files(place_of(folder, tmp_path, code=True))
    assert trusted.keys() == {*expected, "code.py"}


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hosts", "notes.json", ""])
def test_nothing_but_the_model_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.json").write_text("{}")
    reader = FolderReader(tmp_path / "model", ["config.json"])
    with pytest.raises(FileNotFoundError):
        reader.about(name)
    with pytest.raises(FileNotFoundError):
        reader.part(name, 0, 9)


def test_code_that_belongs_to_the_model_is_fetched_too(cluster: Cluster, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / ("long name " * 20), "llama")
    (folder / "modeling.py").write_text("answer = 42\n")
    connect(Compute(address=cluster.address))
    source = offer_model(place_of(folder, tmp_path / "cache", code=True))
    assert source is not None
    try:
        found = FetchedCheckpoint(source)
        assert (found.path / "modeling.py").read_text() == "answer = 42\n"
    finally:
        source.close()
