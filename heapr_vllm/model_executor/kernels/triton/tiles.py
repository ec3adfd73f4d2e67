# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Triton kernels: what they may be for the shape of a layer, and the defaults by routes per expert."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from heapr_vllm.formats.quantized import ExpertScheme

TRITON_UNIT = 64  # the Triton kernels store widths in steps of it; also the slab of their w2
ROUNDED_GROUP = 128  # inputs, at most, that share a scale once rounded

CODES_PER_WORD = 4  # of 4 bits
SHORTEST_PLANE, LONGEST_PLANE = 16, 64  # inputs: of a tensor core's step; 128 bytes of words, and of a token

DECODES = ("bits", "cast")


@dataclass(frozen=True)
class Tile:
    """Tile of one GEMM: `block_n` outputs by `block_k` inputs.

    `tma`: weights (and in the down GEMM the intermediate) are read through TMA descriptors; sm_90.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 1
    tma: bool = False

    def meta(self) -> dict[str, int | bool]:
        """Launch arguments."""
        return {**self.sizes(), "TMA": self.tma}

    def sizes(self) -> dict[str, int]:
        """Launch arguments of kernels without TMA."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class TileConfig:
    """Tiles of both GEMMs over the same blocks of `block_m` routes, and how the kernels run.

    `fused`: gate and up in one product of twice the width. `chained`: programmatic dependent launch, sm_90. `prefetch`:
    the first slabs of w2 go to L2 while the up GEMM drains. `one_route`: every route is a block of its own, which needs
    no alignment. `decode`: E4M3 to wider types by "bits", anywhere, or by the GPU's own "cast", sm_89.
    """

    block_m: int
    up: Tile
    down: Tile
    fused: bool = True
    chained: bool = False
    prefetch: bool = False
    one_route: bool = False
    decode: str = "bits"

    def launch(self) -> dict[str, bool]:
        """Launch arguments that all kernels share."""
        return {"CHAINED": True, "launch_pdl": True} if self.chained else {"CHAINED": False}

    def check(self, shape: LayerShape) -> None:
        """Raises ValueError if the tiles do not fit the layer or each other."""
        if shape.activation_bits:
            self._check_rounded(shape)
            return
        hidden_size, group_size, is_packed = shape.hidden_size, shape.group_size, shape.is_packed
        if hidden_size % self.up.block_k or hidden_size % self.down.block_n:
            raise ValueError(f"hidden size {hidden_size} is no multiple of the tile {self}")
        if TRITON_UNIT % self.down.block_k:
            raise ValueError(f"down.block_k {self.down.block_k} does not divide {TRITON_UNIT}")
        plane = plane_size(hidden_size, group_size) if is_packed else self.up.block_k
        steps = (CODES_PER_WORD * plane, TRITON_UNIT)
        if is_packed and (not self.fused or (self.up.block_k, self.down.block_k) != steps):
            raise ValueError(f"4-bit experts need fused, and block_k {steps[0]} and {steps[1]}, not {self}")
        if group_size and (group_size % plane or group_size % self.down.block_n):
            raise ValueError(f"groups of {group_size} that share a scale are no multiple of the tile {self}")
        if group_size and (self.up.tma or self.down.tma):
            raise ValueError("tma reads no codes")
        if self.decode not in DECODES:
            raise ValueError(f"decode is {self.decode!r}, not one of {', '.join(DECODES)}")
        if self.up.tma and not self.fused:
            raise ValueError("up.tma needs fused: one descriptor holds gate and up rows")
        if self.down.tma and self.down.block_k != TRITON_UNIT:
            raise ValueError(f"down.tma needs down.block_k {TRITON_UNIT}, a whole slab")
        if self.prefetch and (self.down.tma or not self.chained):
            raise ValueError("prefetch needs chained, and down without tma")

    def _check_rounded(self, shape: LayerShape) -> None:
        """Does as `check` for rounded activations, whose groups and slabs are steps of the sums."""
        wanted = (TRITON_UNIT, rounded_group(shape.group_size), TRITON_UNIT)
        if (self.up.block_n, self.up.block_k, self.down.block_k) != wanted:
            raise ValueError(f"up.block_n, up.block_k and down.block_k have to be {wanted}, not those of {self}")
        if shape.hidden_size % self.down.block_n:
            raise ValueError(f"hidden size {shape.hidden_size} is no multiple of the tile {self}")
        if not self.fused or self.prefetch or self.up.tma or self.down.tma:
            raise ValueError("rounded activations need fused, and have neither tma nor prefetch")

    def is_possible(self, shape: LayerShape) -> bool:
        """Whether `check` finds nothing."""
        with suppress(ValueError):
            self.check(shape)
            return True
        return False

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> TileConfig:
        """Inverse of `dataclasses.asdict`; other keys are ignored, and what older files do not name is the default."""
        known: dict[str, Any] = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        known |= {"up": Tile(**entry["up"]), "down": Tile(**entry["down"])}
        return cls(**known)


