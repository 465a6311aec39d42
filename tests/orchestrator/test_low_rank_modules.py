"""Modules of low rank in models that transformers loads, and the kernels that compute them."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.activations import ACT2FN

from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.methods import svd
from moesaic.methods.base import Unit
from moesaic.orchestrator import low_rank_attention, low_rank_mlp, low_rank_modules
from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.family import load_family
from moesaic.orchestrator.low_rank_attention import LowRankAttention, attentions
from moesaic.orchestrator.low_rank_mlp import (
    Form,
    LowRankAfter,
    LowRankFeedForward,
    Pending,
    feed_forwards,
    recognise,
)
from moesaic.orchestrator.probing import NotUnderstood, Place
from moesaic.orchestrator.verify import verify
from tests.kernels.test_int_group_triton import answer, run_script
from tests.orchestrator.conftest import Tiny
from tests.orchestrator.planning import IDS, Choice, make_pieces, open_model

SCRIPT = str(Path(__file__).with_name("run_low_rank_modules.py"))
# Largest error over largest output: three roundings of what lies between.
ROUNDED = {"float16": 2**-9, "bfloat16": 2**-6}
NO_BIASES = {"mlp_bias": False}


def linears(_: int, unit: Unit) -> Choice:
    """Odd ranks, and others for every linear; banks stay dense."""
    rank = 3 + sum(map(ord, unit.name)) % 14
    return None if unit.kind == "bank" else {"rank": rank}


def write(
    tiny: Tiny,
    folder: Path,
    model_type: str,
    choose: Callable[[int, Unit], Choice] = linears,
    **kwargs: Any,
) -> Path:
    source = tiny(model_type, **kwargs)
    model = open_model(source)
    chosen = make_pieces(model, choose, folder / "pieces", svd)
    assemble(model, source, chosen, "moesaic", folder / "out", "card")
    if "dtype" not in kwargs:
        assert verify(folder / "out", model.checkpoint, chosen, "moesaic", IDS) < 1e-5
    return folder / "out"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def fused(model: nn.Module, front: type = LowRankFeedForward) -> list[str]:
    """Names of the modules that a kernel may compute."""
    return [name for name, module in model.named_modules() if isinstance(module, front)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_modules_of_loaded_models_are_close_to_float64_in_the_interpreter(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Attention goes by its kernel without a cache; of each layer's heads four share two keys."""
    half, bfloat = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
    made: dict[str, tuple[dict[str, Any], str, list[str]]] = {
        "llama": ({**half, **NO_BIASES}, "self_attn", ["0.mlp", "1.mlp"]),
        "gemma3_text": (bfloat, "", ["0.mlp", "1.mlp", "2.mlp"]),
        "qwen2": ({**bfloat, "hidden_act": "gelu"}, "self_attn", ["0.mlp", "1.mlp"]),
        "deepseek_v3": (half, "", ["0.mlp", "1.mlp.shared_experts", "2.mlp.shared_experts"]),
        "bert": (half, "attention.self", ["0.output", "1.output"]),
    }
    folders = {name: write(tiny, tmp_path / name, name, **made[name][0]) for name in made}
    cases = answer(run_script(SCRIPT, *map(str, folders.values()), interpret=True))
    for case in cases:
        assert case["error"] <= ROUNDED[case["dtype"]], case
    found = [(case["module"], case["cache"], case["launches"]) for case in cases]
    expected = []
    for model_type, (_, path, layers) in made.items():
        top = "encoder.layer" if model_type == "bert" else "model.layers"
        for cache in (False, True)[: 1 if model_type == "bert" else 2]:
            for layer in layers:
                if path:
                    name = f"{top}.{layer[0]}.{path}"
                    expected.append((name, cache, [] if cache else ["attention"]))
                expected.append((f"{top}.{layer}", cache, ["mlp"]))
    assert found == expected


def test_only_layers_all_of_low_rank_are_for_the_kernel(tiny: Tiny, tmp_path: Path) -> None:
    def choose(index: int, unit: Unit) -> Choice:
        return None if unit.name == "model.layers.0.mlp.down_proj" else linears(index, unit)

    folder = write(tiny, tmp_path, "qwen3", choose)
    assert fused(load(folder)) == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"hidden_act": "quick_gelu", **NO_BIASES}, "between their linears"),
        ("llama", {}, "no biases of gate and up"),
        ("phi3", {}, "between their linears"),
    ],
)
def test_layers_that_are_not_understood_are_told_once(
    model_type: str,
    changes: dict[str, Any],
    reason: str,
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write(tiny, tmp_path, model_type, **changes)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=low_rank_modules.__name__):
        assert not fused(load(folder))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 feed-forward layers of low rank (from block 0 on)")
    assert reason in said


