# SPDX-License-Identifier: Apache-2.0
"""`heapr export --quantize`: as what the exported checkpoint stores weights, and the stages that make it so.

none: in the model's dtype, codes of the base model dequantised. keep: the very codes of the base model, but of those
of 4 bits down_proj is rounded to 8, because its groups cross neurons, and gate and up take 8 if they have zero points.
int8, fp8 and int4: pruned experts in 8 or 4 bits, the rest as in the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import NAMES, SCALE_SUFFIX, ExpertScheme
from heapr_vllm.prune.export.shards import Stage
from heapr_vllm.prune.models.module_weights import run_dtype

CHOICES = ("none", "keep", *NAMES.values())


@dataclass(frozen=True)
class ExpertStorage:
    """`choice`, one of `CHOICES`, for the weights of `base`; `scheme`: of pruned experts, None in the model's dtype.

    `refits_down`: whether a repair changes down_proj, whose codes cannot be kept then.
    """

    base: Checkpoint
    choice: str
    scheme: ExpertScheme | None
    refits_down: bool

    @classmethod
    def choose(
        cls, base: Checkpoint, choice: str | None, *, layout: str, wish: ExpertScheme | None, repaired: bool
    ) -> ExpertStorage:
        """Settles what None means: as the masks wish, else codes kept where the base model has any.

        Plain and zeroed checkpoints are for any engine, so None dequantises them. Raises HeaprError if `choice` and
        `layout` do not go together, or `base` has no codes to keep or, in a compact checkpoint, of some experts only.
        """
        if choice is None and layout == "compact":
            choice = wish.name if wish else "keep" if base.base_quantization else "none"
        choice = choice or "none"
        if choice not in CHOICES:
            raise HeaprError(f"--quantize {choice} is not one of {', '.join(CHOICES)}")
        if choice == "keep" and base.base_quantization is None:
            raise HeaprError(
                f"{base.path} has no codes to keep, it is not quantized; use --quantize "
                f"{', '.join(NAMES.values())} or none"
            )
        is_cut_codes = choice == "keep" and (layout == "plain" or any(map(base.is_pruned_expert, base.packed)))
        if layout != "compact" and (choice in NAMES.values() or (choice == "keep" and repaired) or is_cut_codes):
            raise HeaprError(
                f"{layout} checkpoints cannot be written with --quantize {choice}{' and --repair' * repaired}; use "
                "--layout compact, or --quantize none"
            )
        return cls(base, choice, cls._scheme(base, choice, layout), repaired)

    @staticmethod
    def _scheme(base: Checkpoint, choice: str, layout: str) -> ExpertScheme | None:
        if choice == "none":
            return None
        if choice == "keep":
            kept = base.kept_quantization if layout == "compact" else base.expert_quantization
            return kept.scheme(base.hidden_size) if kept else None
        return ExpertScheme.for_hidden_size(choice, base.hidden_size)

    @property
    def inner(self) -> dict[str, Any] | None:
        """`quantization_config` of all that is not a pruned expert."""
        return None if self.choice == "none" else self.base.quantization

    @property
    def dtype(self) -> torch.dtype:
        """What weights are dequantised to: exactly where they are rounded again, else to what the model computes in."""
        return torch.float32 if self.scheme else run_dtype(self.base, "auto")

    def is_verbatim(self, name: str) -> bool:
        """Tells whether a weight of the base model is taken as it is stored, codes and scales."""
        where = ExpertTensor.parse(name)
        if where is None or not self.base.is_pruned_expert(name):
            return self.choice != "none"
        return self.choice == "keep" and not (self.refits_down and where.shard == "w2")

    def before_layout(self, layout: str) -> list[Stage]:
        """Returns the stages before neurons are cut."""
        base_format = self.base.expert_quantization
        if layout == "zeroed" or self.choice != "keep" or base_format is None:
            return []
        return [NeuronScales(self.base, base_format)]

    def after_layout(self, layout: str) -> list[Stage]:
        """Returns the stages after neurons were cut."""
        return [Quantize(self.base, self.scheme)] if self.scheme and layout == "compact" else []


@dataclass(frozen=True)
class NeuronScales:
    """A stage: scales of pruned experts from the base model's blocks to groups inside one neuron; no value changes."""

    base: Checkpoint
    base_format: BaseQuantization

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = self.base.weight_of(name) if name in self.base.weight_map else None
        where = ExpertTensor.parse(weight) if weight else None
        if weight is None or where is None or not self.base.is_pruned_expert(weight):
            return {name: tensor}
        shape = self.base.headers[weight][1]
        return {weight + SCALE_SUFFIX: self.base_format.neuron_scale(tensor, where.shard, shape)}


@dataclass(frozen=True)
class Quantize:
    """A stage: floating-point weights of pruned experts to codes and scales."""

    base: Checkpoint
    scheme: ExpertScheme

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        where = ExpertTensor.parse(name)
        is_weight = where is not None and tensor.is_floating_point() and tensor.itemsize > 1
        if not is_weight or self.base.is_draft(where.prefix):
            return {name: tensor}
        codes, scale = self.scheme.quantize(tensor, where.shard)
        return {name: codes, name + SCALE_SUFFIX: scale}
