# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels for activations in 8 bits, for `launch.triton_ragged_moe`; one launch rounds tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from heapr_vllm.formats.quantized import dequantize
from heapr_vllm.model_executor.kernels.base import ExpertRows, Scales
from heapr_vllm.model_executor.kernels.slabs import SCALE_DTYPE, round_by_slabs
from heapr_vllm.model_executor.kernels.triton import launch
from heapr_vllm.model_executor.kernels.triton.a8_jit import a8_down_kernel, a8_up_kernel, round_rows_kernel
from heapr_vllm.model_executor.kernels.triton.launch import Steps, group_size
from heapr_vllm.model_executor.kernels.triton.route_blocks import RouteBlocks
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT, TileConfig
from heapr_vllm.model_executor.storage.layout import RaggedLayout


@dataclass(frozen=True)
class Rounded:
    """Rows in 8 bits: `codes` [n, K] of the weights' type, `scales` float32 [n, K / group]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """Returns float32 [n, K]."""
        return dequantize(self.codes, self.scales, (1, self.codes.shape[1] // self.scales.shape[1]))


def pack(w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
    """Does as `launch.pack`; `w2` in groups along H, whose scales differ by neuron, is rounded again by slabs.

    Then a slab and output have one scale, which is constant along the sum over a slab. `slab_scales` finds them. What
    is rounded are the codes of the checkpoint: every reload brings them and their scales anew.
    """
    hidden_size = w2.shape[1]
    if scales is None or scales.is_by_channel(hidden_size) or not layout.num_slots:
        launch.pack(w13, w2, layout, scales)
        return
    by_slab = []
    for row, width in layout.expert_table():
        by_slab.append(round_by_slabs(w2[row : row + width], scales.w2[row : row + width], TRITON_UNIT))
    launch.pack(w13, w2, layout, scales)
    slab_scales(scales.w2, hidden_size).copy_(torch.cat(by_slab))


def slab_scales(w2_scale: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Returns the bf16 scales [rows / 64, H] that `pack` put where those in groups had been, float32 [rows, H / g].

    They fit where g is 128 at most.
    """
    slabs = len(w2_scale) // TRITON_UNIT
    return w2_scale.view(SCALE_DTYPE).flatten()[: slabs * hidden_size].view(slabs, hidden_size)


def inputs(x: torch.Tensor, experts: ExpertRows, config: TileConfig) -> Rounded:
    """Launches `round_rows_kernel`: tokens [T, H] as `up_projection` takes them."""
    num_tokens, hidden_size = x.shape
    group = config.up.block_k
    block = min(1024, triton.next_power_of_2(hidden_size))
    codes = x.new_empty(num_tokens, hidden_size, dtype=experts.w13.dtype)
    scales = x.new_empty(num_tokens, hidden_size // group, dtype=torch.float32)
    round_rows_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        x, x.stride(0), codes, scales, H=hidden_size, BLOCK_N=block, BLOCK_K=group, **config.launch()
    )
    return Rounded(codes, scales)


def empty_hidden(x: torch.Tensor, experts: ExpertRows, blocks: RouteBlocks) -> Rounded:
    """Returns room for what `up_projection` leaves."""
    codes = x.new_empty(blocks.hidden_rows, experts.max_width, dtype=experts.w2.dtype)
    scales = x.new_empty(blocks.hidden_rows, experts.max_width // TRITON_UNIT, dtype=torch.float32)
    return Rounded(codes, scales)


def up_projection(
    hidden: Rounded,
    x: Rounded,
    experts: ExpertRows,
    top_k: int,
    blocks: RouteBlocks,
    config: TileConfig,
) -> None:
    """Launches `a8_up_kernel`: tokens of `inputs` to `hidden` of `empty_hidden`."""
    assert experts.scales is not None
    tile = config.up
    n_tiles = triton.cdiv(hidden.codes.shape[1], tile.block_n)
    a8_up_kernel[(blocks.num_blocks * n_tiles,)](
        x.codes,
        x.scales,
        experts.w13,
        experts.scales.w13,
        experts.table,
        hidden.codes,
        hidden.scales,
        hidden.codes.stride(0),
        blocks.route_ids,
        blocks.block_slots,
        blocks.num_rows,
        *blocks.sizes,
        n_tiles,
        H=x.codes.shape[1],
        TOP_K=top_k,
        BLOCK_M=config.block_m,
        ONE_ROUTE=config.one_route,
        GROUP=group_size(experts),
        **tile.sizes(),
        **config.launch(),
    )


def down_projection(
    routed: torch.Tensor,
    hidden: Rounded,
    experts: ExpertRows,
    blocks: RouteBlocks,
    config: TileConfig,
) -> None:
    """Launches `a8_down_kernel`: `hidden` as `up_projection` left it to `routed` [T * k, H]."""
    assert experts.scales is not None
    tile, hidden_size, w2_scale = config.down, routed.shape[1], experts.scales.w2
    by_channel = experts.scales.is_by_channel(hidden_size)
    n_tiles = hidden_size // tile.block_n
    a8_down_kernel[(blocks.num_blocks * n_tiles,)](
        hidden.codes,
        hidden.scales,
        hidden.codes.stride(0),
        experts.w2,
        w2_scale if by_channel else slab_scales(w2_scale, hidden_size),
        experts.table,
        routed,
        blocks.route_ids,
        blocks.block_slots,
        blocks.num_rows,
        *blocks.sizes,
        n_tiles,
        H=hidden_size,
        BLOCK_M=config.block_m,
        ONE_ROUTE=config.one_route,
        BY_CHANNEL=by_channel,
        **tile.sizes(),
        **config.launch(),
    )


A8 = Steps(
    activation_bits=8,
    pack=pack,
    inputs=inputs,
    empty_hidden=empty_hidden,
    up_projection=up_projection,
    down_projection=down_projection,
    hidden_values=Rounded.values,
)
