# SPDX-License-Identifier: Apache-2.0
"""Random MoE layers of variable width: the table of edge cases that every kernel is held against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch

from heapr_vllm.formats.quantized import (
    BITWISE,
    NAN_CODE,
    ExpertScheme,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales, slots_table
from heapr_vllm.model_executor.kernels.reference import ragged_moe_reference
from heapr_vllm.model_executor.kernels.triton.launch import index_tables, pack, scheme_of, triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, Tile, TileConfig, plane_size
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up

FENCE = 1024  # elements
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_CAST = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)  # of E4M3
SMALL = TileConfig(16, Tile(32, 32), Tile(32, 32))
DECODE = replace(SMALL, one_route=True)
WIDE = TileConfig(16, Tile(128, 64, group_m=4), Tile(64, 64, group_m=2))
TALL = TileConfig(32, Tile(32, 16), Tile(16, 16))
UNFUSED = replace(SMALL, fused=False)
TMA = TileConfig(16, Tile(32, 64, tma=True), Tile(64, 64, tma=True))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """`routing`: "random", "skewed" (expert 1 gets most), "one" (all to expert 2), "nobody" (every third id is -1)."""

    tokens: int
    widths: list[int]
    top_k: int
    hidden_size: int
    config: TileConfig | None = SMALL
    remote: tuple[int, ...] = ()  # experts on another rank
    routing: str = "random"
    scheme: ExpertScheme | None = None  # of experts in 8 or 4 bits

    def __str__(self) -> str:
        kind = f"-{self.scheme.name}-{self.scheme.strategy}{self.scheme.group_size or ''}" if self.scheme else ""
        decode = f"-{self.config.decode}" if self.scheme and self.config else ""
        return f"T{self.tokens}-{'_'.join(map(str, self.widths[:6]))}-{self.routing}{kind}{decode}"

    def in_8_bits(self, kind: str, strategy: str, decode: str = "bits") -> "Case":
        """The case with experts as codes, in the smallest groups that its tiles allow; without TMA."""
        config, group_size = self.config, 32
        if config:
            up, down = (replace(tile, tma=False) for tile in (config.up, config.down))
            config = replace(config, up=up, down=down, decode=decode)
            group_size = max(group_size, up.block_k, down.block_n)
        scheme = ExpertScheme(kind, strategy=strategy, group_size=group_size if strategy == "group" else None)
        return self._replace(config=config, scheme=scheme)

    def in_4_bits(self, group_size: int) -> "Case":
        """The case with experts as codes of 4 bits: its tiles as such experts need them."""
        config = self.config
        if config:
            step = 4 * plane_size(self.hidden_size, group_size)
            up = replace(config.up, block_k=step, tma=False)
            down = replace(config.down, block_n=min(config.down.block_n, group_size), block_k=64, tma=False)
            config = replace(config, up=up, down=down, fused=True)
        return self._replace(config=config, scheme=ExpertScheme(num_bits=4, group_size=group_size))


STRATEGIES = ("group", "channel")
CASES = [
    Case(1, [64, 128, 64, 192, 64, 64, 64, 64], 2, 64, DECODE),  # decode: a block per route, no alignment
    Case(1, [0, 64, 0, 0, 0, 64, 0, 128], 2, 64, DECODE),  # decode, mostly dead experts
    Case(2, [64] * 16, 2, 64, None, (3, 5, 7)),  # decode, expert parallel, default tiles
    Case(2, [64, 128] * 8, 2, 64, DECODE, routing="nobody"),  # decode, ids of nobody
    Case(7, [0, 1, 13, 64], 2, 32),  # widths 0, 1, odd and full
    Case(40, [64, 192, 128, 64], 2, 64, WIDE),  # tile wider than most experts, grouped order
    Case(40, [64, 192, 128, 64], 2, 96, routing="skewed"),  # hidden no power of two; one expert gets most tokens
    Case(33, [64, 64, 128], 1, 64, routing="one"),  # every token to one expert, T % BLOCK_M = 1
    Case(33, [64, 64, 128], 2, 64, TALL, routing="nobody"),  # ids of nobody; blocks taller than tiles are wide
    Case(16, [128, 64], 2, 64, WIDE),  # k = E, blocks exactly full
    Case(33, [128], 1, 128, WIDE),  # one expert: all blocks in use, the last group of blocks smaller
    Case(50, [64, 0, 128, 64, 320], 3, 64, SMALL, (0, 4)),  # expert parallel: most routes elsewhere
    Case(5, [64, 64], 1, 64, SMALL, (0, 1)),  # no local expert at all
    Case(9, [0, 0, 64], 2, 64),  # one live expert
    Case(20, [64, 0, 192, 128], 2, 64, UNFUSED),  # gate and up as two products
    Case(20, [64, 0, 192, 128], 2, 128, TMA, routing="nobody"),  # weights and intermediate through descriptors
    Case(1, [64, 128] * 4, 2, 128, replace(TMA, one_route=True)),  # the same, a block per route
    Case(9, [64, 128], 1, 64, DECODE),  # a block per route although routes are many
    Case(70, [64, 128] * 3, 2, 128, None),  # default tiles
]
CASES_IN_8_BITS = [
    *(case.in_8_bits(kind, strategy) for case in CASES for kind in ("int", "float") for strategy in STRATEGIES),
    *(case.in_8_bits("float", strategy, "cast") for case in CASES[3:6] for strategy in STRATEGIES if HAS_CAST),
]
CASES_IN_4_BITS = [
    *(case.in_4_bits(group_size) for case in CASES if case.hidden_size % 64 == 0 for group_size in (32, 64)),
    Case(40, [64, 192, 128, 64], 2, 512, WIDE).in_4_bits(64),  # a group is a plane of the longest, in two steps
    Case(33, [64, 128], 1, 384, TALL, routing="nobody").in_4_bits(64),  # it is two planes
    Case(9, [64, 128], 2, 192, DECODE).in_4_bits(64),  # it is a step of the shortest planes, of three
    Case(20, [64, 128], 1, 256, None).in_4_bits(128),  # it is larger than ours
    Case(5, [128, 64], 1, 256, WIDE).in_4_bits(32),  # it is a plane, shorter than the hidden size allows
    Case(70, [64, 192], 1, 512, replace(WIDE, block_m=64), (0,)).in_4_bits(64),  # weights are scaled, not sums
    Case(70, [64, 192], 1, 64, replace(SMALL, block_m=64)).in_4_bits(32),
]
FEW_IN_8_BITS = [
    Case(40, [64, 192, 128, 64], 2, 64).in_8_bits("int", "group"),
    Case(20, [64, 0, 192, 128], 2, 64, UNFUSED).in_8_bits("float", "group"),
    Case(9, [64, 128], 1, 64, DECODE).in_8_bits("int", "channel"),
    Case(33, [64, 64, 128], 2, 64, TALL, (0,), "nobody").in_8_bits("float", "group"),
    Case(20, [64, 0, 192, 128], 2, 64, UNFUSED).in_8_bits("int", "channel"),
    Case(2, [64, 128] * 8, 2, 64, DECODE, (3, 5, 7), "nobody").in_8_bits("float", "channel", "cast"),
]  # what `tools/mutants.py` has time for
FEW_IN_4_BITS = [*CASES_IN_4_BITS[-7:-5], *CASES_IN_4_BITS[-3:], Case(9, [64, 128], 2, 64, DECODE).in_4_bits(32)]


class Layer(NamedTuple):
    """A layer on DEVICE: tokens `x` [T, H], routes and experts as `triton_ragged_moe` takes them.

    `plain`: the experts before packing; `plain_slots`: their `Routes.slots`.
    """

    x: torch.Tensor
    routes: Routes
    experts: ExpertRows
    plain: ExpertRows
    plain_slots: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, Routes, ExpertRows]:
        """The arguments of `triton_ragged_moe` after `output`."""
        return self.x, self.routes, self.experts

    @property
    def shape(self) -> LayerShape:
        widths = self.plain.table[:, 1].tolist()
        scheme = scheme_of(self.plain)
        return LayerShape.of(widths, self.x.shape[1], self.routes.ids.shape[1], self.x.dtype, scheme)

    def expected(self) -> torch.Tensor:
        """The reference's output in float64."""
        w13, w2 = self.plain.w13, self.plain.w2
        if self.plain.is_packed:
            w13, w2 = unpack_nibbles(w13), unpack_nibbles(w2)
        experts = replace(self.plain, w13=w13.double(), w2=w2.double())
        return ragged_moe_reference(self.x.double(), replace(self.routes, slots=self.plain_slots), experts)

    def first_token(self) -> tuple[torch.Tensor, Routes, ExpertRows]:
        """`inputs` of a batch that is the first token alone."""
        routes = replace(self.routes, weights=self.routes.weights[:1], ids=self.routes.ids[:1])
        return self.x[:1], routes, self.experts

    def run(self, config: TileConfig | None) -> torch.Tensor:
        """The kernels' output, into memory full of NaN."""
        output = fenced(torch.full_like(self.x, torch.nan))
        triton_ragged_moe(output, *self.inputs, config=config)
        return output

    def error(self, output: torch.Tensor) -> float:
        """Largest deviation from the reference relative to the largest output; infinite if anything is NaN."""
        expected = self.expected()
        error = (output.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
        return float(error.nan_to_num(torch.inf))


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Random weights of `dtype`, or codes and scales, and routing for `case`; padding neurons are zero."""
    generator = torch.Generator(DEVICE).manual_seed(seed + case.tokens)
    local = [width if expert not in case.remote else 0 for expert, width in enumerate(case.widths)]
    layout = RaggedLayout.build(local, [round_up(width, 64) for width in local])
    w13, w2 = (
        torch.zeros(rows, case.hidden_size, dtype=dtype, device=DEVICE)
        for rows in (2 * layout.num_rows, layout.num_rows)
    )
    for expert, width in enumerate(local):
        if width:
            row, stored = layout.place(expert)
            for flat, first in ((w13, 2 * row), (w13, 2 * row + stored), (w2, row)):
                values = torch.randn(width, case.hidden_size, generator=generator, device=DEVICE).mul(0.2)
                flat[first : first + width] = values.to(dtype)
    weights, ids = route(case, generator)
    is_local = torch.tensor([*map(bool, local), False], device=DEVICE)
    weights = weights.where(is_local[ids], torch.nan)  # of experts that are not here, which nobody may use
    x = torch.randn(case.tokens, case.hidden_size, generator=generator, device=DEVICE).to(dtype)
    places = torch.tensor(layout.expert_table(), dtype=torch.int32, device=DEVICE).view(-1, 2)
    plain = ExpertRows(w13, w2, places, layout.max_width)
    if case.scheme:
        plain = as_codes(plain, case.scheme)
    experts = copied(plain, torch.clone)
    pack(experts.w13, experts.w2, layout, experts.scales)
    slot_map, table = (tensor.to(DEVICE) for tensor in index_tables(layout.slots, layout))
    experts = replace(copied(experts, fenced), table=fenced(table))
    routes = Routes(fenced(weights), fenced(ids), fenced(slot_map))
    return Layer(fenced(x), routes, experts, plain, slots_table(layout.slots, layout).to(DEVICE))


def as_codes(plain: ExpertRows, scheme: ExpertScheme) -> ExpertRows:
    """Unpacked experts as codes and scales."""
    hidden_size = plain.w2.shape[1]
    w13, w13_scale = quantize_rows(plain.w13, scheme.group_size or hidden_size, scheme.type, scheme.num_bits)
    if scheme.group_size:
        w2, w2_scale = quantize_rows(plain.w2, scheme.group_size, scheme.type, scheme.num_bits)
        if scheme.num_bits == 4:
            w13, w2 = pack_nibbles(w13), pack_nibbles(w2)
        return replace(plain, w13=w13, w2=w2, scales=Scales(w13_scale, w2_scale))
    w2 = torch.empty_like(plain.w2, dtype=BITWISE)
    w2_scale = torch.empty(len(plain.table), hidden_size, device=w2.device)
    for slot, (row, width) in enumerate(plain.table.tolist()):
        codes, scale = quantize_rows(plain.w2[row : row + width].T, width, scheme.type)
        w2[row : row + width] = codes.view(BITWISE).T
        w2_scale[slot] = scale[:, 0]
    return replace(plain, w13=w13, w2=w2.view(w13.dtype), scales=Scales(w13_scale, w2_scale))


def copied(experts: ExpertRows, copy: Callable[[torch.Tensor], torch.Tensor]) -> ExpertRows:
    """Experts with copies of weights and scales."""
    scales = experts.scales and Scales(copy(experts.scales.w13), copy(experts.scales.w2))
    return replace(experts, w13=copy(experts.w13), w2=copy(experts.w2), scales=scales)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with a page of poison before and after it."""
    memory = poisoned(tensor, (tensor.numel() + 2 * FENCE,))
    view = memory[FENCE : FENCE + tensor.numel()].view(tensor.shape)
    as_bits(view).copy_(as_bits(tensor))
    return view


def poisoned(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory full of NaN, or of absurd integers."""
    if like.dtype == torch.float8_e4m3fn:
        return like.view(BITWISE).new_full(shape, NAN_CODE).view(like.dtype)
    poison = {torch.int8: 127, BITWISE: NAN_CODE}.get(like.dtype, 2**24)
    return like.new_full(shape, torch.nan if like.is_floating_point() else poison)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in a type that torch copies and compares."""
    return tensor.view(BITWISE) if tensor.dtype == torch.float8_e4m3fn else tensor


@contextmanager
def fenced_scratch() -> Iterator[None]:
    """Scratch of the launcher starts as poison between fences; raises AssertionError if a fence was written over."""
    scratch: list[torch.Tensor] = []
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: int, **options) -> torch.Tensor:
        if shape == (0,):  # Triton's interpreter makes its views this way
            return original(self, *shape, **options)
        scratch.append(fenced(poisoned(original(self, 0, **options), shape)))
        return scratch[-1]

    with patch.object(torch.Tensor, "new_empty", new_empty):
        yield
    for tensor in scratch:
        assert is_fenced(tensor), "written outside of the scratch"


def is_fenced(tensor: torch.Tensor) -> bool:
    """Whether both fences of a `fenced` tensor are whole."""
    memory = tensor.new_empty(0).set_(tensor.untyped_storage())
    whole = as_bits(poisoned(tensor, (FENCE,)))
    fences = (as_bits(memory[:FENCE]), as_bits(memory[-FENCE:]))
    return all(torch.allclose(fence, whole, rtol=0, atol=0, equal_nan=True) for fence in fences)


def route(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights float32, topk_ids int32), [T, k]."""
    scores = torch.rand(case.tokens, len(case.widths), generator=generator, device=DEVICE)
    if case.routing == "skewed":
        scores[:, 1] += 0.5
    if case.routing == "one":
        scores[:, 2] += 1
    weights, ids = scores.topk(case.top_k)
    if case.routing == "nobody":
        ids.view(-1)[::3] = -1
    return weights, ids.int()
