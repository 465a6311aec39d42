"""Feed-forward layers of low rank in models that transformers loads."""

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
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from moesaic.kernels import _lowrank_mlp_triton as mlp
from moesaic.methods import svd
from moesaic.methods.base import Unit
from moesaic.orchestrator import low_rank_modules
from moesaic.orchestrator.assemble import assemble
from moesaic.orchestrator.family import load_family
from moesaic.orchestrator.low_rank_modules import (
    Form,
    LowRankFeedForward,
    feed_forwards,
    recognise,
)
from moesaic.orchestrator.trial import NotUnderstood
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
        assert verify(folder / "out", model.checkpoint, chosen, "moesaic", IDS) < 2e-6
    return folder / "out"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def fused(model: nn.Module) -> dict[str, LowRankFeedForward]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankFeedForward)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_layers_of_loaded_models_are_close_to_float64_in_the_interpreter(
    tiny: Tiny, tmp_path: Path
) -> None:
    half, bfloat = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
    made: dict[str, dict[str, Any]] = {
        "llama": {**half, **NO_BIASES},
        "gemma3_text": bfloat,
        "qwen3": {**bfloat, "hidden_act": "gelu"},
        "deepseek_v3": half,
    }
    folders = [write(tiny, tmp_path / name, name, **kwargs) for name, kwargs in made.items()]
    cases = answer(run_script(SCRIPT, *map(str, folders), interpret=True))
    for case in cases:
        assert case["finite"] and case["error"] <= ROUNDED[case["dtype"]], case
    assert [(case["module"], *case["launches"]) for case in cases] == [
        ("model.layers.0.mlp", "silu"),
        ("model.layers.1.mlp", "silu"),
        ("model.layers.0.mlp", "gelu_tanh"),
        ("model.layers.1.mlp", "gelu_tanh"),
        ("model.layers.2.mlp", "gelu_tanh"),
        ("model.layers.0.mlp", "gelu"),
        ("model.layers.1.mlp", "gelu"),
        ("model.layers.0.mlp", "silu"),
        ("model.layers.1.mlp.shared_experts", "silu"),
        ("model.layers.2.mlp.shared_experts", "silu"),
    ]


def test_only_layers_all_of_low_rank_are_for_the_kernel(tiny: Tiny, tmp_path: Path) -> None:
    def choose(index: int, unit: Unit) -> Choice:
        return None if unit.name == "model.layers.0.mlp.down_proj" else linears(index, unit)

    folder = write(tiny, tmp_path, "qwen3", choose)
    assert list(fused(load(folder))) == ["model.layers.1.mlp"]


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
    with caplog.at_level(logging.WARNING, logger=low_rank_modules.__name__):
        assert not fused(load(folder))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 feed-forward layers of low rank (from block 0.mlp on)")
    assert reason in said


def test_on_a_cpu_nothing_changes(tiny: Tiny, tmp_path: Path) -> None:
    model = load(write(tiny, tmp_path, "llama", **NO_BIASES))
    plain = copy.deepcopy(model)
    for module in fused(plain).values():
        module.__class__ = type(module).__bases__[1]
    assert fused(model) and not fused(plain)
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.dequantize()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_sites_tell_where_feed_forward_layers_are() -> None:
    names = ["gate_proj", "up_proj"], "down_proj"
    assert list(feed_forwards(load_family("qwen2_moe"))) == [
        ("mlp", *names),
        ("mlp.shared_expert", *names),
    ]
    assert list(feed_forwards(load_family("mixtral"))) == []


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
    return recognise(module, [name for name in ("a", "b") if hasattr(module, name)], "down")


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


@pytest.mark.parametrize("fault", ["twice", "input", "output", "never"])
def test_a_module_that_does_more_is_not_understood(fault: str) -> None:
    class More(Layer):
        def forward(self, x: Tensor) -> Tensor:
            if fault == "twice":
                self.a(x)
            if fault == "never":
                return self.down(F.silu(self.a(x)) ** 2)  # type: ignore[no-any-return]
            y = super().forward(x + 0 if fault == "input" else x)
            return y + 1 if fault == "output" else y

    with pytest.raises(NotUnderstood, match="more than once|change what"):
        found_out(More(lambda a, b: F.silu(a) * b, True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("none", True),
        ("products are faster", False),
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
        assert path == "fused"
        given.append(layer)
        return "kernel"

    way = "products" if change == "products are faster" else "fused"
    kernel = SimpleNamespace(
        Factors=mlp.Factors, Layer=mlp.Layer, plan=lambda *_: way, feed_forward=feed_forward
    )
    monkeypatch.setattr(low_rank_modules, "_kernel", lambda: kernel)
    monkeypatch.setattr(low_rank_modules, "kernels_take", lambda x: True)
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
