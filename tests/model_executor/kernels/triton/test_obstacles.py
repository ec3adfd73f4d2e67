# SPDX-License-Identifier: Apache-2.0
"""Layers that the Triton kernels refuse, each with what to do instead."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton.a8_kernel import TritonA8Kernel
from heapr_vllm.model_executor.kernels.triton.obstacles import HAS_E4M3


def test_layers_with_rounded_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    kernel, int8, fp8 = TritonA8Kernel(), ExpertScheme("int"), ExpertScheme("float")
    by_channel = ExpertScheme("int", strategy="channel", group_size=None)
    for scheme in (int8, fp8, by_channel):
        assert kernel.layer_obstacle(torch.bfloat16, 256, scheme) is None
    for dtype, hidden_size, scheme, message in (
        (torch.bfloat16, 256, None, "not unquantized ones; choose triton"),
        (torch.bfloat16, 256, ExpertScheme("int", 4, group_size=64), "not int4 ones; choose triton, or prune with"),
        (torch.bfloat16, 256, ExpertScheme("int", 4, group_size=64, down_bits=8), "not int4-int8 ones; choose triton"),
        (torch.float32, 256, int8, "computes in float32; choose triton"),
        (torch.bfloat16, 512, replace(int8, group_size=256), "128 at most, not of 256; choose triton"),
        (torch.bfloat16, 48, by_channel, "no multiple of 32; choose triton"),
    ):
        assert message in (kernel.layer_obstacle(dtype, hidden_size, scheme) or "")
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    monkeypatch.setattr(current_platform, "has_device_capability", lambda number: number <= 86)
    assert HAS_E4M3 == 89 and kernel.layer_obstacle(torch.bfloat16, 256, int8) is None
    assert "choose triton, or export with --quantize int8" in kernel.layer_obstacle(torch.bfloat16, 256, fp8)
    assert not kernel.is_default()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.layer_obstacle(torch.float16, 256, int8) is None
    assert "interpreter" in kernel.layer_obstacle(torch.bfloat16, 256, int8)
