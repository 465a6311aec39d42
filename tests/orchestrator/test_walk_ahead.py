"""The walk that goes ahead leaves the bytes of the joint walk, whatever interrupts it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.orchestrator import readahead, sums
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.console import View
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.streaming import StreamedModel
from tests.orchestrator.inline import InlinePool, Killed, stored
from tests.orchestrator.projects import make_model_folder, make_recipe

WALKERS, WORKERS = 2, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe"), num_hidden_layers=3)


def prepared(folder: Path, model: Path, walk: str) -> Experiment:
    compute = {"walk": walk, "walkers": WALKERS, "workers": WORKERS}
    recipe = make_recipe(folder, model, compute=compute, calibration={"gradient_sequences": 8})
    return Experiment(load_recipe(recipe), folder / "runs" / "small")


def calibrated(experiment: Experiment, kill_at: int | None = None) -> InlinePool:
    pool: Any = InlinePool(WORKERS, kill_at)
    Calibration(experiment, pool, View(), {}).run()
    return pool


@pytest.fixture(scope="module")
def joint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    experiment = prepared(tmp_path_factory.mktemp("joint"), model, "joint")
    assert calibrated(experiment).calls["walk_ahead:pass_block"] == 0
    return stored(experiment, "stats", "gradients")


def test_it_leaves_the_same_bytes_and_no_hidden_states(
    model: Path, tmp_path: Path, joint: dict[str, bytes]
) -> None:
    experiment = prepared(tmp_path, model, "ahead")
    calls = calibrated(experiment).calls
    blocks = experiment.model.blocks
    assert calls["walk_ahead:pass_block"] == blocks * WALKERS
    assert calls["calibrate:collect"] == blocks and calls["calibrate:forward"] == 0
    assert stored(experiment, "stats", "gradients") == joint and len(joint) == 2 * blocks
    assert not list(experiment.walk.scratch.glob("*"))


@pytest.mark.parametrize(
    ("kill_at", "then"),
    [(2, "ahead"), (5, "joint"), (7, "ahead"), (9, "joint"), (12, "ahead"), (15, "joint")],
)
def test_it_goes_on_after_a_kill_in_either_way(
    model: Path, tmp_path: Path, joint: dict[str, bytes], kill_at: int, then: str
) -> None:
    with pytest.raises(Killed):
        calibrated(prepared(tmp_path, model, "ahead"), kill_at)
    experiment = prepared(tmp_path, model, then)
    calibrated(experiment)
    assert stored(experiment, "stats", "gradients") == joint


def test_a_joint_walk_that_was_killed_is_gone_on_with_ahead(
    model: Path, tmp_path: Path, joint: dict[str, bytes]
) -> None:
    with pytest.raises(Killed):
        calibrated(prepared(tmp_path, model, "joint"), 6)
    experiment = prepared(tmp_path, model, "ahead")
    calibrated(experiment)
    assert stored(experiment, "stats", "gradients") == joint


def test_statistics_that_are_there_are_not_collected_again(model: Path, tmp_path: Path) -> None:
    experiment = prepared(tmp_path, model, "ahead")
    calibrated(experiment)
    lost = experiment.store.path("stats", experiment.walk.stats_key(1))
    before = lost.read_bytes()
    lost.unlink()
    assert calibrated(experiment).calls["calibrate:collect"] == 1
    assert lost.read_bytes() == before


@pytest.mark.parametrize("walk", ["joint", "ahead"])
def test_sums_that_are_there_are_not_made_again_when_hidden_states_are_lost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: dict[str, bytes], walk: str
) -> None:
    """Hidden states are walked anew for the gradients of one block; no sums of others with them."""
    experiment = prepared(tmp_path, model, walk)
    calibrated(experiment)
    experiment.store.path("gradients", experiment.walk.gradients_key(0)).unlink()
    made: list[tuple[str, int]] = []
    leave = sums.leave_sums

    def counted(walk: Any, what: str, block: int, *rest: Any) -> None:
        made.append((what, block))
        leave(walk, what, block, *rest)

    monkeypatch.setattr(sums, "leave_sums", counted)
    calls = calibrated(experiment).calls
    assert calls["calibrate:forward"] + calls["walk_ahead:pass_block"] > 0
    assert made == [("gradients", 0)] * WALKERS
    assert stored(experiment, "stats", "gradients") == joint


def test_the_walk_waits_while_too_many_hidden_states_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: dict[str, bytes]
) -> None:
    monkeypatch.setattr("moesaic.orchestrator.walk_ahead.BEHIND", 0)
    experiment = prepared(tmp_path, model, "ahead")
    order: list[str] = []
    pool: Any = InlinePool(WORKERS)
    calibration = Calibration(experiment, pool, View(), {})
    monkeypatch.setattr(
        pool, "run", lambda tasks, tick: InlinePool.run(pool, tasks, lambda now: order.extend(now))
    )
    calibration.run()
    passes = [order.index(f"forward {block}") for block in (1, 2)]
    assert passes == sorted(passes) and order.index("collect 0") < passes[0]
    assert order.index("collect 1") < passes[1]
    assert stored(experiment, "stats", "gradients") == joint


def test_many_workers_walk_ahead_by_themselves() -> None:
    assert [Compute().ahead(workers) for workers in (1, 2, 7, 8)] == [False] * 3 + [True]
    assert Compute(walk="ahead").ahead(1) and not Compute(walk="joint").ahead(512)


def test_a_block_is_read_ahead_in_full_and_not_on_a_processor(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = StreamedModel(Checkpoint(model))
    spans = list(readahead.block_spans(streamed, 1))
    checkpoint = streamed.checkpoint
    wanted = [name for name in checkpoint.names() if name.startswith("model.layers.1.")]
    assert sum(end - begin for _, begin, end in spans) == sum(map(checkpoint.nbytes, wanted))
    read: list[int] = []
    monkeypatch.setattr(readahead, "_read", lambda spans: read.append(len(spans)))
    readahead.read_ahead(streamed, 1)
    assert not read
    streamed.device = torch.device("cuda")
    for block in (streamed.blocks, -1, 1):
        readahead.read_ahead(streamed, block)
    deadline = time.monotonic() + 10
    while not read and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [len(spans)]


def test_a_file_that_is_gone_is_left_to_who_wants_it(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x" * 10)
    readahead._read([(tmp_path / "there", 2, 9), (tmp_path / "gone", 0, 5)])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_reading_begins_at_a_share_and_leaves_nothing_out(share: float) -> None:
    spans = [(Path("a"), 10, 40), (Path("b"), 0, 50), (Path("c"), 7, 27)]
    turned = readahead.from_share(spans, share)

    def places(spans: list[tuple[Path, int, int]]) -> list[tuple[Path, int]]:
        return [(file, place) for file, begin, end in spans for place in range(begin, end)]

    order, first = places(spans), int(share * 100)
    assert places(turned) == order[first:] + order[:first]


@pytest.mark.parametrize(("walkers", "first"), [(8, 0), (8, 8), (4, 3), (1, 0)])
def test_walkers_of_a_node_begin_apart(walkers: int, first: int) -> None:
    """Whichever of them are on it: no gap is more than three times what an even one would be."""
    begins = sorted(readahead.own_share((k, k + 1)) for k in range(first, first + walkers))
    gaps = [high - low for low, high in zip(begins, [*begins[1:], begins[0] + 1], strict=True)]
    assert max(gaps) < 3 / walkers


def test_files_are_read_ahead_where_they_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(readahead, "_begin", lambda model, spans: begun.append(spans))
    (tmp_path / "there").write_bytes(b"x" * 10)
    files = [tmp_path / "gone", tmp_path / "there"]
    readahead.read_files_ahead(StreamedModel(Checkpoint(model)), files)
    assert begun == [[(tmp_path / "there", 0, 10)]]
