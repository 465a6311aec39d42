"""What is predicted against what is: bytes to the byte, memory and time in their proportions."""

import io
import json
import math
import re
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from moesaic.methods.base import Stats
from moesaic.orchestrator import stage_times, timing
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.forecast import forecast, inspect_model, show_forecast, show_model
from moesaic.orchestrator.machine import Crew, Load, Speeds, crew, measure_speeds
from moesaic.orchestrator.memory import Sizes, held_adding, held_sums, predict_memory
from moesaic.orchestrator.resident import HIDDEN_BYTES
from moesaic.orchestrator.results import measurements, problem
from moesaic.orchestrator.run import open_experiment
from moesaic.orchestrator.solving import Compressing
from moesaic.orchestrator.stages import Calibration
from moesaic.orchestrator.statistics import SiteStats, covered, ranges, tree_sum
from moesaic.search.base import Budget, Infeasible, search_module
from tests.orchestrator.inline import InlinePool
from tests.orchestrator.projects import make_model_folder, make_recipe

# What the names of the families below have in their parts.
PARTS = {
    "attention": r"self_attn\.[qkvo]_proj\.weight$",
    "experts": r"\.experts\.\d+\.(gate|up|down)_proj\.weight$",
    "shared_experts": r"\.shared_expert\.(gate|up|down)_proj\.weight$",
    "mlp": r"\.mlp\.(gate|up|down)_proj\.weight$",
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


# Operations, bytes or cubes per second.
_RATES = ["matmul", "hessian", "product", "factor", "read", "sums", "save", "digest", "host_add"]
_RATES += [f"expert_{name}" for name in ("matmul", "hessian", "reverse")]


@pytest.fixture
def fixed_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of a machine that never changes."""

    def speeds(experiment: Any, *_: Any) -> Speeds:
        solving = Compressing(((32, 1e-4), (256, 1.2e-4)), 1e-7, 1e-9)
        return Speeds(
            **dict.fromkeys(_RATES, 1e9),
            attention=1e-9,
            wide=1e-9,
            head=1e-4,
            write=1e-3,
            entry=1e-3,
            compress=dict.fromkeys(experiment.recipe.chains(), solving),
            copy=math.inf,
        )

    monkeypatch.setattr(timing, "measure_speeds", speeds)


def _open(path: Path, model: Path, **changes: Any) -> Any:
    return open_experiment(make_recipe(path, model, **changes), path / "out")


def _tensors(folder: Path) -> dict[str, tuple[int, int]]:
    """Name → (elements, bytes) of every tensor in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                key = f"{path.name}/{name}"
                found[key] = (tensor.numel(), tensor.numel() * tensor.element_size())
    return found


def _experts(config: dict[str, Any]) -> int:
    names = {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys()
    return int(config[names.pop()])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "llama"])
def test_inspect_counts_what_the_files_hold(tmp_path: Path, model_type: str) -> None:
    folder = make_model_folder(tmp_path / "model", model_type)
    result = inspect_model(str(folder))
    tensors = _tensors(folder)
    assert result["parameters"] == sum(count for count, _ in tensors.values())
    assert result["bytes"] == sum(size for _, size in tensors.values())
    covered_names: set[str] = set()
    for part, pattern in PARTS.items():
        names = {name for name in tensors if re.search(pattern, name)}
        covered_names |= names
        expected = [sum(tensors[name][i] for name in names) for i in (0, 1)]
        found = result["parts"].get(part, {"parameters": 0, "bytes": 0, "units": 0})
        assert [found["parameters"], found["bytes"]] == expected
        blocks = {re.search(r"layers\.(\d+)\.", name)[1] for name in names}  # type: ignore[index]
        assert found["units"] == (len(blocks) if part == "experts" else len(names))
    fixed = [entry for name, entry in tensors.items() if name not in covered_names]
    assert result["fixed"]["tensors"] == len(fixed)
    assert result["fixed"]["bytes"] == sum(size for _, size in fixed)
    config = json.loads((folder / "config.json").read_text())
    assert result["blocks"] == config["num_hidden_layers"]
    if model_type == "llama":
        assert result["experts"] is None
    else:
        assert result["experts"]["per_layer"] == _experts(config)
        assert result["experts"]["per_token"] == config["num_experts_per_tok"]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_inspect_knows_the_experts_whatever_the_config_calls_them(
    tmp_path: Path, model_type: str
) -> None:
    folder = make_model_folder(tmp_path / "model", model_type)
    config = json.loads((folder / "config.json").read_text())
    experts = inspect_model(str(folder))["experts"]
    assert experts["per_layer"] == _experts(config)
    assert experts["per_token"] == config["num_experts_per_tok"]


