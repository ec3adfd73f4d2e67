# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint by name, in whatever shard they are, 8-bit weights dequantised."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import CODE_DTYPES, check_codes, check_scale, dequantize


class TensorReader:
    """A context manager: shards are opened when needed and closed at its end."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> None:
        """`dtype`: of dequantised weights."""
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Reads the tensor, codes dequantised. Raises HeaprError if scales are missing, or either is damaged."""
        value = self.stored(name)
        if value.dtype not in CODE_DTYPES.values():
            return value
        scale, block = self._checked_scale(name, value)
        return dequantize(value, scale, block).to(self.dtype)

    def verbatim(self, name: str) -> torch.Tensor:
        """Reads the tensor as it is stored. Raises HeaprError if it is codes and they or their scales are damaged."""
        value = self.stored(name)
        if value.dtype in CODE_DTYPES.values():
            self._checked_scale(name, value)
        return value

    def _checked_scale(self, name: str, codes: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Reads the scales of `codes`, and how many rows and columns share one."""
        scale_name = self.checkpoint.scale_name(name)
        if scale_name is None or scale_name not in self.checkpoint.weight_map:
            raise HeaprError(
                f"{self.checkpoint.path}: {name} is {codes.dtype} and has no scales {scale_name or name + '_scale'}; "
                "download the checkpoint again, or start from the unquantized model"
            )
        scale = self.stored(scale_name)
        shape = tuple(codes.shape)
        where = ExpertTensor.parse(name)
        scheme = self.checkpoint.expert_scheme
        if scheme and where and self.checkpoint.is_pruned_expert(name):
            block, wanted = scheme.block(where.shard, shape), scheme.scale_shape(where.shard, shape)
        else:
            base = self.checkpoint.base_quantization
            assert base is not None, "a scale name comes from one of both"
            block, wanted = base.block(shape), base.scale_shape(shape)
        check_codes(codes, name)
        check_scale(scale, wanted, scale_name)
        return scale, block

    def stored(self, name: str) -> torch.Tensor:
        """Reads the tensor as it is stored."""
        shard = self.checkpoint.weight_map[name]
        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(self.checkpoint.open(shard))
        return self._files[shard].get_tensor(name)
