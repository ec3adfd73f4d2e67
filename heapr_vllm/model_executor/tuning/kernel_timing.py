# SPDX-License-Identifier: Apache-2.0
"""How fast each kernel runs a layer on this machine's CPU: random experts of the model's own widths, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.tuning.stopwatch import interleave, stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape, random_batch

TOKENS = (1, 16, 512)  # a step of one request, of several, and of prefill
WEIGHTS_BYTES = 128 * 2**20  # of the experts that are timed: more than caches hold, and quickly made
BATCHES = 2  # of fresh routing, so that weights are not those of the call before
SECONDS = 0.2  # per token count, all kernels together
LEAST_ROUNDS, MOST_ROUNDS = 2, 15


@dataclass(frozen=True)
class TimedLayer:
    """What is timed: some experts that stand for all of a rank's.

    widths: kept neurons of each of them. num_experts: of the layer, among which tokens are spread.
    is_shared_out: whether the rank holds some of the layer's experts only, so that routes have to be looked at.
    """

    widths: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    is_shared_out: bool = False

    @classmethod
    def of(
        cls,
        kept: Sequence[int],
        num_experts: int,
        top_k: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        num_local_experts: int | None = None,
    ) -> TimedLayer:
        """Takes evenly from the widths `kept` of all experts of a model, as many as `WEIGHTS_BYTES` allow.

        `num_local_experts`: of `num_experts` on the rank, None for all.
        """
        mean = max(1.0, sum(kept) / len(kept))
        affordable = int(WEIGHTS_BYTES / (3 * mean * hidden_size * dtype.itemsize))
        count = min(num_local_experts or num_experts, max(affordable, 2 * top_k))
        ordered = sorted(kept)
        widths = tuple(ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count))
        is_shared_out = num_local_experts not in (None, num_experts)
        return cls(widths, num_experts, min(top_k, count), hidden_size, dtype, is_shared_out)

    def num_tokens(self, tokens: int) -> int:
        """How many tokens bring as many rows to each of these experts as `tokens` to each of the layer's."""
        return max(1, round(tokens * len(self.widths) / self.num_experts))


def time_kernels(layer: TimedLayer, kernels: Sequence[RaggedKernel]) -> dict[str, list[float]]:
    """Measures seconds per call at each of `TOKENS`, by kernel; the best of several rounds, kernels in turn."""
    layouts = [RaggedLayout.build(layer.widths, kernel.stored_widths(list(layer.widths))) for kernel in kernels]
    weights = _weights(3 * max(layout.num_rows for layout in layouts), layer)
    calls = {
        kernel.name: _Call(kernel, layout, weights, may_be_uniform=not layer.is_shared_out)
        for kernel, layout in zip(kernels, layouts, strict=True)
    }
    shape = MoEShape(len(layer.widths), layer.top_k, layer.hidden_size, max(layer.widths))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for tokens in TOKENS:
        batches = [random_batch(layer.num_tokens(tokens), shape, layer.dtype, weights.device) for _ in range(BATCHES)]
        for name, best in _best_of(calls, batches).items():
            seconds[name].append(best)
    return seconds


class _Call:
    """A kernel with experts of its own stored widths."""

    def __init__(
        self, kernel: RaggedKernel, layout: RaggedLayout, weights: torch.Tensor, *, may_be_uniform: bool
    ) -> None:
        """`weights` [rows, H] are not packed: speed does not depend on what they are."""
        slots, table = kernel.index_tables(layout.slots, layout)
        uniform_experts = len(layout.widths) if layout.is_uniform and may_be_uniform else 0
        rows = layout.num_rows
        self.kernel = kernel
        self.slots = slots
        self.experts = ExpertRows(weights[: 2 * rows], weights[2 * rows : 3 * rows], table, layout.max_width)
        self.experts = replace(self.experts, uniform_experts=uniform_experts)

    def __call__(self, batch: Batch) -> None:
        routes = Routes(batch.topk_weights, batch.topk_ids, self.slots)
        self.kernel.run_in_graph(torch.empty_like(batch.x), batch.x, routes, self.experts)


def _weights(rows: int, layer: TimedLayer) -> torch.Tensor:
    """Normal numbers [rows, H], the same ones again and again: drawing them all would take longer than the timing."""
    some = torch.randn(256, layer.hidden_size, dtype=torch.float32).mul_(layer.hidden_size**-0.5).to(layer.dtype)
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def _best_of(calls: dict[str, _Call], batches: list[Batch]) -> dict[str, float]:
    watches = {
        name: stopwatch([partial(call, batch) for batch in batches], batches[0].x.device)
        for name, call in calls.items()
    }
    once = sum(watch() for watch in watches.values()) * len(batches)
    rounds = min(max(int(SECONDS / once), LEAST_ROUNDS), MOST_ROUNDS)
    return {name: min(seconds) for name, seconds in interleave(watches, rounds).items()}
