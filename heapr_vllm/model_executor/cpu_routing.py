# SPDX-License-Identifier: Apache-2.0
"""Routing on CPUs with vLLM before 0.30, whose routers are for GPUs: its CPU experts pick their own, and so do ours."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

MOE = "vllm.model_executor.layers.fused_moe"
HOMES = (f"{MOE}.experts.cpu_moe", f"{MOE}.cpu_fused_moe")  # of select_experts: from 0.28 on, before


@cache
def is_needed() -> bool:
    return current_platform.is_cpu() and find_spec(f"{MOE}.router.cpu_router") is None


@cache
def _home() -> ModuleType:
    modules = (import_module(name) for name in HOMES if find_spec(name))
    return next(module for module in modules if hasattr(module, "select_experts"))


def select_experts(layer: RoutedExperts, x: torch.Tensor,
                   router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and ids int32, both [T, k], of the experts of tokens `x` [T, H]."""
    weights, ids = _home().select_experts(
        hidden_states=x, router_logits=router_logits, top_k=layer.top_k, use_grouped_topk=layer.use_grouped_topk,
        renormalize=layer.renormalize, topk_group=layer.topk_group, num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function, scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor, e_score_correction_bias=layer.e_score_correction_bias)
    return weights.float().contiguous(), ids.int().contiguous()
