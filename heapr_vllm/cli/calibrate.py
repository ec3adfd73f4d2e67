# SPDX-License-Identifier: Apache-2.0
"""`heapr calibrate`: text and a model to neuron moments.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options
from heapr_vllm.errors import HeaprError


def add_calibrate(commands: options.Commands) -> None:
    """Adds `heapr calibrate`."""
    command = options.add_command(
        commands,
        "calibrate",
        run_calibrate,
        "one forward and backward pass over text: neuron moments",
        "heapr calibrate Qwen/Qwen3-30B-A3B --dataset 'wikitext[wikitext-2-raw-v1](train)' -o calib",
    )
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or Hub id")
    options.dataset(command)
    output = options.output(command, "CALIB", required=False)
    output.add_argument("--resume", action="store_true", help="continue a run that was killed")
    command.add_argument("--num-calibration-samples", type=options.positive, default=128, metavar="N")
    command.add_argument(
        "--batch-size",
        type=options.positive,
        default=1,
        metavar="B",
        help="does not change the result, beyond rounding in half precision",
    )
    command.add_argument(
        "--packing",
        action="store_true",
        help="put whole samples into rows of L tokens, where they do not see each other",
    )
    options.placement(command, "cpu, cuda, cuda:1, or auto: one model over all GPUs")
    command.add_argument(
        "--stream",
        action="store_true",
        help="for models larger than memory: one layer at a time, hidden states on disk in CALIB",
    )
    command.add_argument("--revision", help="revision of a Hub id")
    command.add_argument(
        "--checkpoint-every", type=options.positive, default=8, metavar="K", help="batches between saves"
    )
    command.add_argument("--dry-run", action="store_true", help="print sizes, load no weight, write nothing")


def run_calibrate(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.calibration.calibrate import calibrate
    from heapr_vllm.prune.calibration.dry_run import plan
    from heapr_vllm.prune.calibration.processes import joined_processes
    from heapr_vllm.prune.calibration.settings import CalibrationSettings
    from heapr_vllm.prune.text.samples import SourceRecord

    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    settings = CalibrationSettings(
        model=model,
        **options.text(args),
        num_calibration_samples=args.num_calibration_samples,
        batch_size=args.batch_size,
        packing=args.packing,
        dtype=args.dtype,
        revision=args.revision,
        stream=args.stream,
    )
    if args.dry_run:
        sizes = plan(settings, args.device)
        print("\n".join(f"{name.replace('_', ' '):<30} {_human(name, value)}" for name, value in sizes.items()))
        return
    if args.output is None:
        raise HeaprError("say where the result goes with -o CALIB (only --dry-run writes nothing)")
    with joined_processes() as processes:
        moments = calibrate(
            settings,
            args.output,
            device=args.device,
            checkpoint_every=args.checkpoint_every,
            resume=args.resume,
            overwrite=args.overwrite,
            processes=processes,
        )
    silent = sum(int((tokens == 0).sum()) for tokens in moments.tokens.values())
    if processes.is_first:
        for source in moments.metadata.get("sources", []):
            print(SourceRecord(**source))
        print(f"wrote {args.output}: {len(moments.tokens)} MoE layers, {silent} experts without a calibration token")


def _human(name: str, value: int) -> str:
    return f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,}"