@pytest.mark.parametrize("name", ["builtin:nothing", "./nowhere", "/nowhere/at/all"])
def test_inspect_refuses_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name.removeprefix("builtin:").removeprefix("."))):
        inspect_model(name)


@pytest.mark.usefixtures("fixed_speeds")
def test_predicted_bytes_equal_those_in_the_store_when_all_is_measured(
    tmp_path: Path, moe: Path
) -> None:
    experiment = _open(tmp_path, moe)
    before = forecast(experiment)
    work = before["work"]
    assert work["pairs"] == work["units"] * 4
    assert [work[f"{what}_finished"] for what in ("pairs", "blocks", "gradients")] == [0, 0, 0]
    Calibration(experiment, InlinePool(2), View(), experiment.offers).run()  # type: ignore[arg-type]
    for kind in ("pieces", "errors", "stats", "gradients"):
        written = _tensors(experiment.store.root / kind)
        assert before["store"][kind] == sum(size for _, size in written.values()), kind
    after = forecast(experiment)
    for what in ("pairs", "blocks", "gradients"):
        assert after["work"][f"{what}_finished"] == work[what]
    for stage in ("calibrate", "gradients", "measure"):
        assert before["time"][stage] > 0 == after["time"][stage]


@pytest.mark.parametrize("serve", ["moesaic", "transformers", "vllm"])
@pytest.mark.parametrize("strategy", ["knapsack", "uniform"])
def test_the_smallest_plan_is_the_smallest_that_the_search_finds(
    tmp_path: Path, moe: Path, serve: str, strategy: str
) -> None:
    whole = {"method": "rtn", "bits": [2, 8], "group_size": -1}
    groups = {"method": "rtn", "bits": [2, 3, 4], "group_size": 16, "symmetric": [True, False]}
    candidates = [whole] if serve == "vllm" else [groups, whole]
    experiment = _open(
        tmp_path,
        moe,
        serve=serve,
        search=strategy,
        candidates=candidates,
        baselines=None,
        budget={"bits_per_weight": 12},
        calibration={"gradient_sequences": 0},
    )
    Calibration(experiment, InlinePool(), View(), experiment.offers).run()  # type: ignore[arg-type]
    table = measurements(experiment)
    smallest, fixed = experiment.sizes.size.smallest_bytes, experiment.sizes.size.fixed_bytes
    search = search_module(strategy).search
    enough = problem(experiment, table, budget=Budget(smallest, fixed))
    assert search(enough).bytes == smallest
    with pytest.raises(Infeasible, match=f"has {smallest:,} bytes"):
        search(problem(experiment, table, budget=Budget(smallest - 1, fixed)))


def test_dense_bytes_are_those_of_the_files(tmp_path: Path, moe: Path) -> None:
    experiment = _open(tmp_path, moe)
    files = sum(path.stat().st_size for path in moe.glob("*.safetensors"))
    assert experiment.sizes.size.dense_bytes == files
    changes = {"budget": {"bits_per_weight": None, "bytes": files - 1}}
    assert _open(tmp_path, moe, **changes).budget.total_bytes == files - 1
    with pytest.raises(UserError, match=f"hold the whole dense model .{files:,} bytes"):
        _open(tmp_path, moe, budget={"bits_per_weight": None, "bytes": files})


@pytest.mark.usefixtures("fixed_speeds")
def test_forecast_counts_what_a_resume_will_redo_when_entries_are_lost(
    tmp_path: Path, moe: Path
) -> None:
    experiment = _open(tmp_path, moe)
    Calibration(experiment, InlinePool(), View(), experiment.offers).run()  # type: ignore[arg-type]
    pieces = sorted((experiment.store.root / "pieces").rglob("*.safetensors"))
    pieces[0].unlink()
    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    experiment.store.path("stats", experiment.walk.stats_key(1)).unlink()
    work = forecast(experiment)["work"]
    assert work["pairs_finished"] == work["pairs"] - 2
    assert work["blocks_finished"] == work["blocks"] - 1


