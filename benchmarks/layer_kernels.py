# SPDX-License-Identifier: Apache-2.0
"""The kernels of one MoE layer as grids of CTAs, in stock vLLM and in our code, and the time they take. No GPU is used.

Where the constants come from: [code] the source of vLLM 0.32 or ours, or the SASS of both compiled for sm_90a with
Triton 3.6 to 3.9; [guide] NVIDIA's programming guide for compute capability 9.0; [guess] guessed, and then held against
the one set of published times that `tests/benchmarks/test_layer_model.py` has. Not modelled: writes inside the GEMMs, a
full L2, the order of blocks (GROUP_M), skewed routing, clocks that fall under load.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from benchmarks.event_simulation import Gpu, Grid, simulate
from benchmarks.modelled_tiles import GemmTile, LayerTiles
from heapr_vllm.model_executor.kernels.triton.tiles import use_one_route_blocks
from heapr_vllm.model_executor.tuning.synthetic import MoEShape

ITEM_BYTES = 2  # bf16
SHARED_MEMORY, CTA_SHARED_MEMORY = 228 << 10, 1 << 10  # bytes of an SM, and what a CTA takes besides its own [guide]
REGISTERS, THREAD_REGISTERS, WARPS, CTAS = 65536, 255, 64, 32  # of an SM, of a thread, of an SM, of an SM [guide]
WGMMA_ROWS = 64  # from so many rows on Triton emits wgmma, for fewer mma.sync [code]
LAUNCH_S = 2.0e-6  # a small kernel in a CUDA graph with its boundary [guess]
BOUNDARY_S = 1.0e-6  # from the last CTA of a kernel to the first of the next [guess]
DEPENDENT_LOAD_S = 0.3e-6  # one load of a prologue that the next one waits for: L2, now and then DRAM [guess]
ALIGN_ROUTE_S = 0.5e-9  # moe_align_block_size per route, besides its launches [guess]
L2_RESIDENT_BYTES = 40e6  # intermediates up to this size are read back from L2, which has 50 MB [guess]
TWO_PRODUCTS = 1.075  # gate and up as two wgmma read x from shared memory twice: 96 instead of 80 B per clock [guess]
SCALAR_STEP_S = 1.1e-6  # a K step with unpipelined 2-byte loads of W2, besides its products [guess]
DOWN_EPILOGUE_S, DOWN_ELEMENT_S = 0.3e-6, 6e-9  # as `up_epilogue_s`, `up_element_s`; 16-byte stores everywhere [guess]
CHAINED_BOUNDARY_S = 0.2e-6  # with programmatic dependent launch [guess]
CHAINED_COMBINE_S = 1.0e-6  # the least that combine then takes [guess]
CHAINED_OVERLAP_S, CHAINED_OVERLAP = 0.8e-6, 0.1  # what down gains by starting early: time and share at most [guess]


@dataclass(frozen=True)
class Code:
    """One version of the layer's kernels: what differs besides the tiles. Names in `_s` are seconds.

    `fused`: up multiplies a tile of gate and one of up rows, in as many instructions as `products`, and applies SwiGLU.
    `dependent_loads` and `address_s`: what a CTA does before its first weight load. `up_epilogue_s`: end of a tile of
    up, plus `up_element_s` for each accumulator of a thread. `one_route`: from (tokens, top-k, experts) whether
    alignment is skipped, which costs `one_route_launches` kernels. `mapping_launches`: kernels that map experts to
    slots before alignment, among `extra_experts` more. `scalar_down`: W2 in 2-byte loads, unpipelined. `combine_s`:
    chain of loads in combine, at up to 64 tokens.
    """

    name: str
    dependent_loads: int
    address_s: float
    idle_cta_s: float
    up_epilogue_s: float
    up_element_s: float
    one_route: Callable[[int, int, int], bool] = use_one_route_blocks
    one_route_launches: int = 0
    fused: bool = True
    products: int = 1
    mapping_launches: int = 0
    extra_experts: int = 0
    scalar_down: bool = False
    combine_s: float = 0.0


def vllm_skips_alignment(tokens: int, top_k: int, num_experts: int) -> bool:
    """The rule of vLLM 0.32, and ours at c9db1ee [code]."""
    return tokens * top_k * 4 <= num_experts


# Loads, launches and widths of stores [code]; times [guess], longer where the SASS has more instructions.
STOCK = Code(
    "vllm",
    dependent_loads=2,
    address_s=0.5e-6,
    idle_cta_s=0.6e-6,
    up_epilogue_s=0.3e-6,
    up_element_s=6e-9,
    one_route=vllm_skips_alignment,
    one_route_launches=1,
    fused=False,
)
BEFORE = Code(
    "before",
    dependent_loads=4,
    address_s=0.25e-6,
    idle_cta_s=1.2e-6,
    up_epilogue_s=0.4e-6,
    up_element_s=22e-9,
    one_route=vllm_skips_alignment,
    products=2,
    mapping_launches=2,
    extra_experts=1,
    scalar_down=True,
    combine_s=2.5e-6,
)
AFTER = Code("after", dependent_loads=2, address_s=0.25e-6, idle_cta_s=0.9e-6, up_epilogue_s=0.35e-6, up_element_s=9e-9)


class LayerTime(NamedTuple):
    """Seconds of one layer by kernel; `between`: boundaries around the two GEMMs."""

    align: float
    up: float
    activation: float
    down: float
    combine: float
    between: float

    @property
    def total(self) -> float:
        return sum(self)


class Blocks(NamedTuple):
    """Blocks of routes in launch order: expert, routes, and whether it is the expert's first; then `idle` empty ones.

    The first one brings an expert's weights into L2 for the others.
    """

    expert: np.ndarray
    routes: np.ndarray
    first: np.ndarray
    idle: int

    @classmethod
    def build(cls, counts: np.ndarray, block_m: int, experts_aligned: int) -> "Blocks":
        """Aligned blocks of the experts' `counts` of routes; as many as vLLM's op allows for, used or not [code]."""
        used = -(-counts // block_m)
        expert = np.repeat(np.arange(len(counts)), used)
        position = np.arange(len(expert)) - np.repeat(used.cumsum() - used, used)
        total = int(counts.sum())
        rows = total + experts_aligned * (block_m - 1)
        if total < experts_aligned:
            rows = min(rows, total * block_m)
        return cls(
            expert,
            np.minimum(counts[expert] - position * block_m, block_m),
            position == 0,
            -(-rows // block_m) - len(expert),
        )

    @classmethod
    def one_route_each(cls, counts: np.ndarray) -> "Blocks":
        """One block per route, each reading its expert's weights by itself."""
        expert = np.repeat(np.arange(len(counts)), counts)
        return cls(expert, np.ones_like(expert), np.ones(len(expert), dtype=bool), 0)


