# SPDX-License-Identifier: Apache-2.0
"""The base model of served masks: where the user says it is, and whether it is the right one."""

from __future__ import annotations

from heapr_vllm.formats import base_model
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks

BASE_MODEL_KEY = "base_model"  # of --model-loader-extra-config


def base_checkpoint(model: str, revision: str | None, pruning: PruningConfig, override: str | None) -> Checkpoint:
    """Opens the weights that the masks of `model`, a folder or a Hub id, slice. Raises HeaprError if there are none."""
    remedy = f'say where it is with --model-loader-extra-config \'{{"{BASE_MODEL_KEY}": "PATH"}}\''
    return base_model.base_checkpoint(Checkpoint.resolve(model, revision), pruning, override, remedy)


def check_base(base: Checkpoint, masks: NeuronMasks, pruning: PruningConfig) -> None:
    """Raises HeaprError unless `base` is the model the masks were calibrated on, or a quantized sibling of it."""
    expected = (masks.metadata.get("base_model") or {}).get("fingerprint")
    remedy = (
        "serve the right base model, or, for a fine-tune of it, pass --hf-overrides "
        '\'{"quantization_config": {"base_model": {"fingerprint": "any"}}}\''
    )
    base_model.check_base(base, masks, None if pruning.base_model.fingerprint == "any" else expected, remedy)
