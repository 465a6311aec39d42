"""Whole projects for tests: a tiny model with a byte-level tokenizer, text, and a recipe."""

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.orchestrator.tiny import save_tiny

# 256 bytes and the end-of-text token.
VOCABULARY = 257
# Widths that groups of 16 divide. The random models of tiny.py are made for this vocabulary.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SIZES_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "llama": {"attention_bias": False, "mlp_bias": False},
}


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token; token 0 ends a text, and also begins one if ``bos``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{byte: index + 1 for index, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", 0)]
        )
    extra = {"bos_token": "<eos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **extra)


def make_model_folder(path: Path, model_type: str = "qwen3_moe", **overrides: Any) -> Path:
    """A tiny random model with its tokenizer in ``path``; returns ``path``.

    ``dtype`` in ``overrides`` is that of the file (bfloat16 by default); the rest goes to the
    configuration.
    """
    settings = {**SIZES, **SIZES_OF_FAMILY.get(model_type, {}), **overrides}
    save_tiny(path, model_type, settings.pop("dtype", torch.bfloat16), **settings)
    byte_tokenizer().save_pretrained(path)
    return path


@cache
def sample_text(seed: int, words: int = 4000) -> str:
    """English-looking lines, different for every seed."""
    generator = random.Random(seed)
    syllables = ["ka", "to", "mi", "ren", "sol", "ve", "du", "pa", "ith", "or", "an", "els"]
    known = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(150)]
    lines = [" ".join(generator.choices(known, k=8)) for _ in range(words // 8)]
    return ".\n".join(lines) + "\n"


def make_recipe(path: Path, model: Path | str, /, **changes: Any) -> Path:
    """Writes text files and a small valid recipe for ``model`` into the folder ``path``.

    Args:
        path: folder; made if it is not there.
        model: what the recipe's key ``model`` says.
        changes: keys of the recipe; a mapping is merged into the section of that name, None takes
            the key out, anything else replaces it.

    Returns:
        the recipe, ``path/recipe.yaml``.
    """
    path.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("first.txt", "second.txt", "held-out.txt")):
        (path / name).write_text(sample_text(seed), encoding="utf-8")
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(model),
        "serve": "moesaic",
        "budget": {"bits_per_weight": 4.6},
        "calibration": {
            "texts": [{"file": "first.txt", "weight": 2}, {"file": "second.txt"}],
            "sequences": 12,
            "length": 24,
            "shards": 4,
            "gradient_sequences": 4,
        },
        "candidates": [
            {"method": "rtn", "bits": [3, 8], "group_size": 16},
            {"method": "gptq", "bits": 4, "group_size": 16},
        ],
        "baselines": {"rtn 4": {"method": "rtn", "bits": 4, "group_size": 16}},
        "evaluation": {"texts": [{"file": "held-out.txt"}], "sequences": 8, "length": 24},
        "compute": {"workers": 1, "dtype": "float32"},
        "store": "store",
    }
    merge(recipe, changes)
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def merge(recipe: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Changes a recipe in place, as :func:`make_recipe` describes."""
    for key, value in changes.items():
        if value is None:
            recipe.pop(key, None)
        elif (
            isinstance(value, Mapping) and isinstance(recipe.get(key), dict) and key != "baselines"
        ):
            merge(recipe[key], value)
        else:
            recipe[key] = value
