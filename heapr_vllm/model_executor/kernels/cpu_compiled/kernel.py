# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on our compiled op `heapr::cpu_ragged_moe`: when it is used, how its weights are packed."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import BITWISE, PACKED_DTYPE, ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.storage.layout import RaggedLayout

WIDTH_UNIT = 16  # neurons of a panel, half of its columns
COLUMNS = 32  # outputs of a panel; hidden sizes are multiples of it


class CompiledKernel(RaggedKernel):
    """Runs on CPUs, compiled there on first use."""

    name = "compiled"
    width_unit = WIDTH_UNIT
    adds_up_traffic = True
    takes_two_widths = True

    def is_default(self) -> bool:
        return current_platform.is_cpu()

    def machine_obstacle(self) -> str | None:
        if not current_platform.is_cpu():
            return "it is for CPUs; choose triton"
        if not can_run():
            return "it cannot be compiled, the log says why; install a C++ compiler"
        return None

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if hidden_size % COLUMNS:
            return f"the hidden size {hidden_size} is no multiple of {COLUMNS}; choose reference"
        return None

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        """Brings flat parameters, of 8 bits too, and scales into panels, in place; `ragged_moe.cpp` describes them."""
        for row, width in layout.expert_table():
            both, neurons = slice(2 * row, 2 * (row + width)), slice(row, row + width)
            self.pack_gate_up(w13[both])
            self.pack_down(w2[neurons])
            if scales:
                reorder(scales.w13[both], (2, -1, WIDTH_UNIT, scales.w13.shape[1]), (1, 3, 0, 2))
            if scales and not scales.is_by_channel(w2.shape[1]):
                reorder(scales.w2[neurons], (width, -1), (1, 0))

    def pack_gate_up(self, rows: torch.Tensor) -> None:
        """Brings an expert's gate and up [2 * width, H] into panels, in place.

        `codes.h` says why the 16 neurons of a panel of codes are split into fours.
        """
        if rows.dtype == PACKED_DTYPE:
            reorder_nibbles(rows, (2, -1, WIDTH_UNIT, rows.shape[1] // 2, 2, 2), (1, 3, 2, 5, 4, 0))
        elif rows.itemsize == 1:
            _to_sign_and_magnitude(rows)
            reorder(rows.view(BITWISE), (2, -1, 4, 4, rows.shape[1] // 2, 2), (1, 4, 2, 0, 3, 5))
        else:
            pair = 2 if rows.dtype == torch.bfloat16 else 1
            reorder(rows, (2, -1, WIDTH_UNIT, rows.shape[1] // pair, pair), (1, 3, 0, 2, 4))

    def pack_down(self, rows: torch.Tensor) -> None:
        """Brings an expert's down [width, H] into panels, in place, of two times 16 outputs likewise."""
        width = len(rows)
        if rows.dtype == PACKED_DTYPE:
            reorder_nibbles(rows, (width // 4, 2, 2, -1, 2, WIDTH_UNIT), (3, 0, 5, 2, 1, 4))
        elif rows.itemsize == 1:
            _to_sign_and_magnitude(rows)
            reorder(rows.view(BITWISE), (width // 2, 2, -1, 2, 4, 4), (2, 0, 4, 3, 5, 1))
        else:
            pair = 2 if rows.dtype == torch.bfloat16 else 1
            reorder(rows, (width // pair, pair, -1, COLUMNS), (2, 0, 3, 1))

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        torch.ops.heapr.cpu_ragged_moe(
            output,
            x,
            experts.w13,
            experts.w2,
            routes.weights,
            routes.ids,
            routes.slots,
            experts.table,
            experts.scales.w13 if experts.scales else None,
            experts.scales.w2 if experts.scales else None,
            experts.traffic.activation_sq if experts.traffic else None,
            experts.traffic.tokens if experts.traffic else None,
            self.activation_bits == 8,
        )

    def run_in_graph(
        self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows, recorded: str = ""
    ) -> None:
        """Does as `run`, which is one op already; with traffic through the one that knows which calls count."""
        if recorded:
            super().run_in_graph(output, x, routes, experts, recorded)
        else:
            self.run(output, x, routes, experts)


def can_run() -> bool:
    """Returns whether the op is there, compiling it first if need be."""
    if build.isa() == "avx512_amx":
        torch.cpu._init_amx()  # asks the kernel for the tile registers
    return extension.load()


def reorder(part: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Rewrites a contiguous part of a parameter as its view of `shape` with the axes in `order`."""
    part.copy_(part.view(shape).permute(order).contiguous().view(part.shape))


def reorder_nibbles(part: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Does as `reorder` with codes of 4 bits, of which those along the last axis of the result share a byte."""
    nibbles = torch.stack([part & 15, part >> 4], -1)
    low, high = nibbles.view(shape).permute(order).unbind(-1)
    part.copy_((low | high << 4).reshape(part.shape))


def _to_sign_and_magnitude(codes: torch.Tensor) -> None:
    """int8 in place: -n becomes 128 + n, and -128 becomes -0. Codes of floats stay."""
    if codes.dtype == torch.int8:
        codes.copy_(torch.where(codes < 0, -codes | -128, codes))
