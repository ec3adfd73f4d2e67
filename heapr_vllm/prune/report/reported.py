# SPDX-License-Identifier: Apache-2.0
"""What the report says of a pruned model, and the tables that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from heapr_vllm.formats.evaluation_record import EvaluationRecord, ModelRecord
from heapr_vllm.formats.masks import file_sha256
from heapr_vllm.formats.pruned import masks_path
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.report.measured import (
    format_divergence,
    format_task,
    format_top1,
    measured,
    own_evaluation,
)
from heapr_vllm.prune.report.speed import SpeedRow
from heapr_vllm.prune.report.summary import Summary, choice_lines, format_repair, load_report, speed_note
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.selection.selector import Point
from heapr_vllm.prune.selection.sweep import Frontier

Table = tuple[list[str], list[list[str]]]  # header, rows


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """One pruned model: its folder, what it is called on the page, and what its files say."""

    directory: Path
    label: str
    summary: Summary
    calibration: CalibrationRecord
    evaluation: EvaluationRecord | None
    masks_sha256: str

    @classmethod
    def read(cls, directory: Path, label: str) -> ReportedModel:
        """Reads a masks repository or an exported checkpoint. Raises HeaprError if it is neither."""
        summary = load_report(directory)
        return cls(
            directory=directory,
            label=label,
            summary=summary,
            calibration=CalibrationRecord.read(directory / "heapr", "run `heapr prune` again"),
            evaluation=own_evaluation(directory),
            masks_sha256=file_sha256(masks_path(directory)),
        )

    @property
    def method(self) -> str:
        """How neurons were chosen, as far as the masks say."""
        metadata = self.summary.metadata
        return f"{metadata.get('criterion')}, scope {metadata.get('scope')}, align {metadata.get('align')}"

    @property
    def is_combined(self) -> bool:
        """Whether `heapr masks` made it of others, which have frontiers of their own."""
        return self.summary.metadata.get("scope") in ("union", "intersect")

    @property
    def loss_increase(self) -> float | None:
        return self.summary.frontier["chosen"]["loss_increase"] if self.summary.frontier else None

    @property
    def notes(self) -> list[str]:
        """How neurons were chosen, and what deserves attention."""
        summary = self.summary
        notes = [*choice_lines(summary), speed_note(summary) or ""]
        for words, names in (("width 0", summary.dead_experts), ("no calibration token", summary.unrouted_experts)):
            if names:
                notes.append(f"experts with {words}: {len(names)} ({', '.join(names[:6])}{', ...' * (len(names) > 6)})")
        if protected := summary.metadata.get("protected"):
            notes.append(f"super experts found and protected: {len(protected)}")
        if summary.repair is not None:
            notes.append(f"repair: {format_repair(summary.repair)}")
        return [note.removeprefix("note: ") for note in notes if note]

    def measured(self, records: Iterable[EvaluationRecord]) -> ModelRecord | None:
        """Finds the first measurement of this model."""
        for record in records:
            is_own = record is self.evaluation
            reduction = self.summary.stored_reduction
            if found := measured(record, self.directory, self.masks_sha256, reduction, is_own=is_own):
                return found.model
        return None

    def layers(self) -> Table:
        """Lists widths per MoE module."""
        rows = []
        for prefix, widths in self.summary.widths.items():
            mean = sum(widths) / len(widths)
            full = self.summary.full_width[prefix]
            numbers = (f"{mean / full:.1%}", f"{mean:.1f}", min(widths), max(widths), full, widths.count(0))
            rows.append([prefix, *map(str, numbers)])
        return ["MoE module", "kept", "mean width", "min", "max", "full", "experts of width 0"], rows


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Shortens local paths to their last part where that is clear; Hub ids stay whole."""
    short = {name: Path(name).name if _is_local(name) else name for name in names}
    taken = list(short.values())
    return {name: last if last and taken.count(last) == 1 else name for name, last in short.items()}


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip("/").count("/")


def comparison(models: Sequence[ReportedModel], records: Sequence[EvaluationRecord]) -> Table:
    """Puts models side by side, one column each."""
    return _columns({model.label: _compared(model, records) for model in models})


def _compared(model: ReportedModel, records: Sequence[EvaluationRecord]) -> dict[str, str]:
    summary, found = model.summary, model.measured(records)
    return {
        "method": model.method,
        "neurons stored": f"{-summary.stored_reduction:.1%}",
        "executed expert FLOPs": f"{-summary.executed_reduction:.1%}",
        "weights": format_size(summary.compact_bytes) if summary.compact_bytes else "",
        "repair": summary.repair.method if summary.repair else "",
        "experts of width 0": str(len(summary.dead_experts)),
        "predicted loss, nats": "" if model.loss_increase is None else f"{model.loss_increase:+.5f}",
        "perplexity, measured": f"{found.change:+.2%}" if found else "",
    }


