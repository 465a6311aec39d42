"""Tiny random checkpoints of every model family, small enough to build in milliseconds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from moesaic.orchestrator.family import load_family
from moesaic.orchestrator.skeleton import model_class

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "head_dim": 8,
}
GLM_MOE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 12,
}
# What each family adds to COMMON. Odd expert widths, dense blocks and shared experts on purpose.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 55, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "glm": {"head_dim": 12, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 12, "partial_rotary_factor": 0.5},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5, "tie_word_embeddings": True},
    "cohere2": {
        "num_hidden_layers": 3,
        "head_dim": 12,
        "logit_scale": 0.5,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "starcoder2": {"use_bias": True, "sliding_window": 5},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "olmo": {"clip_qkv": 2.0},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "exaone4": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "seed_oss": {"head_dim": 16, "attention_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5},
    "arcee": {},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 56, "word_embed_proj_dim": 48},
    "bloom": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 27},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 21,
        "shared_expert_intermediate_size": 33,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 23,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 25},
    "deepseek_v2": {**MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, "q_lora_rank": 20},
    "phimoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 26,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {**GLM_MOE, "use_qk_norm": True},
    "dots1": GLM_MOE,
    "solar_open": {**GLM_MOE, "num_hidden_layers": 2},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 25},
    "granitemoeshared": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 26,
        "shared_intermediate_size": 20,
    },
    "qwen3_next": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 23,
        "shared_expert_intermediate_size": 33,
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 12},
    "bert": {"intermediate_size": 55},
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model whose norms, biases and routers are all away from their defaults."""
    settings = {**COMMON, **SETTINGS[model_type], **overrides}
    kind = model_class(load_family(model_type))
    model = kind.from_config(AutoConfig.for_model(model_type, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            if name.endswith("weight") and tensor.ndim == 1:  # a norm
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            elif name in model.state_dict():
                tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def outputs(given: Any) -> Tensor:
    """Logits of what a model of transformers gave, or an encoder's last hidden states."""
    found: Tensor = given.logits if hasattr(given, "logits") else given.last_hidden_state
    return found


def save_tiny(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Saves :func:`tiny_model` in ``dtype`` and returns the folder.

    As in the published checkpoints, correction biases stay in float32. ``max_shard_size`` in
    ``overrides`` splits the file.
    """
    max_shard_size = overrides.pop("max_shard_size", "5GB")
    model = tiny_model(model_type, **overrides)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    model.to(dtype)
    for name, bias in biases.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, bias)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
