# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a comparison, made of a dense one and masks: compact for the plugin, zeroed for any engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from heapr_vllm.formats.checkpoint import INDEX_FILE, SIDE_FILES, Checkpoint
from heapr_vllm.formats.config import MASKS_FILE, PruningConfig
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.prune.export.shards import compact, zeroed


def keep_all(masks: NeuronMasks) -> NeuronMasks:
    """Masks of the same model that prune nothing."""
    return NeuronMasks(
        {prefix: torch.ones_like(mask) for prefix, mask in masks.keep.items()}, {**masks.metadata, "sparsity": 0.0}
    )


def write_pruned(dense: Path, masks: NeuronMasks, output: Path) -> Path:
    """Compact checkpoint, which the plugin serves; without weights if `dense` has none (`--load-format dummy`)."""
    (output / MASKS_FILE).parent.mkdir(parents=True, exist_ok=True)
    masks.save_pretrained(output)
    block = PruningConfig(
        layout="compact",
        masks_sha256=file_sha256(output / MASKS_FILE),
        sparsity=masks.metadata["sparsity"],
        scope=masks.metadata["scope"],
        align=masks.metadata["align"],
    )
    return _write(
        Checkpoint(dense),
        output,
        {"quantization_config": block.to_dict()},
        lambda name, tensor: compact(name, tensor, masks),
    )


def write_zeroed(dense: Path, masks: NeuronMasks, output: Path) -> Path:
    """Checkpoint of the shape of `dense` whose pruned neurons are zero."""
    return _write(Checkpoint(dense), output, {}, lambda name, tensor: zeroed(name, tensor, masks))


def _write(
    base: Checkpoint,
    output: Path,
    extra: dict[str, Any],
    transform: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Path:
    """config.json of `base` with `extra`, its tokenizer, and shard by shard what `transform` makes of its tensors."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps({**base.config, **extra}, indent=2) + "\n")
    for name in SIDE_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, output / name)
    weight_map: dict[str, str] = {}
    for shard, names in base.shards.items() if base.has_weights else ():
        tensors: dict[str, torch.Tensor] = {}
        with base.open(shard) as file:
            for name in names:
                tensors |= transform(name, file.get_tensor(name))
        save_file(tensors, output / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    if weight_map:
        (output / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")
    return output
