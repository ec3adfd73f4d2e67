# SPDX-License-Identifier: Apache-2.0
"""Full-size models with random weights or none: config, tokenizer, and masks drawn from a HEAPr-like profile.

Nothing is downloaded. Without weights on the disk vLLM makes them up on the device (`--load-format dummy`). The paper's
models have the sizes of their published config.json files; SMALL is one for CPUs.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heapr_vllm.formats.checkpoint import TOKENIZER_FILES
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.model_executor.tuning.synthetic import ragged_widths
from heapr_vllm.prune.models.deepseek import register_deepseek_model

TOKENIZER = Path(__file__).parent.parent / "serving_examples" / "tiny_qwen3_moe"
LAYER_SPREAD = 0.15  # standard deviation of the kept fraction over layers: that of the bundled model's masks
QWEN = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
}
QWEN2 = {**QWEN, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "norm_topk_prob": False}
QWEN3 = {**QWEN, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
QWEN3_30B = {
    **QWEN3,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
SMALL = "Qwen3-MoE-1.7GB"
TWO_LAYERS = "Qwen3-30B-A3B-2-layers"  # 2 of its 48 layers, and as large a part of its vocabulary
WRITTEN = (SMALL, TWO_LAYERS, "tiny")  # models whose random weights go to the disk by default
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": QWEN3_30B,
    "Qwen1.5-MoE-A2.7B": {
        **QWEN2,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen2-57B-A14B": {
        **QWEN2,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
    },
    "DeepSeekMoE-16B": {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 10944,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    SMALL: {
        **QWEN3,
        "vocab_size": 32768,
        "hidden_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 3072,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
    },
    TWO_LAYERS: {**QWEN3_30B, "num_hidden_layers": 2, "vocab_size": 6336},
    "tiny": {
        **QWEN3,
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
    },
}


def write_dense(name: str, folder: Path, weights: bool = False) -> Path:
    """Model directory of `name` inside `folder`, with random weights or without any."""
    path = folder / (f"{name}-weights" if weights else name)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
    if weights:
        _write_weights(path)
    for file in TOKENIZER_FILES:
        if (TOKENIZER / file).is_file():
            shutil.copyfile(TOKENIZER / file, path / file)
    return path


def _write_weights(path: Path) -> None:
    """Weights as transformers initialises them, in shards beside config.json, which stays as it is."""
    register_deepseek_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=path) as folder:
        model.save_pretrained(folder, max_shard_size="1GB")
        for file in Path(folder).glob("model*.safetensors*"):
            file.replace(path / file.name)


def random_masks(config: dict[str, Any], sparsity: float) -> NeuronMasks:
    """Masks whose kept fractions spread over layers and over the experts of a layer as HEAPr's do; 0 keeps all."""
    full = config["moe_intermediate_size"]
    num_experts = config.get("num_experts") or config["n_routed_experts"]
    layers = range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
    generator = torch.Generator().manual_seed(0)
    spread = LAYER_SPREAD if sparsity else 0.0
    kept = 1 - sparsity + spread * torch.randn(len(layers), generator=generator)
    kept = (kept + (1 - sparsity - kept.mean())).clamp(0.1, 1)
    keep = {}
    for layer, fraction in zip(layers, kept.tolist(), strict=True):
        widths = torch.tensor(ragged_widths(num_experts, full, 1 - fraction, seed=layer))
        keep[f"model.layers.{layer}.mlp.experts"] = torch.arange(full) < widths[:, None]
    return NeuronMasks(keep, {"criterion": "random", "sparsity": sparsity, "scope": "global", "align": 64})
