# SPDX-License-Identifier: Apache-2.0
"""The custom op `heapr::ragged_moe` and the choice of its kernel.

The op is opaque to torch.compile and takes all tables as tensors, so a compiled graph holds no state of the process
that traced it. Kernels: "triton" on GPUs, "ragged" for our compiled CPU op, "amx" or "vec" for vLLM's native CPU op by
instruction set, "reference" for plain torch. They differ in how they store weights (`stored_widths`, `pack`) and in the
table they read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from heapr_vllm.model_executor.kernels import cpu_native
from heapr_vllm.model_executor.kernels.cpu_compiled import kernel
from heapr_vllm.model_executor.kernels.forced import NATIVE, RAGGED, REFERENCE, TRITON, check_layer, forced_kernel
from heapr_vllm.model_executor.kernels.reference import ragged_moe_reference
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up

SHARE_UNIT = 16


def select_kernel(dtype: torch.dtype, hidden_size: int) -> str:
    """The kernel that HEAPR_KERNEL forces, otherwise the fastest one that can run this layer here.

    Raises HeaprError if the forced one cannot.
    """
    if forced := forced_kernel():
        check_layer(forced, dtype, hidden_size)
        return cpu_native.native_isa(dtype, hidden_size) if forced == NATIVE else forced
    if current_platform.is_cpu():
        if hidden_size % kernel.COLUMNS == 0 and kernel.is_used():
            return RAGGED
        return cpu_native.native_isa(dtype, hidden_size) or REFERENCE
    has_triton = current_platform.is_cuda_alike() and importlib.util.find_spec("triton") is not None
    return TRITON if has_triton and hidden_size % 16 == 0 else REFERENCE


def kernel_choice() -> str | None:
    """What the choice depends on apart from the layer; None on other platforms than CPUs, unless it is forced.

    Asked once in the front end, it has our op compiled before any worker starts. Raises HeaprError if the forced
    kernel cannot run here.
    """
    forced = forced_kernel()
    if forced not in (None, NATIVE):
        return forced
    if not current_platform.is_cpu():
        return None
    if forced is None and kernel.is_used():
        return RAGGED
    return f"native, buckets {cpu_native.buckets_override()}"


def share_unit(kernel: str) -> int:
    """A tensor-parallel rank's share of an expert is a multiple of it."""
    return TRITON_UNIT if kernel == TRITON else SHARE_UNIT


def stored_widths(kernel: str, widths: list[int], top_k: int, hidden_size: int, element_size: int) -> list[int]:
    """Stored width per local expert, at least the kept width."""
    if kernel == REFERENCE:
        return widths
    if kernel in (TRITON, RAGGED):
        unit = TRITON_UNIT if kernel == TRITON else kernel.WIDTH_UNIT
        return [round_up(width, unit) for width in widths]
    return cpu_native.stored_widths(widths, top_k, hidden_size, element_size)


def pack(kernel: str, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout) -> None:
    """Brings the loaded parameters into the kernel's layout, in place."""
    if kernel == TRITON:
        from heapr_vllm.model_executor.kernels.triton import launch

        launch.pack(w13, w2, layout)
    elif kernel == RAGGED:
        kernel.pack(w13, w2, layout)
    elif kernel != REFERENCE:
        cpu_native.prepack(w13, w2, layout, kernel)


def index_tables(kernel: str, slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, table): what the kernel finds an expert's weights by.

    `slots`: storage slot of every global expert, `layout.num_slots` if it is not stored here. Tensors: int32
    [num_experts + 1], `slots` and in the last place the slot of nobody, and int32 [num_slots, 2], first row and stored
    width by slot; for the native CPU op `layout.bucket_table()`; for Triton `launch.index_tables`.
    """
    if kernel == TRITON:
        from heapr_vllm.model_executor.kernels.triton import launch

        return launch.index_tables(slots, layout)
    per_expert = kernel in (REFERENCE, RAGGED)
    rows = layout.expert_table() if per_expert else layout.bucket_table()
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 2 if per_expert else 4)
    return torch.tensor([*slots, layout.num_slots], dtype=torch.int32), table


def warm_up(
    kernel: str,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    top_k: int,
    max_width: int,
    max_tokens: int,
) -> None:
    """Compiles what the kernel needs for up to `max_tokens` tokens; arguments as in `ragged_moe`."""
    if kernel == TRITON:
        from heapr_vllm.model_executor.kernels.triton import launch

        launch.warm_up(w13, w2, slots, table, top_k, max_width, max_tokens)


def ragged_moe(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    max_width: int,
    kernel: str,
) -> None:
    """Writes the MoE output [T, H] into `output`.

    `hidden_states` [T, H]; `w13` and `w2` as `pack` left them; `topk_weights` float32 and `topk_ids` int32 [T, k],
    global expert ids, -1 for nobody's; `slots` and `table` from `index_tables`; `max_width` the widest stored width.
    """
    if kernel == TRITON:
        from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe

        triton_ragged_moe(output, hidden_states, w13, w2, topk_weights, topk_ids, slots, table, max_width)
    elif kernel == RAGGED:
        torch.ops.heapr.cpu_ragged_moe(output, hidden_states, w13, w2, topk_weights, topk_ids, slots, table)
    elif kernel == REFERENCE:
        output.copy_(ragged_moe_reference(hidden_states, w13, w2, topk_weights, topk_ids, slots, table))
    else:
        cpu_native.cpu_ragged_moe(output, hidden_states, w13, w2, topk_weights, topk_ids, slots, table, kernel)


def _fake(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    max_width: int,
    kernel: str,
) -> None:
    """Shapes only: the op writes in place and returns nothing."""


@cache
def register_op() -> torch.library.Library:
    """Defines the op once per process; it lives as long as the returned library, which the cache holds."""
    library = torch.library.Library("heapr", "FRAGMENT")
    direct_register_custom_op("ragged_moe", ragged_moe, mutates_args=["output"], fake_impl=_fake, target_lib=library)
    return library
