"""Dense parts made narrower: bytes, what loads them, and what they compute."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moesaic.methods.base import Chain, chain_text, reducing
from moesaic.orchestrator.assemble import assemble, folder_bytes, header_bytes_bound
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.narrowing import block_parts, read_narrowed
from moesaic.orchestrator.pieces import piece_header
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.plugin import MoesaicConfig
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.statistics import load_stats
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import Serve
from moesaic.orchestrator.verify import verify
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.inline import Project
from tests.orchestrator.planning import IDS, headers, logits_without_us, streamed_logits
from tests.orchestrator.projects import make_model_folder

RTN = {"method": "rtn", "bits": 4, "group_size": -1}
CUT = {"method": "modegpt", "keep": 0.5, "multiple": 8, "head_multiple": 2}
WHOLE = {**CUT, "keep": 1.0}
SVD = {"method": "svd", "rank": [2, 4]}
CANDIDATES = [RTN, [CUT], [CUT, RTN], [CUT, SVD], [WHOLE]]
# Biases in every place, groups of heads, norms of queries, sinks and a sliding window, experts.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gpt_oss": {},
    "qwen2_moe": {},
    "phi": {"partial_rotary_factor": 0.5},  # no gate, attention and MLP side by side
}


class Measured:
    """A tiny model in bfloat16 with all candidates measured."""

    def __init__(self, folder: Path, model_type: str, **changes: Any) -> None:
        own = make_model_folder(folder / "model", model_type, **MODELS[model_type])
        with pytest.MonkeyPatch.context() as patch:
            project = Project(folder, own, patch)
            project.write(
                candidates=CANDIDATES,
                baselines=None,
                serve="moesaic",
                calibration={"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 2},
                budget={"bits_per_weight": 8},
                **changes,
            )
            project.run(stages=("measure",))
        self.project = project
        self.experiment = Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
        self.model = self.experiment.model
        self.rtn, self.cut, self.rounded, *self.factored, self.whole = (
            self.experiment.recipe.candidates
        )

    def pieces(self, *chains: Chain, others: Chain = ()) -> dict[str, Path]:
        """Parts take the chains in turns; other linears stay as they are, or take ``others``."""
        plan: dict[str, Chain] = {}
        for unit in self.experiment.units:
            if unit.kind == "linear":
                plan[unit.name] = others
        for number, part in enumerate(self.experiment.shaping.parts.values()):
            plan |= {unit.name: chains[number % len(chains)] for unit in part.units.values()}
        found = plan_pieces(self.experiment, self.experiment.walk, plan)
        return {unit: Path(path) for unit, path in found.items()}

    def assemble(self, pieces: Mapping[str, Path], serve: Serve, output: Path) -> float:
        """Writes the folder, compares its bytes with the forecast, and reloads it."""
        assemble(self.model, self.experiment.folder, pieces, serve, output, "card")
        file = output / "model.safetensors"
        assert folder_bytes(self.model, headers(pieces), serve) == file.stat().st_size
        header = file.stat().st_size - sum(t.nbytes for t in load_file(file).values())
        assert header <= header_bytes_bound(
            self.model, self.model.units(), serve, 2, chained=True, narrowed=True
        )
        return verify(output, self.model.checkpoint, pieces, serve, IDS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Measured]]:
    yield cache(lambda name: Measured(tmp_path_factory.mktemp(name), name))


def test_parts_are_those_that_families_name() -> None:
    cut = {name: load_family(name) for name in families()}
    assert {name for name, f in cut.items() if not f.attention_roles} >= {"phi3", "deepseek_v3"}
    assert {name for name, f in cut.items() if f.paired and f.attention_roles} >= {
        "llama",
        "mistral",
        "qwen2",
        "mixtral",
        "gpt_oss",
    }
    # Where a norm looks at single channels of queries, pairs of them cannot go.
    for name, family in cut.items():
        normed = any("q_norm" in kept for kept in family.kept)
        assert not (normed and family.paired), name


def test_attention_that_clips_its_values_is_no_part(tiny: Tiny) -> None:
    kinds = {part.shape.kind for part in block_parts(StreamedModel(Checkpoint(tiny("olmo"))))}
    assert kinds == {"mlp"}


@pytest.mark.parametrize("model_type", MODELS)
def test_parts_lie_in_their_blocks(model_type: str, measured: Callable[[str], Measured]) -> None:
    own = measured(model_type)
    parts = block_parts(own.model)
    kinds = {part.shape.kind for part in parts}
    assert kinds == ({"attention"} if model_type == "gpt_oss" else {"attention", "mlp"})
    for part in parts:
        assert {unit.block for unit in part.units.values()} == {part.block}
        if part.shape.kind == "attention":
            assert (part.shape.heads, part.shape.kv_heads) == (4, 2)
            assert part.shape.head_channels == part.shape.value_channels
            assert part.shape.paired == (model_type not in ("qwen3", "phi"))


@pytest.mark.parametrize("model_type", MODELS)
def test_bytes_are_forecast_exactly(model_type: str, measured: Callable[[str], Measured]) -> None:
    own = measured(model_type)
    experiment = own.experiment
    for part in experiment.shaping.parts.values():
        for unit in part.units.values():
            assert {own.cut, own.rounded, *own.factored} <= set(experiment.offers[unit.name])
            for chain in (own.cut, own.rounded, *own.factored):
                found = plan_pieces(
                    experiment, experiment.walk, {u.name: chain for u in part.units.values()}
                )
                header = piece_header(Path(found[unit.name]))
                size = sum(stored.nbytes for stored in header["weight"].parts.values())
                assert experiment.sizes.predicted_bytes(unit, chain) == size, chain_text(chain)
                assert header["weight"].shape == unit.shapes["weight"]


@pytest.mark.parametrize("model_type", MODELS)
def test_moesaic_loads_every_part_cut_in_its_own_way(
    model_type: str, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured(model_type)
    plans = [
        own.pieces(own.cut, others=own.rtn),
        own.pieces(own.rounded, (), own.rtn),
        own.pieces(own.factored[0], own.factored[1], own.cut),
    ]
    for number, pieces in enumerate(plans):
        assert own.assemble(pieces, "moesaic", tmp_path / str(number)) < 5e-6
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype=torch.float32)
    options = {"quantization_config": MoesaicConfig(dequantize=True)}
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype=torch.float32, **options)
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_parts_that_keep_everything_compute_what_they_did(
    model_type: str, measured: Callable[[str], Measured]
) -> None:
    """Values in another basis, rounded to the file's bfloat16, give the same logits."""
    own = measured(model_type)
    exact = StreamedModel(own.model.checkpoint, dtype=torch.float32)
    before = streamed_logits(exact, {})
    scale = before.abs().max()
    assert (streamed_logits(exact, own.pieces(own.whole)) - before).abs().max() < 0.02 * scale
    assert (streamed_logits(exact, own.pieces(own.cut)) - before).abs().max() > 0.02 * scale


