# SPDX-License-Identifier: Apache-2.0
"""`heapr prune`, `sweep` and `inspect`: moments to masks, and what they do.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from heapr_vllm.cli import options
from heapr_vllm.errors import HeaprError


def add_prune(commands: options.Commands) -> None:
    """Adds `heapr prune`."""
    command = options.add_command(
        commands,
        "prune",
        run_prune,
        "moments to masks in any budget; needs no model and no GPU",
        "heapr prune calib --sparsity 0.25 -o masks",
    )
    command.add_argument("calibration", type=Path, metavar="CALIB")
    stored = command.add_mutually_exclusive_group()
    stored.add_argument("--sparsity", type=float, help="fraction of routed neurons removed")
    stored.add_argument(
        "--target-size",
        type=options.size,
        metavar="SIZE",
        help="weights of the compact checkpoint at most, such as 34GiB or 800MB",
    )
    stored.add_argument(
        "--gpu-memory",
        type=options.size,
        metavar="SIZE",
        help="of one GPU, such as 80GiB: what the requests of the next two options leave of it is for the weights",
    )
    command.add_argument("--max-model-len", type=options.positive, metavar="L", help="as for `vllm serve`")
    command.add_argument("--max-num-seqs", type=options.positive, metavar="N", help="requests that run at once")
    command.add_argument(
        "--flops",
        type=float,
        help="fraction of executed expert FLOPs per token removed; alone or with one of the above",
    )
    command.add_argument(
        "--criterion",
        metavar="NAME",
        help="heapr (the paper's, default), fisher (default with --flops), heapr-frequency, energy, "
        "magnitude, random, reap (whole experts)",
    )
    command.add_argument(
        "--quantize",
        choices=("int8", "fp8", "int4"),
        help="store experts in 8 or 4 bits: while loading where masks are served, and by `heapr export`",
    )
    weighed = options.mix(command)
    weighed.add_argument(
        "--worst-case",
        action="store_true",
        help="of a mix: the least loss in the source that loses most, by the criterion fisher",
    )
    weighed.add_argument(
        "--traffic",
        type=Path,
        metavar="TRAFFIC",
        help="experts as busy as in what HEAPR_TRAFFIC recorded while `vllm serve` ran; where a criterion reads h^2, "
        "neurons as active too",
    )
    options.selection(command)
    options.output(command, "MASKS")


def run_prune(args: argparse.Namespace) -> None:
    from heapr_vllm.formats.checkpoint import Checkpoint
    from heapr_vllm.formats.quantized import ExpertScheme
    from heapr_vllm.formats.traffic import Traffic
    from heapr_vllm.prune.calibration.moments import NeuronMoments
    from heapr_vllm.prune.export.masks_repository import write_masks_repository
    from heapr_vllm.prune.report.summary import format_report, load_report, speed_note
    from heapr_vllm.prune.selection.budget import Budget, stored_for_size
    from heapr_vllm.prune.selection.selector import Selector, default_criterion
    from heapr_vllm.prune.selection.served_traffic import as_served
    from heapr_vllm.prune.selection.sweep import frontier
    from heapr_vllm.prune.selection.worst_case import CRITERION, worst_case
    from heapr_vllm.prune.text.sources import parse_mix

    if args.worst_case and args.criterion not in (None, CRITERION):
        raise HeaprError(f"--worst-case is of predicted losses, which are --criterion {CRITERION}; drop --criterion")

    moments = NeuronMoments.from_pretrained(args.calibration)
    if args.mix:
        moments = moments.mixed(parse_mix(args.mix))
    if args.traffic:
        moments = as_served(moments, Traffic.load(args.traffic))
    selector = Selector(moments, args.criterion or default_criterion(args.flops), **_selection(args))
    scheme = None
    if args.quantize:
        scheme = ExpertScheme.for_hidden_size(args.quantize, Checkpoint.resolve(args.calibration).hidden_size)
    stored, target_size = args.sparsity, args.target_size
    if args.gpu_memory is not None:
        target_size = _weights_beside_requests(args)
    if target_size is not None:
        stored = stored_for_size(target_size, moments.metadata, selector.blocks, scheme)
    budget = Budget(stored=stored, executed=args.flops)
    if args.worst_case:
        selector = worst_case(moments, budget, **_selection(args)).selector
    masks = selector.masks(budget)
    curves = frontier(selector, budget)
    write_masks_repository(
        masks, args.calibration, args.output, overwrite=args.overwrite, frontier=curves, scheme=scheme
    )
    summary = load_report(args.output)
    print(format_report(summary))
    if note := speed_note(summary):
        print(note)
    print(f"wrote {args.output}")


def _weights_beside_requests(args: argparse.Namespace) -> int:
    from heapr_vllm.formats.checkpoint import Checkpoint
    from heapr_vllm.prune.selection.gpu_memory import GpuMemory

    if args.max_model_len is None or args.max_num_seqs is None:
        raise HeaprError("--gpu-memory needs to know the requests; add --max-model-len and --max-num-seqs")
    memory = GpuMemory(total=args.gpu_memory, max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs)
    config = Checkpoint.resolve(args.calibration).config
    print(memory.describe(config))
    return memory.weights(config)


def add_sweep(commands: options.Commands) -> None:
    """Adds `heapr sweep`."""
    command = options.add_command(
        commands,
        "sweep",
        run_sweep,
        "criteria and budgets side by side: reductions, predicted loss",
        "heapr sweep calib --criterion heapr fisher --plot sweep.png",
    )
    command.add_argument("calibration", type=Path, metavar="CALIB")
    command.add_argument("--criterion", nargs="+", metavar="NAME", help="default: all")
    command.add_argument("--ratios", nargs="+", type=float, metavar="R", help="default: 0.1 0.2 0.25 0.4 0.5")
    options.mix(command)
    options.selection(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("--plot", type=options.png, metavar="PNG", help="predicted loss over both reductions")


def run_sweep(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.calibration.moments import NeuronMoments
    from heapr_vllm.prune.report.plot import plot_sweep
    from heapr_vllm.prune.selection.criteria import CRITERIA
    from heapr_vllm.prune.selection.sweep import RATIOS, format_sweep, sweep
    from heapr_vllm.prune.text.sources import parse_mix

    moments = NeuronMoments.from_pretrained(args.calibration)
    if args.mix:
        moments = moments.mixed(parse_mix(args.mix))
    rows = sweep(
        moments,
        args.criterion or CRITERIA,
        args.ratios or RATIOS,
        **_selection(args),
    )
    print(json.dumps(rows, indent=2) if args.json else format_sweep(rows))
    if args.plot:
        plot_sweep(rows, args.plot)


def add_inspect(commands: options.Commands) -> None:
    """Adds `heapr inspect`."""
    command = options.add_command(
        commands,
        "inspect",
        run_inspect,
        "what masks do: widths, reductions, dead experts",
        "heapr inspect masks --plot widths.png",
    )
    command.add_argument("directory", type=Path, metavar="DIR", help="masks repository or exported checkpoint")
    command.add_argument("--json", action="store_true")
    command.add_argument(
        "--plot", type=options.png, metavar="PNG", help="heat map of kept widths, and the frontier of predicted loss"
    )


def run_inspect(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.report.plot import plot_report
    from heapr_vllm.prune.report.summary import format_report, load_report

    summary = load_report(args.directory)
    print(json.dumps(summary.to_dict(), indent=2) if args.json else format_report(summary))
    if args.plot:
        plot_report(summary, args.plot)


def _selection(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `options.selection` as those of `Selector`."""
    names = ("scope", "align", "min_width", "protect", "unrouted", "include_layers", "exclude_layers", "seed")
    return {name: getattr(args, name) for name in names}
