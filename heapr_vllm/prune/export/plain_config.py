# SPDX-License-Identifier: Apache-2.0
"""The config.json of a model whose experts all became narrower, as the model's own class reads it.

Families disagree on the field that holds the width, and some multiply it into their shared experts too. So models are
built without memory, until one has experts of the width and everything else as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from heapr_vllm.prune.models.experts import expert_modules


def common_width(masks: NeuronMasks) -> int:
    """Returns the width that all experts keep. Raises HeaprError if they differ, or nothing is left."""
    widths = {int(width) for layer in masks.widths.values() for width in layer}
    if len(widths) > 1 or 0 in widths:
        raise HeaprError(
            f"experts keep {min(widths)} to {max(widths)} neurons, and a plain checkpoint has one width for all; prune "
            "with --scope uniform, or use --layout compact"
        )
    return widths.pop()


def plain_config(base: Checkpoint, width: int) -> dict[str, Any]:
    """Returns the config of `base` with experts of `width` neurons, and nothing else changed.

    Raises HeaprError if no field of the family says just that.
    """
    drafts = [name for name in base.weight_map if (where := ExpertTensor.parse(name)) and base.is_draft(where.prefix)]
    if drafts:
        raise HeaprError(
            f"{base.path} has a layer for multi-token prediction, whose experts stay whole ({drafts[0]}), so not all "
            "are of one width; use --layout compact"
        )
    register_deepseek_model()
    experts, others = _shapes(base.config)
    for fields in _candidates(base.config, width):
        config = {**base.config, **fields}
        try:
            found, rest = _shapes(config)
        except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError):
            continue
        narrowed = {name: (*shape[:-1], width) for name, shape in experts.items()}
        if found == narrowed and rest == others:
            return config
    raise HeaprError(
        f"no field in the config.json of {base.config.get('model_type')} makes its routed experts {width} neurons wide "
        "and leaves the rest as it is (shared experts often follow the width, and can only where they are a multiple "
        "of it); prune to another --sparsity, or use --layout compact"
    )


def _candidates(config: dict[str, Any], width: int) -> Iterator[dict[str, int]]:
    full, shared = config.get("moe_intermediate_size"), config.get("n_shared_experts")
    yield {"moe_intermediate_size": width}
    if isinstance(full, int) and isinstance(shared, int) and full * shared % width == 0:
        yield {"moe_intermediate_size": width, "n_shared_experts": full * shared // width}
    yield {"intermediate_size": width}


def _shapes(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the stacked down projections by MoE module, and of all parameters outside of experts by name."""
    known = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known), trust_remote_code=False)
    modules = expert_modules(model)
    inside = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    others = {name: tuple(each.shape) for name, each in model.named_parameters() if id(each) not in inside}
    return {prefix: tuple(module.down_proj.shape) for prefix, module in modules.items()}, others
