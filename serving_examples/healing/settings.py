# SPDX-License-Identifier: Apache-2.0
"""What a healing depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.prune.text.samples import TextSettings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LEARNING_RATES = {"adapter": 2e-3, "weights": 5e-4}


@dataclass(frozen=True, kw_only=True)
class HealingSettings(TextSettings):
    """Text, what is trained, and how.

    `into`: "adapter", LoRA of `rank` on the linear layers named in `target_modules`; or "weights", the `parts` of the
    model that `student.PARTS` names. `top_k`: how many of the dense model's most likely tokens the divergence from it
    looks at one by one. `batch_size`: samples per step. `learning_rate`: the highest, None for that of
    `LEARNING_RATES`. `cache`: a folder that keeps the dense model's log-probabilities.
    """

    into: str = "adapter"
    num_samples: int = 1024
    batch_size: int = 4
    epochs: int = 1
    learning_rate: float | None = None
    rank: int = 16
    target_modules: tuple[str, ...] = ATTENTION
    parts: tuple[str, ...] = ("down_proj", "routers", "attention", "norms")
    top_k: int = 64
    dtype: str = "auto"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    cache: str | None = None

    def check(self) -> None:
        """Raises HeaprError if the settings do not go together."""
        if self.into not in LEARNING_RATES:
            raise HeaprError(f"--into {self.into} is not one of {', '.join(LEARNING_RATES)}")
        if self.device not in ("cpu", "cuda"):
            raise HeaprError(f"--device {self.device} is not cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES")
        if self.into == "weights" and self.dtype != "float32":
            raise HeaprError(
                "weights in half precision round small steps away; add --dtype float32, or use --into adapter, whose "
                "own weights are float32 whatever the model's are"
            )

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or LEARNING_RATES[self.into]

    def as_evaluation(self) -> EvaluationSettings:
        """What the dense model's predictions depend on."""
        return EvaluationSettings(dataset=self.dataset, dtype=self.dtype, device=self.device, top_k=self.top_k)

    def identity(self, *others: str) -> str:
        """A name for a training with these settings and `others`, different for all others."""
        text = json.dumps([asdict(self) | {"cache": None}, *others])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
