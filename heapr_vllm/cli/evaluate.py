# SPDX-License-Identifier: Apache-2.0
"""`heapr eval`: perplexity and tasks of several models.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from heapr_vllm.cli import options


def add_eval(commands: options.Commands) -> None:
    """Adds `heapr eval`."""
    command = options.add_command(
        commands,
        "eval",
        run_eval,
        "perplexity, agreement with the baseline and tasks of several models",
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
    command.add_argument(
        "--engine-args",
        type=options.json_object,
        default={},
        metavar="JSON",
        help="arguments of vLLM, backend vllm only",
    )
    command.add_argument(
        "--top-k",
        type=options.not_negative,
        default=64,
        metavar="K",
        help="likely tokens of the baseline that the divergence from it looks at (default: 64; 0: no comparison)",
    )
    command.add_argument("--cache", metavar="DIR", help="keep the baseline's log-probabilities there, and take them")
    _add_tasks(command)
    options.placement(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("-o", "--output", type=Path, metavar="JSON", help="the table as JSON, beside printing it")


def _add_tasks(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("tasks of lm-eval, the same prompts for every model")
    group.add_argument("--tasks", nargs="+", default=(), metavar="TASK")
    group.add_argument("--num-fewshot", type=options.not_negative, metavar="N", help="default: as the task says")
    group.add_argument("--limit", type=float, metavar="N", help="samples per task; below 1 a fraction of them")
    group.add_argument("--include-path", metavar="DIR", help="a folder of tasks beside lm-eval's own")
    group.add_argument("--samples", metavar="DIR", help="write there what every model answered, JSONL")
    group.add_argument("--confirm-run-unsafe-code", action="store_true", help="for tasks that run generated code")


def run_eval(args: argparse.Namespace) -> None:
    from heapr_vllm.evaluation.compare import evaluate
    from heapr_vllm.evaluation.settings import EvaluationSettings
    from heapr_vllm.evaluation.table import format_evaluation
    from heapr_vllm.formats.atomic import check_file

    if args.output:
        check_file(args.output)
    models = [args.baseline, *args.directories] if args.baseline else args.directories
    names = {field.name for field in fields(EvaluationSettings)}
    chosen: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    chosen |= {**options.text(args), "tasks": tuple(args.tasks)}
    record = evaluate(models, EvaluationSettings(**chosen))
    print(record.as_json() if args.json else format_evaluation(record))
    if args.output:
        record.write(args.output)
