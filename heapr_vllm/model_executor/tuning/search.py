# SPDX-License-Identifier: Apache-2.0
"""Finds the fastest tiles for a layer shape on this GPU: what `heapr tune` runs.

Both GEMMs are timed by themselves over the same blocks of routes, so the search is a sum and not a product; the best
pair of every block size is then timed as a whole layer, and with the winner every way to run it, one after another.
Results go to JSON after every token count.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file, check_writable
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.obstacles import gpu_has_e4m3
from heapr_vllm.model_executor.kernels.triton.route_blocks import RouteBlocks
from heapr_vllm.model_executor.kernels.triton.tiles import (
    LayerShape,
    Tile,
    TileConfig,
    default_config,
    rounded_group,
    use_one_route_blocks,
)
from heapr_vllm.model_executor.kernels.triton.tuned_files import (
    FORMAT_VERSION,
    device_name,
    profile_entry,
    read_profiles,
    token_entry,
)
from heapr_vllm.model_executor.tuning.jobs import Job
from heapr_vllm.model_executor.tuning.stopwatch import stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape, SyntheticLayer, random_batch
from heapr_vllm.progress import progress

BLOCK_MS = (16, 32, 64, 128)
SHARED_MEMORY = 227 * 1024  # bytes per block on Hopper; smaller GPUs refuse at launch
MAX_ACCUMULATORS = 128  # fp32 values per thread, half of the registers
MAX_CANDIDATES = 40  # per GEMM and block size
HOPELESS = 1.5  # a tile this much slower than the best at first sight is not timed again
# What vLLM's files for H200s choose in bf16 (E=128,N=768 and E=64,N=2560), as block_m, block_n, block_k, group_m, warps
# and stages: ours with half of block_n for the up GEMM, and block_k 64 for the down GEMM, are tried first.
STOCK_TILES = (
    (16, 64, 64, 1, 4, 5),
    (16, 64, 64, 1, 4, 4),
    (16, 64, 64, 16, 4, 5),
    (16, 64, 128, 1, 4, 3),
    (16, 64, 128, 1, 4, 4),
    (16, 64, 128, 1, 4, 5),
    (16, 64, 128, 16, 4, 2),
    (16, 64, 128, 32, 4, 2),
    (16, 64, 256, 1, 4, 2),
    (16, 64, 256, 1, 4, 3),
    (16, 64, 256, 16, 4, 3),
    (16, 128, 128, 1, 4, 2),
    (16, 128, 128, 1, 8, 3),
    (16, 128, 128, 16, 4, 3),
    (16, 128, 128, 16, 4, 5),
    (16, 128, 128, 32, 4, 5),
    (16, 128, 256, 1, 4, 2),
    (16, 256, 128, 1, 8, 2),
    (32, 128, 128, 1, 4, 3),
    (32, 256, 128, 16, 4, 2),
    (64, 64, 64, 1, 4, 3),
    (64, 128, 64, 1, 4, 3),
    (128, 256, 64, 1, 8, 4),
    (128, 256, 64, 16, 8, 4),
)


def tune(
    jobs: Sequence[Job], tokens: Sequence[int], folder: Path, time_budget: float, *, overwrite: bool = False
) -> tuple[list[Path], int]:
    """Tunes every job for every token count; returns the files written and the token counts there was no time for.

    `time_budget`: seconds of timing, after all candidates have been compiled. What a file holds already is kept, unless
    `overwrite`: an interrupted run goes on where it was. Raises HeaprError without a GPU, unless Triton interprets, and
    if `folder` cannot be written to.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise HeaprError(
            "heapr tune needs a GPU that torch sees (`heapr env` shows what it sees); to try the command "
            "without one, set TRITON_INTERPRET=1"
        )
    check_writable(folder)
    work = [(job, folder / job.shape.file_name(device_name()), count) for job in jobs for count in tokens]
    work = [(job, path, count) for job, path, count in work if overwrite or not _is_done(path, job.shape, count)]
    if work and device.type == "cuda":
        _compile_all([(job, count) for job, _, count in work])
    deadline = time.monotonic() + time_budget
    built_for: Job | None = None
    layer: SyntheticLayer | None = None
    written: dict[Path, None] = {}
    bar = progress(work, unit="token count", desc="tuning")
    for number, (job, path, count) in enumerate(bar):
        share = (deadline - time.monotonic()) / (len(work) - number)
        if share <= 0:
            return list(written), len(work) - number
        if layer is None or built_for is not job:
            layer = None  # frees the last one's weights first
            layer = SyntheticLayer.build(
                job.moe, list(job.widths), job.dtype, device, 2, job.scheme, job.activation_bits
            )
            built_for = job
        config, seconds = fastest(layer, count, time.monotonic() + share)
        bar.set_postfix_str(f"{count} tokens: {1e6 * seconds:.1f} us, block_m {config.block_m}")
        _record(path, job.shape, count, config, seconds)
        written[path] = None
    return list(written), 0


