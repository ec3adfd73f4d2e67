# SPDX-License-Identifier: Apache-2.0
"""Which kernel the plugin takes on this CPU, and the times that say so: every candidate on layers of a model's shape.

    python -m benchmarks.kernel_choice --model Qwen3-30B-A3B Qwen3-MoE-1.7GB tiny --threads 1 2
    ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.kernel_choice --csv benchmarks/results/kernel_choice.csv

Does what an engine does when it loads a model for the first time (`heapr_vllm/model_executor/tuning/timed_choice.py`),
with random masks, and keeps nothing.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from benchmarks.random_models import CONFIGS, random_masks
from benchmarks.rows import append_csv
from heapr_vllm.model_executor.kernels.choice import candidates
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.model_executor.kernels.op import register_op
from heapr_vllm.model_executor.tuning.kernel_timing import TOKENS, TimedLayer, time_kernels
from heapr_vllm.model_executor.tuning.timed_choice import fastest


def layer_of(name: str, sparsity: float, dtype: torch.dtype) -> TimedLayer:
    """What stands for the layers of a model that is pruned by `sparsity`."""
    config = CONFIGS[name]
    kept: list[int] = []
    for keep in random_masks(config, sparsity).keep.values():
        kept += keep.sum(-1).tolist()
    num_experts = config.get("num_experts") or config["n_routed_experts"]
    return TimedLayer.of(kept, num_experts, config["num_experts_per_tok"], config["hidden_size"], dtype)


def measure(name: str, sparsity: float, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per candidate: microseconds at each token count, and whether it is chosen."""
    layer = layer_of(name, sparsity, dtype)
    seconds = time_kernels(layer, candidates(dtype, layer.hidden_size))
    chosen = fastest(seconds)
    return [
        {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "sparsity": sparsity,
            "threads": torch.get_num_threads(),
            "isa": build.isa(),
            "kernel": kernel,
            **{f"us_{tokens}_tokens": round(1e6 * each, 1) for tokens, each in zip(TOKENS, times, strict=True)},
            "chosen": kernel == chosen,
        }
        for kernel, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=["Qwen3-30B-A3B", "Qwen3-MoE-1.7GB", "tiny"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    current_platform.import_kernels()
    register_op()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.model:
            for sparsity in args.sparsity:
                found = measure(name, sparsity, getattr(torch, args.dtype))
                rows += found
                for row in found:
                    times = " / ".join(f"{row[f'us_{tokens}_tokens']:.0f}" for tokens in TOKENS)
                    mark = "  <- chosen" if row["chosen"] else ""
                    print(
                        f"{threads} threads, {row['isa']}, {name} {sparsity:.0%} pruned, {row['kernel']:<9}"
                        f"{times:>24} us{mark}",
                        flush=True,
                    )
    if args.csv:
        append_csv(args.csv, rows)


if __name__ == "__main__":
    main()
