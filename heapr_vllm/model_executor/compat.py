# SPDX-License-Identifier: Apache-2.0
"""Where the vLLM versions of the supported window differ: all that goes when the window rises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from heapr_vllm.environment import SUPPORTED_VLLM, is_supported

if TYPE_CHECKING:
    import torch

    from heapr_vllm.model_executor.pruned_layer import PrunedLayer

MOE = "vllm.model_executor.layers.fused_moe"
HOMES = (f"{MOE}.experts.cpu_moe", f"{MOE}.cpu_fused_moe")  # of select_experts: from 0.28 on, before
Router = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]


def warn_if_unsupported(version: str) -> None:
    """Warns, and does not raise, so that a newer vLLM can be tried."""
    if not is_supported(version):
        warnings.warn(
            f"heapr-vllm is tested with vllm{SUPPORTED_VLLM}, this is {version}: if serving fails, install "
            f'a supported version with pip install "vllm{SUPPORTED_VLLM}"',
            stacklevel=2,
        )


def online_quantization(quant_config: Any) -> Any | None:
    """What vLLM is to quantize on top of a quantized checkpoint; it cannot before 0.30, which lacks the attribute."""
    return getattr(quant_config, "online_quantization_config", None)


def cpu_router() -> Router | None:
    """Experts from (layer, tokens [T, H], router logits [T, E]) as `_route`; None if vLLM's routers run here.

    To be asked for while a model is built: torch.compile cannot trace the search.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or find_spec(f"{MOE}.router.cpu_router") is not None:
        return None
    modules = (import_module(name) for name in HOMES if find_spec(name))
    return partial(_route, next(module.select_experts for module in modules if hasattr(module, "select_experts")))


def _route(
    select_experts: Callable[..., Any], layer: PrunedLayer, x: torch.Tensor, router_logits: torch.Tensor
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
