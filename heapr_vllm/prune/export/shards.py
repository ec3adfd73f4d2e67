# SPDX-License-Identifier: Apache-2.0
"""Masks repository and compact checkpoint: what `heapr prune` and `heapr export` write.

Weights go shard by shard from the base checkpoint to the new one; the model is never instantiated.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_directory, check_output
from heapr_vllm.formats.checkpoint import INDEX_FILE, SIDE_FILES, Checkpoint
from heapr_vllm.formats.masks import NeuronMasks, check_masks_sha256, find_masks
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.prune.calibration.moments import CALIBRATION_FILE
from heapr_vllm.prune.export.layouts import LAYOUTS, compact, zeroed
from heapr_vllm.prune.export.masks_repository import read_pruning_config, write_config
from heapr_vllm.prune.repair.fit import RepairSettings, fit_repair
from heapr_vllm.prune.report.card import model_card
from heapr_vllm.prune.report.summary import REPAIR_FILE


def export_checkpoint(
    masks_dir: Path,
    output: Path,
    *,
    model: str | None = None,
    layout: str = "compact",
    overwrite: bool = False,
    verify: bool = True,
    repair: RepairSettings | None = None,
) -> None:
    """Writes a checkpoint from a masks repository and its base model, shard by shard.

    `layout` "compact": every expert tensor has its kept width under its standard name, neurons in their original order.
    "masked": full-size tensors with the pruned neurons zeroed and no `quantization_config`, which any engine loads.
    FP8 weights are written as bfloat16. `repair` refits down_proj; killed on the way, the same call continues behind
    the last finished group of layers, which wait in a hidden folder beside `output`. Raises HeaprError if the masks
    belong to another model (`verify` false skips the fingerprint only), if a shard is damaged, if `output` exists, or
    if the repair cannot be done.
    """
    if layout not in LAYOUTS:
        raise HeaprError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    masks_file = find_masks(str(masks_dir))
    block = read_pruning_config(masks_dir)
    check_masks_sha256(masks_file, block.masks_sha256)
    masks = NeuronMasks.load(masks_file)
    base = Checkpoint.resolve(model or block.base_model.name_or_path, block.base_model.revision if not model else None)
    if output.resolve() in (base.path.resolve(), masks_dir.resolve()):
        raise HeaprError(f"{output} is the input of this export; choose another --output")
    base.check_unquantized(allow_fp8=True)
    masks.check_fits(base.expert_shapes(), str(base.path))
    if verify and block.base_model.fingerprint not in (None, base.fingerprint()):
        raise HeaprError(
            f"masks do not belong to {base.path}: its fingerprint differs from that of the calibrated "
            "model; pass the right --model, or --no-verify for a fine-tune of it"
        )
    transform = compact if layout == "compact" else zeroed
    record = json.loads((masks_dir / "heapr" / CALIBRATION_FILE).read_text())
    check_output(output, overwrite=overwrite)
    refitted = None
    if repair is not None:
        refitted = fit_repair(base, masks, record, repair, output.with_name(f".{output.name}.repair"))
    with atomic_directory(output, overwrite=overwrite) as folder:
        weight_map, total = {}, 0
        for shard, names in tqdm(base.shards.items(), unit="shard", desc="exporting", disable=None):
            tensors: dict[str, torch.Tensor] = {}
            with TensorReader(base) as reader:
                for name in names:
                    if not base.is_scale(name):
                        tensor = reader.tensor(name)
                        tensors |= transform(name, refitted.apply(name, tensor) if refitted else tensor, masks)
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for name in SIDE_FILES:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)
        shutil.copytree(masks_dir / "heapr", folder / "heapr", ignore=shutil.ignore_patterns(REPAIR_FILE))
        if refitted is not None:
            (folder / "heapr" / REPAIR_FILE).write_text(json.dumps(refitted.record, indent=2) + "\n")
        block = replace(block, layout="compact", repair=refitted.record["method"] if refitted else None)
        (folder / "README.md").write_text(
            model_card(masks, block if layout == "compact" else None, record, refitted.record if refitted else None)
        )
        write_config(folder, base.config, block if layout == "compact" else None)
    if refitted is not None:
        refitted.discard()
