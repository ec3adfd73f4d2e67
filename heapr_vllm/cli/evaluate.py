# SPDX-License-Identifier: Apache-2.0
"""`heapr eval`: perplexity and tasks of several models.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heapr_vllm.cli import options


def add_eval(commands: options.Commands) -> None:
    """Adds `heapr eval`."""
    command = options.add_command(
        commands,
        "eval",
        run_eval,
        "perplexity and tasks of several models in one table",
        "heapr eval pruned masks --baseline BASE --dataset held_out.txt -o eval.json",
    )
    command.add_argument("directories", nargs="+", metavar="DIR", help="checkpoints and masks repositories, or Hub ids")
    command.add_argument("--baseline", metavar="MODEL", help="what the others are compared with (default: first DIR)")
    options.dataset(command)
    command.add_argument(
        "--num-samples", type=options.positive, default=64, metavar="N", help="samples of text (default: 64)"
    )
    command.add_argument("--batch-size", type=options.positive, default=8, metavar="B")
    command.add_argument(
        "--backend",
        default="transformers",
        choices=("transformers", "vllm"),
        help="what runs the models; vllm measures what is served",
    )
    command.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="tasks of lm-eval, beside perplexity")
    options.placement(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("-o", "--output", type=Path, metavar="JSON", help="the table as JSON, beside printing it")


def run_eval(args: argparse.Namespace) -> None:
    from heapr_vllm.evaluation.compare import EvaluationSettings, compare, format_comparison
    from heapr_vllm.formats.atomic import atomic_file, check_writable

    if args.output:
        check_writable(args.output)
    models = [args.baseline, *args.directories] if args.baseline else args.directories
    settings = EvaluationSettings(
        **options.text(args),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        tasks=tuple(args.tasks),
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
    )
    rows = compare(models, settings)
    print(json.dumps(rows, indent=2) if args.json else format_comparison(rows))
    if args.output:
        atomic_file(args.output, lambda path: path.write_text(json.dumps(rows, indent=2) + "\n"))