@pytest.mark.usefixtures("fixed_speeds")
def test_bytes_of_plans_count_every_weight_once(tmp_path: Path, moe: Path) -> None:
    result = forecast(_open(tmp_path, moe))["bytes"]
    bits = result["baselines"]["rtn 4"]["bits_per_weight"]
    # 4 bits, a bfloat16 scale for 16 weights, and 16 bytes of shape for each of its matrices.
    assert 5.0 < bits < 5.3
    assert result["dense"]["bits_per_weight"] == 16
    assert result["smallest"]["bytes"] < result["budget"]["bytes"] < result["dense"]["bytes"]
    assert result["budget"]["bits_per_weight"] == pytest.approx(4.6, abs=1e-3)


@pytest.mark.usefixtures("fixed_speeds")
def test_few_tokens_are_expected_until_there_are_more(tmp_path: Path, moe: Path) -> None:
    def expected(name: str, **calibration: Any) -> list[dict[str, Any]]:
        result = forecast(_open(tmp_path / name, moe, calibration=calibration))
        return [event for event in result["events"] if event["kind"] == "few_tokens"]

    # 6 × 24 tokens to 2 of 8 experts: 36 each, for 48 inputs of gate and 32 of down.
    (event,) = expected("few", sequences=6)
    assert event["value"] == 36
    assert "48 inputs of gate_proj" in event["message"]
    assert "calibration.sequences: 8" in event["message"]
    assert len(expected("fewer", sequences=5)) == 2  # 30 each: too few for down as well
    assert expected("enough", sequences=8) == []
    assert expected("all", sequences=6, experts="all") == []


@pytest.mark.usefixtures("fixed_speeds")
def test_counted_tokens_take_the_place_of_expected_ones_when_there_are_statistics(
    tmp_path: Path, moe: Path
) -> None:
    experiment = _open(tmp_path, moe, calibration={"sequences": 5})
    Calibration(experiment, InlinePool(), View(), {}).run()  # type: ignore[arg-type]
    events = [e for e in forecast(experiment)["events"] if e["kind"] == "few_tokens"]
    assert events
    assert all("saw fewer tokens" in event["message"] for event in events)


def test_held_sums_are_those_alive_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracked(dict):  # type: ignore[type-arg]
        """A dictionary that can be referred to weakly."""

    for shards in range(1, 12):
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        peak = 0

        def leaf(node: tuple[int, int], alive: Any = alive) -> SiteStats | None:
            nonlocal peak
            if node[1] - node[0] > 1:
                return None
            found = Stats({"x": torch.ones(1)})
            alive.add(found)
            peak = max(peak, len(alive))
            return Tracked(site=found)

        total = tree_sum((0, shards), leaf)
        assert float(total["site"]["x"]) == shards
        assert peak == held_sums((0, shards))


def test_adding_up_holds_a_sum_per_level_of_what_the_workers_left() -> None:
    assert held_adding(8, 1) == 2  # one file, mapped while it is copied
    assert held_adding(8, 2) == 3
    nodes = [node for span in ranges(7, 3) for node in covered((0, 7), span)]
    assert held_adding(7, 3) == 1 + held_sums((0, 7), frozenset(nodes)) > 3


@pytest.mark.usefixtures("fixed_speeds")
def test_memory_covers_the_statistics_and_grows_with_the_hidden_size(tmp_path: Path) -> None:
    def memory(hidden: int) -> tuple[dict[str, Any], int]:
        folder = make_model_folder(tmp_path / f"model-{hidden}", hidden_size=hidden)
        recipe = make_recipe(tmp_path / str(hidden), folder, compute={"workers": 1})
        experiment = open_experiment(recipe, tmp_path / "out")
        sizes = Sizes(experiment, Crew(1, 1, 1, "cpu", ""))
        one = sum(sizes.statistics(sizes.block_units(0)).values())
        return predict_memory(sizes), one

    small, small_stats = memory(48)
    large, large_stats = memory(192)
    # Float32 Hessians alone: attention's two sites, 8 experts' two (of 32 inputs one).
    attention_out = 4 * 16
    hessians = 4 * (9 * 192**2 + attention_out**2 + 8 * 32**2)
    assert hessians <= large_stats < hessians * 1.05
    assert small["calibrate"]["statistics"] >= small_stats * 3  # four shards
    for stage in ("calibrate", "measure", "gradients", "evaluate"):
        assert large[stage]["total"] > small[stage]["total"]
        parts = {name: size for name, size in large[stage].items() if name != "total"}
        assert large[stage]["total"] == sum(parts.values())
    assert large["measure"]["statistics"] >= 4 * 8 * (192**2 + 32**2)


