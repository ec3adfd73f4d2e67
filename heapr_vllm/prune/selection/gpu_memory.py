# SPDX-License-Identifier: Apache-2.0
"""How large weights may be beside the requests that are to run at once (`heapr prune --gpu-memory`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.selection.budget import format_size

UTILIZATION = 0.9  # of the memory that vLLM takes, `--gpu-memory-utilization`; its default is 0.9 to 0.92
RESERVED = 2 * 2**30  # of that for activations, CUDA graphs and the context; an assumption, not measured
BLOCK = 16  # tokens of a cache block
ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
NO_CACHE = ("linear_attention", "mamba", "conv")  # layer types whose state does not grow with the text


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """One GPU's memory in bytes, and `max_num_seqs` requests of up to `max_model_len` tokens that run at once."""

    total: int
    max_model_len: int
    max_num_seqs: int

    def weights(self, config: dict[str, Any]) -> int:
        """Returns the bytes that are left for the weights of the model with this config.json.

        UTILIZATION * total - RESERVED - max_num_seqs * ceil(max_model_len / BLOCK) * BLOCK * `cache_bytes_per_token`.
        Raises HeaprError if nothing is left.
        """
        left = int(UTILIZATION * self.total) - RESERVED - self.cache(config)
        if left <= 0:
            raise HeaprError(
                f"{self.max_num_seqs} requests of {self.max_model_len} tokens need {format_size(self.cache(config))} "
                f"of key-value cache, so {format_size(self.total)} of memory have no room for weights; lower "
                "--max-num-seqs or --max-model-len"
            )
        return left

    def cache(self, config: dict[str, Any]) -> int:
        """Bytes of the key-value cache."""
        blocks = -(-self.max_model_len // BLOCK)
        return self.max_num_seqs * blocks * BLOCK * cache_bytes_per_token(config)

    def describe(self, config: dict[str, Any]) -> str:
        """Says in one line how the memory is shared."""
        return (
            f"{UTILIZATION:.0%} of {format_size(self.total)}: {format_size(self.cache(config))} of key-value cache for "
            f"{self.max_num_seqs} x {self.max_model_len:,} tokens, {format_size(RESERVED)} for activations, "
            f"{format_size(self.weights(config))} for weights"
        )


def cache_bytes_per_token(config: dict[str, Any]) -> int:
    """Computes bytes per token of the key-value cache, in the model's dtype, of the model with this config.json.

    Every attention layer keeps a key and a value per key-value head, 2 * num_key_value_heads * head_dim elements; with
    multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) the compressed vector and the rotary part of the key,
    kv_lora_rank + qk_rope_head_dim. Raises HeaprError if the config does not say.
    """
    text = config.get("text_config") or config
    types = text.get("layer_types") or []
    layers = text.get("num_hidden_layers")
    size = ELEMENT_SIZE.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "bfloat16"))
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    head_dim = text.get("head_dim") or _head_dim(text)
    if not isinstance(layers, int) or size is None or not heads or not head_dim:
        raise HeaprError("config.json does not say how large the key-value cache is; use --target-size")
    layers -= sum(kind in NO_CACHE for kind in types)
    if text.get("kv_lora_rank"):
        return layers * (text["kv_lora_rank"] + text["qk_rope_head_dim"]) * size
    return layers * 2 * heads * head_dim * size


def _head_dim(text: dict[str, Any]) -> int | None:
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if hidden and heads else None
