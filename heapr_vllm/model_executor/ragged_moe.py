# SPDX-License-Identifier: Apache-2.0
"""The custom op `heapr::ragged_moe`: opaque to torch.compile, dispatches to the kernel its weights were packed for.

All tables are tensor arguments, so a compiled graph holds no state of the process that traced it.
"""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from heapr_vllm.model_executor.cpu_moe import cpu_ragged_moe
from heapr_vllm.model_executor.reference import ragged_moe_reference

REFERENCE = "reference"
_LIBRARY = torch.library.Library("heapr", "FRAGMENT")


def ragged_moe(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
               topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, buckets: torch.Tensor,
               kernel: str) -> None:
    """Writes the MoE output [T, H] into `output`; the other arguments as in `ragged_moe_reference`.

    `kernel` is "reference", or the instruction set of vLLM's native CPU op, "amx" or "vec".
    """
    if kernel == REFERENCE:
        output.copy_(ragged_moe_reference(hidden_states, w13, w2, topk_weights, topk_ids, slots, buckets))
    else:
        cpu_ragged_moe(output, hidden_states, w13, w2, topk_weights, topk_ids, slots, buckets, kernel)


def _fake(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
          topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, buckets: torch.Tensor,
          kernel: str) -> None:
    """Shapes only: the op writes in place and returns nothing."""


def register_op() -> None:
    """Defines the op once per process."""
    if not hasattr(torch.ops.heapr, "ragged_moe"):
        direct_register_custom_op("ragged_moe", ragged_moe, mutates_args=["output"], fake_impl=_fake,
                                  target_lib=_LIBRARY)
