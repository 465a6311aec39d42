"""Clusters on paper, unit costs from a file, and what both say of a run."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moesaic.methods.base import Spec
from moesaic.orchestrator import bench
from moesaic.orchestrator.bench_table import bench_table
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.fleet import (
    CPUS_PER_GPU,
    MEMORY_PER_CPU,
    NETWORK_BYTES,
    STORE_BYTES,
    read_cluster,
)
from moesaic.orchestrator.outlook import predict_on, show_outlook
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.stage_times import OVERHEADS
from moesaic.orchestrator.stages import Calibration
from tests.orchestrator.inline import InlinePool
from tests.orchestrator.projects import make_model_folder, make_recipe


def test_words_name_nodes_cores_and_gpus() -> None:
    cluster = read_cluster("2*8xH100:64cpu, 3*32cpu")
    first, second = cluster.nodes
    assert (first.count, first.gpus, first.gpu, first.cores) == (2, 8, "H100", 64)
    assert (second.count, second.gpus, second.cores) == (3, 0, 32)
    assert cluster.gpu_memory == 80_000_000_000
    assert cluster.networks() == [NETWORK_BYTES] * 5 and cluster.store == STORE_BYTES


def test_workers_fill_nodes_one_after_the_other() -> None:
    cluster = read_cluster("2*2xH100:64cpu")
    assert cluster.places(Compute()) == [0, 0, 1, 1]
    assert cluster.places(Compute(workers=3)) == [0, 0, 1]
    assert cluster.places(Compute(gpus_per_worker=0.5)) == [0] * 4 + [1] * 4
    assert cluster.places(Compute(cpus_per_worker=33)) == [0, 1]
    assert cluster.crew(Compute()).device == "cuda"
    processors = read_cluster("4cpu,2cpu")
    assert processors.places(Compute(cpus_per_worker=2)) == [0, 0, 1]
    assert processors.crew(Compute()).device == "cpu"


def test_what_is_not_said_has_stated_defaults() -> None:
    (node,) = read_cluster("4xH200").nodes
    assert node.cores == 4 * CPUS_PER_GPU
    assert node.node_memory == node.cores * MEMORY_PER_CPU


def test_a_file_says_more(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "store: 5 GB\nnodes:\n"
        "- {count: 2, gpus: 4, gpu: B9, gpu_memory: 96 GB, cpus: 48, network: 50 GB}\n"
    )
    cluster = read_cluster(str(file))
    assert (cluster.store, cluster.gpu_memory) == (5_000_000_000, 96_000_000_000)
    assert cluster.networks() == [50_000_000_000] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x", "'8x' is no group of nodes"),
        ("8xB9", "gpu 'B9' has no known memory"),
        ("1xH100,1xA100", "one kind of GPU at a time"),
        ("0*8cpu", "count"),
        ("nowhere.yaml", r"nowhere\.yaml: no such cluster file"),
        ("90000*8cpu,90000*8cpu", "180,000 nodes with 1,440,000 cores: at most 100,000"),
    ],
)
def test_what_is_no_cluster_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_cluster(text)


def test_unknown_keys_of_a_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: [{cpu: 3}]")
    with pytest.raises(UserError, match=r"cluster\.yaml: nodes\.0\.cpu"):
        read_cluster(str(file))


def test_a_key_that_is_there_twice_is_told(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: [{cpus: 3}]\nnodes: [{cpus: 4}]")
    with pytest.raises(UserError, match=r"cluster\.yaml: nodes: written twice, in lines 1 and 2"):
        read_cluster(str(file))


def test_more_workers_than_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"9 worker\(s\) .* do not fit its 2 node\(s\): at most 8"):
        read_cluster("2*4xH100").places(Compute(workers=9))


CHAIN = (Spec.of("rtn", {"bits": 4, "group_size": 16}),)


def unit_costs(**device: Any) -> dict[str, Any]:
    """What a file would say of a machine that is equally fast at everything."""
    sizes = [(d, r, w) for d in ("float32", "bfloat16") for r in (4, 256) for w in (64, 1024)]
    own = {
        "kind": "cpu",
        "threads": 1,
        "memory_bytes": 1,
        "matmul": [[*size, 1e9] for size in sizes],
        "gram": [[*size, 1e9] for size in sizes],
        "head": {"float32": 1e-9, "bfloat16": 1e-9},
        "experts": [[*size, 1e9] for size in sizes],
        "reverse": [[*size, 1e9] for size in sizes],
        "attention": [[dtype, 256, 1e-10] for dtype in ("float32", "bfloat16")],
        "sums": [[256, 1e9]],
        "product": [[256, 1e9]],
        "wide": 1e-9,
        "factor": 1e9,
        "copy": None,
        "solve": [
            {
                "chain": bench._key(chain),
                "rows": [[32, 1e-6], [256, 1.2e-6]],
                "bank": 1e-9,
                "dense": 1e-9,
                "cube": 0,
            }
            for chain in bench._single()
        ],
        **device,
    }
    host: dict[str, Any] = dict.fromkeys(("read", "save", "digest", "host_add"), 1e9)
    host |= {"write": 1e-3, "entry": 1e-3, "call": 1e-3, "worker_start": 1.0}
    host["overheads"] = dict.fromkeys(OVERHEADS, 1.0)
    about = {"schema": bench.SCHEMA, "date": "2026-01-01", "machine": "one", "versions": {}}
    return {**about, "host": host, "devices": {"cpu": own}}


def written(folder: Path, found: dict[str, Any]) -> Path:
    file = folder / "bench.json"
    file.write_text(json.dumps(found))
    return file


def test_speeds_lie_between_those_that_were_measured() -> None:
    table = [["float32", 4, 64, 1e9], ["float32", 256, 64, 4e9], ["float32", 4, 1024, 7e9]]
    assert bench._between(table, "float32", 4, 60) == pytest.approx(1e9)
    assert bench._between(table, "float32", 32, 60) == pytest.approx(2e9)  # half way of 4 … 256
    assert bench._between(table, "float32", 9999, 60) == pytest.approx(4e9)
    assert bench._between(table, "float32", 1, 5000) == pytest.approx(7e9)


def test_every_switch_of_a_method_has_a_key_of_its_own() -> None:
    keys = {bench._key(chain) for chain in bench._single()}
    alike = Spec.of("gptq", {"bits": 3}), Spec.of("gptq", {"bits": 8, "group_size": 32})
    assert bench._key(alike[:1]) == bench._key(alike[1:])
    assert {bench._key((Spec.of("gptq", {"clip": clip}),)) for clip in ("none", "mse")} <= keys


def test_outlook_replays_the_tasks_of_the_recipe(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    recipe = make_recipe(tmp_path, folder, compute={"workers": None})
    file = written(tmp_path, unit_costs())
    one = predict_on(recipe, tmp_path / "out", "1cpu", file)
    two = predict_on(recipe, tmp_path / "out", "2*1cpu", file)
    assert json.loads(json.dumps(two)) == two
    assert two["workers"] == 2 and two["speeds"].startswith("measured")
    tasks = {name: stage["tasks"] for name, stage in one["stages"].items()}
    assert tasks["forward"] == tasks["reverse"] == 2 and "sums" not in tasks
    assert two["stages"]["forward"]["tasks"] == two["stages"]["sums"]["tasks"] == 4
    assert one["simulation"]["busy_share"] == pytest.approx(1, abs=0.2)
    spans = (one, two)
    first, second = (found["simulation"]["makespan"] for found in spans)
    assert first / 2 < second < first
    out = io.StringIO()
    show_outlook(two, Console(file=out, width=160))
    assert "2 worker(s), cpu" in out.getvalue() and "limit" in out.getvalue()


def test_a_gpu_that_nobody_measured_is_marked(tmp_path: Path) -> None:
    bare = make_model_folder(tmp_path / "model")
    (bare / "model.safetensors").unlink()
    recipe = make_recipe(tmp_path, bare)
    file = written(tmp_path, unit_costs())
    found = predict_on(recipe, tmp_path / "out", "2xH100", file)
    assert not found["weights_are_here"] and found["device"] == "cuda"
    assert "NOT measured: data sheet" in found["speeds"]
    there = unit_costs()
    there["devices"]["NVIDIA H100"] = {**there["devices"]["cpu"], "kind": "cuda", "copy": 1e9}
    measured = predict_on(recipe, tmp_path / "out", "2xH100", written(tmp_path, there))
    assert measured["speeds"].startswith("measured on NVIDIA H100")
    assert measured["time"]["total"] != found["time"]["total"]


def test_fewer_walkers_leave_the_same_statistics(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    left = []
    for walkers in (1, 2):
        place = tmp_path / str(walkers)
        recipe = make_recipe(place, folder, compute={"workers": 2, "walkers": walkers})
        experiment, pool = open_experiment(recipe, place / "out"), InlinePool(2)
        Calibration(experiment, pool, View(), {}).run()  # type: ignore[arg-type]
        assert pool.calls["calibrate:forward"] == walkers * experiment.model.blocks
        stats = sorted((experiment.store.root / "stats").rglob("*.safetensors"))
        left.append([(path.name, path.read_bytes()) for path in stats])
    assert left[0] == left[1] and left[0]


def test_fewer_walkers_are_tried(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, make_model_folder(tmp_path / "model"), compute={"workers": None})
    file = written(tmp_path, unit_costs())
    found = predict_on(recipe, tmp_path / "out", "4cpu", file)
    assert list(found["walkers"]) == ["4", "1", "2"]
    recipe = make_recipe(
        tmp_path,
        tmp_path / "model",
        compute={"workers": None, "walkers": 2},
    )
    again = predict_on(recipe, tmp_path / "out", "4cpu", file)
    assert list(again["walkers"]) == ["2", "1"]
    for count in ("1", "2"):
        assert again["walkers"][count] == pytest.approx(found["walkers"][count])


def test_memory_that_is_not_there_is_told(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, make_model_folder(tmp_path / "model"))
    little = tmp_path / "little.yaml"
    little.write_text("nodes: [{cpus: 1, memory: 1 MB}]")
    found = predict_on(recipe, tmp_path / "out", str(little), written(tmp_path, unit_costs()))
    assert "needs" in found["short"]["calibrate host memory"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 1}, "schema 1, this version reads"),
        ({"devices": {}}, "devices.cpu: Field required"),
        ({"devices": {"cpu": []}}, "devices.cpu"),
        ({"machine": None}, "machine"),
        ({"host": {**unit_costs()["host"], "read": -1.0}}, "host.read: .* greater than 0"),
        ({"host": {**unit_costs()["host"], "read": math.nan}}, "host.read: "),
        ({"host": {**unit_costs()["host"], "overheads": {}}}, "host.overheads.start: "),
        (unit_costs(sums=[]), "devices.cpu.sums: "),
        (unit_costs(matmul=[["float32", 4, 64]]), "devices.cpu.matmul.0"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = written(tmp_path, {**unit_costs(), **change})
    with pytest.raises(UserError, match=rf"bench\.json: .*{said}"):
        bench.read_bench(file)


def test_a_file_that_never_ends_is_no_file_of_costs() -> None:
    with pytest.raises(UserError, match="no regular file"):
        bench.read_bench(Path("/dev/zero"))


def test_float16_is_as_fast_as_bfloat16(tmp_path: Path) -> None:
    """Which many models are in, and nobody measures."""
    times = []
    for dtype in (torch.float16, torch.bfloat16):
        folder = make_model_folder(tmp_path / str(dtype), dtype=dtype)
        recipe = make_recipe(tmp_path, folder, compute={"workers": None, "dtype": "auto"})
        costs = unit_costs(matmul=[["float32", 4, 64, 1e7], ["bfloat16", 4, 64, 1e9]])
        found = predict_on(recipe, tmp_path / "out", "1cpu", written(tmp_path, costs))
        times.append(found["time"]["calibrate and measure"])
    assert times[0] == pytest.approx(times[1])


def test_a_chain_that_was_not_measured_is_told(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, make_model_folder(tmp_path / "model"))
    file = written(tmp_path, unit_costs(solve=[]))
    with pytest.raises(UserError, match=r"has no times of .*: run moesaic bench --recipe"):
        predict_on(recipe, tmp_path / "out", "1cpu", file)


def test_bench_measures_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sizes and one chain; Ray's part is the pool's own test."""
    monkeypatch.setattr(bench, "_sizes", lambda kind: [(torch.float32, 8, 64)])
    monkeypatch.setattr(bench, "_single", lambda: iter([CHAIN]))
    monkeypatch.setattr(bench, "_ray", lambda threads, done: {"call": 1e-3, "worker_start": 1.0})
    monkeypatch.setattr(bench, "measure_overheads", lambda threads, place: dict(OVERHEADS))
    monkeypatch.setattr(bench, "_WIDTHS", {"cpu": (64,)})
    monkeypatch.setattr(bench, "_LENGTHS", (64,))
    monkeypatch.setattr(bench, "_FILE_VALUES", 1 << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "bench.json"
    with View(Console(file=io.StringIO())) as view:
        found = bench.run_bench(file, None, 1, view)
    assert bench.read_bench(file) == found
    (device,) = found["devices"].values()
    assert device["copy"] is None and device["matmul"][0][:3] == ["float32", 8, 64]
    rates = [device[name][0][3] for name in ("matmul", "gram", "experts", "reverse")]
    rates += [device["sums"][0][1], device["product"][0][1], device["wide"], device["factor"]]
    rates += [value for name, value in found["host"].items() if name != "overheads"]
    assert found["host"]["overheads"] == OVERHEADS
    assert all(0 < rate < math.inf for rate in rates)
    assert [entry["chain"] for entry in device["solve"]] == [bench._key(CHAIN)]
    assert bench_table(found).row_count > 8
