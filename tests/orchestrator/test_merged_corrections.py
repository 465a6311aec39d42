"""Runs in which experts are corrected from merged ones: `[merger, eora]`, no expert goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.kernels import residual
from moesaic.methods.base import Chain, Unit
from moesaic.orchestrator.compressed_modules import CompressedExperts
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pieces import is_cut, read_piece
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.reductions import read_reduction
from moesaic.orchestrator.resident import Resident
from moesaic.orchestrator.results import measurements
from moesaic.orchestrator.run import collect_garbage
from moesaic.orchestrator.stages import missing_pairs
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

FULL = 32  # the experts' width
GPTQ = {"method": "gptq", "bits": 3, "group_size": 16}
HC_SMOE = {"method": "hc_smoe", "keep": 0.5}
EORA = {"method": "eora", "rank": [4, 8, FULL]}
CORRECTED: dict[str, Any] = {
    "candidates": [GPTQ, [HC_SMOE, EORA], [HC_SMOE, {**GPTQ, "bits": 8}]],
    "baselines": {
        "corrected": [{"method": "m_smoe", "keep": 0.5}, {**EORA, "rank": FULL}],
        "merged": [HC_SMOE, {**GPTQ, "bits": 8}],
    },
    "budget": {"bits_per_weight": 11.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "one", model, monkeypatch)


def _open(project: Project) -> Experiment:
    return Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)


def _path(experiment: Experiment, unit: Unit, chain: Chain) -> Path:
    return experiment.store.path("pieces", experiment.key(unit.name, chain, experiment.walk))


def _corrected(chains: list[Chain]) -> list[Chain]:
    return [chain for chain in chains if len(chain) == 2 and chain[1].method == "eora"]


def test_a_run_chooses_corrected_experts_and_keeps_what_it_needs(
    project: Project, reductions: list[str]
) -> None:
    project.write(**CORRECTED)
    result, _ = project.run()
    # Both chains of hc_smoe take one reduction; a plan's own checkpoint was verified.
    assert sorted(reductions) == ["hc_smoe", "hc_smoe", "m_smoe", "m_smoe"]
    chosen = project.json("plan.json")["units"]
    experiment = _open(project)
    table = measurements(experiment).measurements
    banks = [unit for unit in experiment.units if unit.kind == "bank"]
    used = set()
    for unit in experiment.units:
        offered = experiment.offers[unit.name]
        assert bool(_corrected(offered)) == (unit.kind == "bank")
        for chain in _corrected(offered):
            own = [m for m in table if m.unit.startswith(f"{unit.name}.") and m.chain == chain]
            predicted = experiment.sizes.predicted_bytes(unit, chain)
            assert sum(m.bytes for m in own) == predicted
            entry = experiment.store.get("pieces", _path(experiment, unit, chain).stem)
            assert entry is not None
            assert sum(entry.metadata["bytes"].values()) == predicted
    for unit in banks:
        for member, shape in unit.shapes.items():
            links = [chosen[f"{unit.name}.{expert}.{member}"] for expert in range(shape[0])]
            assert links.count(links[0]) == len(links)
            used.add("+".join(link["method"] for link in links[0]))
    assert "hc_smoe+eora" in used
    scores = result["scores"]
    assert scores["plan"]["bytes"] <= project.json("plan.json")["budget_bytes"]
    # At full rank experts are as good as they were: merged ones, and those of moved channels.
    assert scores["corrected"]["kl"] < 1e-4 < scores["merged"]["kl"] / 10

    loaded = AutoModelForCausalLM.from_pretrained(project.output / "model")
    formats = {
        member.described["format"]
        for module in loaded.modules()
        if isinstance(module, CompressedExperts)
        for member in (module.gate, module.up, module.down)
    }
    assert "residual" in formats

    left = project.left()
    collect_garbage(project.folder / "store", [project.output], 0.0)
    reductions.clear()
    _, again = project.run()
    assert again.keys() <= {"evaluate:evaluate_rows"} and not reductions
    assert project.left()["model.safetensors"] == left["model.safetensors"]


def test_errors_are_those_of_every_old_expert_and_fall_with_the_rank(project: Project) -> None:
    project.write(**{**CORRECTED, "baselines": {}})
    project.run(stages=("measure",))
    experiment = _open(project)
    table = {(m.unit, m.chain): m for m in measurements(experiment).measurements}
    for unit in (unit for unit in experiment.units if unit.kind == "bank"):
        weights = experiment.model.read_unit(unit)
        chains = sorted(
            _corrected(experiment.offers[unit.name]),
            key=lambda chain: dict(chain[1].parsed())["rank"],
        )
        assert [is_cut(_path(experiment, unit, chain)) for chain in chains] == [True, True, False]
        key = experiment.reduction_key(unit.name, chains[0][:1], experiment.walk)
        bank = read_reduction(experiment.store, key, unit)
        assert bank is not None
        for member, weight in weights.items():
            for expert in range(weight.shape[0]):
                own = [table[f"{unit.name}.{expert}.{member}", chain] for chain in chains]
                errors = [m.error for m in own]
                # What is lost by rounding factors to 16 bits is not ordered.
                assert errors[2] < 1e-4 and errors[2] <= errors[1] + 1e-5 <= errors[0] + 2e-5
                alone = int((bank.group == bank.group[expert]).sum()) == 1
                assert (errors[0] == 0) == alone and own[0].score is not None
        piece = read_piece(_path(experiment, unit, chains[-1]))
        assert piece.keys() == unit.shapes.keys()  # nothing comes with it: the router is as it was
        for member, weight in weights.items():
            base, _ = residual.members(piece[member])
            assert torch.equal(base.dense(), bank.members[member][bank.group])
            scale = float(weight.float().abs().max())
            assert float((piece[member].effective() - weight).abs().max()) < 1e-2 * scale

    # A reduction that is gone is made again with the piece that needs it, and only then.
    (unit, _) = (unit for unit in experiment.units if unit.kind == "bank")
    largest = chains[-1]
    key = experiment.reduction_key(unit.name, largest[:1], experiment.walk)
    path = _path(experiment, unit, largest)
    before = path.read_bytes()
    experiment.store.path("reductions", key).unlink()
    wanted = {unit.name: _corrected(experiment.offers[unit.name])}
    assert not missing_pairs(experiment, experiment.walk, wanted)
    path.unlink()
    project.run(stages=("measure",))
    assert experiment.store.get("reductions", key) is not None
    assert path.read_bytes() == before


def test_members_of_a_bank_may_be_corrected_beside_others(project: Project) -> None:
    project.write(**{**CORRECTED, "baselines": {}})
    project.run(stages=("measure",))
    experiment = _open(project)
    unit = next(unit for unit in experiment.units if unit.kind == "bank")
    offered = experiment.offers[unit.name]
    plain = next(chain for chain in offered if len(chain) == 1)
    paths = [_path(experiment, unit, chain) for chain in (plain, _corrected(offered)[0])]
    source = {"gate": paths[0], "up": paths[1], "down": paths[1]}
    held = Resident(experiment.model, 1 << 20, 1 << 20)
    held.mixtures = {"mixed": [(m, str(source[m]), range(8)) for m in unit.shapes]}
    found = held.members(unit.name, "mixed")
    for member, path in source.items():
        assert torch.equal(found[member].float(), read_piece(path)[member].effective().float())


def test_layers_that_share_out_their_experts_propagate_and_are_refined(project: Project) -> None:
    shared = {"method": "sub_moe", "keep": 0.5, "window": 0}
    project.write(
        candidates=[[shared, {**EORA, "rank": [4, 8]}]],
        baselines=None,
        budget={"bits_per_weight": 13.0},
        propagate=True,
        refine={"method": ["evolve"], "generations": 1, "offspring": 4},
    )
    project.run()
    found = {
        (link["method"], link["options"].get("window"))
        for links in project.json("plan.json")["units"].values()
        for link in links
        if len(links) == 2
    }
    assert found == {("sub_moe", 1), ("eora", None)}
    collect_garbage(project.folder / "store", [project.output], 0.0)
    _, again = project.run()
    assert not {name for name in again if name.startswith(("calibrate", "measure"))}


def test_the_smallest_plan_of_corrected_experts_fits_its_own_bytes(project: Project) -> None:
    small = [[{**HC_SMOE, "keep": 2}, {**EORA, "rank": 1}]]
    project.write(**{**CORRECTED, "candidates": small, "baselines": {}})
    smallest = _open(project).sizes.size.smallest_bytes
    budget = {"bits_per_weight": None, "bytes": smallest}
    project.write(**{**CORRECTED, "candidates": small, "baselines": {}, "budget": budget})
    result, _ = project.run()
    assert result["scores"]["plan"]["bytes"] <= smallest


def test_experts_with_biases_may_have_their_channels_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model", "gpt_oss", intermediate_size=FULL)
    project = Project(tmp_path, model, monkeypatch)
    whole = [{"method": "ream", "keep": 0.5}, {**EORA, "rank": FULL}]
    low = [{"method": "ream", "keep": 0.5}, {**EORA, "rank": 2}]
    project.write(**{**CORRECTED, "candidates": [GPTQ], "baselines": {"whole": whole, "low": low}})
    result, _ = project.run(stages=("evaluate",))
    assert result["scores"]["whole"]["kl"] < 1e-4 < result["scores"]["low"]["kl"] / 100


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (
            [{"method": "reap", "keep": 0.5}, EORA],
            "eora cannot follow reap, .* no stand-in .* merge",
        ),
        ([{"method": "slim", "width": 0.5}, EORA], "eora cannot follow slim"),
        ([HC_SMOE, EORA, GPTQ], "eora comes last in a chain"),
        ([HC_SMOE, {**EORA, "rank": FULL + 1}], "rank 33 is above 32"),
        ([{**HC_SMOE, "keep": 9}, EORA], "keep: 9 experts are more than the 8 there are"),
    ],
)
def test_what_cannot_be_corrected_is_told(project: Project, chain: list[Any], reason: str) -> None:
    project.write(**{**CORRECTED, "candidates": [GPTQ, chain], "baselines": {}})
    with pytest.raises(UserError, match=reason):
        project.run()


def test_other_engines_and_dense_models_have_no_corrected_experts(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**CORRECTED, "candidates": [[HC_SMOE, {**EORA, "rank": 4}]], "baselines": {}}
    project.write(**recipe, serve="transformers")
    with pytest.raises(UserError, match="loads one quantizer per unit, not a chain of 2 methods"):
        project.run()
    dense = Project(tmp_path / "two", make_model_folder(tmp_path / "llama", "llama"), monkeypatch)
    dense.write(**recipe)
    with pytest.raises(UserError, match="hc_smoe: for experts only, and llama has none"):
        dense.run()
