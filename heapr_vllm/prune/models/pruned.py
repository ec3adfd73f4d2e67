# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint of ours as a full-size transformers model, for evaluation without vLLM."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.formats.base_model import base_checkpoint, check_base
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from heapr_vllm.prune.models.experts import expert_modules, expert_shapes
from heapr_vllm.prune.models.loading import check_loaded, load_model
from heapr_vllm.prune.models.module_weights import run_dtype


@contextmanager
def opened(checkpoint: Checkpoint, dtype: str, device: str) -> Generator[tuple[PreTrainedModel, NeuronMasks | None]]:
    """Yields the model and its masks, None for an unpruned one.

    Masks repositories become their base model with the pruned neurons switched off, compact checkpoints are expanded
    with zeros: both compute what the served model computes, whose down projections of 4 bits are rounded to 8 under
    masks too. Raises HeaprError on other quantizations and if the masks belong to another base model.
    """
    pruning = checkpoint.pruning
    if pruning is None:
        yield load_model(checkpoint, dtype, device), None
        return
    masks = read_masks(checkpoint.path)
    if pruning.layout == "compact":
        yield load_compact(checkpoint, masks, dtype).to(device), masks
        return
    base = base_checkpoint(checkpoint, pruning, None, "write a checkpoint with `heapr export --model BASE`")
    remedy = "restore the base model, or export the masks with --no-verify"
    check_base(base, masks, pruning.base_model.fingerprint, remedy)
    model = load_model(base, dtype, device)
    codes = base.expert_quantization
    if pruning.expert_scheme:
        round_experts(model, pruning.expert_scheme)
    elif codes and codes.packing and not base.uncoded_experts:
        round_experts(model, codes.scheme(base.hidden_size), shards=("w2",))
    with applied(masks, model):
        yield model, masks


Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def applied(masks: NeuronMasks, model: Model) -> Generator[Model]:
    """Runs a transformers model with the pruned neurons switched off; its weights are restored on exit.

    Zeroing a neuron's down_proj column removes it exactly. Works on any model with stacked experts (`down_proj`
    [E, H, I], Transformers 5). Raises HeaprError if the masks belong to another model.
    """
    masks.check_fits(expert_shapes(model), type(model).__name__)
    saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        for prefix, module in expert_modules(model).items():
            weight = module.down_proj.data
            pruned = ~masks.keep[prefix].to(weight.device)[:, None, :].expand_as(weight)
            saved.append((weight, pruned, weight[pruned]))
            weight[pruned] = 0
        yield model
    finally:
        for weight, pruned, values in saved:
            weight[pruned] = values


def round_experts(model: nn.Module, scheme: ExpertScheme, shards: Collection[str] = ("w13", "w2")) -> None:
    """Gives these matrices of routed experts the values that they have once stored as `scheme` says, in place."""
    for module in expert_modules(model).values():
        stacks = {"w13": module.gate_up_proj.data, "w2": module.down_proj.data}
        for shard in shards:
            for weight in stacks[shard]:
                codes, scale = scheme.quantize(weight, shard)
                weight.copy_(scheme.dequantize(codes, scale, shard))


def load_compact(checkpoint: Checkpoint, masks: NeuronMasks, dtype: str) -> PreTrainedModel:
    """Loads a compact checkpoint as a full-size model on the CPU, pruned neurons zero."""
    tensors: dict[str, torch.Tensor] = {}
    with TensorReader(checkpoint, run_dtype(checkpoint, dtype)) as reader:
        for name in checkpoint.weight_map:
            if checkpoint.weight_of(name) is None:
                tensors[name] = masks.expanded(name, reader.tensor(name))
    register_deepseek_model()
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # of a VLM the language model
    model, found = type(model).from_pretrained(
        None, config=model.config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    check_loaded(checkpoint.path, found)
    return model
