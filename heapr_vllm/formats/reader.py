# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint by name, in whatever shard they are, block-scaled FP8 dequantised."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import FP8_SCALE_SUFFIX, Checkpoint


class TensorReader:
    """A context manager: shards are opened when needed and closed at its end."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Reads the tensor as stored, FP8 as bfloat16. Raises HeaprError if a scale is missing."""
        value = self._stored(name)
        if value.dtype != torch.float8_e4m3fn:
            return value
        block = self.checkpoint.fp8_block
        if block is None or name + FP8_SCALE_SUFFIX not in self.checkpoint.weight_map:
            raise HeaprError(
                f"{self.checkpoint.path}: {name} is FP8 and has no {name}{FP8_SCALE_SUFFIX}; "
                "start from the unquantized model"
            )
        return dequantize(value, self._stored(name + FP8_SCALE_SUFFIX), block)

    def _stored(self, name: str) -> torch.Tensor:
        shard = self.checkpoint.weight_map[name]
        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(self.checkpoint.open(shard))
        return self._files[shard].get_tensor(name)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiplies FP8 `weight` [O, I] by one factor per block of rows and columns, rounded to bfloat16.

    `scale` [ceil(O / block[0]), ceil(I / block[1])], stored as `weight_scale_inv` (DeepSeek-V3, arXiv 2412.19437,
    section 3.3.2).
    """
    rows, columns = weight.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float().mul_(factors).bfloat16()
