# SPDX-License-Identifier: Apache-2.0
"""Which kernels may run a layer: the one that HEAPR_KERNEL forces, otherwise all that can and compute alike.

Time decides between those. Whether activations are rounded does not follow from time, which would make outputs depend
on a measurement: where the first kernel that can run a layer rounds them, only such are left, otherwise none.

HEAPR_CPU_KERNEL and HEAPR_CPU_BUCKETS are older wishes, for CPUs only: unlike HEAPR_KERNEL, which gives that kernel or
an error, so that kernels can be ruled out as a cause one by one, they give way where what they want does not run.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import RaggedKernel
from heapr_vllm.model_executor.kernels.cpu_compiled.a8_kernel import CompiledA8Kernel
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
from heapr_vllm.model_executor.kernels.cpu_native import BucketsKernel, NativeKernel
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel
from heapr_vllm.model_executor.kernels.triton.a8_kernel import TritonA8Kernel
from heapr_vllm.model_executor.kernels.triton.kernel import TritonKernel

VARIABLE = "HEAPR_KERNEL"
FORMER_NAMES = {"ragged": "compiled"}
FORMER_WISHES = {
    ("HEAPR_CPU_KERNEL", "native"): {"native", "buckets"},
    ("HEAPR_CPU_KERNEL", "compiled"): {"compiled"},
    ("HEAPR_CPU_KERNEL", "ragged"): {"compiled"},
    ("HEAPR_CPU_BUCKETS", "always"): {"triton", "compiled_a8", "compiled", "buckets"},
    ("HEAPR_CPU_BUCKETS", "never"): {"triton", "compiled_a8", "compiled", "native"},
}


@cache
def kernels() -> dict[str, RaggedKernel]:
    """Name to kernel, in the order in which they are preferred where they are equally fast.

    The last one is only for layers that no other runs.
    """
    ordered = (
        TritonKernel(),
        TritonA8Kernel(),
        CompiledA8Kernel(),
        CompiledKernel(),
        NativeKernel(),
        BucketsKernel(),
        ReferenceKernel(),
    )
    return {kernel.name: kernel for kernel in ordered}


def candidates(
    dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None, *, adds_up_traffic: bool = False
) -> list[RaggedKernel]:
    """Returns the kernels for a layer of this type and size, whose experts are stored as `scheme` says.

    `adds_up_traffic`: only those that do. Never empty. Raises HeaprError if the forced one cannot run the layer, or
    none can.
    """
    if kernel := forced_kernel():
        _refuse(kernel, _layer_obstacle(kernel, dtype, hidden_size, scheme))
        if adds_up_traffic and not kernel.adds_up_traffic:
            _refuse(kernel, "it does not add up traffic; unset HEAPR_TRAFFIC")
        return [kernel]
    *fast, reference = kernels().values()
    found = [
        kernel
        for kernel in fast
        if kernel.is_default()
        and (kernel.adds_up_traffic or not adds_up_traffic)
        and _layer_obstacle(kernel, dtype, hidden_size, scheme) is None
        and kernel.machine_obstacle() is None
    ]
    if found:
        wished = _as_wished(found)
        return [kernel for kernel in wished if kernel.activation_bits == wished[0].activation_bits]
    if obstacle := _layer_obstacle(reference, dtype, hidden_size, scheme):
        raise HeaprError(f"no kernel runs pruned experts of {dtype} and hidden size {hidden_size} here: {obstacle}")
    return [reference]


def _layer_obstacle(
    kernel: RaggedKernel, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None
) -> str | None:
    """As the kernel says, of experts as it gets them."""
    taken = scheme.widened() if scheme and not kernel.takes_two_widths else scheme
    return kernel.layer_obstacle(dtype, hidden_size, taken)


def _as_wished(found: list[RaggedKernel]) -> list[RaggedKernel]:
    """Those that the older variables name, of each variable that names any of them."""
    for (variable, value), names in FORMER_WISHES.items():
        if os.environ.get(variable) == value:
            found = [kernel for kernel in found if kernel.name in names] or found
    return found


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
