# SPDX-License-Identifier: Apache-2.0
"""Integer experts on our compiled op with activations rounded to 8 bits, so that products are of integers."""

from __future__ import annotations

import torch

from heapr_vllm.formats.quantized import PACKED_DTYPE, ZERO_BYTE_4_BITS, ExpertScheme
from heapr_vllm.model_executor.kernels.base import Scales
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import (
    COLUMNS,
    WIDTH_UNIT,
    CompiledKernel,
    reorder,
    reorder_nibbles,
)
from heapr_vllm.model_executor.kernels.slabs import SCALE_DTYPE, round_by_slabs
from heapr_vllm.model_executor.storage.layout import RaggedLayout

SLAB = 128  # neurons whose activations share a scale, and codes of 8 bits in down_proj: kHiddenGroup of integers.h
MOST_GROUP = 128  # outputs of a scale in groups, at most
LEAST_WIDTH = MOST_GROUP // 2  # then bf16 scales by slab have room: ceil(width / SLAB) * H * 2 <= width * H / group * 4


class CompiledA8Kernel(CompiledKernel):
    """Runs on CPUs with AVX-512 VNNI; float32 is left to kernels that do not round.

    On AMX it has to be asked for: tiles of bfloat16 do more products than VNNI does.
    """

    name = "compiled_a8"
    activation_bits = 8

    def is_default(self) -> bool:
        return super().is_default() and not build.isa().endswith("amx")

    def machine_obstacle(self) -> str | None:
        if obstacle := super().machine_obstacle():
            return obstacle
        if not build.has_vnni():
            return "it needs a CPU with AVX-512 VNNI; choose compiled"
        return None

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if scheme is None or scheme.type != "int":
            return f"it is for integer experts, not {scheme.name if scheme else 'unquantized'} ones; choose compiled"
        if scheme.group_size and scheme.group_size > MOST_GROUP and scheme.of("w2").num_bits == 8:
            return f"it is for groups of at most {MOST_GROUP}, not {scheme.group_size}; choose compiled"
        if dtype == torch.float32:
            return "it rounds activations to 8 bits, and the model computes in float32; choose compiled"
        return super().layer_obstacle(dtype, hidden_size, scheme)

    def stored_widths(self, widths: list[int]) -> list[int]:
        """Returns those of `CompiledKernel`, but at least 64, so that `pack` has room, whatever the scheme."""
        return [max(width, LEAST_WIDTH) if width else 0 for width in super().stored_widths(widths)]

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        """Does as `CompiledKernel.pack`; then scales of down_proj in groups and 8 bits have made way for those by slab.

        So hidden activations are rounded once. In 4 bits they are rounded times their scales, and a neuron without
        weights in a group of outputs gets scale 0 there, so that it does not coarsen others.
        """
        if scales is None or scales.is_by_channel(w2.shape[1]):
            super().pack(w13, w2, layout, scales)
            return
        if w2.dtype == PACKED_DTYPE:
            is_zero = (w2 == ZERO_BYTE_4_BITS).unflatten(1, (scales.w2.shape[1], -1)).all(-1)
            scales.w2.masked_fill_(is_zero, 0)
            super().pack(w13, w2, layout, scales)
            return
        places = [slice(row, row + width) for row, width in layout.expert_table()]
        by_slab = [round_by_slabs(w2[place], scales.w2[place], SLAB) for place in places]
        super().pack(w13, w2, layout, scales)  # which moves the scales that are replaced now
        for place, slab_scales in zip(places, by_slab, strict=True):
            by_panel = slab_scales.unflatten(1, (-1, COLUMNS)).transpose(0, 1).flatten()
            scales.w2[place].view(SCALE_DTYPE).view(-1)[: len(by_panel)] = by_panel

    def pack_gate_up(self, rows: torch.Tensor) -> None:
        """Makes codes unsigned, as those of 4 bits are, in the order of `integers.h`."""
        if rows.dtype == PACKED_DTYPE:
            reorder_nibbles(rows, (2, -1, WIDTH_UNIT, rows.shape[1] // 2, 4), (1, 3, 2, 4, 0))
        else:
            rows.bitwise_xor_(-128)
            reorder(rows, (2, -1, WIDTH_UNIT, rows.shape[1] // 4, 4), (1, 3, 0, 2, 4))

    def pack_down(self, rows: torch.Tensor) -> None:
        """Does as `pack_gate_up`."""
        if rows.dtype == PACKED_DTYPE:
            reorder_nibbles(rows, (len(rows) // 4, 4, -1, 2, WIDTH_UNIT), (2, 0, 4, 1, 3))
        else:
            rows.bitwise_xor_(-128)
            reorder(rows, (len(rows) // 4, 4, -1, COLUMNS), (2, 0, 3, 1))
