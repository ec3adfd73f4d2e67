# SPDX-License-Identifier: Apache-2.0
"""The custom op `heapr::ragged_moe`.

It is opaque to torch.compile and takes all tables as tensors, so a compiled graph holds no state of the process that
traced it but a kernel's name.
"""

from __future__ import annotations

from functools import cache

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import direct_register_custom_op

from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales
from heapr_vllm.model_executor.kernels.choice import kernels
from heapr_vllm.model_executor.storage.traffic_sums import RECORDED


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
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    recorded: str = "",
) -> None:
    """Runs the kernel of that name: `RaggedKernel.run` with its arguments laid out flat.

    Traffic, of the layer that is `recorded`, is what somebody asked: the engine's own trial runs are not added to it.
    """
    routes = Routes(topk_weights, topk_ids, slots)
    scales = None if w13_scale is None or w2_scale is None else Scales(w13_scale, w2_scale)
    traffic = RECORDED[recorded] if recorded and not _is_trial_run() else None
    experts = ExpertRows(w13, w2, table, max_width, scales=scales, traffic=traffic)
    kernels()[kernel].run(output, hidden_states, routes, experts)


def _is_trial_run() -> bool:
    """Whether vLLM sizes memory, warms up or keeps other ranks company: such calls have no attention to compute."""
    return is_forward_context_available() and not get_forward_context().attn_metadata


def _fake(*arguments: object) -> None:
    """Stands for the op where only shapes matter: it writes in place and returns nothing."""


@cache
def register_op() -> torch.library.Library:
    """Defines the op once per process; it lives as long as the returned library, which the cache holds."""
    library = torch.library.Library("heapr", "FRAGMENT")
    direct_register_custom_op("ragged_moe", ragged_moe, mutates_args=["output"], fake_impl=_fake, target_lib=library)
    return library
