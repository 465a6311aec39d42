"""Every family against a tiny random model of its type: names, shapes, round trips."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.orchestrator import family as family_module
from moesaic.orchestrator.bank import fuse, split
from moesaic.orchestrator.blueprint import Blueprint
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.family import Bank, Family, families, load_family
from moesaic.orchestrator.streaming import StreamedModel
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.tiny import SETTINGS, save_tiny


def test_families_are_those_that_the_tests_cover() -> None:
    assert families() == sorted(SETTINGS)
    assert len(families()) == 45


@pytest.mark.parametrize("model_type", families())
def test_every_tensor_on_disk_is_matched_once(model_type: str, tiny: Tiny) -> None:
    model = StreamedModel(Checkpoint(tiny(model_type)))
    units = model.units()
    matched = Counter(model.fixed_names())
    for unit in units:
        # A fused tensor serves gate and up: once per unit.
        matched.update({name for names in model.unit_tensors(unit).values() for name in names})
    assert matched == Counter(model.checkpoint.names())
    assert len({unit.name for unit in units}) == len(units)
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)


@pytest.mark.parametrize("model_type", families())
def test_units_are_all_matrices_but_routers(model_type: str, tiny: Tiny) -> None:
    model = StreamedModel(Checkpoint(tiny(model_type)))
    kept = [
        name
        for name in model.fixed_names()
        if len(model.checkpoint.shape(name)) > 1 and ".layer" in name and not name.endswith("bias")
    ]
    # Norms may have a row per head, and a convolution of single channels is no matrix.
    kept = [name for name in kept if not name.endswith(("_norm.weight", ".conv1d.weight"))]
    assert all(".gate.weight" in n or "router" in n or "shared_expert_gate" in n for n in kept)
    routers = {unit.block for unit in model.units() if unit.kind == "bank"}
    assert {int(name.split(".")[2]) for name in kept} == routers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", families())
def test_read_and_write_give_back_every_bit(
    model_type: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    folder = tiny(model_type, dtype)
    model = StreamedModel(Checkpoint(folder))
    written = {name: model.checkpoint.read(name) for name in model.fixed_names()}
    for unit in model.units():
        members = model.read_unit(unit)
        assert {member: tuple(weight.shape) for member, weight in members.items()} == unit.shapes
        assert all(weight.is_contiguous() for weight in members.values())
        written |= model.write_unit(unit, members)
    original = load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype, name
        assert written[name].shape == tensor.shape, name
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (written[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fuse_is_the_inverse_of_split(transposed: bool, interleaved: bool) -> None:
    bank = Bank(
        name="b",
        module="b",
        gate_up="gu",
        down="d",
        transposed=transposed,
        interleaved=interleaved,
    )
    gate, up, down = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randn(3, 7, 5)
    gate_up, stored_down = fuse({"gate": gate, "up": up, "down": down}, bank)
    assert gate_up.shape == ((3, 7, 10) if transposed else (3, 10, 7))
    rows = gate_up.transpose(1, 2) if transposed else gate_up
    assert torch.equal(rows[:, 1], up[:, 0] if interleaved else gate[:, 1])
    again = split(gate_up, stored_down, bank)
    assert torch.equal(again["gate"], gate)
    assert torch.equal(again["up"], up)
    assert torch.equal(again["down"], down)


def units_by_suffix(folder: Path, block: int) -> dict[str, object]:
    model = StreamedModel(Checkpoint(folder))
    prefix = f"model.layers.{block}."
    return {
        unit.name.removeprefix(prefix): (
            unit.part,
            {site.removeprefix(prefix) for site in unit.sites.values()},
            unit.fused.removeprefix(prefix),
        )
        for unit in model.units()
        if unit.block == block
    }


def test_llama_units_share_sites_and_fuse_as_engines_do(tiny: Tiny) -> None:
    assert units_by_suffix(tiny("llama"), 1) == {
        "self_attn.q_proj": ("attention", {"self_attn:in"}, "self_attn.qkv_proj"),
        "self_attn.k_proj": ("attention", {"self_attn:in"}, "self_attn.qkv_proj"),
        "self_attn.v_proj": ("attention", {"self_attn:in"}, "self_attn.qkv_proj"),
        "self_attn.o_proj": ("attention", {"self_attn:out"}, ""),
        "mlp.gate_proj": ("mlp", {"mlp:in"}, "mlp.gate_up_proj"),
        "mlp.up_proj": ("mlp", {"mlp:in"}, "mlp.gate_up_proj"),
        "mlp.down_proj": ("mlp", {"mlp:mid"}, ""),
    }


def test_deepseek_units_are_dense_first_then_experts(tiny: Tiny) -> None:
    dense, sparse = (units_by_suffix(tiny("deepseek_v3"), block) for block in (0, 1))
    assert sparse["mlp.experts"] == ("experts", {"mlp.experts:in", "mlp.experts:mid"}, "")
    shared = ("shared_experts", {"mlp.shared_experts:in"}, "mlp.shared_experts.gate_up_proj")
    assert sparse["mlp.shared_experts.gate_proj"] == shared
    query = ("attention", {"self_attn:in"}, "self_attn.fused_qkv_a_proj")
    assert dense["self_attn.q_a_proj"] == dense["self_attn.kv_a_proj_with_mqa"] == query
    assert dense["mlp.gate_proj"] == ("mlp", {"mlp:in"}, "mlp.gate_up_proj")
    assert "mlp.experts" not in dense
    assert "mlp.gate_proj" not in sparse
    assert units_by_suffix(tiny("deepseek_v2"), 0)["self_attn.q_proj"] == (
        "attention",
        {"self_attn:in"},
        "",
    )


# What does not fit is told, with names.


@pytest.fixture
def altered(tmp_path: Path, tiny: Tiny) -> Path:
    """A copy of a tiny Mixture-of-Experts checkpoint that a test may change."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Sets (or with None removes) tensors; dots in names are written ``__``."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        StreamedModel(Checkpoint(folder))
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def test_a_part_that_is_0_wide_is_no_unit(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_next", shared_expert_intermediate_size=0)
    model = StreamedModel(Checkpoint(folder))
    shared = "model.layers.1.mlp.shared_expert.down_proj"
    assert f"{shared}.weight" in model.fixed_names()
    assert shared not in {unit.name for unit in model.units()}
    assert "model.layers.1.mlp.experts" in {unit.name for unit in model.units()}
    block = model.load_block(1)
    assert block.get_parameter("mlp.shared_expert.down_proj.weight").shape == (48, 0)


def test_unknown_model_type_is_answered_with_the_list(altered: Path) -> None:
    edit_config(altered, model_type="t5")
    text = message(altered)
    assert "unknown model type 't5'" in text
    assert all(known in text for known in families())
    assert "put a file t5.yaml" in text


def test_what_a_configuration_says_steers_no_terminal(altered: Path) -> None:
    edit_config(altered, model_type="\x1b[31mred")
    assert r"unknown model type '\x1b[31mred'" in message(altered)
    edit_config(altered, model_type="qwen3_moe", dtype="\x1b[31mred")
    assert r"no attribute '\x1b[31mred'" in message(altered)


def test_missing_model_type_is_told(altered: Path) -> None:
    edit_config(altered, model_type=None)
    assert "model_type is missing" in message(altered)


def test_unreadable_configuration_value_is_told(altered: Path) -> None:
    edit_config(altered, hidden_size="wide")
    assert "config.json" in message(altered)


def test_unmatched_tensor_is_named(altered: Path) -> None:
    edit_weights(altered, model__layers__1__self_attn__extra=torch.zeros(3))
    text = message(altered)
    assert "model.layers.1.self_attn.extra matches no pattern of family qwen3_moe" in text


def test_unmatched_tensor_outside_blocks_is_named(altered: Path) -> None:
    edit_weights(altered, score__weight=torch.zeros(3))
    assert "no parameter score.weight, the files do" in message(altered)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate.weight"]
)
def test_missing_tensor_is_named(altered: Path, name: str) -> None:
    edit_weights(altered, **{name.replace(".", "__"): None})
    assert f"asks for a parameter {name} that is in no file" in message(altered)


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    """The same tensors by other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): value for name, value in tensors.items()}, folder / MODEL)
    return folder


MODEL = "model.safetensors"


def test_models_saved_without_their_head_are_told(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("bloom"), tmp_path / "model"))
    text = message(renamed(folder, lambda name: name.removeprefix("transformer.")))
    assert "named without 'transformer'" in text and "AutoModelForCausalLM" in text


def test_a_tensor_that_is_named_as_its_module_although_others_are_not_is_told(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("gpt_neox"), tmp_path / "model"))
    text = message(renamed(folder, lambda name: name.replace("embed_out", "lm_head")))
    assert "tensor lm_head.weight matches no pattern of family gpt_neox" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"do_layer_norm_before": False}, "no model.decoder.final_layer_norm"),
        ({"word_embed_proj_dim": 24}, "model.decoder.project_out.weight outside of its blocks"),
    ],
)
def test_what_stands_around_the_blocks_and_is_not_known_is_told(
    change: dict[str, object], told: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("opt"), tmp_path / "model"))
    edit_config(folder, **change)
    assert told in message(folder)


def test_missing_outer_tensor_is_named(altered: Path) -> None:
    edit_weights(altered, lm_head__weight=None)
    assert "asks for a parameter lm_head.weight that is in no file" in message(altered)


def test_missing_expert_is_named(altered: Path) -> None:
    edit_weights(altered, model__layers__1__mlp__experts__3__up_proj__weight=None)
    assert "no tensor model.layers.1.mlp.experts.3.up_proj.weight" in message(altered)


def test_experts_of_different_shapes_are_named(altered: Path) -> None:
    edit_weights(altered, model__layers__1__mlp__experts__3__up_proj__weight=torch.zeros(9, 48))
    assert "experts.3.up_proj.weight has shape [9, 48], expert 0 has [23, 48]" in message(altered)


def test_number_of_experts_must_be_the_configured_one(altered: Path) -> None:
    edit_config(altered, num_local_experts=7)
    text = message(altered)
    assert "model.layers.0.mlp.experts.gate_up_proj of shape [7, 46, 48]" in text
    assert "the files have [8, 46, 48]" in text


def test_bias_that_the_configuration_denies_is_named(altered: Path) -> None:
    edit_weights(altered, model__layers__0__self_attn__o_proj__bias=torch.zeros(48))
    assert "no parameter model.layers.0.self_attn.o_proj.bias, the files do" in message(altered)


def test_blocks_behind_the_last_are_refused_where_the_family_has_none(altered: Path) -> None:
    edit_config(altered, num_hidden_layers=1)
    text = message(altered)
    assert "1 blocks (num_hidden_layers), but the files have block 1" in text


def test_more_blocks_than_the_files_have_are_refused_before_any_is_built(altered: Path) -> None:
    edit_config(altered, num_hidden_layers=3)
    text = message(altered)
    assert "config.json: asks for 3 blocks (num_hidden_layers): the files have 2" in text


def test_a_count_is_found_under_the_name_that_the_model_type_has_for_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("bloom"), tmp_path / "model"))
    for key in ("n_layer", "num_hidden_layers"):
        edit_config(folder, **{"n_layer": 2, key: 10**8})
        assert f"asks for 100000000 blocks ({key}): the files have 2" in message(folder)


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("qwen3_moe", {"num_labels": 10**8}, "num_labels is 100000000: at most 100000"),
        ("stablelm", {"num_attention_heads": 10**7}, "num_attention_heads is 10000000: at most 1"),
        ("bert", {"max_position_embeddings": 10**9}, "one of shape [1, 1000000000]; at most 2684"),
        ("llama", {"head_dim": 10**9}, "one of shape [500000000]; at most 268435456 bytes"),
        ("llama", {"configuration_files": ["config.4.0.0.json"]}, "which are not read"),
    ],
)
def test_absurd_counts_are_refused(
    kind: str, change: dict[str, object], told: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny(kind), tmp_path / "model"))
    edit_config(folder, **change)
    assert told in message(folder)


def test_of_a_configuration_alone_nothing_absurd_is_planned(tiny: Tiny, tmp_path: Path) -> None:
    for change, told in (
        ({"num_hidden_layers": 10**8}, "asks for 100000000 blocks (num_hidden_layers): at most 4"),
        ({"num_local_experts": 10**8}, "num_local_experts is 100000000: at most 500000"),
    ):
        shutil.copy(tiny("mixtral") / "config.json", tmp_path)
        edit_config(tmp_path, **change)
        with pytest.raises(UserError, match=re.escape(told)):
            Blueprint(tmp_path)


def test_prediction_blocks_behind_the_last_are_fixed(tmp_path: Path, tiny: Tiny) -> None:
    folder = Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "model"))
    edit_weights(folder, model__layers__3__eh_proj__weight=torch.zeros(4, 8))
    model = StreamedModel(Checkpoint(folder))
    assert model.blocks == 3
    assert "model.layers.3.eh_proj.weight" in model.fixed_names()


def test_rotary_frequencies_of_old_checkpoints_are_fixed(tmp_path: Path, tiny: Tiny) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, **{name.replace(".", "__"): torch.ones(6)})
    assert name in StreamedModel(Checkpoint(folder)).fixed_names()


def test_what_plays_no_part_in_an_encoder_may_lack_and_is_fixed(tmp_path: Path, tiny: Tiny) -> None:
    folder = Path(shutil.copytree(tiny("bert"), tmp_path / "model"))
    assert "pooler.dense.weight" in StreamedModel(Checkpoint(folder)).fixed_names()
    edit_weights(folder, pooler__dense__weight=None, pooler__dense__bias=None)
    edit_weights(folder, embeddings__position_ids=torch.arange(64)[None])
    model = StreamedModel(Checkpoint(folder))
    assert "embeddings.position_ids" in model.fixed_names()
    assert model.dtype == torch.float32
    edit_weights(folder, embeddings__position_embeddings__weight=None)
    assert "asks for a parameter embeddings.position_embeddings.weight" in message(folder)


# Family files


@pytest.fixture
def own_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "families"
    shutil.copytree(family_module.FOLDER, folder)
    monkeypatch.setattr(family_module, "FOLDER", folder)
    load_family.cache_clear()
    yield folder
    load_family.cache_clear()  # what was read from here is not the package's


def test_family_is_found_by_its_file(own_families: Path) -> None:
    (own_families / "newtype.yaml").write_text("extends: qwen3\nhead: output\n")
    assert "newtype" in families()
    family = load_family("newtype")
    assert (family.model_type, family.head) == ("newtype", "output")
    assert family.kept == load_family("qwen3").kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: llama\nnorms: x\n", "key norms: Extra inputs"),
        ("extends: nothing\n", "key extends: 'nothing'"),
        ("extends: bad\n", "key extends: 'bad'"),
        ("embed: x\n", "key norm: Field required"),
        ("- a list\n", "must hold a mapping"),
        ("a: [\n", "not readable as YAML"),
        (
            "extends: llama\nexperts: {name: a, module: a, gate: g, up: u, down: d}\n",
            "must contain {expert}",
        ),
        (
            "extends: llama\nexperts: {name: a, module: a, gate_up: g, up: u, down: d}\n",
            "not both",
        ),
        (
            "extends: qwen3_moe\nexperts: {name: a, module: a, gate: 'g{expert}', up: 'u{expert}', "
            "down: 'd{expert}', transposed: true}\n",
            "fused tensors",
        ),
    ],
)
def test_wrong_family_file_is_told(own_families: Path, text: str, expected: str) -> None:
    (own_families / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_family("bad")
    assert "bad.yaml" in str(caught.value)
    assert expected in str(caught.value)


def test_two_patterns_for_one_tensor_are_told(own_families: Path, tiny: Tiny) -> None:
    (own_families / "llama.yaml").write_text(
        (family_module.FOLDER / "llama.yaml")
        .read_text()
        .replace("kept: [", "kept: [mlp.down_proj.weight, ")
    )
    with pytest.raises(UserError, match=r"two patterns match mlp\.down_proj\.weight"):
        StreamedModel(Checkpoint(tiny("llama")))


def test_parts_are_in_model_order() -> None:
    family: Family = load_family("deepseek_v3")
    assert [part for part, _ in family.parts()][-2:] == ["shared_experts", "shared_experts"]
    assert family.parts()[0][0] == "attention"
