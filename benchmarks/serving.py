# SPDX-License-Identifier: Apache-2.0
"""Served tokens/s of a dense model in stock vLLM and of its pruned version with the plugin.

    python -m benchmarks.serving --model Qwen3-30B-A3B --sparsity 0.25 --csv benchmarks/results/serving.csv
    python -m benchmarks.serving --model Qwen3-30B-A3B --offline --rounds 2
    python -m benchmarks.serving --device cpu --sparsity 0.5 --rounds 5
    python -m benchmarks.serving --dense serving_examples/tiny_qwen3_moe --pruned build/demo/pruned --workload chat

`--model` makes both from the published sizes with random weights; on a CPU the default is a model of 1.7 GB. On a GPU
each `vllm serve` has the device to itself for its rounds of `vllm bench serve`; on a CPU, or with `--together`, both
run at once and are asked in turn, so that a slow moment hits both. `--offline` runs `vllm bench throughput`
alternately. CUDA graphs and every other engine setting stay at vLLM's defaults, equal on both sides, unless set after
`--`.
"""

import argparse
import re
import signal
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.random_models import CONFIGS, SMALL, write_dense, write_pruned
from benchmarks.rows import append_csv
from benchmarks.vllm_server import alternate, serve, throughput

SERVE_OPTIONS = ("--no-enable-prefix-caching", "--disable-uvicorn-access-log")


class Workload(NamedTuple):
    """Random prompts: tokens in, tokens out, requests in flight and in total."""

    input_len: int
    output_len: int
    concurrency: int
    num_prompts: int


WORKLOADS = {
    "decode": Workload(128, 1024, 64, 64),
    "prefill": Workload(4096, 8, 32, 64),
    "mixed": Workload(1024, 128, 64, 128),
    "single": Workload(32, 256, 1, 2),
    "batch": Workload(32, 128, 16, 32),
    "chat": Workload(64, 256, 8, 32),
    "smoke": Workload(8, 8, 2, 4),
}


class Arm(NamedTuple):
    """`plugins`: VLLM_PLUGINS, "" for stock vLLM and None for all."""

    model: Path
    plugins: str | None


def measure_served(
    arms: dict[str, Arm], workloads: dict[str, Workload], rounds: int, options: list[str], log_dir: Path, together: bool
) -> dict[str, dict[str, list[float]]]:
    """Workload to arm to output tokens/s per round, over HTTP."""
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in workloads}
    for group in [arms] if together else [{name: arm} for name, arm in arms.items()]:
        with ExitStack() as stack:
            urls = {
                name: (
                    stack.enter_context(
                        serve(arm.model, *SERVE_OPTIONS, *options, log=log_dir / f"{name}.log", plugins=arm.plugins)
                    ),
                    arm.model,
                )
                for name, arm in group.items()
            }
            for name, load in workloads.items():
                speeds[name] |= alternate(urls, rounds, **load._asdict())
    return speeds


def measure_offline(
    arms: dict[str, Arm], workloads: dict[str, Workload], rounds: int, options: list[str], log_dir: Path
) -> dict[str, dict[str, list[float]]]:
    """The same from `vllm bench throughput`, a fresh engine per round and arm."""
    speeds: dict[str, dict[str, list[float]]] = {name: {arm: [] for arm in arms} for name in workloads}
    for name, load in workloads.items():
        for number in range(rounds):
            for arm in list(arms)[:: -1 if number % 2 else 1]:
                speeds[name][arm].append(
                    throughput(
                        arms[arm].model,
                        *options,
                        plugins=arms[arm].plugins,
                        log=log_dir / f"{arm}.log",
                        num_prompts=load.num_prompts,
                        input_len=load.input_len,
                        output_len=load.output_len,
                    )
                )
    return speeds


def memory(log: Path) -> tuple[str, str]:
    """(GiB of weights, tokens of KV cache) as vLLM logged them, empty where it did not."""
    text = log.read_text()
    found = (re.findall(r"Model loading took ([\d.]+) GiB", text), re.findall(r"KV cache size: ([\d,]+) tokens", text))
    return tuple(matches[-1].replace(",", "") if matches else "" for matches in found)


def table(
    label: str, workloads: dict[str, Workload], speeds: dict[str, dict[str, list[float]]], log_dir: Path
) -> list[dict]:
    """One row per workload: medians of both arms, median and range of the per-round ratios, memory."""
    weights, kv_tokens = zip(*(memory(log_dir / f"{arm}.log") for arm in ("dense", "pruned")), strict=True)
    rows = []
    for name, load in workloads.items():
        dense, pruned = speeds[name]["dense"], speeds[name]["pruned"]
        ratios = [p / d for p, d in zip(pruned, dense, strict=True)]
        rows.append(
            {
                "model": label,
                "workload": name,
                **load._asdict(),
                "dense_tok_s": round(statistics.median(dense), 1),
                "pruned_tok_s": round(statistics.median(pruned), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "rounds": len(ratios),
                "dense_weights_gib": weights[0],
                "pruned_weights_gib": weights[1],
                "dense_kv_tokens": kv_tokens[0],
                "pruned_kv_tokens": kv_tokens[1],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what vLLM is built for; decides the defaults below",
    )
    parser.add_argument("--model", choices=CONFIGS, help="random weights at this model's size")
    parser.add_argument("--sparsity", type=float, default=0.25, help="with --model")
    parser.add_argument("--dense", type=Path, help="a checkpoint instead")
    parser.add_argument("--pruned", type=Path, help="its pruned version")
    parser.add_argument(
        "--workload", nargs="+", choices=WORKLOADS, help="default: decode prefill, on a CPU single batch"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--offline", action="store_true", help="vllm bench throughput instead of vllm serve")
    parser.add_argument(
        "--together", action=argparse.BooleanOptionalAction, help="both servers at once, the default on a CPU"
    )
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="models and logs")
    parser.add_argument("options", nargs="*", help="further vLLM options for both, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers, which are in sessions of their own
    options = args.options
    on_cpu = args.device == "cpu"
    if on_cpu and not (args.dense or args.pruned):
        args.model = args.model or SMALL
    if args.model:
        args.dense, args.pruned = (
            write_dense(args.model, args.work),
            write_pruned(args.model, args.sparsity, args.work),
        )
        options = ["--load-format", "dummy", *options]
    if not args.dense or not args.pruned:
        parser.error("name a --model, or --dense and --pruned")
    stock = None if args.model == "DeepSeekMoE-16B" else ""  # vLLM alone does not know model_type deepseek
    arms = {"dense": Arm(args.dense, stock), "pruned": Arm(args.pruned, None)}
    chosen = args.workload or (["single", "batch"] if on_cpu else ["decode", "prefill"])
    workloads = {name: WORKLOADS[name] for name in chosen}
    if args.offline:
        speeds = measure_offline(arms, workloads, args.rounds, options, args.work)
    else:
        speeds = measure_served(
            arms, workloads, args.rounds, options, args.work, on_cpu if args.together is None else args.together
        )
    rows = table(f"{args.model} {args.sparsity:.0%}" if args.model else args.pruned.name, workloads, speeds, args.work)
    for row in rows:
        print(
            f"{row['model']}, {row['workload']} ({row['input_len']} in, {row['output_len']} out, "
            f"{row['concurrency']} at once): dense {row['dense_tok_s']:.0f} output tokens/s, pruned "
            f"{row['pruned_tok_s']:.0f}, ratio {row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f} "
            f"over {row['rounds']} rounds)"
        )
    if args.csv:
        append_csv(args.csv, rows)


if __name__ == "__main__":
    main()
