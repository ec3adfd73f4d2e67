# SPDX-License-Identifier: Apache-2.0
"""The pruned model with what is trained of it: an adapter on its attention, or weights of its own."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.core_model_loading import revert_weight_conversion

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.pruned import masks_path
from heapr_vllm.prune.export.layouts import Zeroed
from heapr_vllm.prune.export.masks_repository import write_config
from heapr_vllm.prune.export.shards import write_shards
from heapr_vllm.prune.models.experts import expert_modules
from serving_examples.healing.settings import HealingSettings

EXPERTS_DOWN = r"\.experts\.down_proj$"
PARTS = {  # of the names of a transformers model's parameters
    "down_proj": EXPERTS_DOWN,
    "routers": r"\.(gate|router)\.weight$",
    "attention": r"\.self_attn\..*proj\.weight$",
    "norms": r"norm\.weight$",
}


class Student(Protocol):
    """A model whose parameters that take gradients are trained."""

    @property
    def model(self) -> nn.Module: ...

    def write(self, folder: Path) -> None:
        """Writes what was trained into an empty folder."""
        ...


@dataclass(frozen=True)
class AdapterStudent:
    """LoRA (Hu et al., 2021) by PEFT, scaled by 2; the adapter's weights are float32."""

    model: PeftModel

    @classmethod
    def of(cls, model: PreTrainedModel, settings: HealingSettings) -> AdapterStudent:
        """Raises HeaprError if the model has none of the layers that are to be adapted."""
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=list(settings.target_modules),
            task_type="CAUSAL_LM",
        )
        set_seed(settings.seed)  # PEFT draws the adapter's first weights
        try:
            return cls(get_peft_model(model, config))
        except ValueError as error:
            raise HeaprError(
                f"{type(model).__name__} has no layers called {', '.join(settings.target_modules)}; name its "
                "attention's with --target-modules"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes a PEFT adapter, which vLLM serves."""
        self.model.save_pretrained(str(folder))


@dataclass(frozen=True)
class WeightsStudent:
    """Weights of the model itself; `pruned` is the checkpoint it was loaded from, `base` the unpruned one."""

    model: PreTrainedModel
    masks: NeuronMasks
    pruned: Checkpoint
    base: Checkpoint

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        masks: NeuronMasks,
        pruned: Checkpoint,
        base: Checkpoint,
        settings: HealingSettings,
    ) -> WeightsStudent:
        """Lets the `parts` of the settings take gradients; those of pruned neurons are zero."""
        pattern = "|".join(PARTS[part] for part in settings.parts)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(pattern, name) is not None)
        for prefix, module in expert_modules(model).items():
            keep = masks.keep[prefix].to(model.device, model.dtype)[:, None]
            if module.down_proj.requires_grad:
                module.down_proj.register_hook(partial(torch.mul, keep))
        return cls(model, masks, pruned, base)

    def write(self, folder: Path) -> None:
        """Writes a full-size checkpoint as the base model's, pruned neurons zero: `heapr export --model` takes it."""
        parameters = self.model.named_parameters()
        changed = {
            name: parameter.detach().cpu()
            for name, parameter in parameters
            if parameter.requires_grad or re.search(EXPERTS_DOWN, name)
        }
        trained = revert_weight_conversion(self.model, changed)
        if unknown := sorted(trained.keys() - self.base.weight_map.keys()):
            raise HeaprError(f"{unknown[0]} is no tensor of {self.base.path}; heal this family with --into adapter")
        stages = [Trained(trained), Zeroed(self.masks)]
        write_shards(self.base, stages, folder)
        self.base.copy_side_files(folder)
        write_config(folder, self.base.config, None)
        (folder / MASKS_FILE).parent.mkdir()
        shutil.copyfile(masks_path(self.pruned.path), folder / MASKS_FILE)


@dataclass(frozen=True)
class Trained:
    """A stage of an export that puts the `weights`, by their names in the checkpoint, in the place of the base's."""

    weights: dict[str, torch.Tensor]

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: self.weights.get(name, tensor).to(tensor.dtype)}
