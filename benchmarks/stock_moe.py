# SPDX-License-Identifier: Apache-2.0
"""The opponents of `benchmarks.moe_layer`: vLLM's Triton MoE as shipped and tuned, and FlashInfer's CUTLASS MoE."""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from triton.errors import TritonError

from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.model_executor.tuning.search import MAX_CANDIDATES, try_stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape, random_batch

Config = dict[str, int]


def why_missing() -> str | None:
    """Why vLLM's Triton MoE cannot run here, None if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    except ImportError as error:
        return f"vLLM does not import ({error})"
    _provide_activation()
    x = torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(8, 128, 64, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(64, 2, dtype=torch.int32, device="cuda")
    try:
        fused_experts(x, weight, weight[:, :64], ids.float(), ids)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"an op of vLLM is missing ({error})"
    return None


@cache
def _provide_activation(device: str = "CUDA") -> torch.library.Library | None:
    """Where only vLLM's Python files and its MoE ops are present, PyTorch compiles the fused SiLU that it calls.

    The op lives as long as the returned library, which the cache holds.
    """
    if hasattr(torch.ops._C, "silu_and_mul"):
        return None
    print("vLLM's silu_and_mul is missing; its stock arms run one compiled by PyTorch")
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
    library.impl("silu_and_mul", torch.compile(_silu_and_mul, dynamic=True), device)
    return library


def _silu_and_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


@dataclass(frozen=True)
class UniformLayer:
    """Experts of one width in vLLM's layout: `w1` [E, 2I, H] gate rows first, `w2` [E, H, I], one per copy."""

    moe: MoEShape
    w1: list[torch.Tensor]
    w2: list[torch.Tensor]

    @classmethod
    def build(cls, moe: MoEShape, width: int, dtype: torch.dtype, device: torch.device, copies: int) -> "UniformLayer":
        """Random weights of `width` instead of the model's own."""
        shapes = (moe.num_experts, 2 * width, moe.hidden_size), (moe.num_experts, moe.hidden_size, width)
        w1, w2 = (
            [torch.empty(shape, dtype=dtype, device=device).normal_(std=moe.hidden_size**-0.5) for _ in range(copies)]
            for shape in shapes
        )
        return cls(moe, w1, w2)

    @property
    def width(self) -> int:
        return self.w2[0].shape[2]

    def vllm(self, batch: Batch, copy: int = 0) -> torch.Tensor:
        """Output [T, H] of vLLM's Triton MoE."""
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        copy %= len(self.w1)
        return fused_experts(batch.x, self.w1[copy], self.w2[copy], batch.topk_weights, batch.topk_ids)

    def flashinfer(self, batch: Batch, copy: int = 0) -> torch.Tensor:
        """Output [T, H] of FlashInfer's CUTLASS MoE, which wants up rows first (`swapped`)."""
        from flashinfer.fused_moe import cutlass_fused_moe

        copy %= len(self.w1)
        output = torch.empty_like(batch.x)
        cutlass_fused_moe(
            input=batch.x,
            token_selected_experts=batch.topk_ids,
            token_final_scales=batch.topk_weights,
            fc1_expert_weights=self.w1[copy],
            fc2_expert_weights=self.w2[copy],
            output=output,
            output_dtype=batch.x.dtype,
            quant_scales=None,
        )
        return output

    def swapped(self) -> "UniformLayer":
        """The same experts with up rows before gate rows."""
        return UniformLayer(self.moe, [torch.cat(w1.chunk(2, dim=1)[::-1], dim=1) for w1 in self.w1], self.w2)


@contextmanager
def using(config: Config | None) -> Generator[None]:
    """vLLM takes `config` for both GEMMs inside the block; None leaves its own choice."""
    if config is None:
        yield
        return
    from vllm.model_executor.layers import fused_moe

    previous = fused_moe.get_config()
    fused_moe._config = config
    try:
        yield
    finally:  # vLLM's own override_config keeps the config after an error
        fused_moe._config = previous


