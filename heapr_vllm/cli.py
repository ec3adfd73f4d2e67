# SPDX-License-Identifier: Apache-2.0
"""The `heapr` command: its arguments. What the subcommands do with them is in `commands.py`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from heapr_vllm import __version__
from heapr_vllm.commands import (
    run_calibrate,
    run_env,
    run_eval,
    run_export,
    run_inspect,
    run_prune,
    run_sweep,
    run_tune,
)
from heapr_vllm.errors import HeaprError, first_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heapr", description="HEAPr expert pruning for Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"heapr-vllm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "calibrate", run_calibrate, "one forward and backward pass over text: neuron moments",
                       "heapr calibrate Qwen/Qwen3-30B-A3B --dataset 'wikitext[wikitext-2-raw-v1](train)' -o calib")
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or Hub id")
    _dataset(command)
    output = _output(command, "CALIB", required=False)
    output.add_argument("--resume", action="store_true", help="continue a run that was killed")
    command.add_argument("--num-calibration-samples", type=_positive, default=128, metavar="N")
    command.add_argument("--max-seq-length", type=_positive, default=2048, metavar="L")
    command.add_argument("--batch-size", type=_positive, default=1, metavar="B",
                         help="does not change the result, beyond rounding in half precision")
    command.add_argument("--seed", type=int, default=0)
    _placement(command, "cpu, cuda, cuda:1, or auto: one model over all GPUs")
    command.add_argument("--stream", action="store_true",
                         help="for models larger than memory: one layer at a time, hidden states on disk in CALIB")
    command.add_argument("--revision", help="revision of a Hub id")
    command.add_argument("--checkpoint-every", type=_positive, default=8, metavar="K", help="batches between saves")
    command.add_argument("--dry-run", action="store_true", help="print sizes, load no weight, write nothing")

    command = _command(commands, "prune", run_prune, "moments to masks in any budget; needs no model and no GPU",
                       "heapr prune calib --sparsity 0.25 -o masks")
    command.add_argument("calibration", type=Path, metavar="CALIB")
    stored = command.add_mutually_exclusive_group()
    stored.add_argument("--sparsity", type=float, help="fraction of routed neurons removed")
    stored.add_argument("--target-size", type=_size, metavar="SIZE",
                        help="weights of the compact checkpoint at most, such as 34GiB or 800MB")
    command.add_argument("--flops", type=float,
                         help="fraction of executed expert FLOPs per token removed; alone or with one of the above")
    command.add_argument("--criterion", metavar="NAME",
                         help="heapr (the paper's, default), fisher (default with --flops), heapr-frequency, energy, "
                              "magnitude, random, reap (whole experts)")
    _selection_options(command)
    _output(command, "MASKS")

    command = _command(commands, "sweep", run_sweep, "criteria and budgets side by side: reductions, predicted loss",
                       "heapr sweep calib --criterion heapr fisher --plot sweep.png")
    command.add_argument("calibration", type=Path, metavar="CALIB")
    command.add_argument("--criterion", nargs="+", metavar="NAME", help="default: all")
    command.add_argument("--ratios", nargs="+", type=float, metavar="R", help="default: 0.1 0.2 0.25 0.4 0.5")
    _selection_options(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=_png, metavar="PNG", help="predicted loss over both reductions")

    command = _command(commands, "export", run_export, "masks to a checkpoint, shard by shard",
                       "heapr export masks -o pruned && vllm serve pruned")
    command.add_argument("masks", type=Path, metavar="MASKS")
    command.add_argument("--model", metavar="BASE", help="base model, if it is not where it was calibrated")
    command.add_argument("--layout", default="compact", choices=("compact", "masked"),
                         help="compact: kept neurons only; masked: full size, pruned neurons zeroed, for any engine")
    command.add_argument("--no-verify", action="store_true", help="skip the fingerprint check, for fine-tunes")
    command.add_argument("--repair", metavar="METHOD",
                         help="least-squares: refit down_proj on the calibration text; the same command continues "
                              "after a kill")
    command.add_argument("--repair-dataset", metavar="SPEC", help="another text for the repair")
    command.add_argument("--repair-samples", type=_positive, metavar="N", help="more or less of it than calibrated on")
    command.add_argument("--repair-memory", type=_size, default="8GiB", metavar="SIZE",
                         help="for second moments; less means more runs over the text (default: 8GiB)")
    command.add_argument("--device", default="cpu", help="of the repair: cpu, cuda, cuda:1")
    _output(command, "DIR")

    command = _command(commands, "inspect", run_inspect, "what masks do: widths, reductions, dead experts",
                       "heapr inspect masks --plot widths.png")
    command.add_argument("directory", type=Path, metavar="DIR", help="masks repository or exported checkpoint")
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=_png, metavar="PNG",
                         help="heat map of kept widths, and the frontier of predicted loss")

    command = _command(commands, "eval", run_eval, "perplexity and tasks of several models in one table",
                       "heapr eval pruned masks --baseline BASE --dataset held_out.txt -o eval.json")
    command.add_argument("directories", nargs="+", metavar="DIR", help="checkpoints and masks repositories, or Hub ids")
    command.add_argument("--baseline", metavar="MODEL", help="what the others are compared with (default: first DIR)")
    _dataset(command)
    command.add_argument("--num-samples", type=_positive, default=64, metavar="N", help="blocks of text (default: 64)")
    command.add_argument("--max-seq-length", type=_positive, default=2048, metavar="L")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="B")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--backend", default="transformers", choices=("transformers", "vllm"),
                         help="what runs the models; vllm measures what is served")
    command.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="tasks of lm-eval, beside perplexity")
    _placement(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("-o", "--output", type=Path, metavar="JSON", help="the table as JSON, beside printing it")

    command = _command(commands, "tune", run_tune, "fastest kernel tiles for a pruned model on this GPU",
                       "heapr tune pruned --time-budget 10m && vllm serve pruned")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("model", type=Path, nargs="?", metavar="DIR", help="masks repository or compact checkpoint")
    what.add_argument("--shape", nargs="+", metavar="NAME", help="a model of the paper, such as Qwen3-30B-A3B")
    command.add_argument("--sparsity", type=_fraction, nargs="+", default=[0.0, 0.25, 0.5],
                         help="with --shape: sparsities to tune for")
    command.add_argument("--tokens", type=_positive, nargs="+", metavar="T",
                         default=[2**power for power in range(14)], help="token counts per step")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the model's")
    command.add_argument("--tensor-parallel-size", type=_positive, default=1, metavar="N")
    command.add_argument("--time-budget", type=_duration, default=600.0, metavar="TIME",
                         help="for timing, after compiling; such as 90s, 10m or 1h")
    command.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                         help="where the plugin looks as well: HEAPR_CONFIG_FOLDER, or the user's cache (default)")
    command.add_argument("--overwrite", action="store_true", help="tune again what is tuned")

    _command(commands, "env", run_env, "versions and hardware as JSON, for bug reports", "heapr env")
    return parser


def _command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    command.set_defaults(run=run)
    return command


def _output(command: argparse.ArgumentParser, metavar: str,
            required: bool = True) -> argparse._MutuallyExclusiveGroup:
    """Adds --output and --overwrite; the returned group holds what excludes --overwrite."""
    command.add_argument("-o", "--output", type=Path, required=required, metavar=metavar)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace what heapr wrote there before")
    return group


def _dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", required=True, metavar="SPEC",
                         help="file.txt, file.jsonl (field `text`) or name[subset](split)")


def _placement(command: argparse.ArgumentParser, devices: str = "cpu, cuda, cuda:1") -> None:
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    command.add_argument("--device", default="cpu", help=devices)


def _selection_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scope", default="global", choices=("global", "layer", "expert"),
                         help="where neurons compete (default: global; reap was published with layer)")
    command.add_argument("--align", type=_positive, default=16, metavar="A", help="kept counts are multiples of it")
    command.add_argument("--min-width", type=_not_negative, default=0, metavar="W", help="neurons every expert keeps")
    command.add_argument("--protect", type=float, metavar="P",
                         help="fraction that super experts (outlier outputs) keep at least (default: 0.5; 0: off)")
    command.add_argument("--unrouted", default="keep", choices=("keep", "prune", "error"),
                         help="experts without a calibration token (default: keep)")
    command.add_argument("--seed", type=int, default=0, help="for --criterion random")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 34GiB, 800MB or 1000000")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _png(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} is not a .png, .pdf or .svg file")
    return Path(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _duration(text: str) -> float:
    """Seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 90s, 10m or 1h") from error


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a mistake the user can fix, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        args.run(args)
    except HeaprError as error:
        print(f"heapr: error: {error}", file=sys.stderr)
        return 2
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        print(f"heapr: error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume continues" if args.run is run_calibrate else ""
        print(f"heapr: interrupted{hint}", file=sys.stderr)
        return 130
    return 0
