"""The bundled demo model loads, is small, has learnt its texts, and uses all of its experts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.orchestrator.demo import KINDS, MODEL, ROOT, text_path
from moesaic.orchestrator.demo.corpus import (
    SHARED_LINE_CHARS,
    markdown_prose,
    po_translations,
    rst_prose,
    split_documents,
)
from moesaic.orchestrator.demo.train import learning_rate_factor, router_losses

WINDOW = 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        MODEL, local_files_only=True, dtype=torch.float32
    ).eval()


def token_ids(tokenizer: Any, split: str, kind: str) -> list[int]:
    text = text_path(split, kind).read_text("utf-8")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def heldout(model: Any, tokenizer: Any) -> dict[str, tuple[float, torch.Tensor, list[int]]]:
    """Kind → mean loss in nats, assignments [layers, experts], predicted tokens."""
    found = {}
    with torch.no_grad():
        for kind in KINDS:
            ids = torch.tensor(token_ids(tokenizer, "heldout", kind))
            windows = ids[: 32 * (WINDOW + 1)].view(-1, WINDOW + 1)
            outputs = model(input_ids=windows[:, :-1], output_router_logits=True, use_cache=False)
            targets = windows[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets)
            loads = torch.stack(
                [
                    torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=16)
                    for logits in outputs.router_logits
                ]
            )
            found[kind] = (loss.item(), loads, targets.tolist())
    return found


def test_size_fits_package_data(model: Any) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    assert 1_500_000 <= parameters <= 3_000_000
    files = [p for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 5_000_000


def test_every_block_is_moe_with_at_least_eight_experts(model: Any) -> None:
    assert model.config.model_type == "qwen3_moe"
    assert model.config.num_experts >= 8
    for layer in model.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape[0] == model.config.num_experts


def test_checkpoint_is_bfloat16_with_one_tensor_per_expert_projection(model: Any) -> None:
    config = model.config
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(config.num_hidden_layers)
        for expert in range(config.num_experts)
        for projection in ("gate", "up", "down")
    }
    assert expected == {name for name in names if ".experts." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_far_below_unigram(
    kind: str, tokenizer: Any, heldout: dict[str, tuple[float, torch.Tensor, list[int]]]
) -> None:
    loss, _, targets = heldout[kind]
    counts = Counter(token_ids(tokenizer, "calibration", kind))
    total = sum(counts.values()) + len(tokenizer)  # add-one smoothing
    unigram = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)
    assert math.exp(loss) < math.exp(unigram) / 4


def test_every_expert_of_every_layer_is_used(
    heldout: dict[str, tuple[float, torch.Tensor, list[int]]],
) -> None:
    loads = torch.stack([loads for _, loads, _ in heldout.values()]).sum(dim=0)
    share = loads / loads.sum(dim=1, keepdim=True) * loads.shape[1]  # 1 is an even load
    assert share.min() > 0.05, f"least load of an even share: {share.min():.3f}"


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # two\n\n\n",
        " leading, trailing ",
        "naïve Größe — “quotes” … ñ ç",
        "日本語 🙂 \u200b Ω\r\nend",
        "a , b . c ! isn 't  ##",
        "\x00\x07\u2028",
        "",
    ],
)
def test_tokenizer_round_trips(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_and_calibration_share_no_long_line(kind: str) -> None:
    def long_lines(path: Path) -> set[str]:
        lines = (line.strip() for line in path.read_text("utf-8").splitlines())
        return {line for line in lines if len(line) >= SHARED_LINE_CHARS}

    heldout, calibration = (text_path(split, kind) for split in ("heldout", "calibration"))
    assert heldout.stat().st_size > 40_000
    assert calibration.stat().st_size > 60_000
    assert not long_lines(heldout) & long_lines(calibration)


def test_unknown_split_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'test'.*calibration, heldout"):
        text_path("test", "code")


def test_split_documents_keeps_texts_apart() -> None:
    shared = "one licence line which every single document carries at its top\n"
    documents = {
        f"file{i}": shared + "".join(f"document {i} says the number {j}\n" * 2 for j in range(150))
        for i in range(60)
    }
    split = split_documents(documents)
    train = "".join(split.train).splitlines()
    for reserved in (split.heldout, split.calibration):
        assert not set(train) & {line for line in reserved.splitlines() if len(line) >= 40}
    owners = [
        {line.split()[1] for line in text.splitlines() if line.startswith("document")}
        for text in (split.heldout, split.calibration, "\n".join(train))
    ]
    assert not owners[0] & (owners[1] | owners[2])
    assert owners[1] <= owners[2]  # the rest of a calibration file is trained on


def test_cleaners_keep_prose_and_drop_the_rest() -> None:
    rst = "Title\n=====\n\nFor example::\n\n    x = 1\n\nAfter.\n\n.. note::\n\n    Kept.\n"
    assert rst_prose(rst) == "Title\n=====\n\nFor example:\nAfter.\n\n.. note::\n\n    Kept.\n"
    rst = ".. code-block:: python\n    :caption: c\n\n    y = 2\n\nText.\n"
    assert rst_prose(rst) == "Text.\n"
    markdown = "Ein [Link](https://example.org) da.\n\n```Python\nx\n```\n\nEnde.\n"
    assert markdown_prose(markdown) == "Ein Link da.\n\nEnde.\n"
    po = (
        'msgid ""\nmsgstr ""\n"Language: de\\n"\n\nmsgid "Yes"\nmsgstr "Ja"\n\n'
        '#, fuzzy\nmsgid "No"\nmsgstr "?"\n\nmsgid "a"\nmsgid_plural "b"\n'
        'msgstr[0] "%d Tag"\nmsgstr[1] ""\n"%d "\n"Tage"\n\nmsgid "long"\nmsgstr ""\n'
    )
    assert po_translations(po) == "Ja\n%d Tag\n%d Tage\n"


def test_balance_loss_is_one_when_even_and_sees_a_single_skewed_layer() -> None:
    even = torch.eye(4).repeat(8, 1) * 20 + torch.eye(4).roll(1, 1).repeat(8, 1) * 20
    skewed = torch.tensor([20.0, 20.0, 0.0, 0.0]).repeat(32, 1)
    assert router_losses([even], 2)[0].item() == pytest.approx(1.0, abs=1e-4)
    assert router_losses([skewed], 2)[0].item() == pytest.approx(2.0, abs=1e-4)
    # The pooled load of these two layers would be even.
    mirrored = skewed.flip(1)
    assert router_losses([skewed, mirrored], 2)[0].item() == pytest.approx(2.0, abs=1e-4)


def test_learning_rate_warms_up_then_falls_to_its_floor() -> None:
    assert learning_rate_factor(0.0) == 0.0
    assert learning_rate_factor(0.015) == pytest.approx(0.5)
    assert learning_rate_factor(0.03) == pytest.approx(1.0)
    assert learning_rate_factor(1.0) == pytest.approx(0.02)
