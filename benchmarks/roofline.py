# SPDX-License-Identifier: Apache-2.0
"""The least time a MoE layer can take: its bytes at the memory's speed or its FLOPs at the tensor cores', whichever."""

from typing import NamedTuple

import torch

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.tuning.stopwatch import stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape


class Peaks(NamedTuple):
    """What this machine reaches: `bandwidth` in bytes/s (read plus written), `flops` in FLOP/s."""

    bandwidth: float
    flops: float


class Work(NamedTuple):
    """What one call has to do, at least. `routed_width`: mean width over routes; `experts`: distinct ones hit."""

    bytes: float
    flops: float
    routed_width: float
    experts: float

    def floor(self, peaks: Peaks) -> float:
        """Seconds."""
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.flops)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """A large copy and a large square matrix product through PyTorch, best of ten."""
    megabytes, side = (2048, 8192) if device.type == "cuda" else (64, 512)
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = stopwatch([lambda: target.copy_(source)], device)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = stopwatch([lambda: left @ right], device)
    best_copy, best_product = (min(run() for _ in range(10)) for run in (copy, product))
    return Peaks(2 * source.numel() / best_copy, 2 * side**3 / best_product)


def work(moe: MoEShape, widths: list[int], batches: list[Batch], scheme: ExpertScheme | None = None) -> Work:
    """Mean over `batches`: every expert hit is read once, x is read once and the output written once.

    `scheme`: how experts are stored; None in the tokens' dtype.
    """
    width = torch.tensor(widths, dtype=torch.double)
    totals = torch.zeros(4, dtype=torch.double)
    for batch in batches:
        ids = batch.topk_ids.cpu().long().flatten()
        hit = ids.unique()
        bits = scheme.bits_per_weight() if scheme else 8 * batch.x.element_size()
        weight_bytes = 3 * moe.hidden_size * width[hit].sum() * bits / 8
        flops = 6 * moe.hidden_size * width[ids].sum()
        totals += torch.stack(
            [
                weight_bytes + 2 * batch.x.nbytes,
                flops,
                width[ids].mean(),
                torch.tensor(float(len(hit)), dtype=torch.double),
            ]
        )
    return Work(*(totals / len(batches)).tolist())
