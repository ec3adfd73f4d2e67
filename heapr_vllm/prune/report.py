# SPDX-License-Identifier: Apache-2.0
"""What masks do to a model, in numbers, as a table and as a picture (`heapr inspect`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.checkpoint import natural_order
from heapr_vllm.errors import HeaprError
from heapr_vllm.masks import NeuronMasks
from heapr_vllm.prune.moments import CALIBRATION_FILE

REPAIR_FILE = "repair.json"


def load_report(directory: Path) -> dict[str, Any]:
    """Summary of a masks repository or an exported checkpoint. Raises HeaprError if it is neither."""
    masks = NeuronMasks.from_pretrained(directory)
    record = directory / "heapr" / CALIBRATION_FILE
    if not record.is_file():
        raise HeaprError(f"{record} is missing; run `heapr prune` again")
    summary = summarize(masks, json.loads(record.read_text()))
    repair = directory / "heapr" / REPAIR_FILE
    if repair.is_file():
        summary["repair"] = json.loads(repair.read_text())
    return summary


def summarize(masks: NeuronMasks, calibration: dict[str, Any]) -> dict[str, Any]:
    """Kept widths and both reductions; JSON values only. `calibration` is the content of calibration.json."""
    tokens = {prefix: torch.tensor(count) for prefix, count in calibration["tokens"].items()}
    prefixes = sorted(masks.keep, key=natural_order)
    widths = {prefix: masks.widths[prefix].tolist() for prefix in prefixes}
    return {
        "base_model": calibration["model"],
        "neurons": masks.num_neurons,
        "kept": masks.num_kept,
        "stored_reduction": masks.sparsity,
        "executed_reduction": masks.executed_reduction(tokens),
        "full_width": {prefix: masks.keep[prefix].shape[1] for prefix in prefixes},
        "dead_experts": [f"{prefix}.{e}" for prefix in prefixes for e, width in enumerate(widths[prefix]) if not width],
        "unrouted_experts": [f"{prefix}.{e}" for prefix in prefixes
                             for e, count in enumerate(tokens[prefix].tolist()) if not count],
        "widths": widths,
        "metadata": masks.metadata,
    }


def format_report(summary: dict[str, Any]) -> str:
    """The summary as text: one line of totals, one row per layer, then what deserves attention."""
    header = f"{'MoE module':<34} {'mean':>6} {'min':>5} {'max':>5} {'full':>5}  widths"
    lines = [format_reductions(summary), "", header]
    for prefix, widths in summary["widths"].items():
        full = summary["full_width"][prefix]
        lines.append(f"{prefix:<34} {sum(widths) / len(widths):>6.1f} {min(widths):>5} {max(widths):>5} {full:>5}  "
                     f"{sparkline(widths, full)}")
    for title, key in (("width 0", "dead_experts"), ("no calibration token", "unrouted_experts")):
        if summary[key]:
            shown = ", ".join(summary[key][:6]) + (" ..." if len(summary[key]) > 6 else "")
            lines.append(f"experts with {title}: {len(summary[key])} ({shown})")
    if "repair" in summary:
        lines.append(f"repair: {format_repair(summary['repair'])}")
    return "\n".join(lines)


def format_repair(repair: dict[str, Any]) -> str:
    """The content of repair.json in one line."""
    few = f", {repair['experts_with_few_tokens']} of them with few tokens" if repair["experts_with_few_tokens"] else ""
    return (f"{repair['method']} on {repair['tokens']:,} tokens of {repair['dataset']}, {repair['experts']} experts"
            f"{few}, prior {repair['prior']:g} tokens per kept neuron: squared output error "
            f"-{repair['output_error_removed']:.0%}")


def format_reductions(summary: dict[str, Any]) -> str:
    """Stored and executed reduction side by side."""
    return (f"routed neurons kept: {summary['kept']:,} of {summary['neurons']:,} | "
            f"stored -{summary['stored_reduction']:.1%} | executed FLOPs -{summary['executed_reduction']:.1%}")


def sparkline(widths: list[int], full: int) -> str:
    """One character per expert, a blank for width 0 and a full block for an unpruned expert."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * width // full)] for width in widths)


def plot_report(summary: dict[str, Any], path: Path) -> None:
    """Heat map of the kept fraction per layer and expert. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HeaprError("--plot needs matplotlib: pip install heapr-vllm[prune]") from error
    rows = [[width / summary["full_width"][prefix] for width in widths]
            for prefix, widths in summary["widths"].items()]
    figure = Figure(figsize=(8, 1.6 + 0.22 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer", title=format_reductions(summary))
    axes.title.set_fontsize(9)
    figure.colorbar(image, label="kept fraction")
    figure.savefig(path, dpi=140)
