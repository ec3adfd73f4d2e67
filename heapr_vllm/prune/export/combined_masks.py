# SPDX-License-Identifier: Apache-2.0
"""Masks of one model put together: `heapr masks union` keeps what any of them keeps, `intersect` what all keep.

`full` keeps everything: the unpruned model with the plugin, for comparisons and to record its traffic.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import MASKS, atomic_directory
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE
from heapr_vllm.prune.export.masks_repository import read_pruning_config, write_config
from heapr_vllm.prune.report.card import card_of

HOW: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # bool [repositories, E, I] to [E, I]
    "union": lambda keep: keep.any(0),
    "intersect": lambda keep: keep.all(0),
    "full": lambda keep: torch.ones_like(keep[0]),
}


def combine_masks(how: str, repositories: Sequence[Path], output: Path, *, overwrite: bool = False) -> NeuronMasks:
    """Writes a masks repository that keeps the `how` ("union", "intersect", "full") of what `repositories` keep.

    Everything but the masks is that of the first one. Raises HeaprError if there are fewer than two, but for "full",
    they are no masks repositories or of different models, or `output` may not be written.
    """
    if len(repositories) < 2 and how != "full":
        raise HeaprError(f"heapr masks {how} needs two masks repositories or more")
    configs = [read_pruning_config(path) for path in repositories]
    for path, config in zip(repositories, configs, strict=True):
        if config.layout != "masks":
            raise HeaprError(f"{path} is a {config.layout} checkpoint; combine the masks it was made of")
    all_masks = [read_masks(path) for path in repositories]
    for path, config, masks in zip(repositories, configs, all_masks, strict=True):
        shapes = {prefix: keep.shape for prefix, keep in masks.keep.items()}
        is_same = config.base_model.fingerprint == configs[0].base_model.fingerprint
        if not is_same or shapes != {prefix: keep.shape for prefix, keep in all_masks[0].keep.items()}:
            raise HeaprError(f"{path} and {repositories[0]} are masks of different models; combine those of one model")
    masks = NeuronMasks(
        {prefix: HOW[how](torch.stack([each.keep[prefix] for each in all_masks])) for prefix in all_masks[0].keep},
        _metadata(how, all_masks),
    )
    masks = replace(masks, metadata=masks.metadata | {"sparsity": round(masks.sparsity, 6)})
    _write(masks, repositories, output, overwrite)
    return masks


def _metadata(how: str, all_masks: list[NeuronMasks]) -> dict[str, Any]:
    first = all_masks[0].metadata
    kept = {name: value for name, value in first.items() if name in ("tokens", "base_model", "unrouted")}
    criteria = [str(masks.metadata.get("criterion")) for masks in all_masks]
    return kept | {"criterion": f"{how} of {', '.join(criteria)}", "scope": how, "align": 1}


def _write(masks: NeuronMasks, repositories: Sequence[Path], output: Path, overwrite: bool) -> None:
    first = repositories[0]
    with atomic_directory(output, MASKS, overwrite=overwrite, inputs=repositories) as folder:
        masks.save_pretrained(folder)
        Checkpoint(first).copy_side_files(folder)
        shutil.copyfile(first / "heapr" / CALIBRATION_FILE, folder / "heapr" / CALIBRATION_FILE)
        pruning = replace(
            read_pruning_config(first),
            masks=MASKS_FILE,
            masks_sha256=file_sha256(folder / MASKS_FILE),
            sparsity=masks.metadata["sparsity"],
            scope=masks.metadata["scope"],
            align=masks.metadata["align"],
        )
        write_config(folder, Checkpoint(first).config, pruning.to_dict())
        (folder / "README.md").write_text(card_of(folder))
