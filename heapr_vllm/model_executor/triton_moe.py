# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels: blocks of routes, scratch, grids. No host sync, sizes from the token count alone.

CUDA graphs and torch.compile therefore stay on: grids are upper bounds and idle programs return at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton

from heapr_vllm.model_executor.layout import TRITON_UNIT
from heapr_vllm.model_executor.tile_config import LayerShape, Tile, TileConfig, choose_config
from heapr_vllm.model_executor.triton_kernels import combine_kernel, ragged_down_kernel, ragged_up_kernel


def use_one_route_blocks(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether routes are so few that most experts get one: then no alignment is needed, as in stock vLLM."""
    return num_tokens * top_k * 4 <= num_experts


def pack_down(w2: torch.Tensor) -> None:
    """[rows, H] neurons as rows to [rows / 64, H, 64] slabs, in place (same number of elements)."""
    slabs = w2.view(-1, TRITON_UNIT, w2.shape[1]).transpose(1, 2).contiguous()
    w2.copy_(slabs.view(w2.shape))


def align_routes(route_slots: torch.Tensor, num_slots: int,
                 block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes sorted by slot and padded to whole blocks: (route_ids, block_slots, num_rows) of `triton_kernels`.

    `route_slots` int32 [T, k]; routes to slot `num_slots` appear in no block. vLLM's CUDA op where there is one,
    otherwise torch without a host sync; sizes depend on shapes only.
    """
    if route_slots.is_cuda and (align := _vllm_align()) is not None:
        return align(route_slots, block_m, num_slots + 1)  # the op does not check ids: absent is a slot of its own
    device, num_routes = route_slots.device, route_slots.numel()
    num_blocks = max_blocks(num_routes, num_slots, block_m)
    slot = route_slots.flatten().long()
    counts = torch.zeros(num_slots + 1, dtype=torch.long, device=device).scatter_add_(0, slot, torch.ones_like(slot))
    padded = (counts[:num_slots] + block_m - 1) // block_m * block_m
    ends = padded.cumsum(0)
    order = slot.argsort(stable=True)
    slot = slot[order]
    rank = torch.arange(num_routes, device=device) - (counts.cumsum(0) - counts)[slot]
    first_row = torch.cat([ends - padded, ends.new_full((1,), num_blocks * block_m)])
    position = (first_row[slot] + rank).clamp_(max=num_blocks * block_m)
    route_ids = torch.full((num_blocks * block_m + 1,), num_routes, dtype=torch.int32, device=device)
    route_ids.scatter_(0, position, order.int())
    route_ids[-1] = num_routes
    block_starts = torch.arange(num_blocks, device=device) * block_m
    block_slots = torch.searchsorted(ends, block_starts, right=True)
    return route_ids, block_slots.int(), ends[-1:].int()


@cache
def _vllm_align() -> Callable | None:
    try:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except ImportError:
        return None
    return moe_align_block_size if hasattr(torch.ops._moe_C, "moe_align_block_size") else None


def max_blocks(num_routes: int, num_slots: int, block_m: int) -> int:
    """Upper bound of blocks: every expert that gets a route may leave one block nearly empty."""
    busy = min(num_routes, num_slots)
    return busy + (num_routes - busy) // block_m


@dataclass(frozen=True)
class Blocks:
    """Routes grouped into `num_blocks` blocks of `block_m` rows, each of one expert: the kernels' first arguments.

    `hidden_rows`: rows of the intermediate that the blocks use.
    """

    route_ids: torch.Tensor
    block_slots: torch.Tensor
    num_rows: torch.Tensor
    num_blocks: int
    hidden_rows: int
    block_m: int
    one_route: bool

    @classmethod
    def build(cls, topk_ids: torch.Tensor, slots: torch.Tensor, num_slots: int, block_m: int) -> Blocks:
        """`topk_ids` int32 [T, k] global expert ids; `slots` int32 [experts + 1], the last one for id -1."""
        num_routes = topk_ids.numel()
        if use_one_route_blocks(*topk_ids.shape, num_slots):
            return cls(topk_ids, slots, slots, num_routes, num_routes, block_m, one_route=True)
        route_ids, block_slots, num_rows = align_routes(slots[topk_ids], num_slots, block_m)
        num_blocks = len(block_slots)
        return cls(route_ids, block_slots, num_rows, num_blocks, num_blocks * block_m, block_m, one_route=False)


def up_projection(hidden: torch.Tensor, x: torch.Tensor, w13: torch.Tensor, table: torch.Tensor, top_k: int,
                  blocks: Blocks, tile: Tile) -> None:
    """Launches `ragged_up_kernel`: `x` [T, H] to `hidden` [blocks.hidden_rows, max_width]."""
    n_tiles = triton.cdiv(hidden.shape[1], tile.block_n)
    ragged_up_kernel[(blocks.num_blocks * n_tiles,)](
        x, x.stride(0), w13, table, hidden, hidden.stride(0), blocks.route_ids, blocks.block_slots, blocks.num_rows,
        x.shape[0] * top_k, len(table), blocks.num_blocks, n_tiles, H=x.shape[1], TOP_K=top_k, BLOCK_M=blocks.block_m,
        ONE_ROUTE=blocks.one_route, PRECISION=_precision(x.dtype), **tile.meta())


def down_projection(routed: torch.Tensor, hidden: torch.Tensor, w2: torch.Tensor, table: torch.Tensor,
                    blocks: Blocks, tile: Tile) -> None:
    """Launches `ragged_down_kernel`: `hidden` as `up_projection` left it to `routed` [T * k, H]."""
    n_tiles = routed.shape[1] // tile.block_n
    ragged_down_kernel[(blocks.num_blocks * n_tiles,)](
        hidden, hidden.stride(0), w2, table, routed, blocks.route_ids, blocks.block_slots, blocks.num_rows,
        len(routed), len(table), blocks.num_blocks, n_tiles, H=routed.shape[1], BLOCK_M=blocks.block_m,
        ONE_ROUTE=blocks.one_route, PRECISION=_precision(hidden.dtype), **tile.meta())


def combine(output: torch.Tensor, routed: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
            slots: torch.Tensor, num_slots: int) -> None:
    """Launches `combine_kernel`: `routed` [T * k, H] to the weighted sum `output` [T, H]."""
    num_tokens, hidden_size = output.shape
    block = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        routed, topk_weights, topk_ids, slots, num_slots, output, output.stride(0), H=hidden_size,
        TOP_K=topk_ids.shape[1], BLOCK_N=block)


