# SPDX-License-Identifier: Apache-2.0
"""The `heapr` command: every subcommand parses its arguments and calls one public function."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from heapr_vllm import __version__
from heapr_vllm.errors import HeaprError, first_line

# Imports of torch and transformers sit inside the commands: `heapr --help` must not wait for them.


def run_calibrate(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.calibrate import CalibrationSettings, calibrate, plan
    from heapr_vllm.prune.parallel import joined_processes

    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    settings = CalibrationSettings(model, args.dataset, args.num_calibration_samples, args.max_seq_length,
                                   args.batch_size, args.seed, args.dtype, args.revision, args.stream)
    if args.dry_run:
        sizes = plan(settings, args.device)
        print("\n".join(f"{name.replace('_', ' '):<30} {_human(name, value)}" for name, value in sizes.items()))
        return
    with joined_processes() as processes:
        moments = calibrate(settings, args.output, device=args.device, checkpoint_every=args.checkpoint_every,
                            resume=args.resume, overwrite=args.overwrite, processes=processes)
    silent = sum(int((tokens == 0).sum()) for tokens in moments.tokens.values())
    if processes.is_first:
        print(f"wrote {args.output}: {len(moments.tokens)} MoE layers, {silent} experts without a calibration token")


def run_prune(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export import write_masks_repository
    from heapr_vllm.prune.moments import NeuronMoments
    from heapr_vllm.prune.report import format_report, load_report
    from heapr_vllm.prune.select import select

    masks = select(NeuronMoments.from_pretrained(args.calibration), args.sparsity, scope=args.scope, align=args.align,
                   min_width=args.min_width, unrouted=args.unrouted)
    write_masks_repository(masks, args.calibration, args.output, args.overwrite)
    print(format_report(load_report(args.output)))
    print(f"wrote {args.output}")


def run_export(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export import export_checkpoint

    export_checkpoint(args.masks, args.output, model=args.model, layout=args.layout, overwrite=args.overwrite,
                      verify=not args.no_verify)
    print(f"wrote {args.output}")


def run_inspect(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.report import format_report, load_report, plot_report

    summary = load_report(args.directory)
    print(json.dumps(summary, indent=2) if args.json else format_report(summary))
    if args.plot:
        plot_report(summary, args.plot)


def run_env(args: argparse.Namespace) -> None:
    from heapr_vllm.environment import report

    print(json.dumps(report(), indent=2))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heapr", description="HEAPr expert pruning for Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"heapr-vllm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "calibrate", run_calibrate, "one forward and backward pass over text: neuron moments",
                       "heapr calibrate Qwen/Qwen3-30B-A3B --dataset 'wikitext[wikitext-2-raw-v1](train)' -o calib")
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or Hub id")
    command.add_argument("--dataset", required=True, metavar="SPEC",
                         help="file.txt, file.jsonl (field `text`) or name[subset](split)")
    _output(command, "CALIB").add_argument("--resume", action="store_true", help="continue a run that was killed")
    command.add_argument("--num-calibration-samples", type=_positive, default=128, metavar="N")
    command.add_argument("--max-seq-length", type=_positive, default=2048, metavar="L")
    command.add_argument("--batch-size", type=_positive, default=1, metavar="B",
                         help="does not change the result, beyond rounding in half precision")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or auto: one model over all GPUs")
    command.add_argument("--stream", action="store_true",
                         help="for models larger than memory: one layer at a time, hidden states on disk in CALIB")
    command.add_argument("--revision", help="revision of a Hub id")
    command.add_argument("--checkpoint-every", type=_positive, default=8, metavar="K", help="batches between saves")
    command.add_argument("--dry-run", action="store_true", help="print sizes, load no weight, write nothing")

    command = _command(commands, "prune", run_prune, "moments to masks at any sparsity; needs no model and no GPU",
                       "heapr prune calib --sparsity 0.25 -o masks")
    command.add_argument("calibration", type=Path, metavar="CALIB")
    command.add_argument("--sparsity", type=float, required=True, help="fraction of routed neurons removed")
    command.add_argument("--scope", default="global", choices=("global", "layer", "expert"),
                         help="where neurons compete (default: global)")
    command.add_argument("--align", type=_positive, default=16, metavar="A", help="kept counts are multiples of it")
    command.add_argument("--min-width", type=_not_negative, default=0, metavar="W", help="neurons every expert keeps")
    command.add_argument("--unrouted", default="keep", choices=("keep", "prune", "error"),
                         help="experts without a calibration token (default: keep)")
    _output(command, "MASKS")

    command = _command(commands, "export", run_export, "masks to a checkpoint, shard by shard",
                       "heapr export masks -o pruned && vllm serve pruned")
    command.add_argument("masks", type=Path, metavar="MASKS")
    command.add_argument("--model", metavar="BASE", help="base model, if it is not where it was calibrated")
    command.add_argument("--layout", default="compact", choices=("compact", "masked"),
                         help="compact: kept neurons only; masked: full size, pruned neurons zeroed, for any engine")
    command.add_argument("--no-verify", action="store_true", help="skip the fingerprint check, for fine-tunes")
    _output(command, "DIR")

    command = _command(commands, "inspect", run_inspect, "what masks do: widths, reductions, dead experts",
                       "heapr inspect masks --plot widths.png")
    command.add_argument("directory", type=Path, metavar="DIR", help="masks repository or exported checkpoint")
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=Path, metavar="PNG", help="heat map of kept widths")

    _command(commands, "env", run_env, "versions and hardware as JSON, for bug reports", "heapr env")
    return parser


def _command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    command.set_defaults(run=run)
    return command


def _output(command: argparse.ArgumentParser, metavar: str) -> argparse._MutuallyExclusiveGroup:
    """Adds --output and --overwrite; the returned group holds what excludes --overwrite."""
    command.add_argument("-o", "--output", type=Path, required=True, metavar=metavar)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace what heapr wrote there before")
    return group


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


def _human(name: str, value: int) -> str:
    return f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,}"


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
        print("heapr: interrupted; --resume continues a calibration", file=sys.stderr)
        return 130
    return 0
