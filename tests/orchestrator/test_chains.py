"""Ranks and chains on their way through the store: made once, cut, read like any other piece."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moesaic.kernels import lowrank, residual
from moesaic.methods.base import Chain, Spec, Unit, method_module, reducing
from moesaic.methods.chains import predict_bytes
from moesaic.orchestrator import compression, propagate
from moesaic.orchestrator.compression import row_errors
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.pieces import is_cut, read_piece
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.results import measurements
from moesaic.orchestrator.run import collect_garbage
from moesaic.orchestrator.stages import missing_pairs
from moesaic.orchestrator.statistics import load_stats
from tests.orchestrator.inline import Killed, Project
from tests.orchestrator.projects import make_model_folder

SVD_LLM = {"method": "svd_llm", "rank": [2, 0.4, 0.6, 6]}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16}
EORA = {"method": "eora", "rank": [1, 2, 4]}
MIXED: dict[str, Any] = {
    "candidates": [SVD_LLM, [GPTQ, EORA]],
    "baselines": {
        "rank 6": {"method": "svd_llm", "rank": 6},
        "corrected": [GPTQ, {"method": "eora", "rank": 2}],
    },
    "budget": {"bits_per_weight": 7.5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "one", model, monkeypatch)
    made.write(**MIXED)
    return made


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[Chain]:
    """Chains whose last link was really run, in order."""
    found: list[Chain] = []
    apply_link = compression.apply_link

    def counted(chain: Chain, *rest: Any) -> Any:
        found.append(chain)
        return apply_link(chain, *rest)

    monkeypatch.setattr(compression, "apply_link", counted)
    return found


def _open(project: Project) -> Experiment:
    return Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)


def _path(experiment: Experiment, unit: Unit, chain: Chain) -> Path:
    return experiment.store.path("pieces", experiment.key(unit.name, chain, experiment.walk))


def test_every_rank_is_what_its_own_factorisation_gives(project: Project) -> None:
    project.run(stages=("measure",))
    experiment = _open(project)
    ranked = [chain for chain in experiment.recipe.candidates if chain[-1].method == "svd_llm"]
    for unit in experiment.units:
        stats = load_stats(experiment.store.path("stats", experiment.walk.stats_key(unit.block)))
        weights = experiment.model.read_unit(unit)
        own = {member: stats[site] for member, site in unit.sites.items()}
        cuts = 0
        for chain in ranked:
            (spec,) = chain
            alone = method_module(spec.method).compress(weights, own, spec.parsed()).members
            path = _path(experiment, unit, chain)
            cuts += is_cut(path)
            found = read_piece(path)
            entry = experiment.store.get("pieces", path.stem)
            assert entry is not None
            assert entry.metadata["bytes"] == {m: t.nbytes for m, t in alone.items()}
            errors = experiment.store.path("errors", path.stem)
            for member, tensor in alone.items():
                for one, other in zip(
                    lowrank.factors(found[member]), lowrank.factors(tensor), strict=True
                ):
                    assert torch.equal(one.dense(), other.dense())
                hessian = own[member]["hessian"]
                wanted = row_errors(weights[member], tensor.effective(), hessian)
                norm = row_errors(weights[member], None, hessian)
                with safe_open(errors, framework="pt") as file:
                    rows = file.get_tensor(f"error|{member}")
                    assert torch.equal(file.get_tensor(f"norm|{member}"), norm)
                assert torch.allclose(rows, wanted, rtol=1e-3, atol=1e-5 * float(norm.max()))
        assert cuts == len(ranked) - 1


def test_all_ranks_take_one_factorisation_and_corrections_one_base(
    project: Project, applied: list[Chain]
) -> None:
    project.run(stages=("measure",))
    experiment = _open(project)
    linears = [unit for unit in experiment.units if unit.kind == "linear"]
    by_method = {name: [c for c in applied if c[-1].method == name] for name in ("svd_llm", "eora")}
    assert {name: len(found) for name, found in by_method.items()} == {
        "svd_llm": len(experiment.units),
        "eora": len(experiment.units),
    }
    assert len(linears) < len(experiment.units)
    # The bases that corrections start from are kept, though nobody asked for them alone.
    chain = next(c for c in experiment.recipe.candidates if c[-1].method == "eora")
    base = experiment.store.get("pieces", _path(experiment, linears[0], chain[:1]).stem)
    assert base is not None
    _, again = project.run(stages=("measure",))
    assert not again


def test_corrections_lessen_the_error_of_their_base(project: Project) -> None:
    project.run(stages=("measure",))
    experiment = _open(project)
    table = {(m.unit, m.chain): m.error for m in measurements(experiment).measurements}
    chains = sorted(
        (c for c in experiment.recipe.candidates if c[-1].method == "eora"),
        key=lambda chain: dict(chain[-1].parsed())["rank"],
    )
    for unit in experiment.units:
        if unit.kind == "linear":
            errors = [table[unit.name, chain] for chain in chains]
            assert errors == sorted(errors, reverse=True)
            members = read_piece(_path(experiment, unit, chains[0]))
            base = read_piece(_path(experiment, unit, chains[0][:1]))
            kept, _ = residual.members(members["weight"])
            assert torch.equal(kept.dense(), base["weight"].dense())


def test_a_plan_of_ranks_and_corrections_loads_and_resumes_to_the_same_bytes(
    project: Project, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = project.run(size=2)
    used = {
        spec["method"] for links in project.json("plan.json")["units"].values() for spec in links
    }
    assert {"svd_llm", "eora"} <= used
    assert result["scores"]["plan"]["bytes"] <= project.json("plan.json")["budget_bytes"]
    other = Project(tmp_path / "two", model, monkeypatch)
    other.write(**MIXED)
    for kill_at in (7, 5, 5):
        with pytest.raises(Killed):
            other.run(kill_at=kill_at)
    other.run()
    first, second = project.left(), other.left()
    for files in (first, second):
        del files["README.md"]  # tells how fast the model was
    assert first == second


def test_a_cut_of_a_piece_that_is_gone_is_made_again(project: Project) -> None:
    project.run(stages=("measure",))
    experiment = _open(project)
    unit = experiment.units[0]
    chains = [c for c in experiment.offers[unit.name] if c[-1].method == "svd_llm"]
    (whole,) = [c for c in chains if not is_cut(_path(experiment, unit, c))]
    _path(experiment, unit, whole).unlink()
    missing = missing_pairs(experiment, experiment.walk, experiment.offers)
    assert {chain for chain, _ in missing.pop(unit.name)} == set(chains)
    assert not missing
    project.run()
    assert not missing_pairs(experiment, experiment.walk, experiment.offers)


def test_garbage_collection_keeps_bases_and_what_cuts_are_cut_from(
    project: Project, applied: list[Chain]
) -> None:
    project.run(stages=("measure",))
    # Of the ranks that were made, this recipe only wants one that is a cut.
    project.write(**{**MIXED, "candidates": [{"method": "svd_llm", "rank": 2}, [GPTQ, EORA]]})
    project.run()
    project.output.joinpath("recipe.yaml").write_text(
        load_recipe(project.folder / "recipe.yaml").to_yaml(), encoding="utf-8"
    )
    left = project.left()
    collect_garbage(project.folder / "store", [project.output], 0.0)
    applied.clear()
    project.run()
    assert not applied
    assert project.left() == left


def test_bytes_of_chains_are_told_before_any_work(project: Project) -> None:
    project.write(
        **{
            **MIXED,
            "candidates": [
                SVD_LLM,
                [{"method": "svd_llm", "rank": 8}, {"method": "rtn", "bits": 4, "group_size": 8}],
                [
                    {"method": "svd_llm", "rank": 8},
                    {"method": "rtn", "bits": 3, "group_size": -1},
                    {"method": "eora", "rank": 2},
                ],
            ],
        }
    )
    project.run(stages=("measure",))
    experiment = _open(project)
    for unit in experiment.units:
        for chain in experiment.offers[unit.name]:
            entry = experiment.store.get("pieces", _path(experiment, unit, chain).stem)
            assert entry is not None
            size = sum(entry.metadata["bytes"].values())
            assert size == experiment.sizes.predicted_bytes(unit, chain)
            rest = reducing(chain)[1]
            dtype = experiment.model.checkpoint.dtype(experiment.model.fixed_names()[0])
            assert size == predict_bytes(unit.shapes, dtype, rest)
    assert Spec.of("rtn", {"bits": 4, "group_size": 8}) in {
        c[-1] for c in experiment.recipe.chains()
    }


DELTA: dict[str, Any] = {
    "candidates": [
        {**GPTQ, "bits": 8},
        {"method": "delta_moe", "rank": [1, 0.2, 4]},
        [{"method": "delta_moe", "rank": 8}, {"method": "rtn", "bits": 4, "group_size": 8}],
    ],
    "baselines": {"shared": {"method": "delta_moe", "rank": 4}},
    "budget": {"bits_per_weight": 6.5},
}


def test_experts_that_share_a_base_take_it_together(project: Project) -> None:
    project.write(**DELTA)
    project.run()
    experiment = _open(project)
    table = measurements(experiment).measurements
    chosen = project.json("plan.json")["units"]
    found = set()
    for unit in experiment.units:
        offered = experiment.offers[unit.name]
        assert any(c[0].method == "delta_moe" for c in offered) == (unit.kind == "bank")
        for chain in offered:
            own = [m for m in table if m.unit.startswith(unit.name) and m.chain == chain]
            assert sum(m.bytes for m in own) == experiment.sizes.predicted_bytes(unit, chain)
        for member in unit.shapes if unit.kind == "bank" else ():
            links = [chosen[f"{unit.name}.{e}.{member}"] for e in range(unit.shapes[member][0])]
            assert links.count(links[0]) == len(links)
            found.add(links[0][0]["method"])
            found.add(links[0][-1]["method"])
    assert {"delta_moe", "rtn"} <= found
    # A baseline for banks alone leaves the rest as it is.
    scores = project.json("scores.json")
    assert scores["shared"]["bytes"] < scores["dense"]["bytes"]


def test_the_smallest_plan_of_chains_fits_its_own_bytes(project: Project) -> None:
    """Names of nested parts are longer; the bound on the headers must hold for them, too."""
    smallest = _open(project).sizes.size.smallest_bytes
    project.write(**{**MIXED, "budget": {"bits_per_weight": None, "bytes": smallest}})
    result, _ = project.run()
    assert result["scores"]["plan"]["bytes"] <= smallest


def test_methods_for_experts_are_refused_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = Project(tmp_path, make_model_folder(tmp_path / "model", "llama"), monkeypatch)
    dense.write(**{**DELTA, "baselines": {}})
    with pytest.raises(UserError, match="delta_moe: for experts only, and llama has none"):
        dense.run()


def test_left_factors_are_fitted_to_what_compressed_predecessors_leave(project: Project) -> None:
    refit = [{"method": "svd_llm", "rank": [0.4, 0.7], "refit": True}]
    recipe = {**MIXED, "candidates": refit, "baselines": {}}
    project.write(**recipe)
    with pytest.raises(UserError, match="propagate: true, or take refit out"):
        project.run()
    project.write(**recipe, propagate=True)
    result, _ = project.run()
    experiment = _open(project)
    chosen = {
        name: tuple(Spec.of(spec["method"], spec["options"]) for spec in links)
        for name, links in project.json("plan.json")["units"].items()
    }
    walk, seen = propagate.prefixed(experiment, chosen), 0
    for unit in (unit for unit in experiment.units if unit.kind == "linear"):
        chain = chosen[unit.name]
        if not chain:
            continue
        before, after = (
            lowrank.factors(read_piece(experiment.store.path("pieces", key))["weight"])[1].dense()
            for key in (experiment.key(unit.name, chain, w) for w in (experiment.walk, walk))
        )
        if unit.block == 0:
            assert torch.equal(before, after)
            continue
        wide, turned = before.double(), after.double()
        rest = turned - turned @ torch.linalg.pinv(wide) @ wide
        assert not torch.equal(before, after)
        # The same rows, up to what bfloat16 leaves of them.
        assert rest.norm() < 0.02 * turned.norm()
        seen += 1
    assert seen and math.isfinite(result["scores"]["plan"]["kl"])


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([EORA], "eora corrects what a compression or a merger left: put it after one"),
        ([GPTQ, {"method": "rtn", "bits": 4}], "rtn cannot follow gptq"),
        ([GPTQ, EORA, EORA], "eora comes last in a chain"),
        ([SVD_LLM, {"method": "asvd", "rank": 0.5}], "asvd cannot follow svd_llm"),
        ([{"method": "svd_llm", "rank": 0}], "rank"),
        ([{"method": "svd_llm", "rank": 1.5}], "a share is above 0 and at most 1"),
        ([{"method": "svd_llm", "rank": 4000}], "above"),
    ],
)
def test_what_cannot_follow_is_told(project: Project, chain: list[Any], reason: str) -> None:
    project.write(**{**MIXED, "candidates": [chain], "baselines": {}})
    with pytest.raises(UserError, match=reason):
        project.run()