def test_on_a_cpu_nothing_changes(tiny: Tiny, tmp_path: Path) -> None:
    model = load(write(tiny, tmp_path, "llama", **NO_BIASES))
    plain = copy.deepcopy(model)
    for name in [*fused(plain), *fused(plain, LowRankAttention)]:
        module = plain.get_submodule(name)
        module.__class__ = type(module).__bases__[1]
    assert fused(model) and fused(model, LowRankAttention) and not fused(plain)
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.dequantize()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_sites_tell_where_feed_forward_layers_are() -> None:
    names = ("gate_proj", "up_proj"), "down_proj"
    assert list(feed_forwards(load_family("qwen2_moe"))) == [
        Place("mlp", *names),
        Place("mlp.shared_expert", *names),
    ]
    assert list(feed_forwards(load_family("mixtral"))) == []


def test_a_layer_of_the_block_itself_is_not_understood() -> None:
    """As OPT has it: the block calls its attention as well."""
    (place,) = feed_forwards(load_family("opt"))
    assert place == Place("", ("fc1",), "fc2")
    with pytest.raises(NotUnderstood, match="in the block itself"):
        recognise(nn.Module(), place)


# Layers of two modules


class Halves(nn.Module):
    """A block as BERT has it; ``peeks`` looks at what goes from one module to the other."""

    def __init__(self, peeks: bool = False) -> None:
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense, self.output.dense = nn.Linear(6, 9), nn.Linear(9, 6)
        self.intermediate.forward = lambda x: F.gelu(self.intermediate.dense(x))
        self.peeks = peeks

    def forward(self, x: Tensor) -> Tensor:
        middle = self.intermediate(x)
        y: Tensor = self.output.dense(middle)
        return y + middle.sum() if self.peeks else y


def test_bert_spreads_its_feed_forward_layer_over_two_modules() -> None:
    (place,) = feed_forwards(load_family("bert"))
    assert place == Place("intermediate", ("dense",), None, after="output.dense")
    assert place.all_in_block == ("intermediate.dense", "output.dense")
    block = Halves()
    assert recognise(block.intermediate, place) == Form("dense", None, None, "gelu")


@pytest.mark.parametrize("peeks", [False, True])
def test_what_is_pending_is_computed_once_and_by_who_looks_at_it(peeks: bool) -> None:
    block = Halves(peeks)
    x = torch.randn(3, 4, 6)
    calls = []

    def value() -> Tensor:
        calls.append("value")
        found: Tensor = block.intermediate(x)
        return found

    def whole() -> Tensor:
        calls.append("whole")
        found: Tensor = nn.Linear.forward(block.output.dense, block.intermediate(x))
        return found

    expected = block(x)
    after: Any = block.output.dense
    after.__class__ = type("Fronted", (LowRankAfter, nn.Linear), {})
    pending = Pending(x, 9, value, whole, after)
    assert pending.shape == (3, 4, 9) and pending.dtype == x.dtype and not calls
    with torch.no_grad():
        found = after(pending)
        if peeks:
            found = found + pending.sum() + 0 * pending.amax()
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    assert calls == (["whole", "value"] if peeks else ["whole"])
    other = nn.Linear(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(other(pending), other(block.intermediate(x)))


class Layer(nn.Module):
    """``down(middle(a(x), b(x)))``, or without ``b``."""

    def __init__(self, middle: Callable[..., Tensor], gated: bool, bias: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 9, bias)
        if gated:
            self.b = nn.Linear(6, 9, bias)
        self.down = nn.Linear(9, 5, bias)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        read = [getattr(self, name)(x) for name in ("a", "b") if hasattr(self, name)]
        y: Tensor = self.down(self.middle(*read))
        return y


def found_out(module: Layer) -> Form:
    first = tuple(name for name in ("a", "b") if hasattr(module, name))
    return recognise(module, Place("mlp", first, "down"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Layer(lambda a, b: F.silu(a) * b, True), Form("b", "down", "a", "silu")),
        (Layer(lambda a, b: a * F.silu(b), True), Form("a", "down", "b", "silu")),
        (Layer(lambda a, b: ACT2FN["gelu_new"](a) * b, True), Form("b", "down", "a", "gelu_tanh")),
        (Layer(lambda a, b: ACT2FN["gelu"](a) * b, True), Form("b", "down", "a", "gelu")),
        (Layer(ACT2FN["gelu"], False, bias=True), Form("a", "down", None, "gelu")),
        (Layer(ACT2FN["gelu_pytorch_tanh"], False), Form("a", "down", None, "gelu_tanh")),
    ],
)
def test_what_a_module_computes_is_recognised(module: Layer, expected: Form) -> None:
    before = dict(module.named_parameters())
    assert found_out(module) == expected
    assert dict(module.named_parameters()) == before