def test_predicted_loss_of_a_cut_is_that_of_its_outputs(
    measured: Callable[[str], Measured],
) -> None:
    own = measured("llama")
    experiment, walk = own.experiment, own.experiment.walk
    prefix = reducing(own.cut)[0]
    for part in experiment.shaping.parts.values():
        name = next(iter(part.units.values())).name
        found = read_narrowed(experiment.store, experiment.reduction_key(name, prefix, walk), part)
        assert found is not None and 0 < found.relative_error < 1
        gradients = load_stats(experiment.store.path("gradients", walk.gradients_key(part.block)))
        tokens = experiment.gradient_tokens()
        total = 0.0
        for unit in part.units.values():
            squares = gradients[f"{unit.name}|weight"]["grad_sq"].double() / tokens
            total += float((squares * found.linears[unit.name].error / (4 * 16)).sum()) / 2
        assert found.loss(gradients, tokens) == pytest.approx(total, rel=1e-9)
        assert total > 0


@pytest.mark.parametrize("serve", ["transformers", "vllm"])
def test_engines_load_narrower_mlps_of_one_width(
    serve: Serve, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured("qwen2")
    mlps = {
        u.name
        for p in own.experiment.shaping.parts.values()
        if p.shape.kind == "mlp"
        for u in p.units.values()
    }
    for chain, others in ((own.cut, ()), (own.rounded, own.rtn)):
        pieces = {u: p for u, p in own.pieces(chain).items() if u in mlps}
        pieces |= {u: p for u, p in own.pieces(others).items() if u not in mlps}
        output = tmp_path / str(len(pieces))
        assert own.assemble(pieces, serve, output) < 5e-6
        config = json.loads((output / "config.json").read_text())
        assert config["intermediate_size"] == 32 and ("quantization_config" in config) == bool(
            others
        )
        shapes = {
            name: tuple(t.shape) for name, t in load_file(output / "model.safetensors").items()
        }
        if not others:
            assert shapes["model.layers.0.mlp.down_proj.weight"] == (48, 32)
            assert shapes["model.layers.1.mlp.gate_proj.weight"] == (32, 48)


def test_engines_are_not_given_widths_that_differ(
    measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured("qwen2")
    first = [u for u in own.pieces(own.cut) if "layers.0.mlp" in u]
    pieces = {unit: own.pieces(own.cut)[unit] for unit in first}
    with pytest.raises(RunError, match="needs MLPs of one width"):
        assemble(own.model, own.experiment.folder, pieces, "transformers", tmp_path / "o", "")


def test_plain_transformers_needs_nothing_of_ours(
    measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured("qwen2")
    pieces = {u: p for u, p in own.pieces(own.cut).items() if ".mlp." in u}
    own.assemble(pieces, "transformers", tmp_path / "out")
    expected = streamed_logits(StreamedModel(own.model.checkpoint, dtype=torch.float32), pieces)
    found = logits_without_us(tmp_path, ["out"])["out"]
    assert bool((found - expected).abs().max() <= 5e-6 * expected.abs().max())


def test_a_whole_run_searches_cuts_and_bits_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model", "qwen2")
    project = Project(tmp_path, model, monkeypatch)
    project.write(
        candidates=[[{**CUT, "keep": [0.75, 0.5]}], [{**CUT, "keep": 0.75}, RTN]],
        baselines={"half": [CUT]},
        serve="moesaic",
        budget={"bits_per_weight": 9},
        calibration={"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 2},
    )
    result, _ = project.run()
    chains = {chain_text_of(c) for c in project.json("plan.json")["units"].values()}
    assert any(text.startswith("modegpt") for text in chains)
    assert result["scores"]["plan"]["kl"] > 0
    assert result["scores"]["half"]["bytes"] < result["scores"]["dense"]["bytes"]
    # Parts are cut as a whole or not at all.
    plan = project.json("plan.json")["units"]
    experiment = Experiment(load_recipe(tmp_path / "recipe.yaml"), project.output)
    for part in experiment.shaping.parts.values():
        cuts = {
            json.dumps([s for s in plan[u.name] if s["method"] == "modegpt"])
            for u in part.units.values()
        }
        assert len(cuts) == 1
    before = project.left()
    again, calls = project.run()
    assert not calls["measure:compress_job"] and project.left() == before


@pytest.mark.parametrize(
    ("serve", "search"),
    [("transformers", "knapsack"), ("vllm", "uniform"), ("transformers", "modegpt")],
)
def test_a_search_for_engines_leaves_all_mlps_one_width(
    serve: Serve, search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path / "model", "qwen2")
    project = Project(tmp_path, model, monkeypatch)
    cuts = {**CUT, "keep": [0.75, 0.5]}
    project.write(
        candidates=[[cuts], [cuts, {"method": "rtn", "bits": 8, "group_size": -1}]],
        baselines=None,
        serve=serve,
        search=search,
        keep=["self_attn"],
        budget={"bits_per_weight": 11},
        calibration={"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 2},
    )
    result, _ = project.run()
    config = json.loads((Path(result["model"]) / "config.json").read_text())
    assert config["intermediate_size"] in (48, 32)
    forms = {
        tuple(s["options"]["keep"] for s in chain if s["method"] == "modegpt")
        for name, chain in project.json("plan.json")["units"].items()
    }
    assert len(forms) == 1 and len(next(iter(forms))) == 1


def test_fisher_information_stands_beside_cuts_and_a_kept_linear_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model_folder(tmp_path / "model", "qwen2")
    project = Project(tmp_path, model, monkeypatch)
    project.write(
        candidates=[RTN, {"method": "fwsvd", "rank": [2, 4]}, [CUT, RTN]],
        baselines=None,
        serve="moesaic",
        keep=[r"layers\.1\.self_attn\.q_proj"],
        budget={"bits_per_weight": 5},
        calibration={"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 2},
    )
    result, _ = project.run()
    assert result["scores"]["plan"]["kl"] > 0
    assert "not offered on 3 unit(s): modegpt cuts a part of a block as a whole" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_plan_is_solved_again_behind_what_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``propagate`` every block is cut for the inputs that the blocks before it leave."""
    model = make_model_folder(tmp_path / "model", "qwen2")
    project = Project(tmp_path, model, monkeypatch)
    changes: dict[str, Any] = {
        "candidates": [[{**CUT, "keep": 0.75}, {"method": "gptq", "bits": 8, "group_size": -1}]],
        "baselines": None,
        "budget": {"bits_per_weight": 7},
        "calibration": {"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 2},
    }
    project.write(**changes)
    plain, _ = project.run()
    project.write(**changes, propagate=True)
    solved, _ = project.run()
    assert solved["scores"]["plan"]["bytes"] == plain["scores"]["plan"]["bytes"]
    assert solved["scores"]["plan"]["kl"] != plain["scores"]["plan"]["kl"]


def chain_text_of(specs: list[dict[str, Any]]) -> str:
    return " → ".join(str(spec["method"]) for spec in specs)
