# SPDX-License-Identifier: Apache-2.0
"""Config of DeepSeekMoE-16B (`model_type: deepseek`), which Transformers knows only as remote code."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class DeepseekConfig(PreTrainedConfig):
    """Multi-head attention and softmax routing over fine-grained experts (arXiv 2401.06066).

    Field names and defaults are those of the published config.json of deepseek-ai/deepseek-moe-16b-base.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "n_routed_experts"}
    mlp_bias, topk_method, n_group, topk_group, routed_scaling_factor = False, "greedy", 1, 1, 1.0

    def __init__(
        self,
        vocab_size: int = 102400,
        hidden_size: int = 2048,
        intermediate_size: int = 10944,
        moe_intermediate_size: int = 1408,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        n_shared_experts: int | None = 2,
        n_routed_experts: int | None = 64,
        num_experts_per_tok: int = 6,
        moe_layer_freq: int = 1,
        first_k_dense_replace: int = 1,
        norm_topk_prob: bool = False,
        scoring_func: str = "softmax",
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 100000,
        eos_token_id: int | None = 100001,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.n_shared_experts = n_shared_experts
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_freq = moe_layer_freq
        self.first_k_dense_replace = first_k_dense_replace
        self.norm_topk_prob = norm_topk_prob
        self.scoring_func = scoring_func
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(**kwargs)


@cache
def register_deepseek() -> None:
    """Lets AutoConfig read `model_type: deepseek` without remote code."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