def quality(record: EvaluationRecord) -> Table:
    """Lists what was measured, one column per model."""
    names = short_names(model.model for model in record.models)
    return _columns({names[model.model]: _measured(model) for model in record.models})


def _measured(model: ModelRecord) -> dict[str, str]:
    cells = {
        "weights": format_size(model.weight_bytes) if model.weight_bytes else "",
        "perplexity": f"{model.perplexity:.3f}",
        "change of perplexity": f"{model.change:+.2%}",
        "KL divergence, nats": format_divergence(model.agreement) if model.agreement else "",
        "same most likely token": format_top1(model.agreement) if model.agreement else "",
    }
    for name, task in model.tasks.items():
        cells[f"{name}, {task.metric}"] = format_task(task)
        cells[f"{name}, of the baseline's"] = "" if task.recovery is None else f"{task.recovery:.1%}"
        cells[f"{name}, McNemar p"] = "" if task.mcnemar_p is None else f"{task.mcnemar_p:.3f}"
    return cells


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Lists tokens per second and memory, one row each; columns that no row has are left out."""
    cells = [_speed_cells(row) for row in rows]
    header = [name for name in cells[0] if any(row[name] for row in cells)]
    return header, [[row[name] for name in header] for row in cells]


def _speed_cells(row: SpeedRow) -> dict[str, str]:
    spread = "" if row.tok_s_min is None or row.tok_s_max is None else f" ({row.tok_s_min:g} to {row.tok_s_max:g})"
    return {
        "model": row.model,
        "workload": row.workload,
        "at once": row.concurrency,
        "arm": row.arm,
        "output tokens/s": f"{row.tok_s:g}{spread}",
        "over dense": "" if row.vs_dense is None else f"{row.vs_dense:.2f}x",
        "weights, GiB": "" if row.weights_gib is None else f"{row.weights_gib:g}",
        "KV cache, tokens": "" if row.kv_tokens is None else f"{row.kv_tokens:,.0f}",
    }


def speed_origin(rows: Sequence[SpeedRow]) -> Table:
    """Lists dates, machines, versions and commands behind the rows."""
    origins = dict.fromkeys((row.date, row.device, row.versions, row.command) for row in rows)
    return ["date", "machine", "versions", "command"], [list(origin) for origin in origins]


def frontier(curves: Frontier) -> Table:
    """Lists the choice made and the choices along budgets of either kind."""
    rows = [_frontier_row("chosen", curves["chosen"])]
    rows += [_frontier_row("stored", point) for point in curves["stored"]]
    rows += [_frontier_row("executed", point) for point in curves["executed"]]
    return ["budget", "stored", "executed", "predicted loss increase, nats"], rows


def _frontier_row(budget: str, point: Point) -> list[str]:
    reductions = (f"{-point['stored_reduction']:.1%}", f"{-point['executed_reduction']:.1%}")
    return [budget, *reductions, f"{point['loss_increase']:+.5f}"]


def provenance(models: Sequence[ReportedModel]) -> Table:
    """Lists how each model was calibrated, one column per model."""
    return _columns({model.label: _calibrated(model) for model in models})


def _calibrated(model: ReportedModel) -> dict[str, str]:
    calibration = model.calibration
    return {
        "base model": calibration.model,
        "revision": calibration.revision or "none",
        "base fingerprint": calibration.base_fingerprint,
        "text": calibration.dataset_name,
        "text fingerprint": calibration.dataset_fingerprint,
        "samples": f"{calibration.num_calibration_samples:,} of up to {calibration.max_seq_length:,} tokens",
        "tokens": f"{calibration.calibration_tokens:,}",
        "seed": str(calibration.seed),
        "dtype": calibration.dtype,
        "processes": str(calibration.processes),
        "time": f"{calibration.wall_time_seconds:.0f} s",
        "method": model.method,
    }


def versions(models: Sequence[ReportedModel], records: Sequence[EvaluationRecord]) -> Table:
    """Lists the versions behind the calibrations and the evaluations, one column for each of them."""
    columns = {f"calibration of {model.label}": model.calibration.versions for model in models}
    columns |= {f"evaluation {number}": record.versions for number, record in enumerate(records, 1)}
    return _columns(columns)


def _columns(columns: dict[str, dict[str, str]]) -> Table:
    """Makes a table of columns, header -> name of the row -> cell, without rows that are empty."""
    names = dict.fromkeys(chain.from_iterable(columns.values()))
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return ["", *columns], [row for row in rows if any(row[1:])]
