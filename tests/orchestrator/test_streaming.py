"""Streamed models against transformers' own forward, watched and not.

Logits are compared bit for bit where transformers is asked for its ``eager`` experts, whose order
of operations the streamed ones share. Its default (grouped) experts sum in another order, and so
does plain arithmetic: ``CLOSE`` in float32.
"""

import gc
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.methods.base import Unit
from moesaic.orchestrator.checkpoint import Checkpoint
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experts import Experts, observing
from moesaic.orchestrator.family import families, load_family
from moesaic.orchestrator.skeleton import model_class
from moesaic.orchestrator.streaming import KEPT_SHAPES, StreamedModel
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.tiny import outputs, save_tiny

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
BANKS = [t for t in families() if load_family(t).experts]


class Recording:
    """Keeps everything that it is told."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int | None], list[Tensor]] = defaultdict(list)
        self.given: dict[tuple[str, str, int | None], list[Tensor]] = defaultdict(list)
        self.gradients: dict[tuple[str, str, int | None], list[Tensor]] = defaultdict(list)

    def inputs(self, site: str, x: Tensor, expert: int | None) -> None:
        assert not x.requires_grad
        self.seen[site, expert].append(x.clone())

    def outputs(self, unit: str, member: str, y: Tensor, expert: int | None) -> None:
        key = (unit, member, expert)
        self.given[key].append(y.detach().clone())
        if y.requires_grad:
            y.register_hook(lambda gradient: self.gradients[key].append(gradient.clone()))


def some_ids(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(5))


def reference(folder: Path, experts: str = "eager", **kwargs: Any) -> Any:
    kind = model_class(load_family(AutoConfig.from_pretrained(folder).model_type))
    return kind.from_pretrained(
        folder, dtype="auto", experts_implementation=experts, **kwargs
    ).eval()


@torch.no_grad()
def streamed(
    model: StreamedModel,
    ids: Tensor,
    observer: Recording | None = None,
    experts: Experts = "routed",
) -> Tensor:
    hidden = model.embed(ids)
    for index in range(model.blocks):
        block = model.load_block(index)
        if observer is None:
            hidden = model.run_block(index, block, hidden)
            continue
        with observing(model, index, block, observer, experts):
            hidden = model.run_block(index, block, hidden)
    return model.outputs(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", families())
def test_streamed_logits_equal_transformers(
    model_type: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    folder, ids = tiny(model_type, dtype), some_ids(2, 13)
    model = StreamedModel(Checkpoint(folder))
    assert model.dtype == dtype
    wanted = reference(folder)
    with torch.no_grad():
        for parameter in wanted.parameters():
            # Where the file's bytes begin at odd places, some products are summed otherwise.
            parameter.data = parameter.data.clone()
        expected = outputs(wanted(ids))
    assert expected.std() > 0.1  # random weights that do something
    plain = streamed(model, ids)
    assert plain.dtype == expected.dtype
    assert torch.equal(plain, expected)
    assert torch.equal(streamed(model, ids, Recording()), expected)
    assert torch.equal(streamed(model, ids, Recording(), "all"), expected)


@pytest.mark.parametrize("model_type", BANKS)
def test_streamed_logits_are_close_to_transformers_default_experts(
    model_type: str, tiny: Tiny
) -> None:
    # Multiples of 16 bytes, which grouped_mm wants.
    folder, ids = tiny(model_type, moe_intermediate_size=24, intermediate_size=56), some_ids(2, 13)
    default = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert default.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        torch.testing.assert_close(
            streamed(StreamedModel(Checkpoint(folder)), ids), default(ids).logits, **CLOSE
        )


def test_dtype_can_be_chosen(tiny: Tiny) -> None:
    folder, ids = tiny("deepseek_v3", torch.bfloat16), some_ids(1, 9)
    model = StreamedModel(Checkpoint(folder), dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(streamed(model, ids), wide(ids).logits)


def test_dtype_is_the_embedding_s_where_the_configuration_has_none(
    tmp_path: Path, tiny: Tiny
) -> None:
    folder = Path(shutil.copytree(tiny("llama", torch.bfloat16), tmp_path / "model"))
    config = (folder / "config.json").read_text().replace('"dtype": "bfloat16",', "")
    (folder / "config.json").write_text(config)
    assert StreamedModel(Checkpoint(folder)).dtype == torch.bfloat16


def test_sharded_checkpoint_gives_the_same_logits(tmp_path: Path, tiny: Tiny) -> None:
    folder = save_tiny(tmp_path / "shards", "qwen2_moe", max_shard_size="30KB")
    assert len(Checkpoint(folder).files) > 3
    ids = some_ids(2, 5)
    expected = streamed(StreamedModel(Checkpoint(tiny("qwen2_moe"))), ids)
    assert torch.equal(streamed(StreamedModel(Checkpoint(folder)), ids), expected)


def test_head_on_disk_comes_before_a_tied_one(tmp_path: Path, tiny: Tiny) -> None:
    folder, ids = Path(shutil.copytree(tiny("qwen2"), tmp_path / "model")), some_ids(1, 5)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    tied, own = (streamed(StreamedModel(Checkpoint(f)), ids) for f in (tiny("qwen2"), folder))
    assert torch.equal(own, 2 * tied)


def test_calls_fit_every_shape_of_a_batch(tiny: Tiny) -> None:
    folder = tiny("mistral")
    model, whole = StreamedModel(Checkpoint(folder)), reference(folder)
    blocks = [model.load_block(index) for index in range(model.blocks)]
    hidden = {}
    for length in range(1, KEPT_SHAPES + 4):
        ids = some_ids(1 + length % 2, length)
        hidden[ids] = model.embed(ids)  # more shapes than are kept
    for ids, x in hidden.items():
        with torch.no_grad():
            for index, block in enumerate(blocks):
                x = model.run_block(index, block, x)
            assert torch.equal(model.logits(model.final_norm(x)), whole(ids).logits)
    assert len(model._calls) == KEPT_SHAPES


# Watching


def watched(folder: Path, ids: Tensor, experts: Experts) -> tuple[StreamedModel, Recording]:
    model, observer = StreamedModel(Checkpoint(folder)), Recording()
    streamed(model, ids, observer, experts)
    return model, observer


def module_inputs(model: Any, ids: Tensor, paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules of a plain transformers model, by hooks of its own."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # A copy: some models clip what a linear gave in its place.
            found[path] = args[0].flatten(0, -2), output.flatten(0, -2).clone()

        return keep

    handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def hessian(parts: list[Tensor]) -> Tensor:
    x = torch.cat(parts).double()
    return x.T @ x


@pytest.mark.parametrize("model_type", families())
def test_linears_are_seen_as_hooks_on_transformers_see_them(model_type: str, tiny: Tiny) -> None:
    folder, ids = tiny(model_type), some_ids(2, 11)
    model, observer = watched(folder, ids, "routed")
    units = [unit for unit in model.units() if unit.kind == "linear"]
    expected = module_inputs(reference(folder), ids, [unit.name for unit in units])
    for unit in units:
        x, y = expected[unit.name]
        (seen,) = observer.seen[unit.sites["weight"], None]  # once per site
        assert torch.equal(seen, x), unit.name
        assert torch.allclose(hessian([seen]), hessian([x]), rtol=1e-12)
        assert seen.shape[1] == unit.shapes["weight"][1]
        (given,) = observer.given[unit.name, "weight", None]
        assert torch.equal(given, y), unit.name
    assert {site for site, expert in observer.seen if expert is None} == {
        unit.sites["weight"] for unit in units
    }


def routing(folder: Path, ids: Tensor, unit: Unit, module: str) -> tuple[Any, Tensor, Tensor]:
    """A plain model's experts module, what it was given, and each token's experts."""
    model = reference(folder)
    experts = model.get_submodule(f"model.layers.{unit.block}").get_submodule(module)
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(ids)
    handle.remove()
    hidden, index, _ = calls[0]
    return experts, hidden, index


@pytest.mark.parametrize("experts", ["routed", "all"])
@pytest.mark.parametrize("length", [2, 41])
@pytest.mark.parametrize("model_type", BANKS)
def test_experts_are_seen_as_brute_force_says(
    model_type: str, length: int, experts: Experts, tiny: Tiny
) -> None:
    folder, ids = tiny(model_type), some_ids(1, length)
    model, observer = watched(folder, ids, experts)
    unit = [unit for unit in model.units() if unit.kind == "bank"][-1]
    module, hidden, index = routing(folder, ids, unit, model.unit_module(unit))
    members = model.read_unit(unit)
    unreached = 0
    for expert in range(module.num_experts):
        tokens = (index.T.flatten() == expert).nonzero().flatten() % len(hidden)
        learnt, routed = hidden if experts == "all" else hidden[tokens], hidden[tokens]
        seen = observer.seen[unit.sites["gate"], expert]
        middle = observer.seen[unit.sites["down"], expert]
        assert len(seen) == len(middle) == (len(learnt) > 0)
        if len(learnt):
            expected = brute_force(module, members, expert, learnt)
            torch.testing.assert_close(hessian(seen), hessian([learnt]), **CLOSE)
            torch.testing.assert_close(hessian(middle), hessian([expected["middle"]]), **CLOSE)
        unreached += len(tokens) == 0
        outputs = brute_force(module, members, expert, routed)
        for member in members:
            given = observer.given[unit.name, member, expert]
            assert len(given) == (len(tokens) > 0)
            for y in given:
                torch.testing.assert_close(y, outputs[member], **CLOSE)
    assert unreached < module.num_experts
    assert unreached > 0 or length > 2


def brute_force(
    module: Any, members: dict[str, Tensor], expert: int, x: Tensor
) -> dict[str, Tensor]:
    """What an expert computes, from the members."""
    gate, up = (x @ members[name][expert].T for name in ("gate", "up"))
    if not module.has_bias:
        middle = module.act_fn(gate) * up
        down = middle @ members["down"][expert].T
        return {"gate": gate, "up": up, "middle": middle, "down": down}
    gate = gate + module.gate_up_proj_bias[expert, ::2]
    up = up + module.gate_up_proj_bias[expert, 1::2]
    capped = gate.clamp(max=module.limit)
    middle = (up.clamp(-module.limit, module.limit) + 1) * capped
    middle = middle * torch.sigmoid(capped * module.alpha)
    down = middle @ members["down"][expert].T + module.down_proj_bias[expert]
    return {"gate": gate, "up": up, "middle": middle, "down": down}


def test_experts_without_tokens_are_not_mentioned(tiny: Tiny) -> None:
    model, observer = watched(tiny("qwen3_moe"), some_ids(1, 1), "routed")
    for unit in model.units():
        if unit.kind == "bank":
            reached = {e for site, e in observer.seen if site == unit.sites["gate"]}
            assert len(reached) == 2  # one token, top-2 of 8


@pytest.mark.parametrize("model_type", families())
def test_gradients_are_those_of_transformers(model_type: str, tiny: Tiny) -> None:
    folder, ids = tiny(model_type), some_ids(1, 9)
    model, index = StreamedModel(Checkpoint(folder)), 1
    observer, block = Recording(), model.load_block(1)
    hidden = model.run_block(0, model.load_block(0), model.embed(ids)).detach()
    plain_input, watched_input = (hidden.clone().requires_grad_() for _ in range(2))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    plain = model.run_block(index, block, plain_input)
    (plain * weights).sum().backward()
    with observing(model, index, block, observer):
        y = model.run_block(index, block, watched_input)
    (y * weights).sum().backward()
    assert plain_input.grad is not None
    assert watched_input.grad is not None
    torch.testing.assert_close(watched_input.grad, plain_input.grad, **CLOSE)
    assert all(parameter.grad is None for parameter in block.parameters())
    # dL/dW = Σ g xᵀ: from what was told, and from autograd over the weights themselves.
    block.requires_grad_(True)
    (model.run_block(index, block, hidden) * weights).sum().backward()
    for unit in model.layouts[index].units:
        module = block.get_submodule(model.unit_module(unit))
        if unit.kind == "linear":
            (x,) = observer.seen[unit.sites["weight"], None]
            (g,) = observer.gradients[unit.name, "weight", None]
            torch.testing.assert_close(g.T @ x, module.weight.grad, rtol=1e-4, atol=1e-5)
            continue
        stored = {"gate_up": module.gate_up_proj.grad, "down": module.down_proj.grad}
        if module.is_transposed:
            stored = {name: gradient.transpose(1, 2) for name, gradient in stored.items()}
        rows = stored["gate_up"]
        gate, up = rows.chunk(2, 1) if module.is_concatenated else (rows[:, ::2], rows[:, 1::2])
        for member, expected in (("gate", gate), ("up", up), ("down", stored["down"])):
            for expert in range(module.num_experts):
                told = observer.gradients.get((unit.name, member, expert))
                if told is None:
                    assert not expected[expert].any()
                    continue
                (x,) = observer.seen[unit.sites[member], expert]
                torch.testing.assert_close(told[0].T @ x, expected[expert], rtol=1e-4, atol=1e-5)


def test_watching_ends_with_its_context(tiny: Tiny) -> None:
    model, observer = StreamedModel(Checkpoint(tiny("qwen2_moe"))), Recording()
    block, hidden = model.load_block(0), model.embed(some_ids(1, 4))
    with pytest.raises(RuntimeError, match="stop"), observing(model, 0, block, observer):
        raise RuntimeError("stop")
    with torch.no_grad():
        model.run_block(0, block, hidden)
    assert not observer.seen
    assert not observer.given


# Blocks


@pytest.mark.parametrize("model_type", families())
def test_blocks_hold_what_transformers_loads(model_type: str, tiny: Tiny) -> None:
    folder = tiny(model_type, torch.bfloat16)
    model, whole = StreamedModel(Checkpoint(folder)), reference(folder)
    for index in range(model.blocks):
        state = model.load_block(index).state_dict()
        expected = whole.get_submodule(model.family.block.format(block=index)).state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype, name  # float32 for correction biases
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_loading_a_block_lets_embedding_and_head_go(model_type: str, tiny: Tiny) -> None:
    model = StreamedModel(Checkpoint(tiny(model_type)))

    def resident() -> set[str]:
        around = model._skeleton.model.named_parameters()
        return {name for name, parameter in around if not parameter.is_meta}

    assert not resident()
    model.embed(some_ids(1, 3))
    assert resident() == {"model.embed_tokens.weight", "model.norm.weight"}
    model.logits(torch.zeros(1, 3, model.hidden_size))
    assert "lm_head.weight" in resident()
    model.load_block(0)
    assert resident() == {"model.norm.weight"}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral", "granitemoe", "gpt_oss"])
def test_replaced_weights_are_used(model_type: str, tmp_path: Path, tiny: Tiny) -> None:
    folder, ids = tiny(model_type), some_ids(2, 6)
    model = StreamedModel(Checkpoint(folder))
    halved = {
        unit.name: {member: weight / 2 for member, weight in model.read_unit(unit).items()}
        for unit in model.units()
        if unit.part != "attention" or unit.block == 1
    }
    other = Path(shutil.copytree(folder, tmp_path / "halved"))
    tensors = load_file(folder / "model.safetensors")
    for unit in model.units():
        if unit.name in halved:
            tensors |= model.write_unit(unit, halved[unit.name])
    save_file(tensors, other / "model.safetensors")
    expected = streamed(StreamedModel(Checkpoint(other)), ids)
    with torch.no_grad():
        hidden = model.embed(ids)
        for index in range(model.blocks):
            hidden = model.run_block(index, model.load_block(index, halved), hidden)
        got = model.logits(model.final_norm(hidden))
    assert torch.equal(got, expected)
    assert not torch.equal(got, streamed(model, ids))


def test_one_replaced_member_leaves_the_others(tiny: Tiny) -> None:
    model = StreamedModel(Checkpoint(tiny("qwen3_moe")))
    unit = next(unit for unit in model.units() if unit.kind == "bank")
    down = torch.zeros(unit.shapes["down"])
    module = model.load_block(0, {unit.name: {"down": down}}).get_submodule(model.unit_module(unit))
    original = model.load_block(0).get_submodule(model.unit_module(unit))
    assert torch.equal(module.gate_up_proj, original.gate_up_proj)
    assert not module.down_proj.any()
    assert original.down_proj.any()


@pytest.mark.parametrize("name", ["mlp.experts.5.down_proj.weight", "self_attn.q_proj.weight"])
def test_nan_in_a_weight_is_told_with_its_name(name: str, tmp_path: Path, tiny: Tiny) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{name}"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    model = StreamedModel(Checkpoint(folder))
    model.load_block(0)
    with pytest.raises(UserError, match=f"tensor model.layers.1.{name} has 1 values"):
        model.load_block(1)


def test_one_block_at_a_time_is_resident(tmp_path: Path) -> None:
    # Eight blocks of 13 MB between an embedding and a head of 8 MB each.
    folder = save_tiny(
        tmp_path / "model",
        "qwen3_moe",
        hidden_size=256,
        moe_intermediate_size=256,
        num_experts=16,
        num_hidden_layers=8,
        vocab_size=8192,
    )
    checkpoint = Checkpoint(folder)
    block_bytes = checkpoint.total_bytes // 10
    assert checkpoint.total_bytes > 100e6
    model, process = StreamedModel(checkpoint), psutil.Process()
    hidden = model.embed(some_ids(1, 4))
    gc.collect()
    before, most = process.memory_info().rss, 0
    with torch.no_grad():
        for index in range(model.blocks):
            block = model.load_block(index)
            most = max(most, process.memory_info().rss - before)
            hidden = model.run_block(index, block, hidden)
            del block
        model.logits(model.final_norm(hidden))
    most = max(most, process.memory_info().rss - before)
    assert most < 3 * block_bytes
