# SPDX-License-Identifier: Apache-2.0
"""Which blocks stay under a budget of stored neurons, of executed FLOPs, or of both.

A block costs 1 to store and its expert's routing frequency f to execute. Keeping the most saliency under both limits
is a linear program once blocks may be split. Its solution is a threshold: with a price `per_flop` and a price
`per_neuron` for the two costs, a block stays if its saliency is at least `per_flop` f + `per_neuron`, and a price is
zero where its limit has room. With one limit this is the greedy order of a fractional knapsack, found by sorting. With
both, the stored limit fixes how many blocks stay, K; for a given `per_flop` the best K are those with the highest
saliency - `per_flop` f, and their executed cost never rises with `per_flop`: a rise would contradict that both choices
are best at their own price. So one bisection over `per_flop` finds it. Whole blocks miss the optimum by at most the one
block (two under both limits) that the linear program would split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune.calibration.record import CheckpointSizes
from heapr_vllm.prune.selection.neuron_blocks import NeuronBlocks

BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What to remove at least; one or both.

    `stored`: fraction of routed neurons. `executed`: fraction of executed routed-expert FLOPs per token.
    """

    stored: float | None = None
    executed: float | None = None

    def __post_init__(self) -> None:
        """Raises HeaprError if neither is given or one is outside (0, 1)."""
        if self.stored is None and self.executed is None:
            raise HeaprError("no budget is given; pass --sparsity, --target-size or --flops")
        for name, value, what in (
            ("sparsity", self.stored, "routed neurons"),
            ("flops", self.executed, "executed expert FLOPs"),
        ):
            if value is not None and not 0 < value < 1:
                raise HeaprError(
                    f"{name} {value} is not between 0 and 1; it is the fraction of {what} removed, such as 0.25"
                )


@dataclass(frozen=True)
class Prices:
    """Lagrange multipliers: a block stays if its mean saliency is at least per_flop * frequency + per_neuron."""

    per_flop: float
    per_neuron: float


def stored_for_size(
    target_bytes: int, metadata: dict[str, Any], blocks: NeuronBlocks, scheme: ExpertScheme | None = None
) -> float:
    """Computes the fraction of neurons to remove so that all tensors of the compact checkpoint fit into `target_bytes`.

    `metadata` of the moments has the sizes of the base checkpoint, `scheme` is how experts will be stored; what is
    removed is rounded up to whole blocks. Raises HeaprError if there is no such fraction.
    """
    recorded = CheckpointSizes.from_metadata(metadata)
    sizes = recorded.stored_as(scheme) if recorded else None
    if sizes is None:
        raise HeaprError(
            "--target-size needs the checkpoint's size, which these moments of an older heapr-vllm lack; "
            "calibrate again, or pass --sparsity"
        )
    whole, routed = sizes.whole, sizes.routed
    if target_bytes >= whole:
        raise HeaprError(
            f"--target-size {format_size(target_bytes)} is no smaller than the checkpoint, "
            f"{format_size(whole)}; there is nothing to prune"
        )
    count = len(blocks.saliency)
    removable = min(int((blocks.saliency < torch.inf).sum()), count - 1)
    removed = -((target_bytes - whole) * count // routed)
    if removed > removable:
        raise HeaprError(
            f"--target-size {format_size(target_bytes)} is out of reach: {format_size(whole - routed)} "
            "are not routed experts, and --min-width, --protect and experts without a calibration token "
            f"keep some neurons; the nearest is {format_size(whole - routed * removable // count)}"
        )
    return removed / count


def format_size(num_bytes: int) -> str:
    """Bytes in the largest fitting binary unit, rounded up so that what is called reachable is."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**power:
            return f"{math.ceil(num_bytes * 100 / 2**power) / 100:.2f} {unit}"
    return f"{num_bytes} B"


def choose(
    saliency: torch.Tensor, frequency: torch.Tensor, max_blocks: int | None, max_cost: float | None
) -> tuple[torch.Tensor, Prices]:
    """Chooses the blocks that stay, bool [B], and finds the prices that say so.

    `saliency`, `frequency`: float64 [B]. `max_blocks`: blocks that may stay, `max_cost`: sum of their frequencies; None
    is no limit. Blocks with infinite saliency fit both limits. Equal blocks are kept in their order.
    """
    if max_cost is None:
        return _most_salient(saliency, len(saliency) if max_blocks is None else max_blocks)
    kept, prices = _most_per_flop(saliency, frequency, max_cost)
    if max_blocks is None or kept.sum() <= max_blocks:
        return kept, prices
    kept, unpriced = _most_salient(saliency, max_blocks)
    if frequency[kept].sum() <= max_cost:
        return kept, unpriced
    low, high = 0.0, prices.per_flop  # at `high` the best blocks fit max_cost even without the other limit
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        kept, _ = _most_salient(saliency - middle * frequency, max_blocks)
        low, high = (low, middle) if frequency[kept].sum() <= max_cost else (middle, high)
    kept, threshold = _most_salient(saliency - high * frequency, max_blocks)
    return kept, Prices(high, threshold.per_neuron)


def _most_salient(saliency: torch.Tensor, count: int) -> tuple[torch.Tensor, Prices]:
    order = saliency.argsort(descending=True, stable=True)
    return _prefix(order, count), Prices(0.0, float(saliency[order[count - 1]]) if count else torch.inf)


def _most_per_flop(saliency: torch.Tensor, frequency: torch.Tensor, max_cost: float) -> tuple[torch.Tensor, Prices]:
    """Blocks by falling saliency per frequency, as many as fit. Blocks that never run cost nothing."""
    ratio = saliency / frequency.clamp(min=torch.finfo(torch.float64).tiny)
    order = ratio.argsort(descending=True, stable=True)
    count = int((frequency[order].cumsum(0) <= max_cost).sum())
    return _prefix(order, count), Prices(float(ratio[order[count - 1]]) if count else torch.inf, 0.0)


def _prefix(order: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    return kept
