"""Measuring: errors against brute force, jobs against the methods themselves, predictions."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr

from moesaic.methods.base import Chain, Spec, Stats, Unit, method_module
from moesaic.orchestrator import compression
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.compression import row_errors
from moesaic.orchestrator.console import View
from moesaic.orchestrator.evaluate import evaluate_rows
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.measure import (
    compress_job,
    needs,
    piece_key,
    predicted_losses,
    read_errors,
    to_measurements,
)
from moesaic.orchestrator.pieces import read_piece
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.results import measurements, problem
from moesaic.orchestrator.stages import Calibration, measuring_jobs, missing_pairs
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.store import Entry
from moesaic.orchestrator.worker import WorkerState, plain
from tests.orchestrator.inline import InlinePool
from tests.orchestrator.projects import make_model_folder, make_recipe

RTN = Spec.of("rtn")
EVENTS = [{"kind": "dead_inputs", "message": "", "unit": "bank", "value": 1.0}] * 2


def experiment_in(folder: Path, model: Path, **changes: Any) -> Experiment:
    recipe = load_recipe(make_recipe(folder, model, **changes))
    return Experiment(recipe, folder / "runs" / "small")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("moe"))


@pytest.fixture
def measured(tmp_path: Path, model: Path) -> Experiment:
    experiment = experiment_in(tmp_path, model)
    Calibration(experiment, InlinePool(2), View(), experiment.offers).run()
    return experiment


@pytest.mark.parametrize("batch", [(), (3,)])
def test_row_errors_are_those_of_the_outputs(
    batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "ERROR_BYTES", 1)  # one expert at a time
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*batch, 5, 7, generator=generator)
    other = weight + 0.1 * torch.randn(*batch, 5, 7, generator=generator)
    x = torch.randn(*batch, 31, 7, generator=generator)
    error, norm = (row_errors(weight, w, x.mT @ x) for w in (other, None))
    y, z = (x.double() @ w.double().mT for w in (weight, other))
    assert error.shape == norm.shape == (*batch, 5)
    assert torch.allclose(error.double(), (y - z).square().sum(-2), rtol=1e-4)
    assert torch.allclose(norm.double(), y.square().sum(-2), rtol=1e-4)


def test_row_errors_of_equal_weights_are_zero_and_never_negative() -> None:
    weight = torch.randn(4, 6)
    vector = torch.randn(6, 1)
    hessian = vector @ vector.T - 1e-3 * torch.eye(6)  # not quite positive, as rounding makes it
    assert torch.equal(row_errors(weight, weight, hessian), torch.zeros(4))
    assert (row_errors(torch.eye(6), torch.zeros(6, 6), hessian) >= 0).all()


def test_predicted_losses_are_the_formula_expert_by_expert(tmp_path: Path) -> None:
    """The second expert saw a quarter of the tokens of the first."""
    shapes = {"gate": (2, 3, 4), "up": (2, 3, 4), "down": (2, 4, 3)}
    unit = Unit("bank", "bank", 0, "experts", shapes, {m: m for m in shapes})
    generator = torch.Generator().manual_seed(1)
    rows, gradients = {}, {}
    tokens, all_tokens = torch.tensor([40, 10]), 64
    for member, (experts, out, _) in shapes.items():
        rows[f"error|{member}"] = torch.rand(experts, out, generator=generator)
        rows[f"norm|{member}"] = torch.rand(experts, out, generator=generator) * 9
        rows[f"tokens|{member}"] = tokens.clone()
        squares = torch.rand(experts, out, generator=generator)
        gradients[f"bank|{member}"] = Stats({"grad_sq": squares})
    save_file(rows, tmp_path / "errors")
    losses = predicted_losses(read_errors(tmp_path / "errors"), gradients, unit, all_tokens)
    entry = Entry(
        tmp_path / "errors",
        0,
        {"bytes": {"gate": 20, "up": 22, "down": 24}, "seconds": 12.0, "events": EVENTS},
    )
    found = to_measurements(unit, (RTN,), entry, entry, gradients, all_tokens)
    assert [m.unit for m in found] == [f"bank.{e}.{m}" for e in (0, 1) for m in shapes]
    for measurement in found:
        _, number, member = measurement.unit.split(".")
        expert = int(number)
        error, norm = (rows[f"{name}|{member}"][expert].tolist() for name in ("error", "norm"))
        squares = gradients[f"bank|{member}"]["grad_sq"][expert].tolist()
        loss = sum(
            0.5 * (g2 / all_tokens) * (e / int(tokens[expert]))
            for g2, e in zip(squares, error, strict=True)
        )
        assert measurement.score == pytest.approx(loss, rel=1e-6)
        assert float(losses[member][2][expert]) == pytest.approx(loss, rel=1e-6)  # type: ignore[index]
        assert measurement.error == pytest.approx(sum(error) / sum(norm), rel=1e-6)
        assert measurement.norm == pytest.approx(sum(norm), rel=1e-6)
        assert measurement.bytes == {"gate": 10, "up": 11, "down": 12}[member]
        assert measurement.seconds == 2.0
    assert [dict(m.events) for m in found] == [{"dead_inputs": 2}, *[{}] * 5]
    plain_losses = predicted_losses(read_errors(tmp_path / "errors"), None, unit, all_tokens)
    assert all(loss is None for _, __, loss in plain_losses.values())


def test_experts_that_saw_nothing_cost_nothing(tmp_path: Path) -> None:
    unit = Unit("bank", "bank", 0, "experts", {"down": (1, 2, 3)}, {"down": "s"})
    zero = torch.zeros(1, 2)
    rows = {"error|down": zero, "norm|down": zero.clone(), "tokens|down": torch.tensor([0])}
    save_file(rows, tmp_path / "errors")
    gradients = {"bank|down": Stats({"grad_sq": zero})}
    entry = Entry(tmp_path / "errors", 0, {"bytes": {"down": 3}, "seconds": 0.0, "events": []})
    (found,) = to_measurements(unit, (RTN,), entry, entry, gradients, 10)
    assert (found.error, found.score) == (0.0, 0.0)


def test_choices_of_a_bank_share_its_bytes_exactly(measured: Experiment) -> None:
    """Or a plan would hold more than the search believes."""
    table = measurements(measured).measurements
    for unit in measured.units:
        names = {choice.name for choice in choices(unit)}
        for chain in measured.offers[unit.name]:
            own = [m for m in table if m.unit in names and m.chain == chain]
            assert len(own) == len(names)
            assert sum(m.bytes for m in own) == measured.sizes.predicted_bytes(unit, chain)


def test_searches_learn_what_units_hold_as_they_are(measured: Experiment) -> None:
    table = measurements(measured)
    given = problem(measured, table)
    for unit in measured.units:
        known = [given.layers[choice.name].bytes for choice in choices(unit)]
        assert sum(known) == measured.sizes.dense_bytes(unit)
        assert {given.layers[choice.name].influence for choice in choices(unit)} == {
            table.influence[unit.block]
        }
    assert all(0 < influence < 2 for influence in table.influence.values())
    assert given.layers.keys() == given.choices.keys()


def test_pieces_hold_what_the_method_gives_alone(measured: Experiment) -> None:
    """Also where the pool solved the units of a site together."""
    checked = set()
    for unit in measured.units:
        stats = load_stats(measured.store.path("stats", measured.walk.stats_key(unit.block)))
        weights = measured.model.read_unit(unit)
        own = {member: stats[site] for member, site in unit.sites.items()}
        for chain in measured.offers[unit.name]:
            (spec,) = chain
            alone = method_module(spec.method).compress(weights, own, spec.parsed()).members
            key = measured.key(unit.name, chain, measured.walk)
            entry = measured.store.get("pieces", key)
            assert entry is not None
            found = read_piece(entry.path)
            assert found.keys() == alone.keys() == unit.shapes.keys()
            for member, tensor in found.items():
                assert torch.equal(tensor.dense(), alone[member].dense())
            assert entry.metadata["bytes"] == {m: t.nbytes for m, t in alone.items()}
            size = sum(entry.metadata["bytes"].values())
            assert size == measured.sizes.predicted_bytes(unit, chain)
            with safe_open(measured.store.path("errors", key), framework="pt") as file:
                for member, tensor in alone.items():
                    hessian = own[member]["hessian"].double()
                    delta = weights[member].double() - tensor.dense().double()
                    wanted = ((delta @ hessian) * delta).sum(-1)
                    rows = file.get_tensor(f"error|{member}").double()
                    assert torch.allclose(rows, wanted, rtol=1e-3, atol=1e-4 * wanted.max())
                    assert torch.equal(file.get_tensor(f"tokens|{member}"), own[member]["tokens"])
            checked.add((unit.kind, spec.method))
    assert checked == {(kind, m) for kind in ("linear", "bank") for m in ("rtn", "gptq")}


def test_only_damaged_or_lost_pairs_are_missing(measured: Experiment) -> None:
    wanted = measured.offers
    assert missing_pairs(measured, measured.walk, wanted) == {}
    first, second, third = (unit.name for unit in measured.units[:3])
    chain = measured.offers[first][1]
    keys = {name: measured.key(name, chain, measured.walk) for name in (first, second, third)}
    measured.store.path("pieces", keys[first]).unlink()
    measured.store.path("errors", keys[second]).unlink()
    altered = measured.store.path("pieces", keys[third])
    altered.write_bytes(altered.read_bytes()[:-1] + b"\x55\x55")
    missing = missing_pairs(measured, measured.walk, wanted)
    assert missing == {name: [(chain, key)] for name, key in keys.items()}
    before = {p: p.stat().st_mtime_ns for p in measured.store.root.glob("pieces/*/*.safetensors")}
    jobs = list(measuring_jobs(measured, measured.walk, missing))
    # q, k and v read one site and are one job.
    assert [job.units for job in jobs] == [(first, second, third)]
    compress_job(WorkerState(1), plain(jobs[0]))
    assert missing_pairs(measured, measured.walk, wanted) == {}
    after = {p: p.stat().st_mtime_ns for p in measured.store.root.glob("pieces/*/*.safetensors")}
    changed = {path.stem for path, time in after.items() if before.get(path) != time}
    assert changed == set(keys.values())


def test_a_piece_made_again_is_the_same_file(measured: Experiment) -> None:
    """Whether its neighbours on the site are solved with it or not."""
    unit = measured.units[1].name
    for chain in measured.offers[unit]:
        path = measured.store.path("pieces", measured.key(unit, chain, measured.walk))
        content = path.read_bytes()
        path.unlink()
        missing = missing_pairs(measured, measured.walk, measured.offers)
        assert list(missing) == [unit]
        for job in measuring_jobs(measured, measured.walk, missing):
            compress_job(WorkerState(1), plain(job))
        assert path.read_bytes() == content


def test_needs_are_the_union_and_always_tell_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rtn, gptq = (Spec.of("rtn"),), (Spec.of("gptq"),)
    assert needs([]) == needs([rtn]) == needs([rtn, gptq]) == ("hessian", "tokens")
    monkeypatch.setattr(method_module("rtn"), "NEEDS", frozenset({"abs"}))
    assert needs([gptq, rtn, gptq]) == ("abs", "hessian", "tokens")


def test_a_piece_is_named_by_all_that_decides_it() -> None:
    rtn3, rtn4 = ((Spec.of("rtn", {"bits": bits}),) for bits in (3, 4))
    keys = {
        piece_key("model", "unit", rtn3, "stats"),
        piece_key("other", "unit", rtn3, "stats"),
        piece_key("model", "other", rtn3, "stats"),
        piece_key("model", "unit", rtn4, "stats"),
        piece_key("model", "unit", rtn3, "other"),
        piece_key("model", "unit", (), "stats"),
    }
    assert len(keys) == 6
    again = (Spec.of("rtn", {"bits": 3, "clip": "none"}),)
    assert piece_key("model", "unit", rtn3, "stats") == piece_key("model", "unit", again, "stats")


def kl_of(experiment: Experiment, state: WorkerState, pieces: Mapping[str, str]) -> float:
    rows = (0, len(experiment.evaluation.ids))
    part = evaluate_rows(state, asdict(experiment.judge), rows, dict(pieces))
    return sum(part["kl"]) / (part["tokens"] * len(part["kl"]))


@pytest.mark.parametrize(("model_type", "least"), [("llama", 0.97), ("qwen3_moe", 0.8)])
def test_predictions_order_choices_as_the_measured_kl_does(
    tmp_path: Path, model_type: str, least: float
) -> None:
    """Units of very different weight, each swapped alone, judged on the calibration text.

    In a random Mixture-of-Experts tokens lie close to the border between two experts, and those
    that a small error sends to another one are what no derivative can foresee.
    """
    model = make_model_folder(tmp_path / "model", model_type, dtype=torch.float32)
    text = {"texts": [{"file": "first.txt"}], "sequences": 24, "length": 24, "seed": 3}
    experiment = experiment_in(
        tmp_path,
        model,
        candidates=[{"method": "rtn", "bits": [5, 6, 8], "group_size": 16}],
        baselines=None,
        budget={"bits_per_weight": 8},
        calibration={**text, "gradient_sequences": 24},
        evaluation=text,
    )
    pool = InlinePool()
    Calibration(experiment, pool, View(), experiment.offers).run()
    scores: dict[tuple[str, Chain], float] = {}
    owner = {choice.name: unit for unit in experiment.units for choice in choices(unit)}
    for m in measurements(experiment).measurements:
        if m.chain:
            assert m.score is not None
            pair = owner[m.unit].name, m.chain
            scores[pair] = scores.get(pair, 0.0) + m.score
    state = pool.states[0]
    assert kl_of(experiment, state, {}) == 0
    pairs = []
    for (unit, chain), score in scores.items():
        key = experiment.key(unit, chain, experiment.walk)
        pieces = {unit: str(experiment.store.path("pieces", key))}
        pairs.append((score, kl_of(experiment, state, pieces)))
    assert len(pairs) == 3 * len(experiment.units)
    predicted, actual = zip(*pairs, strict=True)
    assert min(actual) > 0
    assert spearmanr(predicted, actual).statistic > least
    if model_type == "llama":  # in size as well
        ratios = sorted(p / a for p, a in pairs)
        tenth = len(ratios) // 10
        assert 0.8 < ratios[len(ratios) // 2] < 1.25
        assert 0.5 < ratios[tenth] < ratios[-1 - tenth] < 2
