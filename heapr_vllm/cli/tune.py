# SPDX-License-Identifier: Apache-2.0
"""`heapr tune`: the fastest kernel tiles on this GPU.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options


def add_tune(commands: options.Commands) -> None:
    """Adds `heapr tune`."""
    command = options.add_command(
        commands,
        "tune",
        run_tune,
        "fastest kernel tiles for a pruned model on this GPU",
        "heapr tune pruned --time-budget 10m && vllm serve pruned",
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("model", type=Path, nargs="?", metavar="DIR", help="masks repository or compact checkpoint")
    what.add_argument("--shape", nargs="+", metavar="NAME", help="a model of the paper, such as Qwen3-30B-A3B")
    command.add_argument(
        "--sparsity",
        type=options.fraction,
        nargs="+",
        default=[0.0, 0.25, 0.5],
        help="with --shape: sparsities to tune for",
    )
    command.add_argument(
        "--tokens",
        type=options.positive,
        nargs="+",
        metavar="T",
        default=[2**power for power in range(14)],
        help="token counts per step",
    )
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the model's")
    command.add_argument(
        "--quantize",
        choices=("none", "int8", "fp8", "int4"),
        help="experts in 8 or 4 bits, or in the model's dtype; default: as the model has them",
    )
    command.add_argument(
        "--round-activations", action="store_true", help="for HEAPR_KERNEL=triton_a8, with experts in 8 bits"
    )
    command.add_argument("--tensor-parallel-size", type=options.positive, default=1, metavar="N")
    command.add_argument(
        "--time-budget",
        type=options.duration,
        default=600.0,
        metavar="TIME",
        help="for timing, after compiling; such as 90s, 10m or 1h",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the plugin looks as well: HEAPR_CONFIG_FOLDER, or the user's cache (default)",
    )
    command.add_argument("--overwrite", action="store_true", help="tune again what is tuned")


def run_tune(args: argparse.Namespace) -> None:
    import torch

    from heapr_vllm.model_executor.kernels.triton.tuned_files import user_folder
    from heapr_vllm.model_executor.tuning.jobs import jobs_of_model, jobs_of_shapes, with_rounded_activations
    from heapr_vllm.model_executor.tuning.search import tune

    dtype = getattr(torch, args.dtype) if args.dtype else None
    jobs = (
        jobs_of_model(args.model, dtype, args.tensor_parallel_size, args.quantize)
        if args.model
        else jobs_of_shapes(
            args.shape, args.sparsity, dtype or torch.bfloat16, args.tensor_parallel_size, args.quantize
        )
    )
    if args.round_activations:
        jobs = with_rounded_activations(jobs)
    written, missing = tune(jobs, args.tokens, args.output or user_folder(), args.time_budget, overwrite=args.overwrite)
    for path in written:
        print(f"wrote {path}")
    if missing:
        print(
            f"no time was left for {missing} token counts; the same command continues, or take a longer --time-budget"
        )
    elif not written:
        print("everything was tuned already; --overwrite tunes it again")
