# SPDX-License-Identifier: Apache-2.0
"""Masks repository and compact checkpoint: what `heapr prune` and `heapr export` write.

Weights go shard by shard from the base checkpoint to the new one; the model is never instantiated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from heapr_vllm.atomic import atomic_directory, check_output
from heapr_vllm.checkpoint import INDEX_FILE, SIDE_FILES, TOKENIZER_FILES, Checkpoint, ExpertTensor
from heapr_vllm.config import MASKS_FILE, BaseModel, PruningConfig
from heapr_vllm.errors import HeaprError
from heapr_vllm.masks import NeuronMasks, check_masks_sha256, file_sha256, find_masks
from heapr_vllm.prune.card import model_card
from heapr_vllm.prune.moments import CALIBRATION_FILE
from heapr_vllm.prune.repair import RepairSettings, fit_repair
from heapr_vllm.prune.report import FRONTIER_FILE, REPAIR_FILE
from heapr_vllm.reader import TensorReader

LAYOUTS = ("compact", "masked")
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def write_masks_repository(masks: NeuronMasks, calibration: Path, output: Path, overwrite: bool = False,
                           frontier: dict[str, Any] | None = None) -> None:
    """Masks with the base model's config and tokenizer: under 1 MiB, and vLLM serves it like an adapter.

    `calibration` is the folder `heapr calibrate` wrote, `frontier` what `sweep.frontier` returned for these masks.
    """
    if not (calibration / CALIBRATION_FILE).is_file():
        raise HeaprError(f"{calibration / CALIBRATION_FILE} is missing; `heapr calibrate` writes it")
    with atomic_directory(output, overwrite) as folder:
        masks.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (calibration / name).is_file():
                shutil.copyfile(calibration / name, folder / name)
        shutil.copyfile(calibration / CALIBRATION_FILE, folder / "heapr" / CALIBRATION_FILE)
        if frontier is not None:
            (folder / "heapr" / FRONTIER_FILE).write_text(json.dumps(frontier, indent=2) + "\n")
        block = PruningConfig(masks_sha256=file_sha256(folder / MASKS_FILE), sparsity=masks.metadata["sparsity"],
                              scope=masks.metadata["scope"], align=masks.metadata["align"],
                              base_model=BaseModel(**masks.metadata["base_model"]))
        _write_config(folder, json.loads((calibration / "config.json").read_text()), block)
        record = json.loads((calibration / CALIBRATION_FILE).read_text())
        (folder / "README.md").write_text(model_card(masks, block, record))


def export_checkpoint(masks_dir: Path, output: Path, *, model: str | None = None, layout: str = "compact",
                      overwrite: bool = False, verify: bool = True, repair: RepairSettings | None = None) -> None:
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
    block = _pruning_config(masks_dir)
    check_masks_sha256(masks_file, block.masks_sha256)
    masks = NeuronMasks.load(masks_file)
    base = Checkpoint.resolve(model or block.base_model.name_or_path, block.base_model.revision if not model else None)
    if output.resolve() in (base.path.resolve(), masks_dir.resolve()):
        raise HeaprError(f"{output} is the input of this export; choose another --output")
    base.check_unquantized(allow_fp8=True)
    masks.check_fits(base.expert_shapes(), str(base.path))
    if verify and block.base_model.fingerprint not in (None, base.fingerprint()):
        raise HeaprError(f"masks do not belong to {base.path}: its fingerprint differs from that of the calibrated "
                         "model; pass the right --model, or --no-verify for a fine-tune of it")
    transform = _compact if layout == "compact" else _zeroed
    record = json.loads((masks_dir / "heapr" / CALIBRATION_FILE).read_text())
    check_output(output, overwrite)
    refitted = None
    if repair is not None:
        refitted = fit_repair(base, masks, record, repair, output.with_name(f".{output.name}.repair"))
    with atomic_directory(output, overwrite) as folder:
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
        (folder / "README.md").write_text(model_card(masks, block if layout == "compact" else None, record,
                                                     refitted.record if refitted else None))
        _write_config(folder, base.config, block if layout == "compact" else None)
    if refitted is not None:
        refitted.discard()


def _compact(name: str, tensor: torch.Tensor, masks: NeuronMasks) -> dict[str, torch.Tensor]:
    """The kept part of a tensor; a stacked expert tensor becomes one tensor per expert and projection."""
    return {part_name: _keep(part, where, masks).contiguous() if where and where.prefix in masks.keep else part
            for part_name, part, where in _per_expert(name, tensor)}


def _keep(tensor: torch.Tensor, where: ExpertTensor, masks: NeuronMasks) -> torch.Tensor:
    keep = masks.keep[where.prefix][where.expert]
    return tensor[:, keep] if where.shard == "w2" else tensor[keep]


def _per_expert(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, ExpertTensor | None]]:
    where = ExpertTensor.parse(name)
    if where is None or where.expert is not None:
        yield name, tensor, where
        return
    shards = {"w2": tensor} if where.shard == "w2" else dict(zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True))
    for shard, stack in shards.items():
        for expert, part in enumerate(stack):
            yield (f"{where.prefix}.{expert}.{PROJECTIONS[shard]}.weight", part,
                   ExpertTensor(where.prefix, expert, shard))


def _zeroed(name: str, tensor: torch.Tensor, masks: NeuronMasks) -> dict[str, torch.Tensor]:
    """The full-size tensor with pruned neurons zeroed."""
    where = ExpertTensor.parse(name)
    if where is not None and where.prefix in masks.keep:
        keep = masks.keep[where.prefix] if where.expert is None else masks.keep[where.prefix][where.expert]
        keep = torch.cat([keep, keep], -1) if where.shard == "w13" else keep
        tensor = tensor * (keep[..., None, :] if where.shard == "w2" else keep[..., None])
    return {name: tensor}


def _pruning_config(masks_dir: Path) -> PruningConfig:
    config_file = masks_dir / "config.json"
    block = json.loads(config_file.read_text()).get("quantization_config") if config_file.is_file() else None
    if block is None or block.get("quant_method") != "heapr":
        raise HeaprError(f"{masks_dir} is not a masks repository; `heapr prune` writes one")
    return PruningConfig.from_dict(block)


def _write_config(folder: Path, config: dict[str, Any], block: PruningConfig | None) -> None:
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if block is not None:
        config["quantization_config"] = block.to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