@dataclass(frozen=True)
class LayerShape:
    """What the choice of tiles depends on, besides the token count. Widths are stored widths.

    `dtype`: the model's. `scheme`: how experts of 8 or 4 bits are stored; None in `dtype`. `activation_bits`: as of the
    kernel.
    """

    hidden_size: int
    top_k: int
    num_experts: int  # stored ones: zero-width and remote experts have no tiles
    mean_width: int
    max_width: int
    dtype: torch.dtype
    scheme: ExpertScheme | None = None
    activation_bits: int | None = None

    @classmethod
    def of(
        cls,
        widths: list[int],
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        scheme: ExpertScheme | None = None,
        activation_bits: int | None = None,
    ) -> LayerShape:
        """Shape of a layer with these stored widths, zeros included."""
        stored = [width for width in widths if width]
        mean_width = sum(stored) // max(len(stored), 1)
        widest = max(stored, default=0)
        return cls(hidden_size, top_k, len(stored), mean_width, widest, dtype, scheme, activation_bits)

    @property
    def group_size(self) -> int:
        """How many inputs of gate and up share a scale; 0 if nothing has one."""
        return (self.scheme.group_size or self.hidden_size) if self.scheme else 0

    @property
    def has_groups(self) -> bool:
        """Whether inputs of gate and up have different scales."""
        return 0 < self.group_size < self.hidden_size

    @property
    def is_packed(self) -> bool:
        """Whether codes are of 4 bits."""
        return self.scheme is not None and self.scheme.num_bits == 4

    @property
    def packed_step(self) -> int:
        """Inputs of a step of the up kernel over codes of 4 bits; 0 for others."""
        return CODES_PER_WORD * plane_size(self.hidden_size, self.group_size) if self.is_packed else 0

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.scheme.code_dtype if self.scheme else self.dtype

    def file_name(self, device: str) -> str:
        """Tiles are for one type of activations and, of codes, one kind of experts, such as int8_group128."""
        kinds = [f"dtype={str(self.dtype).removeprefix('torch.')}"]
        if self.scheme:
            kinds.append(f"experts={self.scheme.name}_{self.scheme.strategy}{self.scheme.group_size or ''}")
        if self.activation_bits:
            kinds.append(f"activation_bits={self.activation_bits}")
        sizes = [f"hidden_size={self.hidden_size}", f"top_k={self.top_k}"]
        return ",".join([*sizes, *kinds, f"device={device.replace(' ', '_')}.json"])

    def distance(self, other: LayerShape) -> float:
        """How far apart experts and widths are, as a factor of at least 1."""
        return math.exp(
            abs(math.log(self.num_experts / other.num_experts)) + abs(math.log(self.mean_width / other.mean_width))
        )


