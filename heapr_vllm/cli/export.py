# SPDX-License-Identifier: Apache-2.0
"""`heapr export` and `unpack`: masks to a checkpoint, and a compact one to its full size.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options
from heapr_vllm.errors import HeaprError


def add_export(commands: options.Commands) -> None:
    """Adds `heapr export`."""
    command = options.add_command(
        commands,
        "export",
        run_export,
        "masks to a checkpoint, shard by shard",
        "heapr export masks -o pruned && vllm serve pruned",
    )
    command.add_argument("masks", type=Path, metavar="MASKS")
    command.add_argument("--model", metavar="BASE", help="base model, if it is not where it was calibrated")
    command.add_argument(
        "--layout",
        default="compact",
        choices=("compact", "plain", "zeroed", "masked"),  # the last is what zeroed was called
        metavar="{compact,plain,zeroed}",
        help="compact: kept neurons only, for the plugin; plain: the same for any engine, after `heapr prune --scope "
        "uniform`; zeroed: full size, pruned neurons zeroed, for any engine",
    )
    command.add_argument(
        "--quantize",
        choices=("none", "keep", "int8", "fp8", "int4"),
        help="what experts are stored as: keep the codes of a quantized base model (default there), 8-bit integers or "
        "floats with one scale per neuron and 128 of the hidden size, 4-bit integers with one per 64, or none, the "
        "model's dtype",
    )
    command.add_argument("--no-verify", action="store_true", help="skip the fingerprint check, for fine-tunes")
    command.add_argument(
        "--repair",
        metavar="METHOD",
        help="least-squares: refit down_proj on the calibration text; the same command continues after a kill",
    )
    command.add_argument("--repair-dataset", metavar="SPEC", help="another text for the repair")
    command.add_argument(
        "--repair-samples", type=options.positive, metavar="N", help="more or less of it than calibrated on"
    )
    command.add_argument(
        "--repair-memory",
        type=options.size,
        default="8GiB",
        metavar="SIZE",
        help="for second moments; less means more runs over the text (default: 8GiB)",
    )
    command.add_argument("--device", default="cpu", help="of the repair: cpu, cuda, cuda:1")
    options.output(command, "DIR")


def run_export(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export.checkpoint import export_checkpoint
    from heapr_vllm.prune.repair.fit import RepairSettings
    from heapr_vllm.prune.report.summary import format_repair, load_report

    repair = None
    if args.repair:
        repair = RepairSettings(
            method=args.repair,
            dataset=args.repair_dataset,
            num_samples=args.repair_samples,
            memory=args.repair_memory,
            device=args.device,
        )
    elif args.repair_dataset or args.repair_samples or args.device != "cpu":
        raise HeaprError("--repair-dataset, --repair-samples and --device belong to --repair least-squares; add it")
    export_checkpoint(
        args.masks,
        args.output,
        model=args.model,
        layout=args.layout,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        repair=repair,
        quantize=args.quantize,
    )
    if refitted := load_report(args.output).repair:
        print(f"repair: {format_repair(refitted)}")
    print(f"wrote {args.output}")


def add_unpack(commands: options.Commands) -> None:
    """Adds `heapr unpack`."""
    command = options.add_command(
        commands,
        "unpack",
        run_unpack,
        "a pruned model to full-size weights that any engine loads, pruned neurons zero",
        "heapr unpack pruned -o full",
    )
    command.add_argument("pruned", metavar="DIR", help="compact checkpoint or masks repository, here or on the Hub")
    command.add_argument("--model", metavar="BASE", help="base model of masks, if it is not where it was calibrated")
    options.output(command, "FULL")


def run_unpack(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export.unpacked import unpack

    unpack(args.pruned, args.output, model=args.model, overwrite=args.overwrite)
    print(f"wrote {args.output}")