@pytest.mark.usefixtures("fixed_speeds")
def test_time_follows_tokens_candidates_and_workers(tmp_path: Path, moe: Path) -> None:
    def seconds(name: str, **changes: Any) -> dict[str, float]:
        experiment = _open(tmp_path / name, moe, **changes)
        team = Crew(changes.get("compute", {}).get("workers", 1), 2, 1, "cpu", "")
        blocks = list(range(experiment.model.blocks))
        left = stage_times.Left(blocks, len(blocks), experiment.offers)
        nothing = dict.fromkeys(stage_times.OVERHEADS, 0.0)
        return stage_times.predict_seconds(experiment, team, left, overheads=nothing)

    one = seconds("one")
    more_text = seconds("text", calibration={"sequences": 48}, evaluation={"sequences": 32})
    assert one["calibrate"] < more_text["calibrate"] < 4 * one["calibrate"]
    assert one["evaluate"] < more_text["evaluate"] < 4 * one["evaluate"] + 1e-9
    half = seconds("half", candidates=[{"method": "rtn", "bits": 3, "group_size": 16}])
    assert half["measure"] < 0.6 * one["measure"]  # 2 chains of 4
    two = seconds("two", compute={"workers": 2})
    assert two["measure"] == pytest.approx(one["measure"] / 2)
    assert 0.5 * one["calibrate"] <= two["calibrate"] < one["calibrate"]
    assert math.isclose(one["total"], sum(v for k, v in one.items() if k != "total"))
    assert seconds("back", propagate=True)["total"] > one["total"]


@pytest.mark.usefixtures("fixed_speeds")
def test_what_no_model_changes_is_added_to_stages_with_something_left(
    tmp_path: Path, moe: Path
) -> None:
    experiment = _open(tmp_path, moe)
    team, blocks = Crew(1, 1, 1, "cpu", ""), list(range(experiment.model.blocks))

    def seconds(left: stage_times.Left, each: float) -> dict[str, float]:
        overheads = dict.fromkeys(stage_times.OVERHEADS, each)
        return stage_times.predict_seconds(experiment, team, left, overheads=overheads)

    every = stage_times.Left(blocks, len(blocks), experiment.offers)
    more = {stage: t - seconds(every, 0.0)[stage] for stage, t in seconds(every, 2.0).items()}
    assert more == pytest.approx({**dict.fromkeys(stage_times.OVERHEADS, 2.0), "total": 16.0})
    rest = seconds(stage_times.Left([], 0, {}), 2.0)
    assert rest["calibrate"] == rest["gradients"] == rest["measure"] == 0
    assert rest["start"] == rest["report"] == 2.0


@pytest.mark.usefixtures("fixed_speeds")
def test_attention_grows_with_the_length_of_sequences(tmp_path: Path, moe: Path) -> None:
    def clock(length: int) -> timing.Clock:
        calibration = {"sequences": 12, "length": length, "gradient_sequences": 0}
        experiment = _open(tmp_path / str(length), moe, calibration=calibration)
        return timing.Clock(experiment, Crew(1, 1, 1, "cpu", ""))

    short, long = clock(16), clock(48)
    heads, channels = short.load_of_worker.heads, short.load_of_worker.channels
    assert short.attention() == pytest.approx(16 * heads * channels * 1e-9)
    assert long.attention() == pytest.approx(3 * short.attention())


@pytest.mark.usefixtures("fixed_speeds")
def test_a_hessian_is_factorised_once_for_chains_that_want_the_same(
    tmp_path: Path, moe: Path
) -> None:
    def seconds(**options: Any) -> float:
        own = {
            "candidates": [{"method": "gptq", "group_size": 16, **options}],
            "budget": {"bits_per_weight": 8},
        }
        experiment = _open(tmp_path, moe, baselines=None, **own)
        clock = timing.Clock(experiment, Crew(1, 1, 1, "cpu", ""))
        unit = next(unit for unit in experiment.units if unit.kind == "bank")
        known: set[Any] = set()
        chains = experiment.offers[unit.name]
        return sum(clock.factors([unit], unit.sites["gate"], chain, known) for chain in chains)

    one = seconds(bits=4)
    assert one == pytest.approx(8 * 48**3 / 1e9)
    assert seconds(bits=[3, 4]) == pytest.approx(one)
    assert seconds(bits=4, damp=[0.01, 0.02]) == pytest.approx(2 * one)
    assert seconds(method="rtn", bits=4) == 0


