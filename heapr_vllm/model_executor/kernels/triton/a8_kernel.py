# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 bits on the Triton kernels with activations rounded to 8 bits too, so that products are of 8 by 8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import GROUP_SIZE, MIN_GROUP_SIZE, ExpertScheme
from heapr_vllm.model_executor.kernels.triton.kernel import TritonKernel, is_interpreted

if TYPE_CHECKING:
    from heapr_vllm.model_executor.kernels.triton.launch import Steps

HAS_E4M3 = 89  # compute capability from which tensor cores multiply it


class TritonA8Kernel(TritonKernel):
    """Runs where `TritonKernel` does, if asked for: nobody has timed it on a GPU yet."""

    name = "triton_a8"
    activation_bits = 8

    def is_default(self) -> bool:
        return False

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if scheme is None or scheme.num_bits != 8:
            stored = scheme.name if scheme else "unquantized"
            return f"it is for experts in 8 bits, not {stored} ones; choose triton, or prune with --quantize int8"
        if dtype == torch.float32:
            return "it rounds activations to 8 bits, and the model computes in float32; choose triton"
        if (scheme.group_size or 0) > GROUP_SIZE:
            return f"it takes scales in groups of {GROUP_SIZE} at most, not of {scheme.group_size}; choose triton"
        if hidden_size % MIN_GROUP_SIZE:
            return f"the hidden size {hidden_size} is no multiple of {MIN_GROUP_SIZE}; choose triton"
        is_gpu = current_platform.is_cuda_alike()
        if scheme.type == "float" and is_gpu and not current_platform.has_device_capability(HAS_E4M3):
            return "this GPU does not multiply FP8; choose triton, or export with --quantize int8"
        if is_interpreted() and (dtype == torch.bfloat16 or scheme.type == "float"):
            return "Triton's interpreter gets bfloat16 and rounding to FP8 wrong; add --dtype float16, and take INT8"
        return None

    def steps(self) -> Steps:
        from heapr_vllm.model_executor.kernels.triton import a8_launch

        return a8_launch.A8
