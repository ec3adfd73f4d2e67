# SPDX-License-Identifier: Apache-2.0
"""The masks repository: what `heapr prune` writes and vLLM serves like an adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import MASKS, atomic_directory
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE, QUANT_METHOD, BaseModel, PruningConfig
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE
from heapr_vllm.prune.report.card import card_of
from heapr_vllm.prune.report.summary import FRONTIER_FILE, check_counts
from heapr_vllm.prune.selection.sweep import Frontier

REMEDY_FOR_TRANSFORMERS = "install-heapr-vllm-then-run-heapr-unpack.safetensors"
_REPLACED = ("quantization_config", "compression_config", "transformers_weights")


def write_masks_repository(
    masks: NeuronMasks,
    calibration: Path,
    output: Path,
    *,
    overwrite: bool = False,
    frontier: Frontier | None = None,
    scheme: ExpertScheme | None = None,
) -> None:
    """Writes masks with the base model's config and tokenizer: under 1 MiB, and vLLM serves it like an adapter.

    `calibration` is the folder `heapr calibrate` wrote, `frontier` what `sweep.frontier` returned for these masks.
    `scheme`: how experts are to be stored when they are served or exported; None as the base model stores them. Raises
    HeaprError if `calibration` is no such folder or `output` may not be written.
    """
    record = CalibrationRecord.read(calibration, "`heapr calibrate` writes it")
    if (calibration / PARTIAL_FILE).is_file():
        raise HeaprError(f"{calibration} is not finished; run `heapr calibrate` again with --resume")
    check_counts(masks, record, calibration)
    base = Checkpoint(calibration)  # its config.json
    with atomic_directory(output, MASKS, overwrite=overwrite, inputs=[calibration]) as folder:
        masks.save_pretrained(folder)
        base.copy_side_files(folder)
        if mix := masks.metadata.get("mix"):
            replace(record, mix=mix, tokens=masks.metadata["tokens"]).write(folder / "heapr")
        else:
            shutil.copyfile(calibration / CALIBRATION_FILE, folder / "heapr" / CALIBRATION_FILE)
        if frontier is not None:
            (folder / "heapr" / FRONTIER_FILE).write_text(json.dumps(frontier, indent=2) + "\n")
        pruning = PruningConfig(
            masks_sha256=file_sha256(folder / MASKS_FILE),
            sparsity=masks.metadata["sparsity"],
            scope=masks.metadata["scope"],
            align=masks.metadata["align"],
            base_model=BaseModel(**masks.metadata["base_model"]),
            inner=base.quantization,
            experts=scheme.to_dict() if scheme else None,
        )
        write_config(folder, base.config, pruning.to_dict())
        (folder / "README.md").write_text(card_of(folder))


def read_pruning_config(masks_dir: Path) -> PruningConfig:
    """Reads `quantization_config` of a masks repository. Raises HeaprError if it is none."""
    pruning = Checkpoint(masks_dir).pruning if (masks_dir / "config.json").is_file() else None
    if pruning is None:
        raise HeaprError(f"{masks_dir} is not a masks repository; `heapr prune` writes one")
    return pruning


def write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> None:
    """Writes config.json with `quantization` in the place of any that `config` names.

    A model for the plugin names a file for transformers that is not there, so that its error says what to do.
    """
    config = _unquantized(config)
    if "text_config" in config:
        config["text_config"] = _unquantized(config["text_config"])
    if quantization is not None:
        config["quantization_config"] = quantization
        if quantization.get("quant_method") == QUANT_METHOD:
            config["transformers_weights"] = REMEDY_FOR_TRANSFORMERS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _unquantized(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _REPLACED}
