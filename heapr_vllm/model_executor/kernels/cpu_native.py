# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on vLLM's native CPU MoE op: padded to one width, or one call per bucket of equal width.

The op (`_C::cpu_fused_moe`) wants one width per call, a multiple of 32, and hidden sizes that are multiples of 32; it
never checks expert ids and aborts the process on anything else, so everything is checked here, before.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import ClassVar

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales, slots_table
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up

WIDTH_UNIT = 32
MAX_BUCKETS = 6


class NativeKernel(RaggedKernel):
    """Runs on CPUs where vLLM has the op, in one call of experts padded to the widest."""

    name = "native"
    max_buckets: ClassVar[int] = 1

    def is_default(self) -> bool:
        return current_platform.is_cpu()

    def machine_obstacle(self) -> str | None:
        return None if current_platform.is_cpu() else "it is for CPUs; choose triton"

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if scheme is not None:
            return f"vLLM's op does not decode {scheme.name} experts; choose compiled"
        if native_isa(dtype, hidden_size) is None:
            return f"vLLM's op needs x86-64 and a hidden size in multiples of {WIDTH_UNIT}; choose reference"
        return None

    def stored_widths(self, widths: list[int]) -> list[int]:
        return bucketed(widths, WIDTH_UNIT, self.max_buckets)

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        """Brings both flat parameters into the op's order, in place: an expert's packed and plain sizes are equal."""
        hidden_size = w2.shape[1]
        isa = native_isa(w2.dtype, hidden_size)
        for bucket in layout.buckets:
            rows = slice(bucket.row, bucket.row + bucket.num_slots * bucket.width)
            gate_up = w13[2 * rows.start : 2 * rows.stop].view(bucket.num_slots, 2 * bucket.width, hidden_size)
            down = w2[rows].view(bucket.num_slots, bucket.width, hidden_size).transpose(1, 2).contiguous()
            for plain, flat in ((gate_up, gate_up), (down, w2[rows])):
                packed = torch.empty_like(plain)
                torch.ops._C.prepack_moe_weight(plain, packed, isa)
                flat.copy_(packed.view(flat.shape))

    def index_tables(self, slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, but the table is int32 [B, 4], `layout.bucket_table()`."""
        return slots_table(slots, layout), torch.tensor(layout.bucket_table(), dtype=torch.int32).view(-1, 4)

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        """Gives each bucket the rows routed to it and sums rows in fp32; routes without a slot are dropped."""
        isa = native_isa(x.dtype, x.shape[1])
        plan = experts.table.tolist()
        top_k = routes.ids.shape[1]
        route_slots = routes.slots[routes.ids.flatten()]
        order = route_slots.argsort(stable=True)
        bounds = []
        for first, count, *_ in plan:
            bounds += [first, first + count]
        edges = torch.searchsorted(route_slots[order], torch.tensor(bounds, dtype=route_slots.dtype)).tolist()
        total = torch.zeros(x.shape, dtype=torch.float32)
        weights = routes.weights.flatten()
        for (first_slot, count, width, row), start, stop in zip(plan, edges[::2], edges[1::2], strict=True):
            if start == stop:
                continue
            chosen = order[start:stop]
            token = chosen // top_k
            partial = x.new_empty(len(chosen), x.shape[1])
            last = row + count * width
            local = route_slots[chosen, None] - first_slot
            w13, w2 = experts.w13[2 * row : 2 * last], experts.w2[row:last]
            cpu_uniform_moe(partial, x[token], w13, w2, weights[chosen, None].float(), local, count, isa)
            total.index_add_(0, token, partial.float())
        output.copy_(total)

    def run_in_graph(
        self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows, recorded: str = ""
    ) -> None:
        """Hands a layer of uniform experts to the engine's op directly, so that torch.compile traces a dense layer."""
        if experts.uniform_experts == 0:
            super().run_in_graph(output, x, routes, experts, recorded)
            return
        isa = native_isa(x.dtype, x.shape[1])
        cpu_uniform_moe(output, x, experts.w13, experts.w2, routes.weights, routes.ids, experts.uniform_experts, isa)


class BucketsKernel(NativeKernel):
    """One call for each of a few stored widths: less padding, but rows are sorted into buckets first."""

    name = "buckets"
    max_buckets = MAX_BUCKETS


@torch.compiler.assume_constant_result
def native_isa(dtype: torch.dtype, hidden_size: int) -> str | None:
    """Returns the instruction set to ask the native op for, "amx" or "vec"; None if it cannot run this layer."""
    if platform.machine() not in ("x86_64", "AMD64") or hidden_size % WIDTH_UNIT:
        return None
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        return None
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks the kernel for the tile registers; without it the op dies with SIGILL
        return "amx"
    return "vec"


def cpu_uniform_moe(
    output: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    isa: str,
) -> None:
    """Writes the MoE output [T, H] of packed experts of one stored width; `ids` int32 [T, k] are their numbers."""
    hidden_size = x.shape[1]
    width = w2.shape[0] // num_experts
    gate_up = w13.view(num_experts, 2 * width, hidden_size)
    down = w2.view(num_experts, hidden_size, width)
    torch.ops._C.cpu_fused_moe(output, x, gate_up, down, None, None, weights, ids, False, "silu", isa)


def bucketed(widths: Sequence[int], unit: int, max_buckets: int) -> list[int]:
    """Stored width per expert: the cheapest rounding up to at most `max_buckets` sizes, all multiples of `unit`.

    Minimises the total by dynamic programming over the distinct widths. Width 0 stays 0, except that a single bucket
    takes every expert, which spares the caller from sorting tokens.
    """
    if max_buckets == 1:
        return [round_up(max(widths), unit)] * len(widths)
    padded = [round_up(width, unit) for width in widths]
    sizes = sorted(set(padded) - {0})
    counts = [padded.count(size) for size in sizes]
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [(-1, ())] * len(sizes)
    for _ in range(max_buckets):
        grown = list(best)
        for end in range(1, len(sizes) + 1):
            for start in range(end):
                if best[start][0] < 0:
                    continue
                cost = best[start][0] + sizes[end - 1] * sum(counts[start:end])
                if grown[end][0] < 0 or cost < grown[end][0]:
                    grown[end] = (cost, (*best[start][1], sizes[end - 1]))
        best = grown
    bounds = best[-1][1]
    return [0 if not width else next(bound for bound in bounds if width <= bound) for width in padded]
