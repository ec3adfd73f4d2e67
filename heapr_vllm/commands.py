# SPDX-License-Identifier: Apache-2.0
"""What the subcommands of `heapr` do: each calls one public function and prints what came of it.

Imports of torch and transformers sit inside them: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from heapr_vllm.errors import HeaprError


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
    if args.output is None:
        raise HeaprError("say where the result goes with -o CALIB (only --dry-run writes nothing)")
    with joined_processes() as processes:
        moments = calibrate(settings, args.output, device=args.device, checkpoint_every=args.checkpoint_every,
                            resume=args.resume, overwrite=args.overwrite, processes=processes)
    silent = sum(int((tokens == 0).sum()) for tokens in moments.tokens.values())
    if processes.is_first:
        print(f"wrote {args.output}: {len(moments.tokens)} MoE layers, {silent} experts without a calibration token")


def run_prune(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.budget import Budget, stored_for_size
    from heapr_vllm.prune.export import write_masks_repository
    from heapr_vllm.prune.moments import NeuronMoments
    from heapr_vllm.prune.report import format_report, load_report
    from heapr_vllm.prune.select import Selector, default_criterion
    from heapr_vllm.prune.sweep import frontier

    moments = NeuronMoments.from_pretrained(args.calibration)
    selector = Selector(moments, args.criterion or default_criterion(args.flops), **_selection(args))
    stored = args.sparsity
    if args.target_size is not None:
        stored = stored_for_size(args.target_size, moments.metadata, selector.blocks)
    budget = Budget(stored, args.flops)
    masks = selector.masks(budget)
    write_masks_repository(masks, args.calibration, args.output, args.overwrite, frontier(selector, budget))
    print(format_report(load_report(args.output)))
    print(f"wrote {args.output}")


def run_sweep(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.criteria import CRITERIA
    from heapr_vllm.prune.moments import NeuronMoments
    from heapr_vllm.prune.plot import plot_sweep
    from heapr_vllm.prune.sweep import RATIOS, format_sweep, sweep

    rows = sweep(NeuronMoments.from_pretrained(args.calibration), args.criterion or CRITERIA, args.ratios or RATIOS,
                 **_selection(args))
    print(json.dumps(rows, indent=2) if args.json else format_sweep(rows))
    if args.plot:
        plot_sweep(rows, args.plot)


def run_export(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export import export_checkpoint
    from heapr_vllm.prune.repair import RepairSettings
    from heapr_vllm.prune.report import format_repair, load_report

    repair = None
    if args.repair:
        repair = RepairSettings(args.repair, args.repair_dataset, args.repair_samples, args.repair_memory, args.device)
    elif args.repair_dataset or args.repair_samples or args.device != "cpu":
        raise HeaprError("--repair-dataset, --repair-samples and --device belong to --repair least-squares; add it")
    export_checkpoint(args.masks, args.output, model=args.model, layout=args.layout, overwrite=args.overwrite,
                      verify=not args.no_verify, repair=repair)
    if repair:
        print(f"repair: {format_repair(load_report(args.output)['repair'])}")
    print(f"wrote {args.output}")


def run_inspect(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.plot import plot_report
    from heapr_vllm.prune.report import format_report, load_report

    summary = load_report(args.directory)
    print(json.dumps(summary, indent=2) if args.json else format_report(summary))
    if args.plot:
        plot_report(summary, args.plot)


def run_tune(args: argparse.Namespace) -> None:
    import torch

    from heapr_vllm.model_executor.tile_config import user_folder
    from heapr_vllm.model_executor.tune import tune
    from heapr_vllm.model_executor.tuning_jobs import jobs_of_model, jobs_of_shapes

    dtype = getattr(torch, args.dtype) if args.dtype else None
    jobs = (jobs_of_model(args.model, dtype, args.tensor_parallel_size) if args.model else
            jobs_of_shapes(args.shape, args.sparsity, dtype or torch.bfloat16, args.tensor_parallel_size))
    written, missing = tune(jobs, args.tokens, args.output or user_folder(), args.time_budget,
                            overwrite=args.overwrite)
    for path in written:
        print(f"wrote {path}")
    if missing:
        print(f"no time was left for {missing} token counts; the same command continues, or take a longer "
              "--time-budget")
    elif not written:
        print("everything was tuned already; --overwrite tunes it again")


def run_eval(args: argparse.Namespace) -> None:
    from heapr_vllm.atomic import atomic_file
    from heapr_vllm.prune.compare import EvaluationSettings, compare, format_comparison

    models = [args.baseline, *args.directories] if args.baseline else args.directories
    settings = EvaluationSettings(args.dataset, args.num_samples, args.max_seq_length, args.batch_size, args.seed,
                                  tuple(args.tasks), args.dtype, args.device)
    served = None
    if args.backend == "vllm":
        from heapr_vllm.model_executor.served_perplexity import served_perplexity as served

        if args.tasks:
            raise HeaprError("--tasks needs --backend transformers; for served tasks use lm-eval's own vLLM model")
    rows = compare(models, settings, served)
    print(json.dumps(rows, indent=2) if args.json else format_comparison(rows))
    if args.output:
        atomic_file(args.output, lambda path: path.write_text(json.dumps(rows, indent=2) + "\n"))


def run_env(args: argparse.Namespace) -> None:
    from heapr_vllm.environment import report

    print(json.dumps(report(), indent=2))


def _selection(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `_selection_options` as those of `Selector`."""
    return {name: getattr(args, name) for name in ("scope", "align", "min_width", "protect", "unrouted", "seed")}


def _human(name: str, value: int) -> str:
    return f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,}"
