# SPDX-License-Identifier: Apache-2.0
"""`heapr report`: what is known of pruned models, as a page.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options
from heapr_vllm.errors import HeaprError


def add_report(commands: options.Commands) -> None:
    """Adds `heapr report`."""
    command = options.add_command(
        commands,
        "report",
        run_report,
        "widths, predicted loss, quality and speed of pruned models as one HTML page",
        "heapr report pruned --evaluation evaluation.json -o report.html",
    )
    command.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="masks repositories and exported checkpoints"
    )
    command.add_argument("--evaluation", type=Path, metavar="JSON", help="what `heapr eval -o` wrote")
    command.add_argument("--speed", type=Path, metavar="CSV", help="rows that `benchmarks.serving --csv` wrote")
    command.add_argument(
        "--card",
        action="store_true",
        help="write the evaluation into the model card of each DIR as well, and keep it in DIR/heapr",
    )
    command.add_argument("-o", "--output", type=options.html, required=True, metavar="HTML")


def run_report(args: argparse.Namespace) -> None:
    from heapr_vllm.formats.atomic import check_file
    from heapr_vllm.prune.report.card import write_results
    from heapr_vllm.prune.report.measured import read_evaluation
    from heapr_vllm.prune.report.page import write_page

    if args.card and not args.evaluation:
        raise HeaprError("--card writes an evaluation into model cards; name it with --evaluation")
    check_file(args.output)
    for directory in args.directories if args.card else ():
        write_results(directory, read_evaluation(args.evaluation))
        print(f"wrote {directory / 'README.md'}")
    write_page(args.directories, args.output, evaluation=args.evaluation, speed=args.speed)
    print(f"wrote {args.output}")
