# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels: blocks of routes, scratch, grids. No host sync, sizes from the token count alone.

CUDA graphs and torch.compile therefore stay on: grids are upper bounds and idle programs return at once. An aligned
layer is 5 launches (4 where vLLM's alignment needs one for up to 64 experts), a layer of few routes 3.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from heapr_vllm.model_executor.layout import TRITON_UNIT, RaggedLayout
from heapr_vllm.model_executor.tile_config import LayerShape, TileConfig, choose_config, configs_up_to
from heapr_vllm.model_executor.triton_kernels import combine_kernel, ragged_down_kernel, ragged_up_kernel

PREFETCHED_SLABS = 4


def pack(w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout) -> None:
    """Brings both flat parameters into the kernels' layout, in place.

    `w13` [2 * rows, H]: from a gate and an up block per expert to gate row and up row of every neuron side by side.
    `w2` [rows, H]: from neurons as rows to slabs [rows / 64, H, 64].
    """
    hidden_size = w2.shape[1]
    for row, width in layout.expert_table():
        both = w13[2 * row : 2 * (row + width)]
        both.copy_(both.view(2, width, hidden_size).transpose(0, 1).contiguous().view(both.shape))
        slabs = w2[row : row + width]
        slabs.copy_(slabs.view(-1, TRITON_UNIT, hidden_size).transpose(1, 2).contiguous().view(slabs.shape))


def index_tables(slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot map int32 [E + 1], table int64 [E + 1 + num_slots]) of the kernels.

    `slots`: storage slot of every global expert, `layout.num_slots` if it is not stored here. The slot map is -1, then
    the slot or -1 per expert: vLLM's alignment takes it from its second element on, and versions of it that look up
    expert id -1 find the first. The table is described in `triton_kernels`.
    """
    places = [row // TRITON_UNIT << 32 | width // TRITON_UNIT for row, width in layout.expert_table()]
    by_expert = [*places, 0]
    slot_map = [-1, *(slot if slot < layout.num_slots else -1 for slot in slots)]
    table = [*(by_expert[slot] for slot in slots), 0, *places]
    return torch.tensor(slot_map, dtype=torch.int32), torch.tensor(table, dtype=torch.int64)


def align_routes(topk_ids: torch.Tensor, slot_map: torch.Tensor, num_slots: int,
                 block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes sorted by slot and padded to whole blocks: (route_ids, block_slots, num_rows) of `triton_kernels`.

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
    route_ids[-1] = num_routes
    block_starts = torch.arange(num_blocks, device=device) * block_m
    block_slots = torch.searchsorted(ends, block_starts, right=True)
    return route_ids, block_slots.where(block_starts < ends[-1], -1).int(), ends[-1:].int()


def _align_by_vllm(topk_ids: torch.Tensor, slot_map: torch.Tensor,
                   block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return moe_align_block_size(topk_ids, block_m, len(slot_map) - 1, expert_map=slot_map[1:], pad_sorted_ids=True,
                                ignore_invalid_experts=True)


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
class Blocks:
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
    def build(cls, topk_ids: torch.Tensor, slot_map: torch.Tensor, table: torch.Tensor, config: TileConfig) -> Blocks:
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


def up_projection(hidden: torch.Tensor, x: torch.Tensor, w13: torch.Tensor, table: torch.Tensor, top_k: int,
                  blocks: Blocks, config: TileConfig) -> None:
    """Launches `ragged_up_kernel`: `x` [T, H] to `hidden` [blocks.hidden_rows, max_width]."""
    tile = config.up
    n_tiles = triton.cdiv(hidden.shape[1], tile.block_n)
    weights = TensorDescriptor.from_tensor(w13, [2 * tile.block_n, tile.block_k]) if tile.tma else w13
    ragged_up_kernel[(blocks.num_blocks * n_tiles,)](
        x, x.stride(0), weights, table, hidden, hidden.stride(0), blocks.route_ids, blocks.block_slots,
        blocks.num_rows, *blocks.sizes, n_tiles, H=x.shape[1], TOP_K=top_k, BLOCK_M=config.block_m,
        ONE_ROUTE=config.one_route, PRECISION=_precision(x.dtype), FUSED=config.fused, **tile.meta(),
        **config.launch())


def down_projection(routed: torch.Tensor, hidden: torch.Tensor, w2: torch.Tensor, table: torch.Tensor,
                    blocks: Blocks, config: TileConfig) -> None:
    """Launches `ragged_down_kernel`: `hidden` as `up_projection` left it to `routed` [T * k, H]."""
    tile = config.down
    n_tiles = routed.shape[1] // tile.block_n
    inputs, weights = hidden, w2
    if tile.tma:
        inputs = TensorDescriptor.from_tensor(hidden, [config.block_m, tile.block_k])
        weights = TensorDescriptor.from_tensor(w2.view(-1, TRITON_UNIT), [tile.block_n, tile.block_k])
    ragged_down_kernel[(blocks.num_blocks * n_tiles,)](
        inputs, hidden.stride(0), weights, table, routed, blocks.route_ids, blocks.block_slots, blocks.num_rows,
        *blocks.sizes, n_tiles, H=routed.shape[1], BLOCK_M=config.block_m, ONE_ROUTE=config.one_route,
        PRECISION=_precision(hidden.dtype), PREFETCH=PREFETCHED_SLABS if config.prefetch else 0, **tile.meta(),
        **config.launch())


def combine(output: torch.Tensor, routed: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
            table: torch.Tensor, num_experts: int, config: TileConfig) -> None:
    """Launches `combine_kernel`: `routed` [T * k, H] to the weighted sum `output` [T, H]."""
    num_tokens, hidden_size = output.shape
    block = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        routed, topk_weights, topk_ids, table, num_experts, output, output.stride(0), H=hidden_size,
        TOP_K=topk_ids.shape[1], BLOCK_N=block, **config.launch())


def triton_ragged_moe(output: torch.Tensor, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
                      topk_weights: torch.Tensor, topk_ids: torch.Tensor, slot_map: torch.Tensor, table: torch.Tensor,
                      max_width: int, config: TileConfig | None = None) -> None:
    """Writes the MoE output [T, H] into `output`.

    `hidden_states` [T, H]; `w13` [2 * rows, H] and `w2` as `pack` left them; `topk_weights` float and `topk_ids` int32
    [T, k] with global expert ids, negative for absent ones; `slot_map` and `table` from `index_tables`; `max_width` the
    widest stored width.
    """
    num_tokens, hidden_size = hidden_states.shape
    top_k = topk_ids.shape[1]
    if len(table) == len(slot_map):
        output.zero_()
        return
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    if config is None:
        shape = layer_shape(w13, slot_map, table, top_k, max_width)
        config = choose_config(shape, num_tokens)
    config.check(hidden_size)
    blocks = Blocks.build(topk_ids, slot_map, table, config)
    hidden = hidden_states.new_empty(blocks.hidden_rows, max_width)
    routed = hidden_states.new_empty(num_tokens * top_k, hidden_size)
    up_projection(hidden, hidden_states, w13, table, top_k, blocks, config)
    down_projection(routed, hidden, w2, table, blocks, config)
    combine(output, routed, topk_weights, topk_ids, table, len(slot_map) - 1, config)


def layer_shape(w13: torch.Tensor, slot_map: torch.Tensor, table: torch.Tensor, top_k: int,
                max_width: int) -> LayerShape:
    """Shape of a layer with stored experts; arguments as in `triton_ragged_moe`."""
    num_slots = len(table) - len(slot_map)
    return LayerShape(w13.shape[1], top_k, num_slots, len(w13) // (2 * num_slots), max_width, w13.dtype)


def warm_up(w13: torch.Tensor, w2: torch.Tensor, slot_map: torch.Tensor, table: torch.Tensor, top_k: int,
            max_width: int, max_tokens: int) -> None:
    """Compiles the kernels for all tiles that up to `max_tokens` tokens may choose, so that no request waits for it.

    Every configuration runs once on a token of zeros; arguments as in `triton_ragged_moe`.
    """
    if len(table) == len(slot_map):
        return
    x = w2.new_zeros(1, w2.shape[1])
    weights, ids = x.new_ones(1, top_k, dtype=torch.float32), slot_map.new_zeros(1, top_k)
    shape = layer_shape(w13, slot_map, table, top_k, max_width)
    for config in configs_up_to(shape, max_tokens):
        triton_ragged_moe(torch.empty_like(x), x, w13, w2, weights, ids, slot_map, table, max_width, config=config)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
