# SPDX-License-Identifier: Apache-2.0
"""What codes of experts are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scales:
    """Factors float32 of experts in 8 or 4 bits (`formats/quantized.py`), as `RaggedKernel.pack` left them.

    w13: [2 * rows, H / group_size], or [2 * rows, 1] by channel.
    w2: [rows, H / group_size], or [num_slots, H], one per expert and output, by channel. Kernels that round activations
        to 8 bits keep bf16 scales by slabs of neurons in the room of those in groups (`kernels/slabs.py`).
    """

    w13: torch.Tensor
    w2: torch.Tensor

    def is_by_channel(self, hidden_size: int) -> bool:
        """Returns whether `w2` has a factor per output instead of one per neuron and group."""
        return self.w2.shape[1] == hidden_size