def _scaled() -> Layer:
    module = Layer(lambda a, b: F.silu(a) * b * module.factor, True)
    module.factor = nn.Parameter(torch.ones(1))
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Layer(lambda a, b: F.silu(a) * b * 1.001, True), "between their linears"),
        (Layer(lambda a, b: F.silu(a) * b.clamp(max=29), True), "between their linears"),
        (Layer(ACT2FN["gelu_10"], False), "between their linears"),
        (Layer(ACT2FN["quick_gelu"], False), "between their linears"),
        (Layer(F.relu, False), "between their linears"),
        (Layer(lambda a: F.gelu(a)[..., :4], False), "between their linears"),
        (Layer(lambda a, b: F.silu(a) * b, True, bias=True), "no biases of gate and up"),
        (Layer(lambda a, b: (a @ b.float().mT) @ b, True), "ended in RuntimeError"),
        (_scaled(), "tensors besides"),
    ],
)
def test_anything_else_is_not_understood(module: Layer, reason: str) -> None:
    before = dict(module.named_parameters())
    with pytest.raises(NotUnderstood, match=reason):
        found_out(module)
    assert dict(module.named_parameters()) == before


@pytest.mark.parametrize("fault", ["twice", "input", "output", "never", "written", "given"])
def test_a_module_that_does_more_is_not_understood(fault: str) -> None:
    class More(Layer):
        def forward(self, x: Tensor) -> Tensor:
            if fault == "twice":
                self.a(x)
            if fault == "never":
                return self.down(F.silu(self.a(x)) ** 2)  # type: ignore[no-any-return]
            if fault == "given":
                x.add_(1)
            y = super().forward(x + 0 if fault == "input" else x)
            if fault == "written":
                y.mul_(2)
            return y + 1 if fault == "output" else y

    with pytest.raises(NotUnderstood, match="more than once|change what|write into"):
        found_out(More(lambda a, b: F.silu(a) * b, True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("none", True),
        ("products are faster", True),
        ("linears are faster", False),
        ("training", False),
        ("hooked", False),
        ("replaced", False),
        ("other dtype", False),
        ("keyword", False),
    ],
)
def test_every_call_decides_anew(
    change: str, expected: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tiny, tmp_path, "llama", dtype=torch.bfloat16, **NO_BIASES)
    module: Any = load(folder).model.layers[1].mlp
    given: list[mlp.Layer] = []

    def feed_forward(x: Tensor, layer: mlp.Layer, path: str) -> str:
        assert path == way
        given.append(layer)
        return "kernel"

    ways = {"linears are faster": "linears", "products are faster": "products"}
    way = ways.get(change, "fused")
    kernel = SimpleNamespace(
        Factors=mlp.Factors, Layer=mlp.Layer, plan=lambda *_: way, feed_forward=feed_forward
    )
    monkeypatch.setattr(low_rank_mlp, "_kernel", lambda: kernel)
    monkeypatch.setattr(low_rank_mlp, "kernels_take", lambda x: True)
    x = torch.ones(2, 3, 48, dtype=torch.float16 if change == "other dtype" else torch.bfloat16)
    if change == "training":
        module.train()
    if change == "hooked":
        module.up_proj.register_forward_hook(lambda *_: None)
    if change == "replaced":
        module.down_proj = module.down_proj.dense()
    found = module(x=x) if change == "keyword" else module(x)
    assert (found == "kernel") is expected if expected else isinstance(found, Tensor)
    if expected:
        (layer,) = given
        parts = {"gate": layer.gate, "up": layer.up, "down": layer.down}
        for name, pair in parts.items():
            linear = getattr(module, f"{name}_proj")
            assert pair is not None and pair.left is linear.get_buffer("left_dense")
            assert pair.right is linear.get_buffer("right_dense")
        assert layer.activation == "silu" and layer.up_bias is layer.down_bias is None


# Attention


def test_sites_tell_where_attention_is() -> None:
    names = ("q_proj", "k_proj", "v_proj"), "o_proj"
    assert list(attentions(load_family("llama"))) == [Place("self_attn", *names)]
    assert list(attentions(load_family("phi3"))) == []  # one linear for all three
    assert list(attentions(load_family("deepseek_v3"))) == []


