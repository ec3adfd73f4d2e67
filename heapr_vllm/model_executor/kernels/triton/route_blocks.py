# SPDX-License-Identifier: Apache-2.0
"""Routes sorted by expert into blocks, as the Triton kernels take them."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from heapr_vllm.model_executor.kernels.triton.tiles import TileConfig


def align_routes(
    topk_ids: torch.Tensor, slot_map: torch.Tensor, num_slots: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes sorted by slot and padded to whole blocks: (route_ids, block_slots, num_rows) of `jit.py`.

    `topk_ids` int32 [T, k]; routes of absent experts appear in no block. vLLM's CUDA op where there is one, otherwise
    torch without a host sync; sizes depend on shapes only.
    """
    if topk_ids.is_cuda and _has_vllm_op():
        return _align_by_vllm(topk_ids, slot_map, block_m)
    device, num_routes = topk_ids.device, topk_ids.numel()
    num_blocks = max_blocks(num_routes, num_slots, block_m)
    slot = slot_map[topk_ids.flatten().long() + 1].long()
    slot = torch.where(slot < 0, num_slots, slot)
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
    route_ids[-1:].fill_(num_routes)  # not by assignment, which copies the number from the host
    block_starts = torch.arange(num_blocks, device=device) * block_m
    block_slots = torch.searchsorted(ends, block_starts, right=True)
    return route_ids, block_slots.where(block_starts < ends[-1], -1).int(), ends[-1:].int()


def _align_by_vllm(
    topk_ids: torch.Tensor, slot_map: torch.Tensor, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return moe_align_block_size(
        topk_ids, block_m, len(slot_map) - 1, expert_map=slot_map[1:], pad_sorted_ids=True, ignore_invalid_experts=True
    )


@cache
def _has_vllm_op() -> bool:
    with suppress(ImportError):
        importlib.import_module("vllm._custom_ops")  # loads the ops
    return hasattr(torch.ops._moe_C, "moe_align_block_size")


def max_blocks(num_routes: int, num_slots: int, block_m: int) -> int:
    """Upper bound of blocks: every expert that gets a route may leave one block nearly empty."""
    busy = min(num_routes, num_slots)
    return busy + (num_routes - busy) // block_m


@dataclass(frozen=True)
class RouteBlocks:
    """Routes grouped into `num_blocks` blocks, each of one expert: the kernels' first arguments.

    `hidden_rows`: rows of the intermediate that the blocks use. `sizes`: the kernels' sizes but the number of tiles.
    """

    route_ids: torch.Tensor
    block_slots: torch.Tensor
    num_rows: torch.Tensor
    sizes: tuple[int, int, int]
    hidden_rows: int

    @property
    def num_blocks(self) -> int:
        return self.sizes[-1]

    @classmethod
    def build(
        cls, topk_ids: torch.Tensor, slot_map: torch.Tensor, table: torch.Tensor, config: TileConfig
    ) -> RouteBlocks:
        """`topk_ids` int32 [T, k] global expert ids, negative for absent ones; tables as `index_tables` makes them."""
        num_routes, num_experts = topk_ids.numel(), len(slot_map) - 1
        num_slots = len(table) - len(slot_map)
        if config.one_route:
            sizes = (num_routes, num_experts, num_routes)
            return cls(topk_ids, slot_map, slot_map, sizes, num_routes)
        route_ids, block_slots, num_rows = align_routes(topk_ids, slot_map, num_slots, config.block_m)
        num_blocks = max_blocks(num_routes, num_slots, config.block_m)
        sizes = (num_routes, num_experts, num_blocks)
        return cls(route_ids, block_slots, num_rows, sizes, num_blocks * config.block_m)
