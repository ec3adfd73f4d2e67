# SPDX-License-Identifier: Apache-2.0
"""How much memory a healing needs, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from heapr_vllm.evaluation.predictions import Predictions
from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.text.samples import Samples
from serving_examples.healing.distillation import trained
from serving_examples.healing.settings import HealingSettings

STATE_BYTES = 12  # of a trained parameter: gradient and Adam's two moments in float32
HIDDEN_VALUES, NEURON_VALUES = 16, 6  # kept per token and layer, per unit of hidden size and per neuron that it meets


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `weights`: of the model, of which there is one at a time; `disk`: of the dense model's predictions."""

    weights: int
    training_state: int
    activations: int
    logits: int
    disk: int

    @classmethod
    def of(cls, model: PreTrainedModel, student: nn.Module, samples: Samples, settings: HealingSettings) -> MemoryPlan:
        """Computes what `student` needs, which was made of `model`; both may be on the meta device."""
        config = model.config.get_text_config()
        itemsize = model.dtype.itemsize
        tokens = settings.batch_size * max(len(sample.ids) for sample in samples.entries)
        layers, hidden = config.num_hidden_layers, config.hidden_size
        width = max(module.down_proj.shape[2] for module in expert_modules(model).values())
        one_layer = HIDDEN_VALUES * hidden + config.num_experts_per_tok * (2 * hidden + NEURON_VALUES * width)
        kept = hidden * layers + one_layer if settings.gradient_checkpointing else one_layer * layers
        return cls(
            weights=sum(parameter.numel() * parameter.itemsize for parameter in student.parameters()),
            training_state=STATE_BYTES * sum(parameter.numel() for parameter in trained(student).values()),
            activations=tokens * kept * itemsize,
            logits=tokens * config.vocab_size * (2 * itemsize + 5 * 4),
            disk=Predictions.num_bytes(samples.predictions, settings.top_k),
        )

    @property
    def peak(self) -> int:
        return self.weights + self.training_state + self.activations + self.logits

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and Adam": self.training_state,
            "activations": self.activations,
            "logits": self.logits,
        }
        sizes = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
        return (
            f"memory: about {format_size(self.peak)} ({sizes}); disk for the dense model's log-probabilities: "
            f"{format_size(self.disk)}"
        )