@pytest.mark.parametrize(
    ("model_type", "scale"),
    [
        ("llama", 12**-0.5),
        ("mistral", 16**-0.5),
        ("qwen2", 12**-0.5),
        ("mixtral", 12**-0.5),
        ("granitemoe", 0.2),
    ],
)
def test_what_attention_computes_is_recognised(
    model_type: str, scale: float, tiny: Tiny, tmp_path: Path
) -> None:
    model = load(write(tiny, tmp_path, model_type))
    names = fused(model, LowRankAttention)
    assert names == [f"model.layers.{number}.self_attn" for number in range(2)]
    form = model.get_submodule(names[0]).low_rank_form
    assert form == low_rank_attention.Form(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        head_dim=16 if model_type == "mistral" else 12,
        scale=pytest.approx(scale),
        causal=True,
        rotates=True,
    )


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "olmo2", "gpt_oss"])
def test_attention_with_norms_or_sinks_is_not_understood(
    model_type: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tiny, tmp_path, model_type)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=low_rank_modules.__name__):
        assert not fused(load(folder), LowRankAttention)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "attentions of low rank (from block 0 on)" in said[0]


class Heads(nn.Module):
    """Two heads of four features, with one thing that the kernel has not."""

    config = SimpleNamespace(head_dim=4, _attn_implementation="sdpa")
    scaling = 0.5

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.o = nn.Linear(8, 6)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        if self.fault == "neighbours":
            first, second = x[..., 0::2], x[..., 1::2]
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        q, k, v = (
            linear(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        cos, sin = given["position_embeddings"]
        if self.fault != "not rotated":
            q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        if self.fault == "normed":
            q = F.normalize(q, dim=-1)
        scale = 0.51 if self.fault == "scaled" else self.scaling
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.fault != "whole", scale=scale)
        out = out.transpose(1, 2).flatten(2)
        return self.o(out * out if self.fault == "gated" else out), None


@pytest.mark.parametrize(
    ("fault", "causal", "rotates"),
    [("", True, True), ("whole", False, True), ("not rotated", True, False)],
)
def test_a_module_of_any_class_is_recognised(fault: str, causal: bool, rotates: bool) -> None:
    form = low_rank_attention.recognise(Heads(fault), Place("", ("q", "k", "v"), "o"))
    assert (form.causal, form.rotates, form.scale, form.out) == (causal, rotates, 0.5, "o")


@pytest.mark.parametrize("fault", ["neighbours", "normed", "scaled", "gated"])
def test_any_other_attention_is_not_understood(fault: str) -> None:
    with pytest.raises(NotUnderstood, match="queries, keys and values"):
        low_rank_attention.recognise(Heads(fault), Place("", ("q", "k", "v"), "o"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("none", True),
        ("cache", False),
        ("mask", False),
        ("not causal", False),
        ("positions of its own", False),
        ("other tables", False),
        ("eager", False),
        ("products are faster", False),
        ("training", False),
        ("hooked", False),
    ],
)
def test_every_call_of_attention_decides_anew(
    change: str, expected: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load(write(tiny, tmp_path, "llama", dtype=torch.bfloat16, **NO_BIASES))
    module = model.model.layers[1].self_attn

    def attend(*lifted: Any, **options: Any) -> Tensor:
        attended.append(options)
        return torch.zeros(2, 5, 4, 12, dtype=torch.bfloat16)

    attended: list[dict[str, Any]] = []
    way = "products" if change == "products are faster" else "fused"
    kernel = SimpleNamespace(plan=lambda *_: way, attention=attend)
    monkeypatch.setattr(low_rank_attention, "_kernel", lambda: kernel)
    monkeypatch.setattr(low_rank_attention, "kernels_take", lambda x: True)
    x = torch.ones(2, 5, 48, dtype=torch.bfloat16)
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])
    if change == "positions of its own":
        cos, sin = cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)
    if change == "other tables":
        cos = cos * torch.arange(12)
    given: dict[str, Any] = {"position_ids": torch.arange(5)[None], "use_cache": False}
    if change == "cache":
        given["cache"] = DynamicCache()
    if change == "mask":
        given["attention_mask"] = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    if change == "not causal":
        given["is_causal"] = False
    if change == "eager":
        model.set_attn_implementation("eager")
    if change == "training":
        module.train()
    if change == "hooked":
        module.k_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        y, weights = module(x, position_embeddings=(cos, sin), **given)
    assert y.shape == (2, 5, 48) and (weights is None or change == "eager")
    assert bool(attended) is expected
    if expected:
        assert attended[0]["causal"] and attended[0]["path"] == "fused"
        assert [table.shape for table in attended[0]["rotary"]] == [(5, 6), (5, 6)]
