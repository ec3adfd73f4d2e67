# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint of ours as a full-size transformers model, for evaluation without vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.checkpoint import Checkpoint, ExpertTensor
from heapr_vllm.config import PruningConfig
from heapr_vllm.errors import HeaprError
from heapr_vllm.masks import NeuronMasks
from heapr_vllm.prune.loading import load_model
from heapr_vllm.prune.modeling_deepseek import register_deepseek_model


@contextmanager
def opened(checkpoint: Checkpoint, dtype: str, device: str) -> Iterator[tuple[PreTrainedModel, NeuronMasks | None]]:
    """The model and its masks, None for an unpruned one.

    Masks repositories become their base model with the pruned neurons switched off, compact checkpoints are expanded
    with zeros: both compute what the pruned model computes. Raises HeaprError on other quantizations and if the masks
    belong to another base model.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None or quantization.get("quant_method") != "heapr":
        checkpoint.check_unquantized(allow_fp8=True)
        yield load_model(checkpoint, dtype, device), None
        return
    block = PruningConfig.from_dict(quantization)
    masks = NeuronMasks.from_pretrained(checkpoint.path)
    if block.layout == "compact":
        yield load_compact(checkpoint, masks, dtype).to(device), masks
        return
    base = checkpoint if checkpoint.has_weights else Checkpoint.resolve(block.base_model.name_or_path,
                                                                        block.base_model.revision)
    if block.base_model.fingerprint not in (None, base.fingerprint()):
        raise HeaprError(f"{checkpoint.path} does not belong to {base.path}: its fingerprint differs from that of the "
                         "calibrated model; restore the base model or export the masks with --no-verify")
    with masks.applied(load_model(base, dtype, device)) as model:
        yield model, masks


def load_compact(checkpoint: Checkpoint, masks: NeuronMasks, dtype: str) -> PreTrainedModel:
    """A compact checkpoint as a full-size model on the CPU, pruned neurons zero."""
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in checkpoint.shards.items():
        with checkpoint.open(shard) as file:
            tensors |= {name: _expand(name, file.get_tensor(name), masks) for name in names}
    register_deepseek_model()
    config = AutoConfig.from_pretrained(checkpoint.path)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # of a vision-language model the language model
    return type(model).from_pretrained(None, config=model.config, state_dict=tensors, dtype=dtype)


def _expand(name: str, tensor: torch.Tensor, masks: NeuronMasks) -> torch.Tensor:
    """Inverse of the compact layout: kept rows or columns at their places, zeros elsewhere."""
    where = ExpertTensor.parse(name)
    if where is None or where.prefix not in masks.keep:
        return tensor
    keep = masks.keep[where.prefix][where.expert]
    if where.shard == "w2":
        return tensor.new_zeros(len(tensor), len(keep)).index_copy_(1, keep.nonzero()[:, 0], tensor)
    return tensor.new_zeros(len(keep), tensor.shape[1]).index_copy_(0, keep.nonzero()[:, 0], tensor)
