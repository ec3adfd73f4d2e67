# SPDX-License-Identifier: Apache-2.0
"""How a pruned model's experts are stored once it is served, as its folder tells without the base model."""

from __future__ import annotations

from dataclasses import dataclass

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.schema import Count, read_json

CALIBRATION_FILE = "calibration.json"
BYTES_OF_A_FLOAT = 2  # at least; codes with their scales are less


@dataclass(frozen=True)
class RoutedSizes:
    """What is read of calibration.json here: how many weights the base model's experts have, and bytes."""

    routed_bytes: Count | None = None
    routed_weights: Count | None = None


def served_scheme(checkpoint: Checkpoint, hidden_size: int) -> ExpertScheme | None:
    """Tells how experts are stored when a pruned model is served; None in the model's dtype.

    Masks over a quantized base model take its codes, if experts have any: that is told by the size of them that the
    calibration noted, so the base model need not be here. Raises HeaprError if it is not noted.
    """
    pruning = checkpoint.pruning
    wanted = pruning.expert_scheme if pruning else None
    base = checkpoint.base_quantization if pruning and pruning.layout == "masks" else None
    if base is None or wanted:
        return wanted
    path = inside(checkpoint.path, f"heapr/{CALIBRATION_FILE}")
    sizes = read_json(path, RoutedSizes, "run `heapr prune` again") if path.is_file() else RoutedSizes()
    if sizes.routed_bytes is None or not sizes.routed_weights:
        raise HeaprError(
            f"{checkpoint.path} does not say whether the experts of its base model are quantized, as the rest of it "
            "is; say how they are stored with --quantize int8 (or fp8, int4, none)"
        )
    return base.scheme(hidden_size) if sizes.routed_bytes < BYTES_OF_A_FLOAT * sizes.routed_weights else None
