# SPDX-License-Identifier: Apache-2.0
"""The base model of masks: the checkpoint whose full-size weights they belong to."""

from __future__ import annotations

from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.fingerprint import matches
from heapr_vllm.formats.masks import NeuronMasks


def base_checkpoint(own: Checkpoint, pruning: PruningConfig, override: str | None, remedy: str) -> Checkpoint:
    """Opens the base model of the masks in `own`: `override`, else `own` if its weights are whole, else the recorded.

    Raises HeaprError with the `remedy`, how to override it, if it cannot be read, or if a downloaded repository names
    a folder of this machine.
    """
    if override is None and own.has_weights and pruning.layout == "masks":
        return own
    recorded = pruning.base_model
    if override is None and own.commit and Path(recorded.name_or_path).exists():
        raise HeaprError(
            f"{own.path} was downloaded, and names a folder of this machine as its base model, "
            f"{recorded.name_or_path}; {remedy}"
        )
    try:
        return Checkpoint.resolve(override or recorded.name_or_path, None if override else recorded.revision)
    except HeaprError as error:
        raise HeaprError(f"the base model of {own.path} cannot be read: {error}; {remedy}") from error


def check_base(base: Checkpoint, masks: NeuronMasks, expected: str | None, remedy: str) -> None:
    """Raises HeaprError unless `base` is the model the masks were calibrated on, or a quantized sibling of it.

    `expected`: its fingerprint, None for any model of this shape; `remedy`: what to do if it has another.
    """
    base.check_unpruned()
    masks.check_fits(base.expert_shapes(), str(base.path))
    if not matches(base, expected):
        raise HeaprError(
            f"masks do not belong to {base.path}: its fingerprint differs from that of the calibrated model; {remedy}"
        )
