"""Checkpoints with fewer or narrower experts: their bytes, what they say, who loads them."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.methods.base import Chain, chain_text, reducing
from moesaic.orchestrator.assemble import assemble, folder_bytes, header_bytes_bound
from moesaic.orchestrator.bank import is_reduced
from moesaic.orchestrator.choices import choices
from moesaic.orchestrator.errors import RunError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.export import resized_config
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.pieces import piece_header
from moesaic.orchestrator.plan_pieces import plan_pieces
from moesaic.orchestrator.plugin import MoesaicConfig
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.streaming import StreamedModel
from moesaic.orchestrator.targets import Serve
from moesaic.orchestrator.verify import verify
from tests.orchestrator.inline import Project
from tests.orchestrator.planning import IDS, headers, logits_without_us, streamed_logits
from tests.orchestrator.projects import make_model_folder

FAMILIES = [name for name in families() if load_family(name).experts is not None]
FUSED = [name for name in FAMILIES if (bank := load_family(name).experts) and bank.fused]
NARROWER = [name for name in FAMILIES if (router := load_family(name).router) and router.width]
EXPORTED = ("reap", "mone", "slim", "hc_smoe")
RTN = {"method": "rtn", "bits": 4, "group_size": -1}
# Six of eight is the least where routing takes three experts of one group of four.
FEWER = {"deepseek_v2": 6, "deepseek_v3": 6}


def chains_of(model_type: str) -> list[Any]:
    """What is exported here: every kind of outline, by itself and with bits after it."""
    keep = FEWER.get(model_type, 4)
    links: list[Any] = [{"method": name, **taken(name, keep)} for name in EXPORTED]
    links += [
        {"method": "hc_smoe", "keep": keep, "router": "mean"},
        {"method": "reap", "keep": 1.0},
    ]
    return [RTN, *([link] for link in links), *([link, RTN] for link in links)]


def taken(name: str, keep: int) -> dict[str, Any]:
    return {"width": 0.5} if name == "slim" else {"keep": keep}


class Measured:
    """A tiny model in bfloat16 (corrections are float32) with all that is exported measured."""

    def __init__(self, folder: Path, model_type: str) -> None:
        self.model_type = model_type
        own = make_model_folder(folder / "model", model_type)
        with pytest.MonkeyPatch.context() as patch:
            project = Project(folder, own, patch)
            project.write(
                candidates=chains_of(model_type),
                baselines=None,
                calibration={"sequences": 4, "length": 16, "shards": 2, "gradient_sequences": 0},
                budget={"bits_per_weight": 8},
            )
            project.run(stages=("measure",))
        self.experiment = Experiment(load_recipe(project.folder / "recipe.yaml"), project.output)
        self.chains = self.experiment.recipe.candidates
        self.banks = [unit for unit in self.experiment.units if unit.kind == "bank"]
        self.model = self.experiment.model

    def chain(self, name: str, bits: bool, **options: Any) -> Chain:
        """The measured chain that begins with a reducer of such options."""
        for chain in self.chains:
            prefix, rest = reducing(chain)
            if prefix and prefix[0].method == name and bool(rest) == bits:
                wanted = prefix[0].parsed().model_dump()
                if all(wanted[key] == value for key, value in options.items()):
                    return chain
        raise LookupError(name)

    def pieces(self, chosen: Mapping[str, Chain]) -> dict[str, Path]:
        """Unit → file of its piece; units that are not named take four bits if they are linear."""
        plan: dict[str, Chain] = {}
        for unit in self.experiment.units:
            chain = chosen.get(unit.name, self.chains[0] if unit.kind == "linear" else ())
            shaped = self.experiment.shaping.reduced(unit, reducing(chain)[0])
            plan |= dict.fromkeys((choice.name for choice in choices(shaped)), chain)
        found = plan_pieces(self.experiment, self.experiment.walk, plan)
        return {unit: Path(path) for unit, path in found.items()}

    def alternately(self, *chains: Chain) -> dict[str, Path]:
        """The first chain for the first bank, and so on."""
        pairs = zip(self.banks, chains * len(self.banks), strict=False)
        return self.pieces({bank.name: chain for bank, chain in pairs})

    def assemble(self, pieces: Mapping[str, Path], serve: Serve, output: Path) -> None:
        """Writes the folder, compares it, and compares its bytes with the forecast."""
        assemble(self.model, self.experiment.folder, pieces, serve, output, "card")
        assert verify(output, self.model.checkpoint, pieces, serve, IDS) < 5e-6
        file = output / "model.safetensors"
        assert folder_bytes(self.model, headers(pieces), serve) == file.stat().st_size
        header = file.stat().st_size - sum(t.nbytes for t in load_file(file).values())
        assert header <= header_bytes_bound(
            self.model, self.model.units(), serve, 2, stand_ins=True
        )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Measured]]:
    yield cache(lambda name: Measured(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_predicted_bytes_are_those_of_the_pieces(
    model_type: str, measured: Callable[[str], Measured]
) -> None:
    own = measured(model_type)
    experiment, checkpoint = own.experiment, own.model.checkpoint
    for unit in own.banks:
        kept = own.model.layouts[unit.block].kept
        names = [*own.model.router_names(unit.block).values(), *own.model.bias_names(unit.block)]
        before = sum(checkpoint.nbytes(kept[name]) for name in names)
        assert experiment.sizes.predicted_bytes(unit, ()) == experiment.sizes.dense_bytes(unit)
        for chain in experiment.offers[unit.name]:
            path = experiment.store.path(
                "pieces", experiment.key(unit.name, chain, experiment.walk)
            )
            piece = piece_header(path)
            size = {
                name: sum(part.nbytes for part in m.parts.values()) for name, m in piece.items()
            }
            members = sum(size[name] for name in unit.shapes)
            prefix = reducing(chain)[0]
            side = sum(size.values()) - members - before if is_reduced(piece) else 0
            assert is_reduced(piece) == bool(prefix)
            predicted = experiment.sizes.predicted_bytes(unit, chain)
            assert predicted == members + side, chain_text(chain)
            if prefix:
                assert experiment.shaping.side_bytes(unit, prefix) == side, chain_text(chain)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_moesaic_loads_every_layer_reduced_in_its_own_way(
    model_type: str, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured(model_type)
    keep = FEWER.get(model_type, 4)
    uneven = [own.chain("reap", True, keep=keep), own.chain("reap", False, keep=1.0)]
    mapped = [own.chain("hc_smoe", False, router="map"), own.chain("mone", True)]
    narrow = [own.chain("mone", False), own.chain("slim", True)]
    for number, chains in enumerate((uneven, mapped, narrow)):
        own.assemble(own.alternately(*chains), "moesaic", tmp_path / str(number))
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert {**config, "quantization_config": None} == {
        **own.model.checkpoint.config,
        "quantization_config": None,
    }


def loadable(own: Measured, prefix: str, **options: Any) -> dict[str, Path]:
    """All banks alike, in four bits where the files have a place for them."""
    chain = own.chain(prefix, own.model_type not in FUSED, **options)
    return own.pieces({bank.name: chain for bank in own.banks})


def check_config(own: Measured, folder: Path, experts: int, width: int | None = None) -> None:
    """The configuration tells the new numbers, and everything else as before."""
    before = own.model.checkpoint.config
    after = json.loads((folder / "config.json").read_text())
    after.pop("quantization_config", None)
    changed = {key for key in after if after[key] != before.get(key)}
    router = own.model.family.router
    assert router is not None and after.keys() == before.keys()
    counts = {key: value for key, value in after.items() if key in changed and key != router.width}
    assert set(counts.values()) <= {experts} and len(counts) <= 2
    if width is not None:
        assert after[router.width] == width
    tensors = load_file(folder / "model.safetensors")
    for unit in own.banks:
        kept = own.model.layouts[unit.block].kept
        for name in own.model.router_names(unit.block).values():
            assert len(tensors[kept[name]]) == experts


@pytest.mark.parametrize("serve", ["transformers", "vllm"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_engines_load_layers_that_are_all_alike(
    model_type: str, serve: Serve, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured(model_type)
    keep = FEWER.get(model_type, 4)
    # One engine each takes the merged and the narrower one; both take the pruned one.
    pruned = loadable(own, "reap", keep=keep)
    own.assemble(pruned, serve, tmp_path / "pruned")
    check_config(own, tmp_path / "pruned", keep)
    if serve == "transformers":
        own.assemble(loadable(own, "hc_smoe", router="mean"), serve, tmp_path / "merged")
        check_config(own, tmp_path / "merged", keep)
    elif model_type in NARROWER:
        own.assemble(loadable(own, "slim"), serve, tmp_path / "narrow")
        shaped = own.experiment.shaping.reduced(own.banks[0], own.chain("slim", False))
        check_config(own, tmp_path / "narrow", *shaped.shapes["gate"][:2])


@pytest.mark.parametrize("serve", ["transformers", "vllm"])
def test_engines_are_not_given_what_they_would_misread(
    serve: Serve, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured("qwen3_moe")

    def refused(*chains: Chain) -> str:
        with pytest.raises(RunError) as caught:
            assemble(
                own.model,
                own.experiment.folder,
                own.alternately(*chains),
                serve,
                tmp_path / "o",
                "",
            )
        assert not (tmp_path / "o").exists()
        return str(caught.value)

    four, eight = own.chain("reap", True, keep=4), own.chain("reap", True, keep=1.0)
    assert "equally many experts of one width" in refused(four, eight)
    assert "map of experts" in refused(own.chain("hc_smoe", True, router="map"))
    assert "map of experts" in refused(own.chain("mone", True))
    assert "equally many experts of one width" in refused(four, ())


def test_plain_transformers_needs_nothing_of_ours(
    measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    """A process that never imports moesaic; experts are left in bfloat16."""
    expected = {}
    for name in FAMILIES:
        own = measured(name)
        chain = own.chain("reap", False, keep=FEWER.get(name, 4))
        pieces = own.pieces({bank.name: chain for bank in own.banks})
        pieces = {
            unit: path for unit, path in pieces.items() if unit in {b.name for b in own.banks}
        }
        assemble(own.model, own.experiment.folder, pieces, "transformers", tmp_path / name, "")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config
        exact = StreamedModel(own.model.checkpoint, dtype=torch.float32)
        expected[name] = streamed_logits(exact, pieces)
    for name, found in logits_without_us(tmp_path, FAMILIES).items():
        wanted = expected[name]
        assert bool((found - wanted).abs().max() <= 5e-6 * wanted.abs().max()), name


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_reduced_models_can_be_dequantized_and_saved(
    model_type: str, measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    """Maps, constants and other numbers of experts side by side."""
    own = measured(model_type)
    keep = FEWER.get(model_type, 4)
    chains = own.chain("mone", True), own.chain("reap", True, keep=keep)
    own.assemble(own.alternately(*chains), "moesaic", tmp_path / "out")

    def logits(folder: Path, **options: Any) -> tuple[Any, Tensor]:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            experts_implementation="eager",
            output_loading_info=True,
            **options,
        )
        assert not any(report.values()), report
        with torch.no_grad():
            return model, model(IDS).logits

    packed, expected = logits(tmp_path / "out")
    with pytest.warns(UserWarning, match="loading attributes"):
        _, dense = logits(tmp_path / "out", quantization_config=MoesaicConfig(dequantize=True))
    assert bool((dense - expected).abs().max() <= 5e-6 * expected.abs().max())
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again")[1], expected)


def test_experts_of_a_reduced_bank_may_differ_in_bits(
    measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    own = measured("gpt_oss")
    dense, packed = own.chain("mone", False), own.chain("mone", True)
    bank = own.banks[0]
    shaped = own.experiment.shaping.reduced(bank, dense)
    plan = {c.name: (dense if i % 5 == 1 else packed) for i, c in enumerate(choices(shaped))}
    found = plan_pieces(own.experiment, own.experiment.walk, plan)
    own.assemble({unit: Path(path) for unit, path in found.items()}, "moesaic", tmp_path / "out")


def test_the_configuration_says_nothing_new_where_nothing_is_reduced(
    measured: Callable[[str], Measured],
) -> None:
    own = measured("mixtral")
    headers = {unit: piece_header(path) for unit, path in own.pieces({}).items()}
    assert headers and resized_config(own.model, headers) == {}
