# SPDX-License-Identifier: Apache-2.0
"""Tiny random MoE checkpoints built from transformers configs, with a byte tokenizer and some text."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from heapr_vllm.prune.models.deepseek import register_deepseek_model

VOCAB, END = 320, "<|endoftext|>"
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
SHARED = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": COMMON["num_experts"]}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "tie_word_embeddings": False,
}
HYBRID = {
    "num_hidden_layers": 2,
    "head_dim": 32,
    "shared_expert_intermediate_size": 32,
    "partial_rotary_factor": 0.5,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # vLLM's op on CPUs takes no other sizes
FULL_ATTENTION = {**HYBRID, "layer_types": ["full_attention"] * 2}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "out_hidden_size": COMMON["hidden_size"],
}
OWN = {  # by name: model type, what differs from COMMON
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "norm_topk_prob": True, "tie_word_embeddings": False}),
    "dense_between": (
        "qwen3_moe",
        {"num_hidden_layers": 5, "head_dim": 32, "mlp_only_layers": [0, 2], "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 32, "norm_topk_prob": False}),
    "qwen3_next": ("qwen3_next", FULL_ATTENTION),
    "qwen3_next_linear": (
        "qwen3_next",
        {**HYBRID, "layer_types": ["linear_attention", "full_attention"], "dtype": "bfloat16"},
    ),  # vLLM's linear attention takes no other on CPUs
    "qwen3_5_moe": ("qwen3_5_moe_text", FULL_ATTENTION),
    "qwen3_5_moe_vl": ("qwen3_5_moe", {"text_config": {**COMMON, **FULL_ATTENTION}, "vision_config": VISION}),
    "deepseek": ("deepseek", {**SHARED, "n_shared_experts": 2}),
    "deepseek_v2": ("deepseek_v2", {**SHARED, **MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {**SHARED, **MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "glm4_moe": (
        "glm4_moe",
        {
            **SHARED,
            "head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "partial_rotary_factor": 0.5,
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "intermediate_size": COMMON["moe_intermediate_size"],
            "num_local_experts": COMMON["num_experts"],
            "tie_word_embeddings": False,
        },
    ),
    "olmoe": ("olmoe", {"intermediate_size": COMMON["moe_intermediate_size"], "norm_topk_prob": False}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": COMMON["num_experts"],
            "moe_k": 2,
            "head_dim": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
            "tie_word_embeddings": True,
        },
    ),
}
DRAFT = {"deepseek_v3": "model.layers.3.", "qwen3_next": "mtp.layers.0."}  # their layers for multi-token prediction


def config(family: str) -> PreTrainedConfig:
    register_deepseek_model()
    model_type, own = OWN[family]
    return CONFIG_MAPPING[model_type](**(own if "text_config" in own else COMMON | own))


def save(family: str, path: Path) -> Path:
    """A seeded random model of `family` with its tokenizer, in fp32 if its config names no other dtype."""
    torch.manual_seed(0)
    own = config(family)
    auto = AutoModelForImageTextToText if "vision_config" in own.sub_configs else AutoModelForCausalLM
    model = auto.from_config(own, dtype=own.dtype or torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.save_pretrained(path)
    if family in DRAFT:
        last = model.config.num_hidden_layers - 1
        add_draft_layer(path / "model.safetensors", f"model.layers.{last}.", DRAFT[family])
    tokenizer().save_pretrained(path)
    return path


def add_draft_layer(weights: Path, source: str, target: str) -> None:
    """Gives a checkpoint a decoder layer named `target`, which only drafting needs, like its layer `source`."""
    tensors = load_file(weights)
    tensors |= {name.replace(source, target): tensor + 1 for name, tensor in tensors.items() if name.startswith(source)}
    save_file(tensors, weights, metadata={"format": "pt"})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {END: 256}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def write_corpus(path: Path) -> Path:
    """60 documents of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(50)]
    with path.open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=60))}) + "\n")
    return path
