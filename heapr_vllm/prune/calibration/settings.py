# SPDX-License-Identifier: Apache-2.0
"""What a calibration depends on, and the text that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.schema import Positive, Seed
from heapr_vllm.prune.text.samples import checkpoint_samples


class NotFiniteError(HeaprError):
    """The loss is NaN or infinite: no later step can be right."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What the result depends on; `--resume` insists that it has not changed."""

    model: str
    dataset: str
    num_calibration_samples: Positive = 128
    max_seq_length: Positive = 2048
    batch_size: Positive = 1
    seed: Seed = 0
    dtype: str = "auto"
    revision: str | None = None
    stream: bool = False


def check_finite(loss: float, sample: int) -> None:
    """Raises NotFiniteError if the loss of the batch that starts at `sample` is not finite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss is {loss} at sample {sample}; try --dtype float32, or check the checkpoint for NaN weights"
        )


def calibration_samples(settings: CalibrationSettings, checkpoint: Checkpoint) -> torch.Tensor:
    """Draws int64 [num_calibration_samples, max_seq_length]. Raises HeaprError if the text is not enough."""
    return checkpoint_samples(
        checkpoint, settings.dataset, settings.num_calibration_samples, settings.max_seq_length, settings.seed
    )
