# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on our compiled op `heapr::cpu_ragged_moe`: when it is used, how its weights are packed."""

from __future__ import annotations

import os

import torch
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.storage.layout import RaggedLayout

WIDTH_UNIT = 16  # neurons of a panel, half of its columns
COLUMNS = 32  # outputs of a panel; hidden sizes are multiples of it
TIMED = ("avx2", "avx512", "avx512_bf16")  # instruction sets where it was faster than vLLM's op


class CompiledKernel(RaggedKernel):
    """Runs on CPUs, compiled there on first use.

    It is the default on AVX2 and AVX-512 without AMX: with AMX (through PyTorch's brgemm) it was never timed against
    vLLM's op. HEAPR_CPU_KERNEL=compiled or native overrides that.
    """

    name = "compiled"
    width_unit = WIDTH_UNIT

    def is_default(self) -> bool:
        override = os.environ.get("HEAPR_CPU_KERNEL")
        if override == "native" or not current_platform.is_cpu():
            return False
        return build.isa() in TIMED or override in ("compiled", "ragged")

    def machine_obstacle(self) -> str | None:
        if not current_platform.is_cpu():
            return "it is for CPUs; choose triton"
        if not can_run():
            return "it cannot be compiled, the log says why; install a C++ compiler"
        return None

    def layer_obstacle(self, dtype: torch.dtype, hidden_size: int, scheme: ExpertScheme | None = None) -> str | None:
        if scheme is not None:
            return f"it does not decode {scheme.name} experts; choose reference"
        if hidden_size % COLUMNS:
            return f"the hidden size {hidden_size} is no multiple of {COLUMNS}; choose reference"
        return None

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        """Brings both flat parameters into panels, in place; `ragged_moe.cpp` describes them."""
        pair = 2 if w13.dtype == torch.bfloat16 else 1
        hidden = w2.shape[1]
        for row, width in layout.expert_table():
            gate_up, down = w13[2 * row : 2 * (row + width)], w2[row : row + width]
            panels = gate_up.view(2, width // WIDTH_UNIT, WIDTH_UNIT, hidden // pair, pair).permute(1, 3, 0, 2, 4)
            gate_up.copy_(panels.clone(memory_format=torch.contiguous_format).view(gate_up.shape))
            panels = down.view(width // pair, pair, hidden // COLUMNS, COLUMNS).permute(2, 0, 3, 1)
            down.copy_(panels.clone(memory_format=torch.contiguous_format).view(down.shape))

    def run(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        torch.ops.heapr.cpu_ragged_moe(
            output, x, experts.w13, experts.w2, routes.weights, routes.ids, routes.slots, experts.table
        )

    def run_in_graph(self, output: torch.Tensor, x: torch.Tensor, routes: Routes, experts: ExpertRows) -> None:
        """Does as `run`, which is one op already."""
        self.run(output, x, routes, experts)


def can_run() -> bool:
    """Returns whether the op is there, compiling it first if need be."""
    if build.isa() == "avx512_amx":
        torch.cpu._init_amx()  # asks the kernel for the tile registers
    return extension.load()