def triton_ragged_moe(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
                      topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, table: torch.Tensor,
                      max_width: int, config: TileConfig | None = None) -> None:
    """Writes the MoE output [T, H] into `output`.

    `hidden_states` [T, H]; `w13` [2 * rows, H]; `w2` packed by `pack_down`; `topk_weights` float and `topk_ids` int32
    [T, k] with global expert ids, negative for nobody's; `slots` int32 [experts + 1], num_slots for experts that are
    not stored and in the last place; `table` int32 [num_slots, 2] first row and stored width; `max_width` the widest
    stored width.
    """
    num_tokens, hidden_size = hidden_states.shape
    top_k, num_slots = topk_ids.shape[1], len(table)
    if num_slots == 0:
        output.zero_()
        return
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    if config is None:
        mean_width = len(w13) // (2 * num_slots)
        config = choose_config(LayerShape(hidden_size, top_k, num_slots, mean_width, max_width, hidden_states.dtype),
                               num_tokens)
    config.check(hidden_size)
    blocks = Blocks.build(topk_ids, slots, num_slots, config.block_m)
    hidden = hidden_states.new_empty(blocks.hidden_rows, max_width)
    routed = hidden_states.new_empty(num_tokens * top_k, hidden_size)
    up_projection(hidden, hidden_states, w13, table, top_k, blocks, config.up)
    down_projection(routed, hidden, w2, table, blocks, config.down)
    combine(output, routed, topk_weights, topk_ids, slots, num_slots)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
