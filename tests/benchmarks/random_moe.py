"""A random Mixture-of-Experts checkpoint of a chosen size, written shard by shard.

The shape is Qwen3-MoE's. No more than one shard is in memory. Every weight is cut out of one block
of random numbers at a place of its own, so that no two are equal and writing costs only I/O.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

_BLOCK_VALUES = (1 << 24) + 13
_STRIDE = 7919
_SCALE = 0.02
SHARD_BYTES = 500_000_000


def make_random_moe(
    path: Path,
    gigabytes: float,
    hidden: int = 1024,
    experts: int = 64,
    expert_width: int = 512,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> int:
    """Writes config, byte-level tokenizer, index and bfloat16 shards into the folder ``path``.

    Args:
        gigabytes: about how large (10⁹ bytes); reached with as many layers as it takes, at least 1.
        shard_bytes: limit of a shard, unless a single layer is larger.

    Returns:
        bytes of all tensors.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * expert_width,
        moe_intermediate_size=expert_width,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        norm_topk_prob=True,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        num_hidden_layers=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        dtype="bfloat16",
    )
    layer = sum(2 * math.prod(shape) for _, shape in layer_shapes(config, 0))
    outer = sum(2 * math.prod(shape) for _, shape in outer_shapes(config))
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - outer) / layer))
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return _write_shards(path, config, shard_bytes, seed)


def layer_shapes(config: Any, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's tensors."""
    hidden, width, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    prefix = f"model.layers.{layer}."
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    heads["v"] = heads["k"]
    for name, count in heads.items():
        yield f"{prefix}self_attn.{name}_proj.weight", (count * head, hidden)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, heads["q"] * head)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}self_attn.{name}.weight", (head,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", (hidden,)
    yield f"{prefix}mlp.gate.weight", (config.num_experts, hidden)
    for expert in range(config.num_experts):
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden))):
            yield f"{prefix}mlp.experts.{expert}.{name}_proj.weight", shape
        yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, width)


def outer_shapes(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what is in no layer."""
    table = (config.vocab_size, config.hidden_size)
    return [
        ("model.embed_tokens.weight", table),
        ("model.norm.weight", (config.hidden_size,)),
        ("lm_head.weight", table),
    ]


def _write_shards(path: Path, config: Any, shard_bytes: int, seed: int) -> int:
    shapes = [outer_shapes(config)]
    shapes += [list(layer_shapes(config, index)) for index in range(config.num_hidden_layers)]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for part in shapes:
        size = sum(2 * math.prod(shape) for _, shape in part)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += part
        filled += size
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(_BLOCK_VALUES, generator=generator) * _SCALE).bfloat16()
    owner: dict[str, str] = {}
    total = drawn = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard:
            tensors[name] = _values(block, shape, drawn)
            owner[name] = file
            drawn += 1
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": owner}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _values(block: Tensor, shape: tuple[int, ...], number: int) -> Tensor:
    """The tensor of this number: norms are ones, weights a window of the block, wrapped around."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start, count = number * _STRIDE % len(block), math.prod(shape)
    rounds = -(-(start + count) // len(block))
    source = block if rounds == 1 else block.repeat(rounds)
    return source[start : start + count].view(shape).clone()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; token 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{byte: index + 1 for index, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
