# SPDX-License-Identifier: Apache-2.0
"""What the masks say about one MoE layer of a served model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerMasks:
    """The pruning of the layer that vLLM calls `prefix`.

    keep: bool [num_experts, moe_intermediate_size], true for kept neurons, all experts of the model's layer.
    tokens: how many tokens calibration routed to each expert; None if the masks do not say.
    is_compact: whether the checkpoint's tensors have the kept widths; otherwise they are sliced while loading.
    name: what the masks call the layer, as the checkpoint does.
    """

    prefix: str
    keep: torch.Tensor
    tokens: list[int] | None
    is_compact: bool
    name: str = ""