def test_speeds_of_this_machine_are_positive(tmp_path: Path, moe: Path) -> None:
    experiment = _open(tmp_path, moe)
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    load = Load(tokens=96, few=24, fewer=6, length=24, heads=4, channels=16)
    speeds = measure_speeds(
        experiment, crew(experiment.recipe.compute, experiment.workers_per_gpu), load
    )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    rates = [value for name, value in vars(speeds).items() if name not in ("compress", "copy")]
    assert all(0 < value < math.inf for value in rates)
    assert speeds.copy > 0
    assert set(speeds.compress) == set(experiment.recipe.chains())
    for entry in speeds.compress.values():
        assert [rows for rows, _ in entry.rows] == [32, 256, 1024]
        assert all(seconds > 0 for _, seconds in entry.rows)
        assert entry.bank > 0 and entry.dense > 0


@pytest.mark.usefixtures("fixed_speeds")
def test_forecast_is_plain_data_and_prints(tmp_path: Path, moe: Path) -> None:
    changes = {"serve": "transformers", "calibration": {"sequences": 5}}
    candidates = [{"method": "rtn", "bits": 4, "group_size": 16, "symmetric": [True, False]}]
    result = forecast(_open(tmp_path, moe, **changes, candidates=candidates, budget=_BUDGET))
    model = inspect_model(str(moe))
    assert json.loads(json.dumps(result)) == result
    assert json.loads(json.dumps(model)) == model
    (unloadable,) = result["unloadable"].items()
    assert "zero points" in unloadable[0]
    assert unloadable[1] == result["work"]["units"]
    out = io.StringIO()
    console = Console(file=out, width=160)
    show_forecast(result, console)
    show_model(model, console)
    text = out.getvalue()
    for figure in (result["bytes"]["budget"]["bytes"], model["parts"]["experts"]["bytes"]):
        assert f"{figure:,}" in text
    assert "few_tokens" in text
    assert unloadable[0] in text.replace("\n", " ")


_BUDGET = {"bits_per_weight": 6.0}


@pytest.mark.usefixtures("fixed_speeds")
def test_more_workers_than_fit_are_refused(tmp_path: Path, moe: Path) -> None:
    with pytest.raises(UserError, match=r"4000 worker\(s\) of 1 CPU and 0 GPU do not fit"):
        forecast(_open(tmp_path, moe, compute={"workers": 4000}))


@pytest.mark.usefixtures("fixed_speeds")
def test_too_little_memory_is_an_event(
    tmp_path: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = types.SimpleNamespace(total=1 << 20, available=1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: little)
    result = forecast(_open(tmp_path, moe))
    assert "memory_short" in {event["kind"] for event in result["events"]}


def test_a_recipe_with_a_study_is_told_what_a_resident_model_takes(
    moe: Path, tmp_path: Path, fixed_speeds: None
) -> None:
    experiment = _open(tmp_path, moe, tune={"seed": 1})
    result = forecast(experiment)
    parts = result["memory"]["stages"]["tune"]
    assert parts["weights"] > sum(experiment.sizes.dense_bytes(u) for u in experiment.units)
    assert parts["hidden states"] == HIDDEN_BYTES and parts["weights of other plans"] > 0
    assert result["memory"]["peak"] == parts["total"]
    console = Console(file=io.StringIO(), width=200)
    show_forecast(result, console)
    assert re.search(r"│ tune +│ +│ +│ +1\.\d GB │", console.file.getvalue())
    assert "tune" not in forecast(_open(tmp_path, moe))["memory"]["stages"]


def test_slopes_take_more_memory_than_evaluations(moe: Path, tmp_path: Path) -> None:
    totals = []
    for method in ("evolve", "relax"):
        experiment = _open(tmp_path, moe, refine={"method": method})
        parts = forecast(experiment)["memory"]["stages"]["refine"]
        assert ("gradients" in parts) == (method == "relax")
        totals.append(parts["total"])
    largest = max(experiment.sizes.dense_bytes(unit) for unit in experiment.units)
    assert totals[1] - totals[0] > 3 * largest
