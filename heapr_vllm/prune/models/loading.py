# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a transformers model: on one device or over all GPUs, 8-bit weights dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from heapr_vllm.prune.models.module_weights import load_dequantized


def check_device(device: str, *, allow_auto: bool = False) -> None:
    """Raises HeaprError if torch does not have `device`: cpu, cuda, cuda:N, or "auto" where it is allowed."""
    if device == "auto" and allow_auto:
        return
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise HeaprError(f"--device {device} is not cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise HeaprError(
            f"--device {device}: this torch ({torch.__version__}) sees {torch.cuda.device_count()} GPUs; "
            "use --device cpu"
        )


def load_model(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """Loads the whole model on `device`, or with "auto" over all GPUs.

    Raises HeaprError if transformers cannot load it or the devices are too small for it.
    """
    register_deepseek_model()
    if checkpoint.base_quantization:
        if device == "auto":
            raise HeaprError("--device auto does not take quantized checkpoints; use --device cuda or --stream")
        return load_dequantized(checkpoint, dtype, device)
    try:
        if device != "auto":
            return _loaded(checkpoint.path, dtype=dtype).to(device)
        model = _loaded(checkpoint.path, dtype=dtype, device_map="auto")
    except HeaprError:
        raise
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # "auto" needs accelerate
        raise HeaprError(f"transformers cannot load {checkpoint.path}: {first_line(error)}") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise HeaprError(f"{checkpoint.path} does not fit these devices; use --stream with --device cuda or cpu")
    return model


def _loaded(path: Path, **how: Any) -> PreTrainedModel:
    """Loads a model, never code of its own. Raises HeaprError if the checkpoint lacks a weight."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **how)
    model, found = loaded
    check_loaded(path, found)
    return model


def check_loaded(path: Path, found: dict[str, Any]) -> None:
    """Raises HeaprError if transformers had to make up weights. `found`: its loading info."""
    if missing := sorted(found["missing_keys"]):
        raise HeaprError(
            f"{path} lacks {missing[0]} and {len(missing) - 1} more weights of the model; download the checkpoint again"
        )
