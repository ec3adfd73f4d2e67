# SPDX-License-Identifier: Apache-2.0
"""What a kernel adds the tokens of a call to, if traffic is recorded.

A traced graph holds a layer's name only: tensors that an op writes to would be copied around every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrafficSums:
    """Sums over all calls of one layer on this rank, by storage slot.

    activation_sq: float64 [num_slots, max_width], squares of silu(gate) * up of an expert's stored neurons, in order.
    tokens: int64 [num_slots], tokens routed to the expert.
    """

    activation_sq: torch.Tensor
    tokens: torch.Tensor


# This process's layers, by what their masks call them; `TrafficRecorder` fills it.
RECORDED: dict[str, TrafficSums] = {}
