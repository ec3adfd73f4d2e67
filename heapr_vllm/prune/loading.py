# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a transformers model: on one device or over all GPUs, FP8 weights dequantised."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.checkpoint import Checkpoint
from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.prune.modeling_deepseek import register_deepseek_model
from heapr_vllm.prune.weights import load_dequantized


def check_device(device: str) -> None:
    """Raises HeaprError if `device` is a GPU that torch does not see."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HeaprError(f"--device {device}: this torch ({torch.__version__}) sees no GPU; use --device cpu")


def load_model(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """The whole model on `device`, or with "auto" over all GPUs.

    Raises HeaprError if transformers cannot load it or the devices are too small for it.
    """
    register_deepseek_model()
    if checkpoint.fp8_block:
        if device == "auto":
            raise HeaprError("--device auto does not take FP8 checkpoints; use --device cuda or --stream")
        return load_dequantized(checkpoint, dtype, device)
    try:
        if device != "auto":
            return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype).to(device)
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, device_map="auto")
    except (ImportError, ValueError) as error:  # "auto" needs accelerate
        raise HeaprError(f"transformers cannot load {checkpoint.path}: {first_line(error)}") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise HeaprError(f"{checkpoint.path} does not fit these devices; use --stream with --device cuda or cpu")
    return model
