# SPDX-License-Identifier: Apache-2.0
"""An evaluation as text: one table of the models, one of the tasks."""

from __future__ import annotations

from heapr_vllm.formats.evaluation_record import EvaluationRecord, ModelRecord, TaskResult
from heapr_vllm.prune.selection.budget import format_size


def format_evaluation(record: EvaluationRecord) -> str:
    """Aligns the models, and below them one line per task and model."""
    text = _table([_model_cells(model) for model in record.models])
    tasks: list[dict[str, str]] = []
    for task in record.models[0].tasks:
        tasks += [
            {"task": task, "model": model.model, **_task_cells(model.tasks[task])}
            for model in record.models
            if task in model.tasks
        ]
    parts = [text, _table(tasks)] if tasks else [text]
    return "\n\n".join(parts + _notes(record))


def _model_cells(model: ModelRecord) -> dict[str, str]:
    """Formats a model, column -> text."""
    cells = {
        "model": model.model,
        "size": format_size(model.weight_bytes) if model.weight_bytes else "",
        "perplexity": f"{model.perplexity:.3f}",
        "change": f"{model.change:+.1%}",
        "stored": _reduction(model.stored_reduction),
        "executed": _reduction(model.executed_reduction),
    }
    if model.agreement:
        found = model.agreement
        cells["KL"] = f"{found.kl_divergence:.4f}{_interval(found.kl_low, found.kl_high, '.4f')}"
        cells["top-1"] = f"{found.top1:.1%}{_interval(found.top1_low, found.top1_high, '.1%')}"
    if model.worst_recovery is not None:
        cells["worst task"] = f"{model.worst_task} {model.worst_recovery:.1%}"
    return cells


def _task_cells(result: TaskResult) -> dict[str, str]:
    cells = {
        "metric": result.metric,
        "shots": str(result.num_fewshot),
        "samples": str(result.num_samples),
        "value": f"{result.value:.3f}{_interval(result.low, result.high, '.3f')}",
    }
    if result.recovery is not None:
        cells["recovery"] = f"{result.recovery:.1%}"
    if result.mcnemar_p is not None:
        cells["McNemar p"] = f"{result.mcnemar_p:.2g}"
    return cells


def _notes(record: EvaluationRecord) -> list[str]:
    """Says what the columns mean, once there are any of them."""
    found = next((model.agreement for model in record.models if model.agreement), None)
    if found is None:
        return []
    what = f"next-token predictions against {found.against} at {found.tokens} places"
    how = f"{found.top_k} likely tokens one by one, the rest as one"
    return [f"KL and top-1: {what}, {how}. In brackets: 95 % intervals."]


def _reduction(fraction: float | None) -> str:
    return "" if fraction is None else f"{-fraction:.1%}"


def _interval(low: float | None, high: float | None, digits: str) -> str:
    return "" if low is None else f" [{low:{digits}}, {high:{digits}}]"


def _table(lines: list[dict[str, str]]) -> str:
    """Aligns lines of column -> text to the right, the first column to the left; columns in order of appearance."""
    columns: dict[str, None] = {}
    for line in lines:
        columns |= dict.fromkeys(line)
    rows = [list(columns)] + [[line.get(column, "") for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([row[0].ljust(len(first)), *others])