def fastest(layer: SyntheticLayer, num_tokens: int, deadline: float) -> tuple[TileConfig, float]:
    """(tiles, seconds per layer) of the best configuration timed before `deadline` (`time.monotonic`).

    The default is timed first, so there is always a result and it is never slower than the default.
    """
    batches = batches_for(layer, num_tokens)
    default = default_config(num_tokens, layer.shape)
    outputs = torch.empty_like(batches[0].x)

    def layer_seconds(config: TileConfig) -> float:
        run = try_stopwatch(
            [
                partial(triton_ragged_moe, outputs, *layer.arguments(batch, i), config=config, steps=layer.steps)
                for i, batch in enumerate(batches)
            ],
            outputs.device,
        )
        return math.inf if run is None else median_seconds(run, outputs.device)

    best, best_seconds = default, layer_seconds(default)
    sizes = sorted(block_sizes(layer.shape, num_tokens), key=lambda size: abs(math.log2(size / default.block_m)))
    for number, block_m in enumerate(sizes):
        remaining = 2 * (len(sizes) - number) + 1  # searches still to come, and the ways to run, share the time
        tiles = []
        for kind, calls in zip(("up", "down"), _gemm_calls(layer, batches, block_m), strict=True):
            until = time.monotonic() + (deadline - time.monotonic()) / remaining
            tiles.append(
                _fastest_tile(calls, candidates(kind, layer.shape, block_m, num_tokens), until, outputs.device)
            )
            remaining -= 1
        if None in tiles:
            continue
        config = replace(default, block_m=block_m, up=tiles[0], down=tiles[1])
        if (seconds := layer_seconds(config)) < best_seconds:
            best, best_seconds = config, seconds
    for change in changes(layer.shape, num_tokens):
        config = change(best)
        if time.monotonic() > deadline or not config.is_possible(layer.shape):
            continue
        if (seconds := layer_seconds(config)) < best_seconds:
            best, best_seconds = config, seconds
    if math.isinf(best_seconds):
        raise HeaprError(f"no tile runs on {device_name()}; run make test-gpu")
    return best, best_seconds


def changes(shape: LayerShape, num_tokens: int) -> list[Callable[[TileConfig], TileConfig]]:
    """Ways to run the kernels, each to be tried on the best configuration so far.

    Aligned or one block per route is a question near the border between them only. TMA and programmatic dependent
    launches need Hopper, and only its wgmma is wider for a fused product. There are two decodes of E4M3 where
    GPUs cast it.
    """
    found: list[Callable[[TileConfig], TileConfig]] = []
    if use_one_route_blocks(num_tokens, shape.top_k, 4 * shape.num_experts) and num_tokens > 1:
        found.append(lambda config: replace(config, one_route=not config.one_route))
    if shape.activation_bits:
        return [*found, lambda config: replace(config, chained=True)] if _has_hopper() else found
    if shape.weight_dtype == torch.float8_e4m3fn and gpu_has_e4m3():
        found.append(lambda config: replace(config, decode="bits" if config.decode == "cast" else "cast"))
    if _has_hopper():
        found += [
            lambda config: replace(config, fused=not config.fused),
            lambda config: replace(config, up=replace(config.up, tma=True)),
            lambda config: replace(config, down=replace(config.down, tma=True)),
            lambda config: replace(config, chained=True),
            lambda config: replace(config, prefetch=True, down=replace(config.down, tma=False)),
        ]
    return found


@cache
def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def batches_for(layer: SyntheticLayer, num_tokens: int) -> list[Batch]:
    """As many differently routed batches as one timing needs to be longer than its own overhead."""
    count = 32 if num_tokens <= 16 else 8 if num_tokens <= 1024 else 4
    if layer.slot_map.device.type == "cpu":
        count = 2
    return [random_batch(num_tokens, layer.moe, layer.shape.dtype, layer.slot_map.device) for _ in range(count)]


