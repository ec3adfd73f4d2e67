# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on vLLM's native CPU MoE op, one call per bucket of equal stored width.

The op (`_C::cpu_fused_moe`) wants one width per call, a multiple of 32, and hidden sizes that are multiples of 32; it
never checks expert ids and aborts the process on anything else, so everything is checked here, before.
"""

from __future__ import annotations

import platform

import torch

from heapr_vllm.model_executor.layout import RaggedLayout, bucketed

WIDTH_UNIT = 32
MAX_BUCKETS = 6
# What an extra bucket costs (sorting rows, one more op call) against what it saves (weights not read at decode); from
# `python -m benchmarks.cpu_buckets`, see docs/architecture.md.
SECONDS_PER_BUCKET = 60e-6
BYTES_PER_SECOND = 12e9


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


def stored_widths(widths: list[int], top_k: int, hidden_size: int, element_size: int) -> list[int]:
    """Stored width per expert with the number of buckets that makes decoding cheapest."""
    row_bytes = 3 * hidden_size * element_size

    def seconds(num_buckets: int) -> float:
        mean_width = sum(bucketed(widths, WIDTH_UNIT, num_buckets)) / len(widths)
        return min(top_k, len(widths)) * mean_width * row_bytes / BYTES_PER_SECOND + num_buckets * SECONDS_PER_BUCKET

    return bucketed(widths, WIDTH_UNIT, min(range(1, MAX_BUCKETS + 1), key=seconds))


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


def cpu_ragged_moe(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
                   topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, buckets: torch.Tensor,
                   isa: str) -> None:
    """Writes the MoE output [T, H]; arguments as in `ragged_moe_reference`, weights prepacked for `isa`.

    A layer with a single bucket of all experts goes to the op as it is. Otherwise each bucket gets the rows routed to
    it, and rows are summed in fp32; routes to slot -1 are dropped.
    """
    hidden_size = hidden_states.shape[1]
    plan = buckets.tolist()
    if len(plan) == 1 and plan[0][1] == len(slots):
        _native(output, hidden_states, w13, w2, plan[0], topk_weights, topk_ids, isa)
        return
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
        partial = hidden_states.new_empty(len(routes), hidden_size)
        _native(partial, hidden_states[token], w13, w2, bucket, weights[routes, None],
                (route_slots[routes, None] - bucket[0]), isa)
        total.index_add_(0, token, partial.float())
    output.copy_(total)


def _native(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, bucket: list[int],
            topk_weights: torch.Tensor, topk_ids: torch.Tensor, isa: str) -> None:
    """One call of the op over a bucket's experts; `topk_ids` count from the bucket's first slot."""
    _, count, width, row = bucket
    hidden_size = hidden_states.shape[1]
    stop = row + count * width
    torch.ops._C.cpu_fused_moe(
        output, hidden_states.contiguous(), w13[2 * row : 2 * stop].view(count, 2 * width, hidden_size),
        w2[row:stop].view(count, hidden_size, width), None, None, topk_weights.float().contiguous(),
        topk_ids.int().contiguous(), False, "silu", isa)
