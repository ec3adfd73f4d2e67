# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint by name, in whatever shard they are, codes dequantised."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import (
    CODE_DTYPES,
    PACKED_DTYPE,
    SCALE_SUFFIX,
    ExpertScheme,
    check_codes,
    check_scale,
    dequantize,
)


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
        if name in self.checkpoint.packed:
            assert self._base.packing is not None, name
            codes, scale = self._base.packing.unpack(self._parts(name), name)
            return dequantize(codes, scale, self._base.block(tuple(codes.shape))).to(self.dtype)
        value = self.stored(name)
        if not self._is_codes(name, value):
            return value
        scale = self._checked_scale(name, value)
        if scheme := self._expert_scheme(name):
            return scheme.dequantize(value, scale, _shard(name)).to(self.dtype)
        return dequantize(value, scale, self._base.block(tuple(value.shape))).to(self.dtype)

    def verbatim(self, name: str) -> dict[str, torch.Tensor]:
        """Reads the tensor as it is stored, by name; of 4 bits all that hold it, but experts as codes and scales.

        The latter are what `BaseQuantization.neuron_codes` makes of them. Raises HeaprError if it is codes and they or
        their scales are damaged.
        """
        if name in self.checkpoint.packed:
            if not self.checkpoint.is_pruned_expert(name):
                return {part: self.stored(part) for part in self.checkpoint.packed[name].values()}
            codes, scale = self._base.neuron_codes(self._parts(name), _shard(name), name)
            return {name: codes, name + SCALE_SUFFIX: scale}
        value = self.stored(name)
        if self._is_codes(name, value):
            self._checked_scale(name, value)
        return {name: value}

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        """What holds a weight of 4 bits."""
        return {part: self.stored(stored) for part, stored in self.checkpoint.packed[name].items()}

    def _is_codes(self, name: str, value: torch.Tensor) -> bool:
        is_packed = value.dtype == PACKED_DTYPE and self._expert_scheme(name) is not None
        return is_packed or value.dtype in CODE_DTYPES.values()

    def _expert_scheme(self, name: str) -> ExpertScheme | None:
        """How a pruned expert's weight is stored; None if it is none, or as the base model has it."""
        return self.checkpoint.expert_scheme if self.checkpoint.is_pruned_expert(name) else None

    @property
    def _base(self) -> BaseQuantization:
        base = self.checkpoint.base_quantization
        assert base is not None, "codes are those of pruned experts or of the base model"
        return base

    def _checked_scale(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        """Reads the scales of `codes`."""
        scale_name = self.checkpoint.scale_name(name)
        if scale_name is None or scale_name not in self.checkpoint.weight_map:
            raise HeaprError(
                f"{self.checkpoint.path}: {name} is {codes.dtype} and has no scales {scale_name or name + '_scale'}; "
                "download the checkpoint again, or start from the unquantized model"
            )
        scale = self.stored(scale_name)
        shape = tuple(codes.shape)
        if scheme := self._expert_scheme(name):
            wanted = scheme.scale_shape(_shard(name), scheme.weight_shape(_shard(name), shape))
        else:
            wanted = self._base.scale_shape(shape)
        check_codes(codes, name)
        check_scale(scale, wanted, scale_name)
        return scale

    def stored(self, name: str) -> torch.Tensor:
        """Reads the tensor as it is stored."""
        shard = self.checkpoint.stored_map[name]
        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(self.checkpoint.open(shard))
        return self._files[shard].get_tensor(name)


def _shard(name: str) -> str:
    """ "w1", "w2" or "w3" of an expert's weight."""
    where = ExpertTensor.parse(name)
    assert where is not None, name
    return where.shard