def median_seconds(run: Callable[[], float], device: torch.device) -> float:
    """Median seconds per call of a stopwatch."""
    return statistics.median(run() for _ in range(15 if device.type == "cuda" else 1))


def block_sizes(shape: LayerShape, num_tokens: int) -> list[int]:
    """Rows per block worth trying: about the routes that an expert gets."""
    routes = num_tokens * shape.top_k / shape.num_experts
    if use_one_route_blocks(num_tokens, shape.top_k, shape.num_experts):
        return [16]
    return [block for block in BLOCK_MS if min(routes / 8, BLOCK_MS[-1]) <= block <= max(16, 4 * routes)]


def candidates(kind: str, shape: LayerShape, block_m: int, num_tokens: int) -> list[Tile]:
    """Tiles for the "up" or "down" GEMM that fit the layer, registers and shared memory.

    What stock vLLM's tuned files choose comes first, then what differs least from the default.
    """
    routes = num_tokens * shape.top_k / shape.num_experts
    group_sizes = (1, 8) if routes > block_m else (1,)
    lengths = (64, 128, 256) if kind == "up" else (64,)
    if kind == "up" and shape.activation_bits:
        lengths = (rounded_group(shape.group_size),)
    elif kind == "up" and shape.is_packed:
        lengths = (shape.packed_step,)
    elif kind == "up" and (shape.group_size or shape.hidden_size) % 64:
        lengths = (32,)
    warps = (2, 4, 8) if shape.is_packed else (4, 8)
    axes = ((16, 32, 64, 128, 256), lengths, warps, (2, 3, 4, 5), group_sizes)
    default = default_config(num_tokens, shape)
    usual = getattr(default, kind).meta()
    ordinary = sorted(
        (Tile(*sizes) for sizes in itertools.product(*axes)),
        key=lambda tile: sum(usual[name] != value for name, value in tile.meta().items()),
    )
    tiles = dict.fromkeys([*stock_tiles(kind, block_m), *ordinary])
    possible = [tile for tile in tiles if replace(default, **{kind: tile}).is_possible(shape)]
    return [tile for tile in possible if _fits(kind, tile, shape, block_m)][:MAX_CANDIDATES]


