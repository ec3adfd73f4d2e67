# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a transformers model, under the names that its checkpoint gives them."""

from __future__ import annotations

import torch
from torch import nn

from heapr_vllm.formats.names import ExpertTensor


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """MoE module prefix as in the checkpoint to the module with stacked experts, in the order of the layers.

    Transformers calls some modules otherwise than checkpoints do (Mixtral's `block_sparse_moe` is its `mlp`), and knows
    under which names to save them. So it is asked to save stand-ins, whose one value says which module they stand for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter) and module.down_proj.dim() == 3
    ]
    stand_ins = {f"{name}.down_proj": torch.full((1, 1, 1), index) for index, (name, _) in enumerate(found)}
    saved = revert_weight_conversion(model, stand_ins)  # what `save_pretrained` writes
    prefixes = {int(stand_in): _prefix(name) for name, stand_in in saved.items()}
    return {prefixes[index]: module for index, (_, module) in enumerate(found)}


def expert_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(num_experts, moe_intermediate_size) of every module of `expert_modules`."""
    return {
        prefix: (module.down_proj.shape[0], module.down_proj.shape[2])
        for prefix, module in expert_modules(model).items()
    }


def _prefix(name: str) -> str:
    tensor = ExpertTensor.parse(name)
    return tensor.prefix if tensor else name.rpartition(".")[0]
