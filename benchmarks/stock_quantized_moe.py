# SPDX-License-Identifier: Apache-2.0
"""The opponents of `benchmarks.moe_layer` in 8 and 4 bits: what vLLM runs for quantized experts on Hopper and Ampere.

FP8 in blocks of 128 x 128 with activations rounded by 128 in vLLM's Triton MoE, with the file that vLLM ships for the
shape if it has one; 4-bit integers in groups of 128 inputs, activations as they are, in Marlin.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.stock_moe import UniformLayer
from heapr_vllm.formats.quantized import LARGEST_CODE
from heapr_vllm.model_executor.tuning.synthetic import Batch

BLOCK = 128
ZERO = 8  # what GPTQ adds to symmetric codes of 4 bits
CODES_PER_WORD = 8


@dataclass(frozen=True)
class Fp8Layer:
    """Experts as FP8 codes, `w1` [E, 2I, H] and `w2` [E, H, I], with float32 scales of their blocks, one per copy."""

    w1: list[torch.Tensor]
    w2: list[torch.Tensor]
    configs: list[Any]  # vLLM's FusedMoEQuantConfig

    @classmethod
    def of(cls, layer: UniformLayer) -> Fp8Layer:
        """Rounds the experts of `layer`. Raises ValueError if blocks do not divide its sizes."""
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        w1, w2 = ([in_blocks(weight) for weight in weights] for weights in (layer.w1, layer.w2))
        configs = [
            fp8_w8a8_moe_quant_config(w1_scale=up[1], w2_scale=down[1], block_shape=[BLOCK, BLOCK])
            for up, down in zip(w1, w2, strict=True)
        ]
        return cls([codes for codes, _ in w1], [codes for codes, _ in w2], configs)

    def vllm(self, batch: Batch, copy: int = 0) -> torch.Tensor:
        """Output [T, H] of vLLM's Triton MoE."""
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        copy %= len(self.w1)
        config = self.configs[copy]
        return fused_experts(
            batch.x, self.w1[copy], self.w2[copy], batch.topk_weights, batch.topk_ids, quant_config=config
        )


@dataclass(frozen=True)
class MarlinLayer:
    """Experts as codes of 4 bits in Marlin's layout, `w1` and `w2`, with scales of groups, one per copy."""

    w1: list[tuple[torch.Tensor, torch.Tensor]]
    w2: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, layer: UniformLayer) -> MarlinLayer:
        """Rounds the experts of `layer`. Raises ValueError if groups do not divide its sizes."""
        w1, w2 = ([_for_marlin(weight) for weight in weights] for weights in (layer.w1, layer.w2))
        return cls(w1, w2)

    def vllm(self, batch: Batch, copy: int = 0) -> torch.Tensor:
        """Output [T, H] of vLLM's Marlin MoE."""
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        from vllm.scalar_type import scalar_types

        copy %= len(self.w1)
        (w1, w1_scale), (w2, w2_scale) = self.w1[copy], self.w2[copy]
        return fused_marlin_moe(
            batch.x,
            w1,
            w2,
            bias1=None,
            bias2=None,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            topk_weights=batch.topk_weights,
            topk_ids=batch.topk_ids,
            quant_type_id=scalar_types.uint4b8.id,
            global_num_experts=len(w1),
        )


OPPONENTS = {"fp8": ("vllm fp8 blocks", Fp8Layer), "int4": ("vllm marlin int4", MarlinLayer)}


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds [E, O, I] to FP8 codes and float32 scales [E, O / BLOCK, I / BLOCK]."""
    experts, rows, columns = weight.shape
    _check(rows, columns)
    blocks = weight.float().view(experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((2, 4), keepdim=True).clamp(min=1e-12) / LARGEST_CODE["float"]
    codes = (blocks / scale).to(torch.float8_e4m3fn).view(weight.shape)
    return codes, scale[:, :, 0, :, 0].contiguous()


def as_gptq(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds [E, O, I] to GPTQ's words int32 [E, I / 8, O] and scales [E, I / BLOCK, O] of its dtype."""
    experts, outputs, inputs = weight.shape
    _check(BLOCK, inputs)
    groups = weight.float().view(experts, outputs, inputs // BLOCK, BLOCK)
    scale = (groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (ZERO - 1)).to(weight.dtype)
    codes = (groups / scale).round().clamp(-ZERO, ZERO - 1).view(weight.shape).int() + ZERO
    words = codes.mT.reshape(experts, inputs // CODES_PER_WORD, CODES_PER_WORD, outputs)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    return (words << shifts).sum(2, dtype=torch.int32), scale[..., 0].mT.contiguous()


def _for_marlin(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm._custom_ops import gptq_marlin_moe_repack
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales

    experts, outputs, inputs = weight.shape
    words, scale = as_gptq(weight)
    sizes: dict[str, Any] = {"size_k": inputs, "size_n": outputs}
    if "perm" in inspect.signature(gptq_marlin_moe_repack).parameters:  # vLLM 0.26
        sizes["perm"] = words.new_empty(experts, 0)
    codes = gptq_marlin_moe_repack(words, num_bits=4, **sizes)
    return codes, marlin_moe_permute_scales(scale, size_k=inputs, size_n=outputs, group_size=BLOCK)


def _check(rows: int, columns: int) -> None:
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide a matrix of {rows} x {columns}")
