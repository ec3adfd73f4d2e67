# SPDX-License-Identifier: Apache-2.0
"""The exported checkpoint: what `heapr export` makes of a masks repository and its base model."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from heapr_vllm.formats.atomic import CHECKPOINT, alone_in, atomic_directory, check_output
from heapr_vllm.formats.base_model import base_checkpoint, check_base
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import FORMAT_VERSION, MASKS_FILE, PruningConfig
from heapr_vllm.formats.folder import inside
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.pruned import masks_path, read_masks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.export.expert_storage import ExpertStorage
from heapr_vllm.prune.export.layouts import LAYOUTS, current_name
from heapr_vllm.prune.export.masks_repository import read_pruning_config, write_config
from heapr_vllm.prune.export.plain_config import common_width, plain_config
from heapr_vllm.prune.export.shards import Stage, write_shards
from heapr_vllm.prune.report.card import card_of
from heapr_vllm.prune.report.summary import FRONTIER_FILE


class FittedRepair(Stage, Protocol):
    """The stage that refits kept weights before the layout cuts them."""

    @property
    def record(self) -> RepairRecord: ...

    def discard(self) -> None:
        """Removes what the fit left on disk; called when the export is complete."""
        ...


class Repair(Protocol):
    """Something that can refit weights, such as `heapr_vllm.prune.repair.fit.RepairSettings`."""

    def fit(
        self,
        base: Checkpoint,
        masks: NeuronMasks,
        calibration: CalibrationRecord,
        scheme: ExpertScheme | None,
        folder: Path,
    ) -> FittedRepair:
        """Fits to the weights of `base`, which will be stored as `scheme` says.

        What it keeps in `folder` lets the same call continue after a kill.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ExportInputs:
    """What an export reads, checked against each other."""

    masks_dir: Path
    base: Checkpoint
    masks: NeuronMasks
    pruning: PruningConfig
    calibration: CalibrationRecord

    @classmethod
    def read(cls, masks_dir: Path, *, model: str | None = None, verify: bool = True) -> ExportInputs:
        """Reads a masks repository and finds its base model, which `model` may name.

        Raises HeaprError if the masks are damaged or belong to another model; `verify` false skips the fingerprint.
        """
        pruning = read_pruning_config(masks_dir)
        masks = read_masks(masks_dir)
        recorded = pruning.base_model
        base = base_checkpoint(Checkpoint(masks_dir), pruning, model, "name it with --model")
        remedy = "pass the right --model, or --no-verify for a fine-tune of it"
        check_base(base, masks, recorded.fingerprint if verify else None, remedy)
        calibration = CalibrationRecord.read(masks_dir / "heapr", "run `heapr prune` again")
        return cls(masks_dir=masks_dir, base=base, masks=masks, pruning=pruning, calibration=calibration)


def export_checkpoint(
    masks_dir: Path,
    output: Path,
    *,
    model: str | None = None,
    layout: str = "compact",
    overwrite: bool = False,
    verify: bool = True,
    repair: Repair | None = None,
    quantize: str | None = None,
) -> None:
    """Writes a checkpoint from a masks repository and its base model, shard by shard.

    `layout` "compact": every expert tensor has its kept width under its standard name, neurons in their original order.
    "plain": the same for experts that all keep as many, with the width in the model's own config and no
    `quantization_config`, which any engine loads. "zeroed": full-size tensors with the pruned neurons zeroed, likewise.
    `quantize`: how weights are stored, as in `expert_storage.py`; None as the masks wish, otherwise the codes of a
    quantized base model in a compact checkpoint. `repair` refits kept weights before that; killed on the way, the same
    call continues with what waits in a hidden folder beside `output`. Raises HeaprError if the masks belong to another
    model (`verify` false skips the fingerprint only), if a shard is damaged, if `output` exists, or if the repair or
    `quantize` cannot be done.
    """
    layout = current_name(layout)
    inputs = ExportInputs.read(masks_dir, model=model, verify=verify)
    sources = [inputs.base.path, masks_dir]
    check_output(output, CHECKPOINT, overwrite=overwrite, inputs=sources)
    config = plain_config(inputs.base, common_width(inputs.masks)) if layout == "plain" else inputs.base.config
    wish = inputs.pruning.expert_scheme
    storage = ExpertStorage.choose(inputs.base, quantize, layout=layout, wish=wish, repaired=repair is not None)
    stages: list[Stage] = [*storage.before_layout(layout), LAYOUTS[layout](inputs.masks), *storage.after_layout(layout)]
    work = output.with_name(f".{output.name}.repair")
    with alone_in(work) if repair is not None else nullcontext():
        fitted = None
        if repair is not None:
            fitted = repair.fit(inputs.base, inputs.masks, inputs.calibration, storage.scheme, work)
            stages.insert(0, fitted)
        with atomic_directory(output, CHECKPOINT, overwrite=overwrite, inputs=sources) as folder:
            write_shards(inputs.base, stages, folder, dtype=storage.dtype, is_verbatim=storage.is_verbatim)
            record = fitted.record if fitted else None
            block = _quantization(inputs, layout, storage, record)
            write_side_files(inputs.base, masks_dir, folder, config=config, quantization=block, repair=record)
        if fitted is not None:
            fitted.discard()


def _quantization(
    inputs: ExportInputs, layout: str, storage: ExpertStorage, repair: RepairRecord | None
) -> dict[str, Any] | None:
    """Returns `quantization_config`: ours for a compact checkpoint, else that of the base model if its codes stay."""
    if layout != "compact":
        return storage.inner
    pruning = replace(
        inputs.pruning,
        layout="compact",
        masks=MASKS_FILE,
        repair=repair.method if repair else None,
        inner=storage.inner,
        experts=storage.scheme.to_dict() if storage.scheme else None,
        format_version=FORMAT_VERSION,
    )
    return pruning.to_dict()


def write_side_files(
    source: Checkpoint,
    masks_dir: Path,
    folder: Path,
    *,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    repair: RepairRecord | None,
) -> None:
    """Writes all that is not weights: tokenizer of `source`, masks and records of `masks_dir`, card and config.json."""
    source.copy_side_files(folder)
    (folder / MASKS_FILE).parent.mkdir()
    shutil.copyfile(masks_path(masks_dir), folder / MASKS_FILE)
    for name in (CALIBRATION_FILE, FRONTIER_FILE):
        if inside(masks_dir, f"heapr/{name}").is_file():
            shutil.copyfile(masks_dir / "heapr" / name, folder / "heapr" / name)
    if repair is not None:
        repair.write(folder)
    write_config(folder, config, quantization)
    (folder / "README.md").write_text(card_of(folder))
