# SPDX-License-Identifier: Apache-2.0
"""Tiny random MoE checkpoints built from transformers configs, with a byte tokenizer and some text."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen3MoeConfig

VOCAB, END = 320, "<|endoftext|>"
COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
          "intermediate_size": 96, "max_position_embeddings": 512, "eos_token_id": 256, "pad_token_id": 256,
          "bos_token_id": None, "initializer_range": 0.2}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**COMMON, head_dim=32, norm_topk_prob=True, tie_word_embeddings=False),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, shared_expert_intermediate_size=32, norm_topk_prob=False),
    "deepseek_v3": DeepseekV3Config(**{**COMMON, "n_routed_experts": COMMON["num_experts"]}, n_group=2, topk_group=1,
                                    first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16,
                                    qk_nope_head_dim=16, v_head_dim=32),
    "dense_between": Qwen3MoeConfig(**{**COMMON, "num_hidden_layers": 5}, head_dim=32, mlp_only_layers=[0, 2],
                                    tie_word_embeddings=True),
}


def save(family: str, path: Path) -> Path:
    """A seeded random fp32 model of `family` with its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


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
