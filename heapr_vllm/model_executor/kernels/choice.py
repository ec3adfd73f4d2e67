# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a layer: the one that HEAPR_KERNEL forces, otherwise the first that can.

Unlike HEAPR_CPU_KERNEL, an older wish for CPUs only, HEAPR_KERNEL gives that kernel or an error, never another one, so
that kernels can be ruled out as a cause one by one.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import RaggedKernel
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
from heapr_vllm.model_executor.kernels.cpu_native import NativeKernel
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel
from heapr_vllm.model_executor.kernels.triton.kernel import TritonKernel

VARIABLE = "HEAPR_KERNEL"
FORMER_NAMES = {"ragged": "compiled"}


@cache
def kernels() -> dict[str, RaggedKernel]:
    """Name to kernel, in the order in which they are asked."""
    return {kernel.name: kernel for kernel in (TritonKernel(), CompiledKernel(), NativeKernel(), ReferenceKernel())}


def select_kernel(dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> RaggedKernel:
    """Returns the kernel for a layer of this type and size, whose experts are stored as `scheme` says.

    Raises HeaprError if the forced one cannot run it, or none can.
    """
    if kernel := forced_kernel():
        _refuse(kernel, kernel.layer_obstacle(dtype, hidden_size, scheme))
        return kernel
    for kernel in kernels().values():
        is_free = kernel.is_default(scheme) and kernel.layer_obstacle(dtype, hidden_size, scheme) is None
        if is_free and kernel.machine_obstacle() is None:
            return kernel
    raise HeaprError(
        f"no kernel runs pruned experts of {dtype} and hidden size {hidden_size} here: "
        f"{ReferenceKernel().layer_obstacle(dtype, hidden_size, scheme)}"
    )


def kernel_choice() -> str | None:
    """Returns what the choice depends on apart from the layer; None on GPUs, unless it is forced.

    Asked once in the front end, it has our CPU op compiled before any worker starts. Raises HeaprError if the forced
    kernel cannot run here.
    """
    if kernel := forced_kernel():
        return kernel.cache_key()
    if not current_platform.is_cpu():
        return None
    return next(k.cache_key() for k in kernels().values() if k.is_default() and k.machine_obstacle() is None)


def forced_kernel() -> RaggedKernel | None:
    """Returns the kernel that HEAPR_KERNEL names; None if it is unset or empty.

    Raises HeaprError if there is none of that name, or it runs no layer on this machine.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    kernel = kernels().get(FORMER_NAMES.get(name, name))
    if kernel is None:
        raise HeaprError(f"{VARIABLE}={name} is no kernel; choose from {', '.join(kernels())}, or unset it")
    _refuse(kernel, kernel.machine_obstacle())
    return kernel


def _refuse(kernel: RaggedKernel, obstacle: str | None) -> None:
    if obstacle:
        raise HeaprError(
            f"{VARIABLE}={kernel.name} cannot run here: {obstacle}, or choose another of {', '.join(kernels())}, or "
            "unset it"
        )
