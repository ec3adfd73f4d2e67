# SPDX-License-Identifier: Apache-2.0
"""What a pruned model's folder says: its masks, as config.json names them, and how experts are stored in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.masks import NeuronMasks, check_masks_sha256
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.schema import Count, read_json

CALIBRATION_FILE = "calibration.json"
BYTES_OF_A_FLOAT = 2  # at least; codes with their scales are less


@dataclass(frozen=True)
class RoutedSizes:
    """What is read of calibration.json here: how many weights the base model's experts have, and bytes."""

    routed_bytes: Count | None = None
    routed_weights: Count | None = None


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


def served_scheme(folder: Path, hidden_size: int) -> ExpertScheme | None:
    """Tells how experts are stored when a pruned model is served; None in the model's dtype.

    Masks over a quantized base model take its codes, if experts have any: that is told by the size of them that the
    calibration noted, so the base model need not be here. Raises HeaprError if it is not noted.
    """
    checkpoint = Checkpoint(folder)
    pruning = checkpoint.pruning
    wanted = pruning.expert_scheme if pruning else None
    base = checkpoint.base_quantization if pruning and pruning.layout == "masks" else None
    if base is None or wanted:
        return wanted
    path = inside(folder, f"heapr/{CALIBRATION_FILE}")
    sizes = read_json(path, RoutedSizes, "run `heapr prune` again") if path.is_file() else RoutedSizes()
    if sizes.routed_bytes is None or not sizes.routed_weights:
        raise HeaprError(
            f"{folder} does not say whether the experts of its base model are quantized, as the rest of it is; say how "
            "they are stored with --quantize int8 (or fp8, int4, none)"
        )
    return base.scheme(hidden_size) if sizes.routed_bytes < BYTES_OF_A_FLOAT * sizes.routed_weights else None
