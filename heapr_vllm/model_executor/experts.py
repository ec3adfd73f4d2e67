# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts behind vLLM's modular-kernel interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes
from heapr_vllm.model_executor.pruned_layer import PrunedLayer
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.scales import Scales


class HeaprExperts(mk.FusedMoEExpertsModular):
    """Calls the kernel, which weights and reduces over top-k itself. `layer` holds the weights' index tables."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        layer: PrunedLayer,
        layout: RaggedLayout,
        kernel: RaggedKernel,
        scales: Callable[[PrunedLayer], Scales | None],
        recorded: str = "",
    ) -> None:
        """`scales`: finds the factors of codes on the layer, where reloading replaces them.

        `recorded`: the layer's name in `RECORDED`, if its traffic is.
        """
        super().__init__(moe_config, quant_config)
        self.layer = layer
        self.scales = scales
        self.recorded = recorded
        self.kernel = kernel
        self.num_local_experts = len(layout.widths)
        self.max_width = layout.max_width
        self.uniform_experts = self.num_local_experts if layout.is_uniform and layer.expert_map is None else 0

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return (weight_key, activation_key) == (None, None)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """(local experts, M, N, K, top_k); the base class reads them from 3-D weights, ours are flat."""
        return self.num_local_experts, a1.shape[0], 2 * self.max_width, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes the weighted sum over local experts into `output` [M, H].

        `expert_map` is folded into the layer's slot table. With `apply_router_weight_on_input` (top-k 1) the weights
        are in `hidden_states` already.
        """
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        routes = Routes(topk_weights, topk_ids, self.layer.heapr_slots)
        table, scales = self.layer.heapr_table, self.scales(self.layer)
        experts = ExpertRows(w1, w2, table, self.max_width, self.uniform_experts, scales)
        self.kernel.run_in_graph(output, hidden_states, routes, experts, self.recorded)