def predict(code: Code, moe: MoEShape, widths: list[int], tokens: int, gpu: Gpu, tiles: LayerTiles) -> LayerTime:
    """Mean over random routings. `widths`: stored neurons of each expert; 0 takes part in routing only."""
    times = [
        _predict_routing(code, moe, np.sort(widths)[::-1], counts, tokens, gpu, tiles)  # ours store widest first
        for counts in route_counts(moe.num_experts, moe.top_k, tokens)
    ]
    return LayerTime(*np.mean(times, axis=0).tolist())


@cache
def route_counts(num_experts: int, top_k: int, tokens: int) -> list[np.ndarray]:
    """Routes of each expert when every token picks `top_k` different ones at random: 8 draws, fewer for many tokens."""
    random = np.random.default_rng(0)
    draws = max(1, min(8, 512 // tokens))
    picks = [random.random((tokens, num_experts)).argpartition(top_k - 1)[:, :top_k] for _ in range(draws)]
    return [np.bincount(pick.ravel(), minlength=num_experts) for pick in picks]


def chained(time: LayerTime) -> LayerTime:
    """The same layer with programmatic dependent launch of down and combine: prologues and first loads overlap."""
    return time._replace(
        down=time.down - min(CHAINED_OVERLAP_S, CHAINED_OVERLAP * time.down),
        combine=max(time.combine - BOUNDARY_S, CHAINED_COMBINE_S),
        between=2 * CHAINED_BOUNDARY_S,
    )


def _predict_routing(
    code: Code, moe: MoEShape, widths: np.ndarray, counts: np.ndarray, tokens: int, gpu: Gpu, tiles: LayerTiles
) -> LayerTime:
    routes = tokens * moe.top_k
    one_route = code.one_route(tokens, moe.top_k, int(np.count_nonzero(widths)))
    experts_aligned = moe.num_experts + code.extra_experts
    if one_route:
        blocks = Blocks.one_route_each(counts)
        align = code.one_route_launches * LAUNCH_S
    else:
        blocks = Blocks.build(counts, tiles.block_m, experts_aligned)
        launches = code.mapping_launches + (1 if experts_aligned <= 64 and routes < 1024 else 2)  # [code]
        align = launches * LAUNCH_S + routes * ALIGN_ROUTE_S
    up = simulate(up_grid(code, blocks, widths, moe.hidden_size, gpu, tiles), gpu)
    down = simulate(down_grid(code, blocks, widths, moe.hidden_size, gpu, tiles), gpu)
    combine = _stream_s((routes + tokens) * moe.hidden_size * ITEM_BYTES, gpu)
    combine += code.combine_s if tokens <= 64 else 0
    activation = 0.0 if code.fused else _stream_s(routes * 3 * moe.moe_intermediate_size * ITEM_BYTES, gpu)
    return LayerTime(align, up, activation, down, combine, 2 * BOUNDARY_S)


def _stream_s(num_bytes: float, gpu: Gpu) -> float:
    """A kernel that reads and writes so many bytes and does little else."""
    bandwidth = gpu.l2_bandwidth if num_bytes < L2_RESIDENT_BYTES else gpu.dram_bandwidth
    return max(LAUNCH_S, BOUNDARY_S + num_bytes / bandwidth)


def up_grid(code: Code, blocks: Blocks, widths: np.ndarray, hidden_size: int, gpu: Gpu, tiles: LayerTiles) -> Grid:
    """x times gate and up: a tile holds `block_n` columns of each if they are fused, otherwise of both together."""
    matrices = 2 if code.fused else 1
    outputs = 2 // matrices * widths
    accumulators = tiles.block_m * matrices * tiles.up.block_n / (32 * tiles.up.num_warps)
    grid = _gemm_grid(code, blocks, tiles.block_m, tiles.up, outputs, np.full_like(widths, hidden_size), gpu, matrices)
    slowdown = TWO_PRODUCTS if code.products > 1 and tiles.block_m >= WGMMA_ROWS else 1.0
    return replace(
        grid, tensor_s=slowdown * grid.tensor_s, epilogue_s=code.up_epilogue_s + code.up_element_s * accumulators
    )


def down_grid(code: Code, blocks: Blocks, widths: np.ndarray, hidden_size: int, gpu: Gpu, tiles: LayerTiles) -> Grid:
    """Hidden neurons times W2."""
    block_m, tile = tiles.block_m, tiles.down
    grid = _gemm_grid(code, blocks, block_m, tile, np.full_like(widths, hidden_size), widths, gpu)
    if not code.scalar_down:
        return grid
    if block_m < WGMMA_ROWS:  # 128 registers; one step of W2 in flight [code]
        return replace(grid, ctas_per_sm=4, bytes_in_flight=tile.block_n * tile.block_k * ITEM_BYTES)
    products_s = 2.0 * block_m * tile.block_n * tile.block_k / (gpu.sm_flops * tensor_share(block_m, 256))
    columns = -(-hidden_size // tile.block_n)
    steps = np.repeat(-(-widths[blocks.expert] // tile.block_k), columns)
    serial_s = np.append(steps * (SCALAR_STEP_S + products_s), np.zeros(blocks.idle * columns))
    return replace(grid, serial_s=serial_s, ctas_per_sm=2 if block_m == WGMMA_ROWS else 1)  # 255 registers [code]


def _gemm_grid(
    code: Code,
    blocks: Blocks,
    block_m: int,
    tile: GemmTile,
    outputs: np.ndarray,
    inputs: np.ndarray,
    gpu: Gpu,
    matrices: int = 1,
) -> Grid:
    """Blocks times tiles of `outputs`, all tiles of a block in a row; `outputs` and `inputs` are of each expert.

    A tile reads its columns of `matrices` weights and its block's rows. The epilogue is that of down.
    """
    start = np.arange(0, outputs.max(), tile.block_n)
    columns = matrices * np.clip(outputs[blocks.expert, None] - start, 0, tile.block_n)
    column_bytes = inputs[blocks.expert, None] * ITEM_BYTES
    weight_bytes = columns * column_bytes
    works = weight_bytes > 0
    width = matrices * tile.block_n
    flops = 2.0 * block_m * width * inputs[blocks.expert, None]
    prologue_s = code.dependent_loads * DEPENDENT_LOAD_S + code.address_s
    ctas_per_sm, bytes_in_flight = residency(block_m, width, tile)

    def with_idle(values: np.ndarray, idle_value: float = 0.0) -> np.ndarray:
        return np.append(np.where(works, values, idle_value), np.full(blocks.idle * len(start), idle_value))

    return Grid(
        prologue_s=with_idle(np.full(works.shape, prologue_s), code.idle_cta_s),
        dram_bytes=with_idle(weight_bytes * blocks.first[:, None]),
        l2_bytes=with_idle(weight_bytes + blocks.routes[:, None] * column_bytes),
        tensor_s=with_idle(flops / (gpu.sm_flops * tensor_share(block_m, width))),
        serial_s=np.zeros(works.size + blocks.idle * len(start)),
        epilogue_s=DOWN_EPILOGUE_S + DOWN_ELEMENT_S * block_m * width / (32 * tile.num_warps),
        ctas_per_sm=ctas_per_sm,
        bytes_in_flight=bytes_in_flight,
    )


def tensor_share(block_m: int, columns: int) -> float:
    """Part of the tensor cores' peak that a main loop reaches on a tile of so many rows and columns [guess]."""
    if block_m < WGMMA_ROWS:
        return 0.33
    if columns >= 256:
        return 0.66
    if columns >= 128:
        return 0.56 if block_m >= 128 else 0.50
    return 0.42


def residency(block_m: int, columns: int, tile: GemmTile) -> tuple[int, float]:
    """(CTAs on an SM, bytes that each has in flight) of a pipelined GEMM.

    Registers per thread are a fit to those of the compiled kernels, 10 tiles [code].
    """
    stage_bytes = (block_m + columns) * tile.block_k * ITEM_BYTES
    wgmma = block_m >= WGMMA_ROWS
    buffers = tile.num_stages if wgmma else tile.num_stages - 1
    threads = 32 * tile.num_warps
    accumulators = block_m * columns / threads
    copies = columns * tile.block_k * ITEM_BYTES / (16 * threads)  # of 16 bytes, of weights, per thread and step
    registers = 50 + 1.15 * accumulators if wgmma else 30 + 1.75 * accumulators + 2.5 * copies
    thread_registers = min(registers, THREAD_REGISTERS) // 8 * 8 + 8  # allocated by eights
    limits = (
        SHARED_MEMORY // (stage_bytes * buffers + CTA_SHARED_MEMORY),
        REGISTERS // (thread_registers * threads),
        WARPS // tile.num_warps,
        CTAS,
    )
    return max(1, int(min(limits))), stage_bytes * (tile.num_stages - 1)
