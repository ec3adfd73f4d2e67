# SPDX-License-Identifier: Apache-2.0
"""`heapr masks`: masks of one model put together.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options


def add_masks(commands: options.Commands) -> None:
    """Adds `heapr masks`."""
    command = options.add_command(
        commands,
        "masks",
        run_masks,
        "masks of one model put together",
        "heapr masks union code-masks chat-masks -o masks",
    )
    command.add_argument(
        "how",
        choices=("union", "intersect", "full"),
        help="keep what any of them keeps, only what all of them keep, or everything",
    )
    command.add_argument("masks", type=Path, nargs="+", metavar="MASKS")
    options.output(command, "MASKS")


def run_masks(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export.combined_masks import combine_masks
    from heapr_vllm.prune.report.summary import format_report, load_report

    combine_masks(args.how, args.masks, args.output, overwrite=args.overwrite)
    print(format_report(load_report(args.output)))
    print(f"wrote {args.output}")
