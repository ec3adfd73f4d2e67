# SPDX-License-Identifier: Apache-2.0
"""`heapr unpack`: a pruned model in the shape of its base model, for engines without the plugin."""

from __future__ import annotations

from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import CHECKPOINT, atomic_directory, check_output
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.prune.export.checkpoint import export_checkpoint, write_side_files
from heapr_vllm.prune.export.layouts import Expanded
from heapr_vllm.prune.export.shards import write_shards
from heapr_vllm.prune.models.module_weights import run_dtype


def unpack(name_or_path: str | Path, output: Path, *, model: str | None = None, overwrite: bool = False) -> None:
    """Writes a full-size checkpoint in which pruned neurons are zero, shard by shard.

    `name_or_path`: a compact checkpoint, whose 8-bit weights become the model's dtype, codes times scales; or a masks
    repository, of whose base model, which `model` may name, it is what `export_checkpoint` writes as "zeroed". Raises
    HeaprError if it is neither, if it is damaged, or if `output` exists.
    """
    compact = Checkpoint.resolve(name_or_path)
    directory = compact.path
    if compact.pruning is None:
        raise HeaprError(f"{directory} is not packed: its config.json names no plugin, so any engine loads it as it is")
    if compact.pruning.layout == "masks":
        export_checkpoint(directory, output, model=model, layout="zeroed", overwrite=overwrite)
        return
    if model is not None:
        raise HeaprError(f"{directory} has weights of its own; leave --model out")
    check_output(output, CHECKPOINT, overwrite=overwrite, inputs=[directory])
    masks = read_masks(directory)
    wanted = {(prefix, len(keep)) for prefix, keep in masks.keep.items()}
    stored = {(prefix, shape[0]) for prefix, shape in compact.expert_shapes().items()}
    if wanted != stored:
        prefix, _ = min(wanted ^ stored)
        raise HeaprError(f"{directory} lacks weights or masks of experts of {prefix}; create or download it again")
    with atomic_directory(output, CHECKPOINT, overwrite=overwrite, inputs=[directory]) as folder:
        write_shards(compact, [Expanded(masks)], folder, dtype=run_dtype(compact, "auto"))
        repair = RepairRecord.read(directory)
        write_side_files(compact, directory, folder, config=compact.config, quantization=None, repair=repair)
