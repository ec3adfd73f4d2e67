# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels: blocks of routes, scratch, grids. No host sync, sizes from the token count alone.

CUDA graphs and torch.compile therefore stay on: grids are upper bounds and idle programs return at once. An aligned
layer is 5 launches (4 where vLLM's alignment needs one for up to 64 experts), a layer of few routes 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from heapr_vllm.formats.quantized import BITWISE, PACKED_DTYPE, ExpertScheme, pack_nibbles, unpack_nibbles
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales
from heapr_vllm.model_executor.kernels.triton.jit import combine_kernel, ragged_down_kernel, ragged_up_kernel
from heapr_vllm.model_executor.kernels.triton.route_blocks import RouteBlocks
from heapr_vllm.model_executor.kernels.triton.tiles import (
    CODES_PER_WORD,
    TRITON_UNIT,
    LayerShape,
    TileConfig,
    plane_size,
)
from heapr_vllm.model_executor.kernels.triton.tuned_files import choose_config, configs_up_to
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.traffic_sums import TrafficSums

PREFETCHED_SLABS = 4


@dataclass(frozen=True)
class Steps:
    """What layers that round activations do otherwise than those that do not, `PLAIN`.

    activation_bits: as of `RaggedKernel`.
    pack, up_projection, down_projection: as the functions of this module.
    inputs: from tokens [T, H], experts and tiles to what `up_projection` takes.
    empty_hidden: from tokens, experts and blocks to room for what `up_projection` leaves.
    hidden_values: from that to numbers [blocks.hidden_rows, max_width].
    """

    activation_bits: int | None
    pack: Callable[..., None]
    inputs: Callable[[torch.Tensor, ExpertRows, TileConfig], Any]
    empty_hidden: Callable[[torch.Tensor, ExpertRows, RouteBlocks], Any]
    up_projection: Callable[..., None]
    down_projection: Callable[..., None]
    hidden_values: Callable[[Any], torch.Tensor]


def pack(w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
    """Brings the flat parameters into the kernels' layout, in place.

    `w13` [2 * rows, H]: from a gate and an up block per expert to gate row and up row of every neuron side by side.
    `w2` [rows, H]: from neurons as rows to slabs [rows / 64, H, 64]. Their scales in groups of g likewise, and both to
    slabs, [rows / 64, H / g, 128] and [rows / 64, H / g, 64]. Codes of 4 bits [2 * rows, H / 2] and [rows, H / 2] go to
    the same places and there to the words that `jit.py` describes.
    """
    is_packed = w2.dtype == PACKED_DTYPE
    w13, w2 = w13.view(_moved_as(w13)), w2.view(_moved_as(w2))
    for row, width in layout.expert_table():
        both, neurons = slice(2 * row, 2 * (row + width)), slice(row, row + width)
        _interleave(w13[both])
        if is_packed and scales is not None:
            _make_words(w13[both], w2[neurons], len(scales.w13[0]))
        else:
            _make_slabs(w2[neurons], TRITON_UNIT)
        if scales is None:
            continue
        _interleave(scales.w13[both])
        _make_slabs(scales.w13[both], 2 * TRITON_UNIT)
        if is_packed or not scales.is_by_channel(w2.shape[1]):
            _make_slabs(scales.w2[neurons], TRITON_UNIT)


def _interleave(rows: torch.Tensor) -> None:
    """[2 * width, C]: from all gate rows before all up rows to pairs of both."""
    rows.copy_(rows.view(2, -1, rows.shape[1]).transpose(0, 1).contiguous().view(rows.shape))


def _make_slabs(rows: torch.Tensor, height: int) -> None:
    """[n * height, C]: from rows to n slabs [C, height]."""
    rows.copy_(rows.view(-1, height, rows.shape[1]).transpose(1, 2).contiguous().view(rows.shape))


def _make_words(gate_up: torch.Tensor, down: torch.Tensor, num_groups: int) -> None:
    """uint8 [2 * n, H / 2] and [n, H / 2]: from pairs of neighbours to words of codes that lie a plane apart."""
    hidden_size = 2 * gate_up.shape[1]
    gate_up.copy_(_words(unpack_nibbles(gate_up), plane_size(hidden_size, hidden_size // num_groups)))
    slabs = unpack_nibbles(down).view(-1, TRITON_UNIT, hidden_size).transpose(1, 2)
    down.copy_(_words(slabs.reshape(-1, TRITON_UNIT), TRITON_UNIT // CODES_PER_WORD).view(down.shape))


def _words(codes: torch.Tensor, plane: int) -> torch.Tensor:
    """int8 [n, C] of -8 to 7 as the bytes uint8 [n, C / 2] of words."""
    return pack_nibbles(codes.unflatten(1, (-1, CODES_PER_WORD, plane)).transpose(2, 3).flatten(1))


def _moved_as(weights: torch.Tensor) -> torch.dtype:
    return BITWISE if weights.dtype == torch.float8_e4m3fn else weights.dtype


def index_tables(slots: Sequence[int], layout: RaggedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot map int32 [E + 1], table int64 [E + 1 + num_slots]) of the kernels.

    `slots`: storage slot of every global expert, `layout.num_slots` if it is not stored here. The slot map is -1, then
    the slot or -1 per expert: vLLM's alignment takes it from its second element on, and versions of it that look up
    expert id -1 find the first. The table is described in `jit.py`.
    """
    places = [row // TRITON_UNIT << 32 | width // TRITON_UNIT for row, width in layout.expert_table()]
    by_expert = [*places, 0]
    slot_map = [-1, *(slot if slot < layout.num_slots else -1 for slot in slots)]
    table = [*(by_expert[slot] for slot in slots), 0, *places]
    return torch.tensor(slot_map, dtype=torch.int32), torch.tensor(table, dtype=torch.int64)


def up_projection(
    hidden: torch.Tensor,
    x: torch.Tensor,
    experts: ExpertRows,
    top_k: int,
    blocks: RouteBlocks,
    config: TileConfig,
) -> None:
    """Launches `ragged_up_kernel`: `x` [T, H] to `hidden` [blocks.hidden_rows, max_width]."""
    tile = config.up
    n_tiles = triton.cdiv(hidden.shape[1], tile.block_n)
    weights = _weights(experts.w13, config)
    if tile.tma:
        weights = TensorDescriptor.from_tensor(weights, [2 * tile.block_n, tile.block_k])
    ragged_up_kernel[(blocks.num_blocks * n_tiles,)](
        x,
        x.stride(0),
        weights,
        experts.scales.w13 if experts.scales else None,
        experts.table,
        hidden,
        hidden.stride(0),
        blocks.route_ids,
        blocks.block_slots,
        blocks.num_rows,
        *blocks.sizes,
        n_tiles,
        H=x.shape[1],
        TOP_K=top_k,
        BLOCK_M=config.block_m,
        ONE_ROUTE=config.one_route,
        PRECISION=_precision(x.dtype),
        FUSED=config.fused,
        GROUP=group_size(experts),
        **tile.meta(),
        **config.launch(),
    )


def down_projection(
    routed: torch.Tensor,
    hidden: torch.Tensor,
    experts: ExpertRows,
    blocks: RouteBlocks,
    config: TileConfig,
) -> None:
    """Launches `ragged_down_kernel`: `hidden` as `up_projection` left it to `routed` [T * k, H]."""
    tile = config.down
    n_tiles = routed.shape[1] // tile.block_n
    inputs, weights = hidden, _weights(experts.w2, config)
    if tile.tma:
        inputs = TensorDescriptor.from_tensor(hidden, [config.block_m, tile.block_k])
        weights = TensorDescriptor.from_tensor(weights.view(-1, TRITON_UNIT), [tile.block_n, tile.block_k])
    ragged_down_kernel[(blocks.num_blocks * n_tiles,)](
        inputs,
        hidden.stride(0),
        weights,
        experts.scales.w2 if experts.scales else None,
        experts.table,
        routed,
        blocks.route_ids,
        blocks.block_slots,
        blocks.num_rows,
        *blocks.sizes,
        n_tiles,
        H=routed.shape[1],
        BLOCK_M=config.block_m,
        ONE_ROUTE=config.one_route,
        PRECISION=_precision(hidden.dtype),
        GROUP=group_size(experts),
        BY_CHANNEL=_is_by_channel(experts),
        PREFETCH=PREFETCHED_SLABS if config.prefetch else 0,
        **tile.meta(),
        **config.launch(),
    )


def combine(
    output: torch.Tensor,
    routed: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    num_experts: int,
    config: TileConfig,
) -> None:
    """Launches `combine_kernel`: `routed` [T * k, H] to the weighted sum `output` [T, H]."""
    num_tokens, hidden_size = output.shape
    block = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        routed,
        topk_weights,
        topk_ids,
        table,
        num_experts,
        output,
        output.stride(0),
        H=hidden_size,
        TOP_K=topk_ids.shape[1],
        BLOCK_N=block,
        **config.launch(),
    )


def empty_hidden(x: torch.Tensor, experts: ExpertRows, blocks: RouteBlocks) -> torch.Tensor:
    """Returns room for what `up_projection` leaves."""
    return x.new_empty(blocks.hidden_rows, experts.max_width)


def triton_ragged_moe(
    output: torch.Tensor,
    x: torch.Tensor,
    routes: Routes,
    experts: ExpertRows,
    config: TileConfig | None = None,
    steps: Steps | None = None,
) -> None:
    """Writes the MoE output [T, H] of `x` [T, H] into `output`; `config` replaces the best tiles known.

    `steps`: `PLAIN` unless given.
    """
    steps = steps or PLAIN
    num_tokens, hidden_size = x.shape
    top_k = routes.ids.shape[1]
    num_experts = len(routes.slots) - 1
    if num_stored(routes.slots, experts) == 0:
        output.zero_()
        return
    weights, ids = routes.weights.contiguous(), routes.ids.contiguous()
    shape = layer_shape(routes.slots, experts, top_k, x.dtype, steps)
    config = config or choose_config(shape, num_tokens)
    config.check(shape)
    blocks = RouteBlocks.build(ids, routes.slots, experts.table, config)
    hidden = steps.empty_hidden(x, experts, blocks)
    routed = x.new_empty(num_tokens * top_k, hidden_size)
    steps.up_projection(hidden, steps.inputs(x, experts, config), experts, top_k, blocks, config)
    if experts.traffic:
        _add_up(experts.traffic, steps.hidden_values(hidden), ids, blocks, config)
    steps.down_projection(routed, hidden, experts, blocks, config)
    combine(output, routed, weights, ids, experts.table, num_experts, config)


def _add_up(
    traffic: TrafficSums, hidden: torch.Tensor, ids: torch.Tensor, blocks: RouteBlocks, config: TileConfig
) -> None:
    """Adds the rows of `hidden` that are routes to `traffic`: four launches more, which nobody needs to be fast."""
    if config.one_route:
        slots = blocks.block_slots[ids.flatten().long() + 1]
        is_route = slots >= 0
    else:
        slots = blocks.block_slots.repeat_interleave(config.block_m)
        rows = torch.arange(len(slots), device=slots.device)
        is_route = (rows < blocks.num_rows) & (blocks.route_ids[: len(slots)] < ids.numel())
    slots = slots.clamp(min=0).long()
    squares = hidden.double().square().where(is_route[:, None], 0.0)
    traffic.activation_sq.index_add_(0, slots, squares)
    traffic.tokens.index_add_(0, slots, is_route.long())


def num_stored(slot_map: torch.Tensor, experts: ExpertRows) -> int:
    """Returns the number of experts with stored rows."""
    return len(experts.table) - len(slot_map)


def layer_shape(
    slot_map: torch.Tensor, experts: ExpertRows, top_k: int, dtype: torch.dtype, steps: Steps | None = None
) -> LayerShape:
    """Returns the shape of a layer with stored experts; `dtype`: of its tokens."""
    num_slots = num_stored(slot_map, experts)
    return LayerShape(
        experts.hidden_size,
        top_k,
        num_slots,
        len(experts.w2) // num_slots,
        experts.max_width,
        dtype,
        scheme_of(experts),
        (steps or PLAIN).activation_bits,
    )


def scheme_of(experts: ExpertRows) -> ExpertScheme | None:
    """Returns how experts are stored, as far as tiles depend on it; None in the model's dtype."""
    if experts.scales is None:
        return None
    if experts.is_packed:
        return ExpertScheme(num_bits=4, group_size=group_size(experts))
    kind = "int" if experts.w2.dtype == torch.int8 else "float"
    if _is_by_channel(experts):
        return ExpertScheme(kind, strategy="channel", group_size=None)
    return ExpertScheme(kind, group_size=group_size(experts))


def group_size(experts: ExpertRows) -> int:
    """Returns how many of the inputs of gate and up share a scale; 0 in the model's dtype."""
    return experts.hidden_size // experts.scales.w13.shape[1] if experts.scales else 0


def warm_up(
    slot_map: torch.Tensor,
    experts: ExpertRows,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype | None = None,
    steps: Steps | None = None,
) -> None:
    """Compiles the kernels for all tiles that calls of up to `max_tokens` tokens may choose.

    Every configuration runs once on a token of zeros of `dtype`; None for the weights'.
    """
    if num_stored(slot_map, experts) == 0:
        return
    x = experts.table.new_zeros(1, experts.hidden_size, dtype=dtype or experts.w2.dtype)
    routes = Routes(x.new_ones(1, top_k, dtype=torch.float32), slot_map.new_zeros(1, top_k), slot_map)
    for config in configs_up_to(layer_shape(slot_map, experts, top_k, x.dtype, steps), max_tokens):
        triton_ragged_moe(torch.empty_like(x), x, routes, experts, config=config, steps=steps)


def _is_by_channel(experts: ExpertRows) -> bool:
    return experts.scales is not None and experts.scales.is_by_channel(experts.hidden_size)


def _weights(weights: torch.Tensor, config: TileConfig) -> torch.Tensor:
    """Weights as the kernels take them: E4M3 that is decoded by bits as those, codes of 4 bits as words."""
    if weights.dtype == PACKED_DTYPE:
        return weights.view(torch.uint16)
    is_by_bits = weights.dtype == torch.float8_e4m3fn and config.decode == "bits"
    return weights.view(BITWISE) if is_by_bits else weights


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


PLAIN = Steps(
    activation_bits=None,
    pack=pack,
    inputs=lambda x, experts, config: x,
    empty_hidden=empty_hidden,
    up_projection=up_projection,
    down_projection=down_projection,
    hidden_values=lambda hidden: hidden,
)
