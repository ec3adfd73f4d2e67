# SPDX-License-Identifier: Apache-2.0
"""Routing on CPUs with vLLM before 0.30, whose routers are for GPUs: its CPU experts pick their own, and so do ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

MOE = "vllm.model_executor.layers.fused_moe"
HOMES = (f"{MOE}.experts.cpu_moe", f"{MOE}.cpu_fused_moe")  # of select_experts: from 0.28 on, before
Router = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def router() -> Router | None:
    """Experts from (layer, tokens [T, H], router logits [T, E]) as `_route`; None if vLLM's routers run here.

    To be asked for while a model is built: torch.compile cannot trace the search.
    """
    if not current_platform.is_cpu() or find_spec(f"{MOE}.router.cpu_router") is not None:
        return None
    modules = (import_module(name) for name in HOMES if find_spec(name))
    return partial(_route, next(module.select_experts for module in modules if hasattr(module, "select_experts")))


def _route(
    select_experts: Callable[..., Any], layer: RoutedExperts, x: torch.Tensor, router_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and ids int32, both [T, k], of the experts of tokens `x` [T, H]."""
    weights, ids = select_experts(
        hidden_states=x,
        router_logits=router_logits,
        top_k=layer.top_k,
        use_grouped_topk=layer.use_grouped_topk,
        renormalize=layer.renormalize,
        topk_group=layer.topk_group,
        num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor,
        e_score_correction_bias=layer.e_score_correction_bias,
    )
    return weights.float().contiguous(), ids.int().contiguous()