def stock_tiles(kind: str, block_m: int) -> list[Tile]:
    """The equivalents of `STOCK_TILES` for blocks of this height, without repetitions."""
    tiles = [
        Tile(block_n // 2, block_k, warps, stages, group_m)
        if kind == "up"
        else Tile(block_n, 64, warps, stages, group_m)
        for height, block_n, block_k, group_m, warps, stages in STOCK_TILES
        if height == block_m
    ]
    return list(dict.fromkeys(tiles))


def _fits(kind: str, tile: Tile, shape: LayerShape, block_m: int) -> bool:
    """Whether registers and shared memory allow this tile."""
    is_up = kind == "up"
    halves = 2 if is_up else 1
    rounded = shape.activation_bits is not None
    scales_sums = is_up and shape.has_groups and not (shape.is_packed and block_m >= 64)
    sums = 2 if rounded or scales_sums else 1  # of all steps, and of one
    accumulators = sums * halves * block_m * tile.block_n / (32 * tile.num_warps)
    bits_per_weight = shape.scheme.num_bits if shape.scheme else 8 * shape.dtype.itemsize
    item_bytes = 1 if rounded else shape.dtype.itemsize
    step = block_m * item_bytes + halves * tile.block_n * bits_per_weight / 8
    shared = tile.num_stages * tile.block_k * step
    return accumulators <= MAX_ACCUMULATORS and shared <= SHARED_MEMORY


def _gemm_calls(layer: SyntheticLayer, batches: list[Batch], block_m: int) -> tuple[Callable, Callable]:
    """Functions of a tile that give the calls to time for the up and the down GEMM."""
    shape, top_k = layer.shape, layer.moe.top_k
    default = replace(default_config(len(batches[0].x), shape), block_m=block_m)
    blocks = [RouteBlocks.build(batch.topk_ids, layer.slot_map, layer.copies[0].table, default) for batch in batches]
    x, steps = batches[0].x, layer.steps
    hidden = steps.empty_hidden(x, layer.copies[0], blocks[0])
    tokens = [steps.inputs(batch.x, layer.copies[0], default) for batch in batches]
    routed = x.new_empty(x.shape[0] * top_k, shape.hidden_size)
    copies = list(itertools.islice(itertools.cycle(layer.copies), len(batches)))

    def up_calls(tile: Tile) -> list[Callable[[], None]]:
        config = replace(default, up=tile)
        return [
            partial(steps.up_projection, hidden, rows, experts, top_k, block, config)
            for rows, experts, block in zip(tokens, copies, blocks, strict=True)
        ]

    def down_calls(tile: Tile) -> list[Callable[[], None]]:
        config = replace(default, down=tile)
        return [
            partial(steps.down_projection, routed, hidden, experts, block, config)
            for experts, block in zip(copies, blocks, strict=True)
        ]

    return up_calls, down_calls


def _fastest_tile(
    calls: Callable[[Tile], list[Callable]], tiles: list[Tile], deadline: float, device: torch.device
) -> Tile | None:
    best, best_seconds = None, float("inf")
    for tile in tiles:
        if time.monotonic() > deadline:
            break
        run = try_stopwatch(calls(tile), device)
        if run is None:
            continue
        seconds = run()
        if seconds < HOPELESS * best_seconds and device.type == "cuda":
            seconds = statistics.median(run() for _ in range(7))
        if seconds < best_seconds:
            best, best_seconds = tile, seconds
    return best


def try_stopwatch(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float] | None:
    """`stopwatch`, or None for tiles that do not compile or want more than the GPU has. Broken kernels still raise."""
    try:
        return stopwatch(calls, device)
    except (TritonError, RuntimeError) as error:
        if "CUDA error" in str(error):
            raise
        return None


def _compile_all(work: list[tuple[Job, int]]) -> None:
    """Compiles all candidates in parallel processes; this one then finds them in Triton's cache on disk."""
    kernels = {
        (
            job.shape.hidden_size,
            job.shape.top_k,
            job.dtype,
            job.scheme,
            job.activation_bits,
            one_route,
            block_m,
            kind,
            tile,
        )
        for job, count in work
        for one_route in [use_one_route_blocks(count, job.shape.top_k, job.shape.num_experts)]
        for block_m in block_sizes(job.shape, count)
        for kind in ("up", "down")
        for tile in candidates(kind, job.shape, block_m, count)
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), context) as pool:
        list(
            progress(
                pool.map(_compile, *zip(*kernels, strict=True), chunksize=4),
                total=len(kernels),
                unit="kernel",
                desc="compiling",
            )
        )


def _compile(
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    scheme: ExpertScheme | None,
    activation_bits: int | None,
    one_route: bool,
    block_m: int,
    kind: str,
    tile: Tile,
) -> None:
    """Runs one kernel on the smallest layer that uses it."""
    device = torch.device("cuda")
    moe = MoEShape(4 * top_k if one_route else top_k, top_k, hidden_size, 64)
    layer = SyntheticLayer.build(moe, [64] * moe.num_experts, dtype, device, 1, scheme, activation_bits)
    up_calls, down_calls = _gemm_calls(layer, [random_batch(1, moe, dtype, device)], block_m)
    with suppress(TritonError, RuntimeError):
        (up_calls if kind == "up" else down_calls)(tile)[0]()


def _find(profiles: list[dict[str, Any]], shape: LayerShape) -> Iterator[dict[str, Any]]:
    new = profile_entry(shape)
    keys = new.keys() - {"tokens"}
    return (profile for profile in profiles if all(profile[key] == new[key] for key in keys))


def _is_done(path: Path, shape: LayerShape, num_tokens: int) -> bool:
    return any(str(num_tokens) in profile["tokens"] for profile in _find(read_profiles(path), shape))


def _record(path: Path, shape: LayerShape, num_tokens: int, config: TileConfig, seconds: float) -> None:
    """Adds one result to the file, atomically."""
    profiles = read_profiles(path)
    profile = next(_find(profiles, shape), None)
    if profile is None:
        profiles.append(profile := profile_entry(shape))
    profile["tokens"][str(num_tokens)] = token_entry(config, 1e6 * seconds)
    profile["tokens"] = dict(sorted(profile["tokens"].items(), key=lambda entry: int(entry[0])))
    content = {
        "format_version": FORMAT_VERSION,
        "device": device_name(),
        "triton": triton.__version__,
        "profiles": profiles,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file(path, lambda target: target.write_text(json.dumps(content, indent=2) + "\n"))
