# SPDX-License-Identifier: Apache-2.0
"""Variable-width experts on the compiled op `heapr::cpu_ragged_moe`: when it is used, how its weights are packed."""

from __future__ import annotations

import os

import torch

from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.storage.layout import RaggedLayout

WIDTH_UNIT = 16  # neurons of a panel, half of the columns of the op's micro-kernel
COLUMNS = 32  # outputs of a panel; hidden sizes are multiples of it


def is_used() -> bool:
    """Whether CPU layers run on the op: AVX2 or AVX-512 without AMX, and it compiles.

    With AMX (through PyTorch's brgemm) ours was never timed against vLLM's op, which is the default there.
    HEAPR_CPU_KERNEL=ragged or native overrides the choice, as HEAPR_KERNEL does on every machine.
    """
    override = os.environ.get("HEAPR_CPU_KERNEL")
    if override == "native":
        return False
    is_measured = build.isa() in ("avx2", "avx512", "avx512_bf16")
    if not is_measured and override != "ragged":
        return False
    return can_run()


def can_run() -> bool:
    """Whether the op is there, compiling it first if need be."""
    if build.isa() == "avx512_amx":
        torch.cpu._init_amx()  # asks the kernel for the tile registers
    return extension.load()


def pack(w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout) -> None:
    """Brings both flat parameters into panels, in place; `ragged_moe.cpp` describes them."""
    pair = 2 if w13.dtype == torch.bfloat16 else 1
    hidden = w2.shape[1]
    for row, width in layout.expert_table():
        gate_up, down = w13[2 * row : 2 * (row + width)], w2[row : row + width]
        panels = gate_up.view(2, width // WIDTH_UNIT, WIDTH_UNIT, hidden // pair, pair).permute(1, 3, 0, 2, 4)
        gate_up.copy_(panels.clone(memory_format=torch.contiguous_format).view(gate_up.shape))
        panels = down.view(width // pair, pair, hidden // COLUMNS, COLUMNS).permute(2, 0, 3, 1)
        down.copy_(panels.clone(memory_format=torch.contiguous_format).view(down.shape))
