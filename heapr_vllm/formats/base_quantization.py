# SPDX-License-Identifier: Apache-2.0
"""The 8-bit formats that base models are published in, as their config.json describes them.

- DeepSeek-V3's FP8 (arXiv 2412.19437, section 3.3.2), also Qwen's: `X.weight_scale_inv` per 128 x 128 weights.
- compressed-tensors FP8 and INT8: `X.weight_scale` per output row [O, 1], or per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import SCALE_SUFFIX, ExpertScheme
from heapr_vllm.formats.schema import Positive, convert

FP8_SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class _Fp8Config:
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[Positive, Positive] | None = None


@dataclass(frozen=True)
class _Weights:
    num_bits: int = 0
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str | None = None
    block_structure: tuple[Positive, Positive] | None = None


@dataclass(frozen=True)
class _Activations:
    dynamic: bool | str = False


@dataclass(frozen=True)
class _Group:
    weights: _Weights = field(default_factory=_Weights)
    input_activations: _Activations | None = None


@dataclass(frozen=True)
class _CompressedConfig:
    config_groups: dict[str, _Group] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseQuantization:
    """How 8-bit weights of a base model are stored.

    `type`: "float" (E4M3) or "int". `blocks`: rows and columns that share a scale; None for one scale per row.
    `scale_suffix`: what the name of the scales has after `X.weight`.
    """

    type: str
    blocks: tuple[int, int] | None
    scale_suffix: str

    @classmethod
    def from_config(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        """Parses `quantization_config` of the base model `model`. Raises HeaprError if the format is not supported."""
        if block.get("quant_method") == "fp8":
            return cls._fp8(block, model)
        if block.get("quant_method") == "compressed-tensors":
            return cls._compressed_tensors(block, model)
        raise _unsupported(model, str(block.get("quant_method")))

    @classmethod
    def _fp8(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _Fp8Config, f"{model}: quantization_config", "download the model again")
        if config.activation_scheme != "dynamic":
            raise _unsupported(model, "FP8 with static activation scales")
        if not config.weight_block_size:
            raise _unsupported(model, "FP8 with one scale per tensor")
        return cls("float", config.weight_block_size, FP8_SCALE_SUFFIX)

    @classmethod
    def _compressed_tensors(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _CompressedConfig, f"{model}: quantization_config", "download the model again")
        found = {cls._weights(group, model) for group in config.config_groups.values()}
        if len(found) != 1:
            raise _unsupported(model, f"compressed-tensors with {len(found)} ways of storing weights")
        return found.pop()

    @classmethod
    def _weights(cls, group: _Group, model: str) -> BaseQuantization:
        weights = group.weights
        what = f"compressed-tensors {weights.type} with {weights.num_bits} bits"
        if group.input_activations and not group.input_activations.dynamic:
            raise _unsupported(model, "compressed-tensors with static activation scales")
        if weights.num_bits != 8 or not weights.symmetric:
            raise _unsupported(model, what)
        if weights.strategy == "channel":
            return cls(weights.type, None, SCALE_SUFFIX)
        if weights.strategy == "block" and weights.block_structure:
            return cls(weights.type, weights.block_structure, SCALE_SUFFIX)
        raise _unsupported(model, f"{what} and strategy {weights.strategy}")

    def scheme(self, hidden_size: int) -> ExpertScheme:
        """Returns how the experts are stored once pruned, without changing a code."""
        if self.blocks is None:
            return ExpertScheme(type=self.type, strategy="channel", group_size=None)
        scheme = ExpertScheme(type=self.type, group_size=gcd(hidden_size, *self.blocks))
        scheme.check(hidden_size)
        return scheme

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns how many rows and columns of a weight [O, I] share a scale."""
        return self.blocks or (1, shape[1])

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape of the scales of a weight [O, I]."""
        rows, columns = self.block(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def neuron_scale(self, scale: torch.Tensor, shard: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the same scales with every group inside one neuron, as `ExpertScheme.scale_shape` says.

        `shape`: [O, I] of the expert's full-size weight.
        """
        if self.blocks is None:
            return scale
        scheme = self.scheme(shape[0] if shard == "w2" else shape[1])
        rows, columns = scheme.block(shard, shape)
        spread = scale.repeat_interleave(self.blocks[0] // rows, 0).repeat_interleave(self.blocks[1] // columns, 1)
        wanted = scheme.scale_shape(shard, shape)
        return spread[: wanted[0], : wanted[1]].contiguous()


def _unsupported(model: str, what: str) -> HeaprError:
    return HeaprError(
        f"{model} is quantized in a way that is not supported yet ({what}); supported are DeepSeek's FP8 in blocks, "
        "and FP8 or INT8 of compressed-tensors by channel or block with dynamic activations: start from the "
        "unquantized base model, and quantize its experts with `heapr export --quantize int8`"
    )
