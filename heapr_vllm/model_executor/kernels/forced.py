# SPDX-License-Identifier: Apache-2.0
"""HEAPR_KERNEL: the kernel that a user forces on every pruned layer, for one by one to be ruled out as a cause.

Unlike HEAPR_CPU_KERNEL, an older wish for CPUs only, it gives that kernel or an error, never another one.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError
from heapr_vllm.model_executor.kernels import cpu_native
from heapr_vllm.model_executor.kernels.cpu_compiled import kernel

VARIABLE = "HEAPR_KERNEL"
TRITON, RAGGED, NATIVE, REFERENCE = NAMES = ("triton", "ragged", "native", "reference")


def forced_kernel() -> str | None:
    """The name in HEAPR_KERNEL; None if it is unset or empty.

    Raises HeaprError if it is none of `NAMES`, or one that runs no layer on this machine.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in NAMES:
        raise HeaprError(f"{VARIABLE}={name} is no kernel; choose from {', '.join(NAMES)}, or unset it")
    _refuse(name, _machine_obstacle(name))
    return name


def check_layer(name: str, dtype: torch.dtype, hidden_size: int) -> None:
    """Raises HeaprError if the kernel, which `forced_kernel` gave, cannot run a layer of this type and size."""
    _refuse(name, _layer_obstacle(name, dtype, hidden_size))


def _refuse(name: str, obstacle: str | None) -> None:
    if obstacle:
        raise HeaprError(
            f"{VARIABLE}={name} cannot run here: {obstacle}, or choose another of {', '.join(NAMES)}, or unset it"
        )


def _machine_obstacle(name: str) -> str | None:
    if name == TRITON:
        if importlib.util.find_spec("triton") is None:
            return "there is no Triton; install it"
        if not current_platform.is_cuda_alike() and not _is_interpreted():
            return "there is no GPU; set TRITON_INTERPRET=1 to have it interpreted, which is slow"
    if name in (RAGGED, NATIVE) and not current_platform.is_cpu():
        return "it is for CPUs; choose triton"
    if name == RAGGED and not kernel.can_run():
        return "it cannot be compiled, the log says why; install a C++ compiler"
    return None


def _layer_obstacle(name: str, dtype: torch.dtype, hidden_size: int) -> str | None:
    if name == TRITON and hidden_size % 16:
        return f"the hidden size {hidden_size} is no multiple of 16; choose reference"
    if name == TRITON and dtype == torch.bfloat16 and _is_interpreted():
        return "Triton's interpreter gets bfloat16 wrong; add --dtype float32"
    if name == RAGGED and hidden_size % kernel.COLUMNS:
        return f"the hidden size {hidden_size} is no multiple of {kernel.COLUMNS}; choose reference"
    if name == NATIVE and cpu_native.native_isa(dtype, hidden_size) is None:
        return f"vLLM's op needs x86-64 and a hidden size in multiples of {cpu_native.WIDTH_UNIT}; choose reference"
    if name == REFERENCE and current_platform.is_cuda_alike() and _captures_graphs():
        return "plain torch cannot be captured in CUDA graphs; add --enforce-eager"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _captures_graphs() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
