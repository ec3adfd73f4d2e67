# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a comparison, made of a dense one and masks: for the plugin, or zeroed for any engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE, BaseModel, PruningConfig
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune.export.expert_storage import Quantize
from heapr_vllm.prune.export.layouts import Compact, Zeroed
from heapr_vllm.prune.export.shards import Stage, write_shards


def keep_all(masks: NeuronMasks) -> NeuronMasks:
    """Masks of the same model that prune nothing."""
    return NeuronMasks(
        {prefix: torch.ones_like(mask) for prefix, mask in masks.keep.items()}, {**masks.metadata, "sparsity": 0.0}
    )


def write_pruned(dense: Path, masks: NeuronMasks, output: Path, scheme: ExpertScheme | None = None) -> Path:
    """Compact checkpoint, which the plugin serves; without weights if `dense` has none (`--load-format dummy`).

    `scheme`: how its experts are stored, None in the model's dtype.
    """
    block = _save_masks(masks, output)
    block = replace(block, layout="compact", experts=scheme.to_dict() if scheme else None)
    stages: list[Stage] = [Compact(masks)]
    if scheme:
        stages.append(Quantize(Checkpoint(dense), scheme))
    return _write(dense, stages, output, {"quantization_config": block.to_dict()})


def write_masks(dense: Path, masks: NeuronMasks, output: Path) -> Path:
    """Masks repository, served with `--load-format heapr` over the weights of `dense`."""
    block = replace(_save_masks(masks, output), base_model=BaseModel(str(dense.resolve())))
    _write_side_files(dense, output, {"quantization_config": block.to_dict()})
    return output


def _save_masks(masks: NeuronMasks, output: Path) -> PruningConfig:
    (output / MASKS_FILE).parent.mkdir(parents=True, exist_ok=True)
    masks.save_pretrained(output)
    return PruningConfig(
        masks_sha256=file_sha256(output / MASKS_FILE),
        sparsity=masks.metadata["sparsity"],
        scope=masks.metadata["scope"],
        align=masks.metadata["align"],
    )


def write_zeroed(dense: Path, masks: NeuronMasks, output: Path) -> Path:
    """Checkpoint of the shape of `dense` whose pruned neurons are zero."""
    return _write(dense, [Zeroed(masks)], output, {})


def _write(dense: Path, stages: list[Stage], output: Path, extra: dict[str, Any]) -> Path:
    """config.json of `dense` with `extra`, its tokenizer, and its weights, if it has any, after `stages`."""
    _write_side_files(dense, output, extra)
    base = Checkpoint(dense)
    if base.has_weights:
        write_shards(base, stages, output)
    return output


def _write_side_files(dense: Path, output: Path, extra: dict[str, Any]) -> None:
    """config.json of `dense` with `extra`, and its tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps({**Checkpoint(dense).config, **extra}, indent=2) + "\n")
    Checkpoint(dense).copy_side_files(output)