def tuned_config(layer: UniformLayer, batches: list[Batch], folder: Path, seconds: float) -> Config:
    """vLLM's fastest configuration for these batches, from `folder` or found within `seconds` and written there.

    Candidates start with what vLLM ships, for this GPU and for the H200, so the result is never slower than that.
    """
    path = folder / (
        f"vllm,E={layer.moe.num_experts},N={layer.width},H={layer.moe.hidden_size},"
        f"dtype={str(layer.w1[0].dtype).removeprefix('torch.')},"
        f"device={torch.cuda.get_device_name().replace(' ', '_')}.json"
    )
    known = json.loads(path.read_text()) if path.is_file() else {}
    key = str(len(batches[0].x))
    if key not in known:
        known[key] = _search(layer, batches, time.monotonic() + seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_file(path, lambda target: target.write_text(json.dumps(known, indent=2) + "\n"))
    return known[key]


def _search(layer: UniformLayer, batches: list[Batch], deadline: float) -> Config:
    device = batches[0].x.device
    known = known_configs(layer, len(batches[0].x))
    best, best_seconds = known[0], float("inf")
    for config in [*known, *candidates(layer, len(batches[0].x))]:
        if time.monotonic() > deadline:
            break
        with using(config):
            run = try_stopwatch([lambda i=i, b=b: layer.vllm(b, i) for i, b in enumerate(batches)], device)
        if run is None or run() > 1.5 * best_seconds:
            continue
        seconds = statistics.median(run() for _ in range(7))
        if seconds < best_seconds:
            best, best_seconds = config, seconds
    return best


def shipped_config(layer: UniformLayer, num_tokens: int) -> Config:
    """What vLLM would take by itself."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    return try_get_optimal_moe_config(layer.w1[0].shape, layer.w2[0].shape, layer.moe.top_k, None, num_tokens)


def h200_config(layer: UniformLayer, num_tokens: int) -> Config | None:
    """What vLLM takes on an H200, if it ships a file of this shape for that and would not take the same here."""
    import vllm

    path = (
        Path(vllm.__file__).parent
        / "model_executor/layers/fused_moe/configs"
        / f"E={layer.moe.num_experts},N={layer.width},device_name=NVIDIA_H200.json"
    )
    if not path.is_file():
        return None
    entries = json.loads(path.read_text())
    entries.pop("triton_version", None)
    config = entries[min(entries, key=lambda count: abs(int(count) - num_tokens))]
    return None if config == shipped_config(layer, num_tokens) else config


def known_configs(layer: UniformLayer, num_tokens: int) -> list[Config]:
    """vLLM's own choice, and that for the H200 if it is another."""
    from_file = h200_config(layer, num_tokens)
    return [shipped_config(layer, num_tokens), *([from_file] if from_file else [])]


def candidates(layer: UniformLayer, num_tokens: int) -> list[Config]:
    """Configurations around the usual ones, nearest to the last of `known_configs` first."""
    routes = num_tokens * layer.moe.top_k / layer.moe.num_experts
    found = [
        {
            "BLOCK_SIZE_M": m,
            "BLOCK_SIZE_N": n,
            "BLOCK_SIZE_K": k,
            "GROUP_SIZE_M": group,
            "SPLIT_K": 1,
            "num_warps": warps,
            "num_stages": stages,
        }
        for m in (16, 32, 64, 128)
        if routes / 8 <= m <= max(16, 4 * routes)
        for n in (32, 64, 128, 256)
        for k in (64, 128, 256)
        for warps in (4, 8)
        for stages in (2, 3, 4, 5)
        for group in ((1, 16) if routes > m else (1,))
        if m * n <= 128 * 32 * warps and stages * k * (m + n) * 2 <= 227 * 1024 and (warps == 4 or m * n >= 64 * 128)
    ]
    near = known_configs(layer, num_tokens)[-1]
    return sorted(found, key=lambda config: sum(config[key] != near.get(key) for key in config))[:MAX_CANDIDATES]


def compile_all(work: list[tuple[UniformLayer, int]]) -> None:
    """Compiles the candidates for these layers and token counts in parallel; Triton's cache then has them."""
    jobs: dict[tuple, None] = {}
    for layer, tokens in work:
        for config in [*known_configs(layer, tokens), *candidates(layer, tokens)]:
            jobs[layer.moe.top_k, layer.w1[0].dtype, tuple(config.items())] = None  # any size, one kernel
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), context) as pool:
        list(
            tqdm(
                pool.map(_compile, *zip(*jobs, strict=True), chunksize=4),
                total=len(jobs),
                unit="config",
                desc="compiling vLLM's kernel",
                disable=None,
            )
        )


def _compile(top_k: int, dtype: torch.dtype, config: tuple[tuple[str, int], ...]) -> None:
    """Runs one configuration with and without alignment on a small layer."""
    device = torch.device("cuda")
    few = MoEShape(4 * top_k, top_k, 512, 256)
    layer = UniformLayer.build(few, few.moe_intermediate_size, dtype, device, copies=1)
    for tokens in (1, 64):
        with using(dict(config)), suppress(TritonError, RuntimeError):
            layer.vllm(random_batch(tokens, few, dtype, device))
