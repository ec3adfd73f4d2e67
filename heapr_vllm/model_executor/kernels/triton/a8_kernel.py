# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 bits on the Triton kernels with activations rounded to 8 bits too, so that products are of 8 by 8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton.kernel import TritonKernel, is_interpreted
from heapr_vllm.model_executor.kernels.triton.obstacles import HAS_E4M3, layer_obstacle

if TYPE_CHECKING:
    from heapr_vllm.model_executor.kernels.triton.launch import Steps


class TritonA8Kernel(TritonKernel):
    """Runs where `TritonKernel` does, if asked for: nobody has timed it on a GPU yet."""

    name = "triton_a8"
    activation_bits = 8

    def is_default(self) -> bool:
        return False

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        has_e4m3 = not current_platform.is_cuda_alike() or current_platform.has_device_capability(HAS_E4M3)
        if obstacle := layer_obstacle(dtype, hidden_size, scheme, self.activation_bits, has_e4m3=has_e4m3):
            return obstacle
        is_float = scheme is not None and scheme.type == "float"
        if is_interpreted() and (dtype == torch.bfloat16 or is_float):
            return "Triton's interpreter gets bfloat16 and rounding to FP8 wrong; add --dtype float16, and take INT8"
        return None

    def steps(self) -> Steps:
        from heapr_vllm.model_executor.kernels.triton import a8_launch

        return a8_launch.A8
