# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 or 4 bits: codes and scales. Every scale group lies inside one neuron, so that pruning cuts none.

A neuron is a row of gate_proj and up_proj [I, H] and a column of down_proj [H, I]; groups run along H. Field names,
tensor names and shapes are those of compressed-tensors, whose `dequantize` reads them. In 4 bits two neighbours along H
share a byte, the first in its lower half, with 8 added to each: [I, H / 2] and [H / 2, I].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.schema import Positive, convert

GROUP_SIZE = 128
GROUP_SIZE_4_BITS = 64
MIN_GROUP_SIZE = 32  # outputs of a panel of the CPU kernel
SCALE_SUFFIX = "_scale"  # of the tensor of scales beside `X.weight`
CODE_DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}
PACKED_DTYPE = torch.uint8  # of two codes of 4 bits
STORED_DTYPES = ("I8", "F8_E4M3")  # of codes of 8 bits, as safetensors calls them
STORED_PACKED_DTYPE = "U8"  # of those of 4
NAMES = {("int", 8): "int8", ("float", 8): "fp8", ("int", 4): "int4"}
LARGEST_CODE = {"int": 127.0, "float": 448.0}
ZERO_4_BITS = 8
ZERO_BYTE_4_BITS = 0x88
NAN_CODE = 0x7F  # of E4M3, apart from the sign
BITWISE = torch.uint8  # what float8 codes are moved as: torch has few float8 kernels


