# SPDX-License-Identifier: Apache-2.0
"""The checkpoint whose full-size weights masks slice."""

from __future__ import annotations

from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks

BASE_MODEL_KEY = "base_model"  # of --model-loader-extra-config


def base_checkpoint(model: str, pruning: PruningConfig, override: str | None) -> Checkpoint:
    """Opens the base model of a masks repository: `model` itself if it holds weights, else `override` or the recorded.

    Raises HeaprError if it cannot be read.
    """
    if Path(model).is_dir() and Checkpoint(Path(model)).has_weights:
        return Checkpoint(Path(model))
    recorded = pruning.base_model
    if override is None and Checkpoint(Path(model)).commit and Path(recorded.name_or_path).exists():
        raise HeaprError(
            f"{model} was downloaded and names a folder of this machine as its base model, {recorded.name_or_path}; if "
            f'that is right, say so with --model-loader-extra-config \'{{"{BASE_MODEL_KEY}": "PATH"}}\''
        )
    try:
        return Checkpoint.resolve(override or recorded.name_or_path, None if override else recorded.revision)
    except HeaprError as error:
        raise HeaprError(
            f"the base model of {model} cannot be read: {error}. Say where it is with "
            f'--model-loader-extra-config \'{{"{BASE_MODEL_KEY}": "PATH"}}\''
        ) from error


def check_base(base: Checkpoint, masks: NeuronMasks, pruning: PruningConfig) -> None:
    """Raises HeaprError unless `base` is the model the masks were calibrated on, or a quantized sibling of it."""
    base.check_unpruned()
    masks.check_fits(base.expert_shapes(), str(base.path))
    expected = (masks.metadata.get("base_model") or {}).get("fingerprint")
    if pruning.base_model.fingerprint != "any" and not base.matches(expected):
        raise HeaprError(
            f"masks do not belong to {base.path}: its fingerprint differs from that of the calibrated "
            "model; serve the right base model, or, for a fine-tune of it, pass --hf-overrides "
            '\'{"quantization_config": {"base_model": {"fingerprint": "any"}}}\''
        )
