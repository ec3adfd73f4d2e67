# SPDX-License-Identifier: Apache-2.0
"""The masks of a pruned model's folder, as its config.json names them: one reader for all commands."""

from __future__ import annotations

from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.masks import NeuronMasks, check_masks_sha256


def masks_path(folder: Path) -> Path:
    """Finds the masks file of a masks repository or an exported checkpoint.

    Raises HeaprError if there is none, if config.json names one outside of the folder, or if it is not the one that
    config.json was written for.
    """
    pruning = Checkpoint(folder).pruning if (folder / "config.json").is_file() else None
    path = inside(folder, pruning.masks if pruning else MASKS_FILE)
    if not path.is_file():
        raise HeaprError(f"{folder} holds no {path.relative_to(folder)}; create it with `heapr prune`")
    check_masks_sha256(path, pruning.masks_sha256 if pruning else None)
    return path


def read_masks(folder: Path) -> NeuronMasks:
    """Reads the masks of a masks repository or an exported checkpoint. Raises HeaprError as `masks_path` does."""
    return NeuronMasks.load(masks_path(folder))