@dataclass(frozen=True)
class ExpertScheme:
    """How the experts of a pruned model are stored: `quantization_config.experts`.

    `type` and `num_bits`: "int" of 8 or 4 bits, or "float" (E4M3) of 8. `strategy` "group": one scale per neuron and
    `group_size` of H; "channel": one per row of the matrix, that is per neuron in gate and up and per output in
    down_proj, in 8 bits only. `down_bits`: 8 where down_proj has more bits than gate and up, which have 4; None where
    all have `num_bits`.
    """

    type: str = "int"
    num_bits: int = 8
    symmetric: bool = True
    strategy: str = "group"
    group_size: Positive | None = GROUP_SIZE
    down_bits: int | None = None

    def __post_init__(self) -> None:
        """Raises HeaprError for what no kernel decodes."""
        strategies = ("group",) if self.num_bits == 4 else ("group", "channel")
        known = (self.type, self.num_bits) in NAMES and self.strategy in strategies
        known = known and (self.down_bits is None or (self.num_bits, self.down_bits) == (4, 8))
        if not known or not self.symmetric or (self.strategy == "group") != bool(self.group_size):
            raise HeaprError(
                f"experts stored as {asdict(self)} are not supported; supported are symmetric int of 8 or 4 bits and "
                "float of 8 in groups along the hidden size, those of 8 by channel too: `heapr export --quantize int8` "
                "(or fp8, int4) writes them"
            )

    @classmethod
    def for_hidden_size(cls, name: str, hidden_size: int) -> ExpertScheme:
        """Returns what `--quantize int8`, `fp8` or `int4` means for a model.

        Raises HeaprError if no group size divides `hidden_size`.
        """
        kind, num_bits = next(stored for stored, known in NAMES.items() if known == name)
        group_size = gcd(hidden_size, GROUP_SIZE_4_BITS if num_bits == 4 else GROUP_SIZE)
        scheme = cls(type=kind, num_bits=num_bits, group_size=group_size)
        scheme.check(hidden_size)
        return scheme

    def check(self, hidden_size: int) -> None:
        """Raises HeaprError if groups do not divide `hidden_size`, or are too small for the kernels."""
        if self.group_size and (hidden_size % self.group_size or self.group_size % MIN_GROUP_SIZE):
            raise HeaprError(
                f"quantized experts need groups in multiples of {MIN_GROUP_SIZE} that divide the hidden size, not "
                f"{self.group_size} for {hidden_size}; write the checkpoint with `heapr export --quantize none`"
            )

    def of(self, shard: str) -> ExpertScheme:
        """Returns how one matrix is stored: "w2", or "w1", "w3" or both of them, "w13"."""
        return replace(self, num_bits=(shard == "w2" and self.down_bits) or self.num_bits, down_bits=None)

    def widened(self) -> ExpertScheme:
        """Returns how experts are stored where all have as many bits as down_proj: codes and scales stay the same."""
        return replace(self, num_bits=self.down_bits or self.num_bits, down_bits=None)

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of tensors of codes, of gate and up if `down_bits` says something else."""
        return CODE_DTYPES[self.type] if self.num_bits == 8 else PACKED_DTYPE

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.num_bits

    @property
    def zero_byte(self) -> int:
        """Byte of codes that are zero."""
        return ZERO_BYTE_4_BITS if self.num_bits == 4 else 0

    @property
    def name(self) -> str:
        """Returns "int8", "fp8", "int4", or "int4-int8" where down_proj has more bits."""
        name = NAMES[self.type, self.num_bits]
        return f"{name}-{self.of('w2').name}" if self.down_bits else name

    def weight_shape(self, shard: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape [O, I] of the expert matrix whose codes have `shape`."""
        rows, columns = shape
        per_byte = self.of(shard).codes_per_byte
        return (rows * per_byte, columns) if shard == "w2" else (rows, columns * per_byte)

    def block(self, shard: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns how many rows and columns of an expert matrix [O, I] share a scale."""
        if self.group_size is None:
            return 1, shape[1]
        return (self.group_size, 1) if shard == "w2" else (1, self.group_size)

    def scale_shape(self, shard: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape of the scales of an expert matrix [O, I] "w1", "w3" or "w2"."""
        if self.group_size is None:
            return shape[0], 1
        rows, columns = self.block(shard, shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def bits_per_weight(self) -> float:
        """Returns the size of a weight and its part of a float32 scale; scales by channel count as nothing."""
        bits = (2 * self.num_bits + (self.down_bits or self.num_bits)) / 3
        return bits + (32 / self.group_size if self.group_size else 0)

    def quantize(self, weight: torch.Tensor, shard: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounds an expert matrix [O, I] to codes, [O, I] or fewer where they share bytes, and float32 scales."""
        rows, columns = self.block(shard, tuple(weight.shape))
        own = self.of(shard)
        if rows > 1:
            codes, scale = own._quantize_rows(weight.T, rows)
            return codes.view(BITWISE).T.contiguous().view(codes.dtype), scale.T.contiguous()
        return own._quantize_rows(weight, columns)

    def _quantize_rows(self, rows: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = quantize_rows(rows, group_size, self.type, self.num_bits)
        return (pack_nibbles(codes) if self.num_bits == 4 else codes), scale

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, shard: str) -> torch.Tensor:
        """Returns the float32 values [O, I] of what `quantize` made, or of as many whole neurons of it."""
        if self.of(shard).num_bits == 4:
            codes = unpack_nibbles(codes.T).T.contiguous() if shard == "w2" else unpack_nibbles(codes)
        return dequantize(codes, scale, self.block(shard, tuple(codes.shape)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> ExpertScheme:
        """Parses `quantization_config.experts`; unknown keys are ignored. Raises HeaprError if it is not supported."""
        if block.get("strategy") == "channel":
            block = {"group_size": None, **block}
        return convert(block, cls, "quantization_config.experts", "create or download the model again")


def quantize_rows(
    rows: torch.Tensor, group_size: int, kind: str, num_bits: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds [n, C] to codes [n, C], and one float32 scale per row and `group_size` columns, [n, C / group_size].

    The largest magnitude of a group gets the largest code, 127 or 448, or of 4 bits -8, of which there is no positive
    one: their scales have a sign. A group of zeros gets scale 1.
    """
    if not rows.shape[1]:
        return rows.to(CODE_DTYPES[kind]), torch.ones(len(rows), 1)
    groups = rows.float().unflatten(1, (rows.shape[1] // group_size, group_size))
    if num_bits == 4:
        lowest, largest = -ZERO_4_BITS, ZERO_4_BITS - 1
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / lowest
    else:
        lowest, largest = -LARGEST_CODE[kind], LARGEST_CODE[kind]
        scale = groups.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    codes = groups / scale
    if kind == "int":
        codes = codes.round()
    codes = codes.clamp(lowest, largest).view(rows.shape)
    return codes.to(CODE_DTYPES[kind]), scale[..., 0]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Puts two neighbours of codes int8 [n, C] of -8 to 7 into a byte: uint8 [n, C / 2]."""
    low, high = (codes + ZERO_4_BITS).to(PACKED_DTYPE).unflatten(1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Inverts `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8) - ZERO_4_BITS


def dequantize(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiplies codes [O, I] by one factor per block of rows and columns, in float32.

    `scale`: [ceil(O / block[0]), ceil(I / block[1])]; the last blocks may be cut short.
    """
    rows, columns = codes.shape
    factors = scale.float().repeat_interleave(min(block[0], rows), 0)[:rows]
    return codes.float().mul_(factors.repeat_interleave(min(block[1], columns), 1)[:, :columns])


def check_codes(codes: torch.Tensor, name: str) -> None:
    """Raises HeaprError if codes are no numbers."""
    if codes.dtype == torch.float8_e4m3fn and bool(((codes.view(BITWISE) & NAN_CODE) == NAN_CODE).any()):
        raise HeaprError(f"{name} is damaged: it holds codes that are not numbers; download or export it again")


def are_finite(scale: torch.Tensor) -> bool:
    """Tells whether scales, and in float32 the values of all codes with them, are finite numbers."""
    return bool((scale.float() * LARGEST_CODE["float"]).isfinite().all())


def check_scale(scale: torch.Tensor, shape: tuple[int, int], name: str) -> None:
    """Raises HeaprError if scales have another shape, or are no finite numbers, as `are_finite` says."""
    if tuple(scale.shape) != shape:
        raise HeaprError(
            f"{name} is {list(scale.shape)} instead of {list(shape)}: scales and weights do not belong together; "
            "download or export the checkpoint again"
        )
    if not are_finite(scale):
        raise HeaprError(f"{name} is damaged: it holds scales that are not finite; download or export it again")
