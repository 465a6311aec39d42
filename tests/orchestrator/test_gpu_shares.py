"""How many workers share a GPU: only where layers are small, and where all GPUs get some."""

from pathlib import Path

import pytest

from moesaic.methods.base import Unit
from moesaic.orchestrator import headstart
from moesaic.orchestrator.fleet import read_cluster
from moesaic.orchestrator.gpu_shares import gpu_share, workers_per_gpu
from moesaic.orchestrator.placing import Roster, Slot
from moesaic.orchestrator.recipe_sections import Compute
from tests.orchestrator.projects import make_recipe

MILLION = 1_000_000


def units(*blocks: int) -> list[Unit]:
    """Two of each block, which has so many weights."""
    return [
        Unit(f"{n}.{half}", "linear", n, "mlp", {"weight": (2, size // 4)}, {"weight": "x"})
        for n, size in enumerate(blocks)
        for half in range(2)
    ]


@pytest.mark.parametrize(
    ("blocks", "weights", "count"),
    [
        ((3 * MILLION, 4 * MILLION), 135 * MILLION, 4),
        ((8 * MILLION,), 200 * MILLION, 4),
        ((3 * MILLION, 9 * MILLION), 400 * MILLION, 2),
        ((3 * MILLION, 33 * MILLION), 200 * MILLION, 1),
        ((218 * MILLION,) * 32, 8000 * MILLION, 1),
        # Small layers of a large model, which each of them may have to hold.
        ((8 * MILLION,), 501 * MILLION, 2),
        ((8 * MILLION,), 1001 * MILLION, 1),
    ],
)
def test_small_layers_share_a_gpu(blocks: tuple[int, ...], weights: int, count: int) -> None:
    assert workers_per_gpu(units(*blocks), weights) == count


@pytest.mark.parametrize(
    ("compute", "rooms", "per_gpu", "share"),
    [
        (Compute(), [(32, 8)], 4, 0.25),
        (Compute(), [(32, 8)], 2, 0.5),
        (Compute(), [(32, 8)], 1, 1.0),
        (Compute(), [(31, 8)], 4, 0.5),  # or some GPU would have no worker
        (Compute(), [(8, 8), (64, 8)], 4, 1.0),
        (Compute(), [(4, 8)], 4, 1.0),
        (Compute(cpus_per_worker=4), [(32, 4)], 4, 0.5),
        (Compute(workers=8), [(64, 8)], 4, 1.0),
        (Compute(workers=16), [(64, 8)], 4, 0.5),
        (Compute(workers=3), [(64, 1)], 4, 0.5),
        (Compute(), [(64, 0), (16, 4)], 4, 0.25),
        (Compute(), [(64, 0)], 4, 0.0),
        (Compute(), [(64, 0.5)], 4, 0.0),
        (Compute(gpus_per_worker=1), [(64, 8)], 4, 1.0),
        (Compute(gpus_per_worker=0), [(64, 8)], 4, 0.0),
    ],
)
def test_no_gpu_is_left_without_workers(
    compute: Compute, rooms: list[tuple[float, float]], per_gpu: int, share: float
) -> None:
    assert gpu_share(compute, rooms, per_gpu) == share


def test_workers_ask_for_their_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}}]
    monkeypatch.setattr("moesaic.orchestrator.placing.ray.nodes", lambda: nodes)
    monkeypatch.setattr(Roster, "_start", lambda self: Slot(None, None, 0.0))
    roster = Roster(Compute(), per_gpu=4)
    roster.ask()
    assert (roster.gpus, len(roster.slots), roster.beside) == (0.25, 8, 8)
    assert capsys.readouterr().err.startswith("compute: small layers: 4 workers share a GPU;")
    Roster(Compute(gpus_per_worker=0.25), per_gpu=4).ask()
    assert capsys.readouterr().err == ""


def test_a_forecast_shares_as_a_run_does() -> None:
    cluster = read_cluster("2*2xH100:8cpu")
    assert cluster.places(Compute(), 4) == [0] * 8 + [1] * 8
    shared, alone = cluster.crew(Compute(), 4), cluster.crew(Compute(), 1)
    assert (shared.workers, alone.workers) == (16, 4)
    assert shared.room is not None and alone.room is not None
    assert shared.room == pytest.approx(alone.room / 4)


@pytest.mark.parametrize(
    ("names", "compute", "begun"),
    [
        (["null"], {}, True),
        (["nvidiactl", "nvidia-uvm"], {}, True),
        (["nvidia0"], {}, False),
        (["kfd"], {}, False),
        (["nvidia0"], {"gpus_per_worker": 0}, True),
    ],
)
def test_workers_wait_for_the_model_where_it_decides_how_many_there_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    compute: dict[str, int],
    begun: bool,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = headstart.load_recipe(make_recipe(tmp_path, tmp_path, compute=compute))
    with monkeypatch.context() as patch:
        patch.setattr(headstart.os, "listdir", lambda folder: names if folder == "/dev" else [])
        assert headstart._all_is_to_do(recipe, tmp_path / "out") is begun


@pytest.mark.parametrize(
    ("kinds", "compute", "told"),
    [
        (("H100", "A100"), Compute(), "compute: GPUs of several kinds (A100, H100): "),
        (("H100", "H100"), Compute(), ""),
        (("H100", "A100"), Compute(gpus_per_worker=0), ""),
    ],
)
def test_gpus_of_several_kinds_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kinds: tuple[str, str],
    compute: Compute,
    told: str,
) -> None:
    resources = [{"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{kind}": 1.0} for kind in kinds]
    nodes = [{"Alive": True, "Resources": node} for node in resources]
    monkeypatch.setattr("moesaic.orchestrator.placing.ray.nodes", lambda: nodes)
    monkeypatch.setattr(Roster, "_start", lambda self: Slot(None, None, 0.0))
    Roster(compute).ask()
    line = capsys.readouterr().err
    assert line.startswith(told) and line.count("\n") == bool(told)
