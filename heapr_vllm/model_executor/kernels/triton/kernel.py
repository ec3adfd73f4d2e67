# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as one of the kernels to choose from. Imports Triton only when a layer runs on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales
from heapr_vllm.model_executor.kernels.triton.obstacles import layer_obstacle
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT
from heapr_vllm.model_executor.storage.layout import RaggedLayout

if TYPE_CHECKING:
    from heapr_vllm.model_executor.kernels.triton.launch import Steps


class TritonKernel(RaggedKernel):
    """Runs on GPUs; forced, also in Triton's interpreter."""

    name = "triton"
    share_unit = TRITON_UNIT
    width_unit = TRITON_UNIT
    adds_up_traffic = True

    def is_default(self) -> bool:
        return current_platform.is_cuda_alike()

    def machine_obstacle(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "there is no Triton; install it"
        if not current_platform.is_cuda_alike() and not is_interpreted():
            return "there is no GPU; set TRITON_INTERPRET=1 to have it interpreted, which is slow"
        return None

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if obstacle := layer_obstacle(dtype, hidden_size, scheme):
            return obstacle
        if dtype == torch.bfloat16 and is_interpreted():
            return "Triton's interpreter gets bfloat16 wrong; add --dtype float32"
        return None

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        self.steps().pack(w13, w2, layout, scales)

    def index_tables(self, slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        from heapr_vllm.model_executor.kernels.triton import launch

        return launch.index_tables(slots, layout)

    def warm_up(
        self,
        slots: torch.Tensor,
        experts: ExpertRows,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        from heapr_vllm.model_executor.kernels.triton import launch

        launch.warm_up(slots, experts, top_k, max_tokens, dtype, self.steps())

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        from heapr_vllm.model_executor.kernels.triton import launch

        launch.triton_ragged_moe(output, x, routes, experts, steps=self.steps())

    def steps(self) -> Steps:
        """Returns what it does otherwise than its kin."""
        from heapr_vllm.model_executor.kernels.triton import launch

        return launch.PLAIN


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
