# SPDX-License-Identifier: Apache-2.0
"""The formats of 8 and 4 bits that base models are published in, as their config.json describes them.

- DeepSeek-V3's FP8 (arXiv 2412.19437, section 3.3.2), also Qwen's: `X.weight_scale_inv` per 128 x 128 weights.
- compressed-tensors FP8 and INT8: `X.weight_scale` per output row [O, 1], or per block.
- GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and compressed-tensors' pack-quantized, in 4 bits: `four_bits.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.four_bits import ZERO_POINT, Awq, Gptq, Packing, PackQuantized
from heapr_vllm.formats.quantized import MIN_GROUP_SIZE, SCALE_SUFFIX, ExpertScheme, dequantize, pack_nibbles
from heapr_vllm.formats.schema import Positive, convert

FP8_SCALE_SUFFIX = "_scale_inv"
PACKED_FORMAT = "pack-quantized"
MAX_GROUP_SIZE = 1024  # of a block's rows or columns too; scales are spread over them, whatever a config says
GROUPS_BY_ACTIVATION = ("true", "group", "dynamic")  # what `actorder` may say
GPTQ_EXCLUDES = "-:"  # what rules of `dynamic` start with that leave modules unquantized


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
    group_size: int | None = None
    actorder: bool | str | None = None


@dataclass(frozen=True)
class _Activations:
    dynamic: bool | str = False


@dataclass(frozen=True)
class _Group:
    weights: _Weights = field(default_factory=_Weights)
    input_activations: _Activations | None = None
    format: str | None = None


@dataclass(frozen=True)
class _CompressedConfig:
    config_groups: dict[str, _Group] = field(default_factory=dict)
    format: str | None = None


@dataclass(frozen=True)
class _GptqConfig:
    bits: int = 0
    group_size: int = -1
    sym: bool = False
    desc_act: bool = False
    dynamic: dict[str, Any] | None = None


@dataclass(frozen=True)
class _AwqConfig:
    bits: int = 0
    w_bit: int = 0
    group_size: int = -1
    q_group_size: int = -1
    zero_point: bool = False
    version: str = "gemm"


@dataclass(frozen=True)
class BaseQuantization:
    """How weights of a base model are stored, codes of 8 bits or of 4 that are read as such.

    `type`: "float" (E4M3) or "int". `blocks`: rows and columns that share a scale; None for one scale per row.
    `scale_suffix`: what the name of the scales has after `X.weight`. `packing`: of codes of 4 bits; None of 8.
    """

    type: str
    blocks: tuple[int, int] | None
    scale_suffix: str
    packing: Packing | None = None

    @classmethod
    def from_config(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        """Parses `quantization_config` of the base model `model`. Raises HeaprError if the format is not supported."""
        if block.get("quant_method") == "fp8":
            return cls._fp8(block, model)
        if block.get("quant_method") == "compressed-tensors":
            return cls._compressed_tensors(block, model)
        if block.get("quant_method") == "gptq":
            return cls._gptq(block, model)
        if block.get("quant_method") == "awq":
            return cls._awq(block, model)
        raise _unsupported(model, str(block.get("quant_method")))

    @classmethod
    def _packed(cls, packing: Packing, what: str, model: str) -> BaseQuantization:
        if not 1 <= packing.group_size <= MAX_GROUP_SIZE or packing.group_size % MIN_GROUP_SIZE:
            raise _unsupported(model, f"{what} with a group_size of {packing.group_size}")
        return cls("int", (1, packing.group_size), SCALE_SUFFIX, packing)

    @classmethod
    def _gptq(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _GptqConfig, f"{model}: quantization_config", "download the model again")
        if config.bits != 4:
            raise _unsupported(model, f"GPTQ with {config.bits} bits")
        if not config.sym:
            raise _unsupported(model, "asymmetric GPTQ, which vLLM does not run either")
        if config.desc_act:
            raise _unsupported(model, "GPTQ with desc_act, groups in the order of activations")
        if not all(rule.startswith(GPTQ_EXCLUDES) for rule in config.dynamic or {}):
            raise _unsupported(model, "GPTQ with other settings for some modules in `dynamic`")
        return cls._packed(Gptq(config.group_size), "GPTQ", model)

    @classmethod
    def _awq(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _AwqConfig, f"{model}: quantization_config", "download the model again")
        bits, group_size = config.w_bit or config.bits, max(config.q_group_size, config.group_size)
        if bits != 4:
            raise _unsupported(model, f"AWQ with {bits} bits")
        if config.version.lower() != "gemm":
            raise _unsupported(model, f"AWQ in the version {config.version}")
        if not config.zero_point:
            raise _unsupported(model, "AWQ without zero points")
        return cls._packed(Awq(group_size), "AWQ", model)

    @classmethod
    def _fp8(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _Fp8Config, f"{model}: quantization_config", "download the model again")
        if config.activation_scheme != "dynamic":
            raise _unsupported(model, "FP8 with static activation scales")
        if not config.weight_block_size:
            raise _unsupported(model, "FP8 with one scale per tensor")
        return cls._in_blocks("float", config.weight_block_size, FP8_SCALE_SUFFIX, model)

    @classmethod
    def _in_blocks(cls, kind: str, blocks: tuple[int, int], scale_suffix: str, model: str) -> BaseQuantization:
        if max(blocks) > MAX_GROUP_SIZE:
            raise _unsupported(model, f"scales of blocks of {blocks[0]} x {blocks[1]}")
        return cls(kind, blocks, scale_suffix)

    @classmethod
    def _compressed_tensors(cls, block: dict[str, Any], model: str) -> BaseQuantization:
        config = convert(block, _CompressedConfig, f"{model}: quantization_config", "download the model again")
        found = {cls._weights(group, config.format, model) for group in config.config_groups.values()}
        if len(found) != 1:
            raise _unsupported(model, f"compressed-tensors with {len(found)} ways of storing weights")
        return found.pop()

    @classmethod
    def _weights(cls, group: _Group, default_format: str | None, model: str) -> BaseQuantization:
        weights = group.weights
        what = f"compressed-tensors {weights.type} with {weights.num_bits} bits"
        if (group.format or default_format) == PACKED_FORMAT:
            return cls._pack_quantized(group, what, model)
        if group.input_activations and not group.input_activations.dynamic:
            raise _unsupported(model, "compressed-tensors with static activation scales")
        if weights.num_bits != 8 or not weights.symmetric:
            raise _unsupported(model, what)
        if weights.strategy == "channel":
            return cls(weights.type, None, SCALE_SUFFIX)
        if weights.strategy == "block" and weights.block_structure:
            return cls._in_blocks(weights.type, weights.block_structure, SCALE_SUFFIX, model)
        raise _unsupported(model, f"{what} and strategy {weights.strategy}")

    @classmethod
    def _pack_quantized(cls, group: _Group, what: str, model: str) -> BaseQuantization:
        weights = group.weights
        if weights.num_bits != 4 or weights.type != "int" or weights.strategy != "group" or not weights.group_size:
            raise _unsupported(model, f"{what} packed by {weights.strategy}")
        if group.input_activations:
            raise _unsupported(model, f"{what} packed, with quantized activations")
        if str(weights.actorder).lower() in GROUPS_BY_ACTIVATION:
            raise _unsupported(model, f"{what} packed, groups in the order of activations")
        packing = PackQuantized(weights.group_size)
        if not weights.symmetric:
            packing = PackQuantized(weights.group_size, others=(*packing.others, ZERO_POINT))
        return cls._packed(packing, what, model)

    def scheme(self, hidden_size: int) -> ExpertScheme:
        """Returns how the experts are stored once pruned, without changing a code.

        But down projections of 4 bits, whose groups cross neurons, become codes of 8, and so do gate and up if they
        have zero points.
        """
        if self.blocks is None:
            return ExpertScheme(type=self.type, strategy="channel", group_size=None)
        if self.packing is not None:
            group_size = gcd(hidden_size, self.packing.group_size)
            scheme = ExpertScheme(num_bits=4, down_bits=8, group_size=group_size)
            scheme = scheme if self.packing.is_symmetric else scheme.widened()
            scheme.check(hidden_size)
            return scheme
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

    def neuron_codes(
        self, parts: Mapping[str, torch.Tensor], shard: str, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns an expert's weight of 4 bits as `scheme` says: codes and scales.

        gate and up keep their codes and scales. down_proj, whose groups cross neurons, is rounded to 8 bits. `parts`:
        as in `Packing.unpack`, which says what is raised.
        """
        assert self.packing is not None, name
        codes, scale = self.packing.unpack(parts, name)
        shape = tuple(codes.shape)
        if shard == "w2":
            return self.scheme(shape[0]).quantize(dequantize(codes, scale, self.block(shape)), shard)
        scheme = self.scheme(shape[1])
        repeats = self.packing.group_size // scheme.block(shard, shape)[1]
        codes = pack_nibbles(codes) if scheme.num_bits == 4 else codes
        groups = scheme.scale_shape(shard, shape)[1]
        return codes, scale.repeat_interleave(min(repeats, groups), 1)[:, :groups].contiguous()

    def neuron_scale(self, scale: torch.Tensor, shard: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the same scales with every group inside one neuron, as `ExpertScheme.scale_shape` says.

        `shape`: [O, I] of the expert's full-size weight.
        """
        if self.blocks is None:
            return scale
        scheme = self.scheme(shape[0] if shard == "w2" else shape[1])
        rows, columns = scheme.block(shard, shape)
        wanted = scheme.scale_shape(shard, shape)
        spread = scale.repeat_interleave(min(self.blocks[0] // rows, wanted[0]), 0)[: wanted[0]]
        return spread.repeat_interleave(min(self.blocks[1] // columns, wanted[1]), 1)[:, : wanted[1]].contiguous()


def _unsupported(model: str, what: str) -> HeaprError:
    return HeaprError(
        f"{model} is quantized in a way that is not supported yet ({what}); supported are DeepSeek's FP8 in blocks, "
        "FP8 or INT8 of compressed-tensors by channel or block with dynamic activations, and 4 bits in groups of GPTQ "
        "(symmetric, desc_act false), AWQ (gemm, with zero points) or compressed-tensors (pack-quantized): start from "
        "the unquantized base model, and quantize its experts with `heapr export --quantize int8`"
    )
