# SPDX-License-Identifier: Apache-2.0
"""What a calibration depends on, and the text that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.schema import Positive
from heapr_vllm.prune.models.packing import check_packing
from heapr_vllm.prune.text.batches import Batch, batches
from heapr_vllm.prune.text.samples import Samples, TextSettings, draw_samples


class NotFiniteError(HeaprError):
    """The loss is NaN or infinite: no later step can be right."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(TextSettings):
    """What the result depends on; `--resume` insists that it has not changed.

    `packing`: whole samples share a row of up to `max_seq_length` tokens, without seeing each other.
    """

    model: str
    num_calibration_samples: Positive = 128
    batch_size: Positive = 1
    packing: bool = False
    dtype: str = "auto"
    revision: str | None = None
    stream: bool = False

    def batches(self, samples: Samples) -> list[Batch]:
        """Puts samples into the batches that the model runs on."""
        return batches(samples, self.batch_size, self.max_seq_length if self.packing else None)


def check_finite(loss: float, sample: int) -> None:
    """Raises NotFiniteError if the loss of the batch that starts at `sample` is not finite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss is {loss} at sample {sample}; try --dtype float32, or check the checkpoint for NaN weights"
        )


def calibration_samples(settings: CalibrationSettings, checkpoint: Checkpoint) -> Samples:
    """Does `draw_samples`, for packing after `check_packing`."""
    if settings.packing:
        check_packing(checkpoint, settings.dtype)
    return draw_samples(checkpoint, settings, settings.num_calibration_samples)
