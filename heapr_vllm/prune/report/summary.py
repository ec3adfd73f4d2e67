# SPDX-License-Identifier: Apache-2.0
"""What masks do to a model, in numbers and as a table (`heapr inspect`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import natural_order
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.formats.schema import read_json
from heapr_vllm.formats.sizes import num_bytes
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.selection.sweep import Frontier

FRONTIER_FILE = "frontier.json"
FAR_BEHIND = 0.5  # of the stored reduction: an executed one below that deserves a note


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Kept widths and both reductions of masks, with what was recorded about them.

    `full_width`: MoE module prefix -> neurons of an unpruned expert. `widths`: prefix -> kept neurons of every expert.
    `dead_experts`, `unrouted_experts`: names of experts without neurons and without calibration tokens.
    `compact_bytes`, `checkpoint_bytes`: all weights of the compact and of the base checkpoint, None if the calibration
    did not record them. `experts`: what the compact one stores experts as, None for the base model's way. `metadata`:
    of the masks. `frontier`: what `sweep.frontier` returned for them.
    """

    base_model: str
    neurons: int
    kept: int
    stored_reduction: float
    executed_reduction: float
    compact_bytes: int | None = None
    checkpoint_bytes: int | None = None
    experts: str | None = None
    full_width: dict[str, int]
    dead_experts: list[str]
    unrouted_experts: list[str]
    widths: dict[str, list[int]]
    metadata: dict[str, Any]
    repair: RepairRecord | None = None
    frontier: Frontier | None = None

    def to_dict(self) -> dict[str, Any]:
        """Lists what is known, JSON values only."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_report(directory: Path) -> Summary:
    """Summarizes a masks repository or an exported checkpoint. Raises HeaprError if it is neither."""
    masks = read_masks(directory)
    calibration = CalibrationRecord.read(directory / "heapr", "run `heapr prune` again")
    frontier = directory / "heapr" / FRONTIER_FILE
    checkpoint = Checkpoint(directory)
    pruning = checkpoint.pruning if (directory / "config.json").is_file() else None
    check_counts(masks, calibration, directory)
    summary = summarize(masks, calibration, pruning.expert_scheme if pruning else None)
    if checkpoint.has_weights:
        summary = replace(summary, compact_bytes=num_bytes(checkpoint))
    return replace(
        summary,
        repair=RepairRecord.read(directory),
        frontier=read_json(frontier, Frontier, "run `heapr prune` again") if frontier.is_file() else None,
    )


def check_counts(masks: NeuronMasks, calibration: CalibrationRecord, directory: Path) -> None:
    """Raises HeaprError unless the calibration counted the tokens of just the experts that have masks."""
    counted = {prefix: len(tokens) for prefix, tokens in calibration.tokens.items()}
    if counted != {prefix: len(keep) for prefix, keep in masks.keep.items()}:
        raise HeaprError(
            f"{directory}: calibration.json counts the tokens of other experts than the masks have; run `heapr prune` "
            "again"
        )


def summarize(masks: NeuronMasks, calibration: CalibrationRecord, scheme: ExpertScheme | None = None) -> Summary:
    """Counts what masks keep and remove, by the routing of the calibration, with experts stored as `scheme` says."""
    prefixes = sorted(masks.keep, key=natural_order)
    widths = {prefix: masks.widths[prefix].tolist() for prefix in prefixes}
    tokens = {prefix: torch.tensor(count) for prefix, count in calibration.tokens.items()}
    compact_bytes = None
    sizes = calibration.sizes.stored_as(scheme) if calibration.sizes else None
    if sizes is not None:
        compact_bytes = sizes.whole - sizes.routed * (masks.num_neurons - masks.num_kept) // masks.num_neurons
    return Summary(
        base_model=calibration.model,
        neurons=masks.num_neurons,
        kept=masks.num_kept,
        stored_reduction=masks.sparsity,
        executed_reduction=masks.executed_reduction(tokens),
        compact_bytes=compact_bytes,
        checkpoint_bytes=calibration.checkpoint_bytes,
        experts=scheme.name if scheme else None,
        full_width={prefix: masks.keep[prefix].shape[1] for prefix in prefixes},
        dead_experts=_experts_with_none(widths),
        unrouted_experts=_experts_with_none({prefix: calibration.tokens[prefix] for prefix in prefixes}),
        widths=widths,
        metadata={key: value for key, value in masks.metadata.items() if key != "tokens"},
    )


def _experts_with_none(counts: dict[str, list[int]]) -> list[str]:
    """Names the experts whose count is 0."""
    names = []
    for prefix, experts in counts.items():
        names += [f"{prefix}.{expert}" for expert, count in enumerate(experts) if not count]
    return names


def format_report(summary: Summary) -> str:
    """Writes the summary as text: totals and how they came about, one row per layer, then what deserves attention."""
    header = f"{'MoE module':<34} {'mean':>6} {'min':>5} {'max':>5} {'full':>5}  widths"
    lines = [format_reductions(summary), *_size(summary), *choice_lines(summary), "", header]
    for prefix, widths in summary.widths.items():
        full = summary.full_width[prefix]
        lines.append(
            f"{prefix:<34} {sum(widths) / len(widths):>6.1f} {min(widths):>5} {max(widths):>5} {full:>5}  "
            f"{sparkline(widths, full)}"
        )
    lines += _protection(summary.metadata)
    for title, names in (("width 0", summary.dead_experts), ("no calibration token", summary.unrouted_experts)):
        if names:
            lines.append(f"experts with {title}: {len(names)} ({_first(names)})")
    if summary.repair is not None:
        lines.append(f"repair: {format_repair(summary.repair)}")
    return "\n".join(lines)


def speed_note(summary: Summary) -> str | None:
    """Says what it means that the executed reduction falls far behind the stored one; None if it does not."""
    if summary.executed_reduction >= FAR_BEHIND * summary.stored_reduction:
        return None
    return (
        f"note: speed follows executed FLOPs, which fall by {summary.executed_reduction:.1%} only, because most of "
        "what goes sits in experts that few tokens visit; to gain speed, ask for it: --flops R with --criterion fisher"
    )


def format_repair(repair: RepairRecord) -> str:
    """Puts the content of repair.json into one line."""
    few = f", {repair.experts_with_few_tokens} of them with few tokens" if repair.experts_with_few_tokens else ""
    return (
        f"{repair.method} on {repair.tokens:,} tokens of {repair.dataset}, {repair.experts} experts"
        f"{few}, prior {repair.prior:g} tokens per kept neuron: squared output error "
        f"-{repair.output_error_removed:.0%}"
    )


def _size(summary: Summary) -> list[str]:
    """Writes one line about the size on disk, if it is known."""
    if summary.compact_bytes is None or summary.checkpoint_bytes is None:
        return []
    whole = format_size(summary.checkpoint_bytes)
    experts = f", experts in {summary.experts}" if summary.experts else ""
    return [f"compact checkpoint: {format_size(summary.compact_bytes)} of {whole}{experts}"]


def choice_lines(summary: Summary) -> list[str]:
    """Lists how neurons were chosen: predicted loss, also by source, and prices, as far as they are known."""
    lines = []
    if summary.frontier is not None:
        loss = summary.frontier["chosen"]["loss_increase"]
        lines.append(
            f"predicted loss increase if neurons did not interact, criterion {summary.frontier['criterion']}: "
            f"{loss:.4f} nats per token. It ranks choices; what is lost is several times that: `heapr eval` measures it"
        )
        if own := summary.frontier.get("own_widths"):
            lines.append(
                f"the same with a width of its own for every expert: {own['loss_increase']:.4f} nats per token, with "
                f"{-own['executed_reduction']:.1%} executed FLOPs (scope global, for the plugin)"
            )
        if losses := summary.frontier.get("sources"):
            each = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            lines.append(f"by source, in nats per token of its own: {each}")
    if worst := summary.metadata.get("worst_case"):
        lines.append(
            f"chosen for the source that loses most: {worst['largest']:.4f} nats per token, and no choice gets below "
            f"{worst['bound']:.4f}"
        )
    if mix := summary.metadata.get("mix"):
        lines.append(f"chosen for the mix {', '.join(f'{name} {share:.0%}' for name, share in mix.items())}")
    if prices := summary.metadata.get("prices"):
        lines.append(
            f"a block stays if its mean saliency is at least {prices['per_flop']:.4g} x routing frequency + "
            f"{prices['per_neuron']:.4g}"
        )
    return lines


def _protection(metadata: dict[str, Any]) -> list[str]:
    """Writes one line about super experts; none for masks that `heapr prune` did not make."""
    if "protected" not in metadata:
        return []
    names = metadata["protected"]
    if names is None:
        return ["super experts: unknown to these moments of an older heapr-vllm; calibrate again to protect them"]
    shown = f" ({_first(names)})" if names else ""
    return [f"super experts found and protected: {len(names)}{shown}"]


def _first(names: list[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")


def format_reductions(summary: Summary) -> str:
    """Puts stored and executed reduction side by side."""
    return (
        f"routed neurons kept: {summary.kept:,} of {summary.neurons:,} | "
        f"stored -{summary.stored_reduction:.1%} | executed FLOPs -{summary.executed_reduction:.1%}"
    )


def sparkline(widths: list[int], full: int) -> str:
    """Draws one character per expert, a blank for width 0 and a full block for an unpruned expert."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * width // full)] for width in widths)
