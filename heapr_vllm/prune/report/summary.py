# SPDX-License-Identifier: Apache-2.0
"""What masks do to a model, in numbers and as a table (`heapr inspect`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import natural_order
from heapr_vllm.prune.calibration.moments import CALIBRATION_FILE
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.selection.sweep import format_perplexity

FRONTIER_FILE = "frontier.json"
REPAIR_FILE = "repair.json"


def load_report(directory: Path) -> dict[str, Any]:
    """Summary of a masks repository or an exported checkpoint. Raises HeaprError if it is neither."""
    masks = NeuronMasks.from_pretrained(directory)
    record = directory / "heapr" / CALIBRATION_FILE
    if not record.is_file():
        raise HeaprError(f"{record} is missing; run `heapr prune` again")
    summary = summarize(masks, json.loads(record.read_text()))
    for key, name in (("repair", REPAIR_FILE), ("frontier", FRONTIER_FILE)):
        if (directory / "heapr" / name).is_file():
            summary[key] = json.loads((directory / "heapr" / name).read_text())
    return summary


def summarize(masks: NeuronMasks, calibration: dict[str, Any]) -> dict[str, Any]:
    """Kept widths and both reductions; JSON values only. `calibration` is the content of calibration.json.

    `compact_bytes` and `checkpoint_bytes`, all weights with and without the pruned neurons, are there if the
    calibration recorded them.
    """
    sizes = {}
    if "routed_bytes" in calibration:
        saved = calibration["routed_bytes"] * (masks.num_neurons - masks.num_kept) // masks.num_neurons
        sizes = {
            "compact_bytes": calibration["checkpoint_bytes"] - saved,
            "checkpoint_bytes": calibration["checkpoint_bytes"],
        }
    tokens = {prefix: torch.tensor(count) for prefix, count in calibration["tokens"].items()}
    prefixes = sorted(masks.keep, key=natural_order)
    widths = {prefix: masks.widths[prefix].tolist() for prefix in prefixes}
    return {
        "base_model": calibration["model"],
        "neurons": masks.num_neurons,
        "kept": masks.num_kept,
        "stored_reduction": masks.sparsity,
        "executed_reduction": masks.executed_reduction(tokens),
        **sizes,
        "full_width": {prefix: masks.keep[prefix].shape[1] for prefix in prefixes},
        "dead_experts": [f"{prefix}.{e}" for prefix in prefixes for e, width in enumerate(widths[prefix]) if not width],
        "unrouted_experts": [
            f"{prefix}.{e}" for prefix in prefixes for e, count in enumerate(tokens[prefix].tolist()) if not count
        ],
        "widths": widths,
        "metadata": {key: value for key, value in masks.metadata.items() if key != "tokens"},
    }


def format_report(summary: dict[str, Any]) -> str:
    """The summary as text: totals and how they came about, one row per layer, then what deserves attention."""
    header = f"{'MoE module':<34} {'mean':>6} {'min':>5} {'max':>5} {'full':>5}  widths"
    lines = [format_reductions(summary), *_choice(summary), "", header]
    for prefix, widths in summary["widths"].items():
        full = summary["full_width"][prefix]
        lines.append(
            f"{prefix:<34} {sum(widths) / len(widths):>6.1f} {min(widths):>5} {max(widths):>5} {full:>5}  "
            f"{sparkline(widths, full)}"
        )
    lines += _protection(summary["metadata"])
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
    return (
        f"{repair['method']} on {repair['tokens']:,} tokens of {repair['dataset']}, {repair['experts']} experts"
        f"{few}, prior {repair['prior']:g} tokens per kept neuron: squared output error "
        f"-{repair['output_error_removed']:.0%}"
    )


def _choice(summary: dict[str, Any]) -> list[str]:
    """Size on disk, predicted loss and prices, as far as they are known."""
    lines = []
    if "compact_bytes" in summary:
        lines.append(
            f"compact checkpoint: {format_size(summary['compact_bytes'])} of {format_size(summary['checkpoint_bytes'])}"
        )
    if "frontier" in summary:
        loss = summary["frontier"]["chosen"]["loss_increase"]
        lines.append(
            f"predicted loss increase, neurons taken one by one: {loss:.4f} nats per token (perplexity "
            f"{format_perplexity(loss)}), criterion {summary['frontier']['criterion']}"
        )
    if prices := summary["metadata"].get("prices"):
        lines.append(
            f"a block stays if its mean saliency is at least {prices['per_flop']:.4g} x routing frequency + "
            f"{prices['per_neuron']:.4g}"
        )
    return lines


def _protection(metadata: dict[str, Any]) -> list[str]:
    """One line about super experts; none for masks that `heapr prune` did not make."""
    if "protected" not in metadata:
        return []
    names = metadata["protected"]
    if names is None:
        return ["super experts: unknown to these moments of an older heapr-vllm; calibrate again to protect them"]
    shown = f" ({', '.join(names[:6])}{' ...' if len(names) > 6 else ''})" if names else ""
    return [f"super experts found and protected: {len(names)}{shown}"]


def format_reductions(summary: dict[str, Any]) -> str:
    """Stored and executed reduction side by side."""
    return (
        f"routed neurons kept: {summary['kept']:,} of {summary['neurons']:,} | "
        f"stored -{summary['stored_reduction']:.1%} | executed FLOPs -{summary['executed_reduction']:.1%}"
    )


def sparkline(widths: list[int], full: int) -> str:
    """One character per expert, a blank for width 0 and a full block for an unpruned expert."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * width // full)] for width in widths)
