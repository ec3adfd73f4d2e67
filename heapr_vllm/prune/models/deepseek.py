# SPDX-License-Identifier: Apache-2.0
"""DeepSeekMoE-16B (`model_type: deepseek`) for calibration, put together from Transformers' own blocks.

The architecture (arXiv 2401.06066): a Llama decoder whose MLPs, from layer `first_k_dense_replace` on, are softmax
routers over fine-grained experts, without renormalisation of the top-k weights, plus always-active shared experts. Its
MoE block is the one of DeepSeek-V2 with greedy routing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2Moe, DeepseekV2TopkRouter

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.deepseek_config import DeepseekConfig, register_deepseek


class _HasExperts:
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for its decorator in this file, but it is on DeepSeek-V2's experts."""
        return True


class DeepseekModel(_HasExperts, LlamaModel):
    """The decoder. Raises HeaprError for routing that no published model of this type uses."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        if config.norm_topk_prob or config.scoring_func != "softmax":
            raise HeaprError(
                "model_type deepseek with norm_topk_prob or another scoring_func than softmax is not supported"
            )
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekV2Moe(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekV2TopkRouter | DeepseekV2Experts):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)


class DeepseekForCausalLM(_HasExperts, LlamaForCausalLM):
    """The decoder with its language-model head."""

    config: DeepseekConfig
    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # without Llama's own decoder
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@cache
def register_deepseek_model() -> None:
    """Lets AutoModelForCausalLM build and load it: checkpoints hold one tensor per expert and projection."""
    register_deepseek()
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("deepseek_v2"), overwrite=True)
