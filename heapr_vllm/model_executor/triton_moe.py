# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels: tiles, blocks of routes, scratch. No host sync, sizes from the token count alone.

CUDA graphs and torch.compile therefore stay on: grids are upper bounds and idle programs return at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from heapr_vllm.model_executor.layout import TRITON_UNIT
from heapr_vllm.model_executor.triton_kernels import combine_kernel, ragged_down_kernel, ragged_up_kernel


@dataclass(frozen=True)
class Tile:
    """Tile of one GEMM: `block_n` outputs by `block_k` inputs."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 1

    def meta(self) -> dict[str, int]:
        """Launch arguments."""
        return {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m,
                "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class TileConfig:
    """Tiles of both GEMMs over the same blocks of `block_m` routes."""

    block_m: int
    up: Tile
    down: Tile

    def check(self, hidden_size: int) -> None:
        """Raises ValueError if the tiles do not fit the layout or each other."""
        if hidden_size % self.up.block_k or hidden_size % self.down.block_n:
            raise ValueError(f"hidden size {hidden_size} is no multiple of the tile {self}")
        if TRITON_UNIT % self.down.block_k:
            raise ValueError(f"down.block_k {self.down.block_k} does not divide {TRITON_UNIT}")


def default_config(num_tokens: int, top_k: int, num_experts: int, hidden_size: int, hopper: bool = True,
                   element_size: int = 2) -> TileConfig:
    """Tiles by routes per expert, for shapes without a tuned configuration.

    Ampere's registers hold smaller tiles than Hopper's; fp32 is there to be right, not fast.
    """
    routes = num_tokens * top_k / max(num_experts, 1)
    if element_size > 2:
        config = TileConfig(16, Tile(32, 32, 4, 2), Tile(64, 32, 4, 2))
    elif routes <= 16:
        config = TileConfig(16, Tile(32, 128, 4, 4), Tile(64, 64, 4, 4))
    elif routes <= 64:
        config = TileConfig(32 if routes <= 32 else 64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4, 1))
    elif hopper:
        config = TileConfig(128, Tile(128, 64, 8, 4, 8), Tile(256, 64, 8, 3, 8))
    else:
        config = TileConfig(128, Tile(64, 64, 8, 3, 8), Tile(128, 64, 8, 3, 8))
    up_k = _largest_divisor(hidden_size, config.up.block_k)
    down_n = _largest_divisor(hidden_size, config.down.block_n)
    return TileConfig(config.block_m, replace(config.up, block_k=up_k), replace(config.down, block_n=down_n))


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
    return moe_align_block_size


def max_blocks(num_routes: int, num_slots: int, block_m: int) -> int:
    """Upper bound of blocks: every expert that gets a route may leave one block nearly empty."""
    busy = min(num_routes, num_slots)
    return busy + (num_routes - busy) // block_m


def triton_ragged_moe(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
                      topk_weights: torch.Tensor, topk_ids: torch.Tensor, slots: torch.Tensor, table: torch.Tensor,
                      max_width: int, config: TileConfig | None = None) -> None:
    """Writes the MoE output [T, H] into `output`.

    `hidden_states` [T, H]; `w13` [2 * rows, H]; `w2` packed by `pack_down`; `topk_weights` float32 and `topk_ids` int32
    [T, k] with global expert ids; `slots` int32 [num_experts], num_slots for experts that are not stored; `table` int32
    [num_slots, 2] first row and stored width; `max_width` the widest stored width.
    """
    num_tokens, hidden_size = hidden_states.shape
    top_k, num_slots = topk_ids.shape[1], table.shape[0]
    if num_slots == 0:
        output.zero_()
        return
    config = config or default_config(num_tokens, top_k, num_slots, hidden_size, _is_hopper(),
                                      hidden_states.element_size())
    config.check(hidden_size)
    num_routes = num_tokens * top_k
    route_slots = slots[topk_ids]
    one_route = use_one_route_blocks(num_tokens, top_k, num_slots)
    if one_route:
        route_ids = num_rows = block_slots = route_slots.flatten()
        num_blocks = num_hidden_rows = num_routes
    else:
        route_ids, block_slots, num_rows = align_routes(route_slots, num_slots, config.block_m)
        num_blocks = len(block_slots)
        num_hidden_rows = num_blocks * config.block_m
    hidden = hidden_states.new_empty(num_hidden_rows, max_width)
    routed = hidden_states.new_empty(num_routes, hidden_size)
    shared = {"H": hidden_size, "BLOCK_M": config.block_m, "ONE_ROUTE": one_route,
              "PRECISION": "ieee" if hidden_states.dtype == torch.float32 else "tf32"}
    up_tiles = triton.cdiv(max_width, config.up.block_n)
    ragged_up_kernel[(num_blocks * up_tiles,)](
        hidden_states, hidden_states.stride(0), w13, table, hidden, hidden.stride(0), route_ids, block_slots, num_rows,
        num_routes, num_slots, num_blocks, up_tiles, TOP_K=top_k, **shared, **config.up.meta())
    down_tiles = hidden_size // config.down.block_n
    ragged_down_kernel[(num_blocks * down_tiles,)](
        hidden, hidden.stride(0), w2, table, routed, route_ids, block_slots, num_rows, num_routes, num_slots,
        num_blocks, down_tiles, **shared, **config.down.meta())
    block = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        routed, topk_weights, route_slots, num_slots, output, output.stride(0), H=hidden_size, TOP_K=top_k,
        BLOCK_N=block)


@cache
def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _largest_divisor(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `size`."""
    return min(limit, size & -size)
