# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on vLLM's native CPU MoE op, one call per bucket of equal stored width.

The op (`_C::cpu_fused_moe`) wants one width per call, a multiple of 32, and hidden sizes that are multiples of 32; it
never checks expert ids and aborts the process on anything else, so everything is checked here, before.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch

from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up

WIDTH_UNIT = 32
MAX_BUCKETS = 6
# Sorting rows into buckets costs a fixed time per layer, however many buckets; it pays where decoding reads so much
# less that it saves more. Figures from `python -m benchmarks.cpu_layer --buckets`, kept in docs/measurements.md.
BUCKETING_SECONDS = 1e-4
BYTES_PER_SECOND = 30e9


def native_isa(dtype: torch.dtype, hidden_size: int) -> str | None:
    """Instruction set to ask the native op for, "amx" or "vec"; None if it cannot run this layer."""
    if platform.machine() not in ("x86_64", "AMD64") or hidden_size % WIDTH_UNIT:
        return None
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        return None
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks the kernel for the tile registers; without it the op dies with SIGILL
        return "amx"
    return "vec"


def buckets_override() -> str | None:
    """HEAPR_CPU_BUCKETS, if it is always or never."""
    override = os.environ.get("HEAPR_CPU_BUCKETS")
    return override if override in ("always", "never") else None


def stored_widths(widths: list[int], top_k: int, hidden_size: int, element_size: int) -> list[int]:
    """Stored width per expert: one width for all where calls dominate, else `MAX_BUCKETS` widths.

    HEAPR_CPU_BUCKETS=always or never overrides the choice.
    """
    uniform, ragged = bucketed(widths, WIDTH_UNIT, 1), bucketed(widths, WIDTH_UNIT, MAX_BUCKETS)
    if override := buckets_override():
        return ragged if override == "always" else uniform
    saved_rows = top_k * (sum(uniform) - sum(ragged)) / len(widths)
    saved_seconds = saved_rows * 3 * hidden_size * element_size / BYTES_PER_SECOND
    return ragged if saved_seconds > BUCKETING_SECONDS else uniform


def prepack(w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, isa: str) -> None:
    """Brings both flat parameters into the op's layout, in place: an expert's packed and plain sizes are equal."""
    hidden_size = w2.shape[1]
    for bucket in layout.buckets:
        rows = slice(bucket.row, bucket.row + bucket.num_slots * bucket.width)
        gate_up = w13[2 * rows.start : 2 * rows.stop].view(bucket.num_slots, 2 * bucket.width, hidden_size)
        down = w2[rows].view(bucket.num_slots, bucket.width, hidden_size).transpose(1, 2).contiguous()
        for plain, flat in ((gate_up, gate_up), (down, w2[rows])):
            packed = torch.empty_like(plain)
            torch.ops._C.prepack_moe_weight(plain, packed, isa)
            flat.copy_(packed.view(flat.shape))


def cpu_uniform_moe(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    isa: str,
) -> None:
    """Writes the MoE output [T, H] of a layer whose experts are all local and stored at one width, in id order.

    It is the engine's op and nothing else, so torch.compile traces it as it traces a dense layer.
    """
    hidden_size = hidden_states.shape[1]
    width = w2.shape[0] // num_experts
    torch.ops._C.cpu_fused_moe(
        output,
        hidden_states,
        w13.view(num_experts, 2 * width, hidden_size),
        w2.view(num_experts, hidden_size, width),
        None,
        None,
        topk_weights,
        topk_ids,
        False,
        "silu",
        isa,
    )


def cpu_ragged_moe(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    buckets: torch.Tensor,
    isa: str,
) -> None:
    """Writes the MoE output [T, H]; arguments as in `ragged_moe_reference`, but weights prepacked for `isa`.

    `buckets` int32 [B, 4] is `layout.bucket_table()`. Each bucket gets the rows routed to it, and rows are summed in
    fp32; routes without a slot are dropped.
    """
    hidden_size = hidden_states.shape[1]
    plan = buckets.tolist()
    top_k = topk_ids.shape[1]
    route_slots = slots[topk_ids.flatten()]
    order = route_slots.argsort(stable=True)
    bounds = torch.tensor([edge for first, count, *_ in plan for edge in (first, first + count)], dtype=slots.dtype)
    edges = torch.searchsorted(route_slots[order], bounds).tolist()
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    weights = topk_weights.flatten()
    for bucket, start, stop in zip(plan, edges[::2], edges[1::2], strict=True):
        if start == stop:
            continue
        routes = order[start:stop]
        token = routes // top_k
        rows = slice(bucket[3], bucket[3] + bucket[1] * bucket[2])
        partial = hidden_states.new_empty(len(routes), hidden_size)
        cpu_uniform_moe(
            partial,
            hidden_states[token],
            w13[2 * rows.start : 2 * rows.stop],
            w2[rows],
            weights[routes, None].float(),
            route_slots[routes, None] - bucket[0],
            bucket[1],
            isa,
        )
        total.index_add_(0, token, partial.float())
    output.copy_(total)


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
