# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a transformers model, under the names that its checkpoint gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from heapr_vllm.formats.names import ExpertTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StackedExperts(nn.Module):
    """What a module behind Transformers' experts interface has; for annotations only.

    `gate_up_proj`: [E, 2I, H], gate rows first. `down_proj`: [E, H, I].
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    has_bias: bool
    is_transposed: bool

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2I] to [T, I]."""
        raise NotImplementedError


def expert_modules(model: nn.Module) -> dict[str, StackedExperts]:
    """Finds the modules with stacked experts, MoE module prefix as in the checkpoint -> module, in layer order.

    Transformers calls some modules otherwise than checkpoints do (Mixtral's `block_sparse_moe` is its `mlp`), and knows
    under which names to save them. So it is asked to save stand-ins, whose one value says which module they stand for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = {name: module for name, module in model.named_modules() if _is_stacked(module)}
    stand_ins = {f"{name}.down_proj": torch.full((1, 1, 1), index) for index, name in enumerate(found)}
    saved = revert_weight_conversion(cast("PreTrainedModel", model), stand_ins)  # what `save_pretrained` writes
    prefixes = {int(stand_in): _prefix(name) for name, stand_in in saved.items()}
    return {prefixes[index]: cast(StackedExperts, module) for index, module in enumerate(found.values())}


def expert_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Lists prefix -> (num_experts, moe_intermediate_size) of every module of `expert_modules`."""
    shapes = {prefix: module.down_proj.shape for prefix, module in expert_modules(model).items()}
    return {prefix: (shape[0], shape[2]) for prefix, shape in shapes.items()}


def _is_stacked(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _prefix(name: str) -> str:
    tensor = ExpertTensor.parse(name)
    return tensor.prefix if tensor else name.rpartition(".")[0]