def default_config(num_tokens: int, shape: LayerShape, hopper: bool | None = None) -> TileConfig:
    """Tiles by routes per expert, for shapes without a tuned configuration.

    Blocks are as tall as those of the files that vLLM ships for H200s. Smaller GPUs than Hopper get smaller tiles; fp32
    is there to be right, not fast. E4M3 is cast on GPUs like Hopper: 2 instructions per weight against 3.7 by bits.
    `hopper` defaults to whether the GPU at hand has as much shared memory.
    """
    hopper = _has_hoppers_memory() if hopper is None else hopper
    routes = num_tokens * shape.top_k / max(shape.num_experts, 1)
    if shape.activation_bits:
        return _default_rounded(num_tokens, routes, shape, hopper)
    if shape.is_packed:
        config = _default_in_4_bits(routes, shape, hopper)
    elif shape.dtype.itemsize > 2:
        config = TileConfig(16, Tile(32, 32, 4, 2), Tile(64, 32, 4, 2))
    elif routes <= 10:
        is_long = num_tokens <= 8 or shape.has_groups  # a step per group has the fewest sums
        config = TileConfig(16, Tile(32, 128, 4, 4) if is_long else Tile(64, 64, 4, 3), Tile(64, 64, 4, 4))
    elif routes <= 40:
        config = TileConfig(32 if routes <= 20 else 64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4))
    elif shape.has_groups:  # sums of a step and of all, scales of this and the next: registers are short
        config = TileConfig(128, Tile(32, 128 if hopper else 64, 8, 3, 8), Tile(128, 64, 8, 3, 8))
    elif hopper:
        config = TileConfig(128, Tile(128, 64, 8, 4, 8), Tile(256, 64, 8, 3, 8))
    else:
        config = TileConfig(128, Tile(64, 64, 8, 3, 8), Tile(128, 64, 8, 3, 8))
    unit = shape.group_size or shape.hidden_size
    block_k = shape.packed_step or largest_divisor(unit, config.up.block_k)
    return replace(
        config,
        up=replace(config.up, block_k=block_k),
        down=replace(config.down, block_n=largest_divisor(unit, config.down.block_n)),
        one_route=use_one_route_blocks(num_tokens, shape.top_k, shape.num_experts),
        decode="cast" if hopper and shape.weight_dtype == torch.float8_e4m3fn else "bits",
    )


def _default_in_4_bits(routes: float, shape: LayerShape, hopper: bool) -> TileConfig:
    """`default_config` of codes of 4 bits, in blocks of the same heights but for smaller GPUs.

    Warps decode the less twice the fewer they are, and without wgmma each decodes all of a tile taller than wide.
    """
    step = shape.packed_step
    more = 1 if step < CODES_PER_WORD * LONGEST_PLANE else 0
    if shape.dtype.itemsize > 2:
        return TileConfig(16, Tile(32, step, 4, 2), Tile(64, TRITON_UNIT, 4, 2))
    if routes <= 20:
        return TileConfig(16 if routes <= 10 else 32, Tile(32, step, 4, 3 + more), Tile(64, TRITON_UNIT, 2, 4))
    if routes <= 40 or not hopper:
        return TileConfig(64, Tile(64, step, 4, 2 + more), Tile(64, TRITON_UNIT, 4, 4))
    return TileConfig(128, Tile(64, step, 8, 2 + more, 8), Tile(64, TRITON_UNIT, 4, 4, 8))


def _default_rounded(num_tokens: int, routes: float, shape: LayerShape, hopper: bool) -> TileConfig:
    """`default_config` for rounded activations, in blocks of the same heights."""
    group = rounded_group(shape.group_size)
    if routes <= 10:
        config = TileConfig(16, Tile(TRITON_UNIT, group, 4, 4), Tile(64, 64, 4, 4))
    elif routes <= 40:
        config = TileConfig(32 if routes <= 20 else 64, Tile(TRITON_UNIT, group, 4, 4), Tile(128, 64, 4, 4))
    else:
        config = TileConfig(128, Tile(TRITON_UNIT, group, 8, 3, 8), Tile(128 if hopper else 64, 64, 8, 4, 8))
    return replace(
        config,
        down=replace(config.down, block_n=largest_divisor(shape.hidden_size, config.down.block_n)),
        one_route=use_one_route_blocks(num_tokens, shape.top_k, shape.num_experts),
    )


@cache
def _has_hoppers_memory() -> bool:
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties().shared_memory_per_block_optin >= 224 * 1024


def rounded_group(group_size: int) -> int:
    """How many inputs share a scale once rounded, where `group_size` of them share one of each neuron."""
    return largest_divisor(group_size, ROUNDED_GROUP)


def use_one_route_blocks(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether routes are so few that most experts get one: then no alignment is needed, as in stock vLLM."""
    return num_tokens * top_k * 4 <= num_experts


def largest_divisor(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `size`."""
    return min(limit, size & -size)


def plane_size(hidden_size: int, group_size: int) -> int:
    """Distance, a power of two, of the inputs of gate and up that share a word of codes of 4 bits; 0 if too short.

    A plane of as many inputs has one scale, and four are a step of the kernel.
    """
    plane = largest_divisor(math.gcd(hidden_size // CODES_PER_WORD, group_size), LONGEST_PLANE)
    return plane if plane >= SHORTEST_PLANE else 0
