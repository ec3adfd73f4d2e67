# SPDX-License-Identifier: Apache-2.0
"""vLLM's layer of routed experts as type checkers should see it once it is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never, cast

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


class PrunedLayer(RoutedExperts):
    """What the plugin registers on the layer, for type checkers: no layer is made of this class.

    w13_weight, w2_weight: from `create_weights` on. heapr_slots, heapr_table: index tables, once weights are loaded.
    """

    w13_weight: nn.Parameter
    w2_weight: nn.Parameter
    heapr_slots: torch.Tensor
    heapr_table: torch.Tensor

    if TYPE_CHECKING:
        # torch says that modules have every attribute, of type Tensor | Module: this one has those that vLLM defines
        def __getattr__(self, name: Never) -> object: ...  # ty: ignore[incompatible-method-override]


def as_pruned(layer: nn.Module) -> PrunedLayer:
    """Returns `layer` itself."""
    return cast(PrunedLayer, layer)
