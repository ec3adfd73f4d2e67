# SPDX-License-Identifier: Apache-2.0
"""Perplexity and tasks of several models in one table (`heapr eval`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.evaluation.perplexity import counted_routes, perplexity
from heapr_vllm.evaluation.served import served_perplexity
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.prune.models.loading import check_device
from heapr_vllm.prune.models.pruned import opened
from heapr_vllm.prune.report.summary import load_report
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.text.samples import Samples, TextSettings, draw_samples, load_tokenizer

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(TextSettings):
    """Text, tasks, and what runs the models. The text is `num_samples` seeded samples, the same for every model."""

    num_samples: int = 64
    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "cpu"
    backend: str = "transformers"


def compare(models: list[str], settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Measures one row per checkpoint directory or Hub id, with `change` of the perplexity against the first.

    Rows hold JSON values only, `weight_bytes` the size of all weights on the disk, None if it is not known. Pruned
    models also have their stored reduction, and with the backend "transformers" the
    executed one, counted from their routing of this text. Raises HeaprError if a model cannot be loaded, the tokenizers
    differ, lm-eval is missing, or `settings` do not fit together.
    """
    if settings.backend not in BACKENDS:
        raise HeaprError(f"backend {settings.backend!r} is not one of {', '.join(BACKENDS)}")
    check_device(settings.device)
    if settings.tasks:
        if settings.backend == "vllm":
            raise HeaprError("--tasks needs --backend transformers; for served tasks use lm-eval's own vLLM model")
        _lm_eval()
    measure = _measure_served if settings.backend == "vllm" else _measure
    checkpoints = [Checkpoint.resolve(model) for model in models]
    texts = [draw_samples(checkpoint, settings, settings.num_samples) for checkpoint in checkpoints]
    if len({samples.fingerprint() for samples in texts}) > 1:
        raise HeaprError("the models have different tokenizers, so their perplexities cannot be compared")
    rows: list[dict[str, Any]] = []
    for name, checkpoint in zip(models, checkpoints, strict=True):
        size = _weight_bytes(checkpoint)
        row = measure(checkpoint, texts[0], settings)
        change = row["perplexity"] / (rows[0] if rows else row)["perplexity"] - 1
        rows.append({"model": name, "weight_bytes": size, **row, "change": change})
    return rows


def _weight_bytes(checkpoint: Checkpoint) -> int | None:
    """Masks have the size of the checkpoint that `heapr export` makes of them."""
    return sizes.num_bytes(checkpoint) if checkpoint.has_weights else load_report(checkpoint.path).compact_bytes


def _measure_served(checkpoint: Checkpoint, samples: Samples, settings: EvaluationSettings) -> dict[str, Any]:
    row = {"perplexity": served_perplexity(checkpoint, samples, settings.dtype)}
    if (checkpoint.path / MASKS_FILE).is_file():
        row["stored_reduction"] = read_masks(checkpoint.path).sparsity
    return row


def _measure(checkpoint: Checkpoint, samples: Samples, settings: EvaluationSettings) -> dict[str, Any]:
    with opened(checkpoint, settings.dtype, settings.device) as (model, masks):
        with counted_routes(model) as tokens:
            row: dict[str, Any] = {"perplexity": perplexity(model, samples, settings.batch_size)}
        if masks is not None:
            row |= {"stored_reduction": masks.sparsity, "executed_reduction": masks.executed_reduction(tokens)}
        if settings.tasks:
            row["tasks"] = run_tasks(model, checkpoint, settings)
    return row


def run_tasks(
    model: PreTrainedModel, checkpoint: Checkpoint, settings: EvaluationSettings
) -> dict[str, dict[str, float]]:
    """Runs lm-eval; returns task -> metric -> value, as it reports them."""
    lm_eval = _lm_eval()
    tokenizer = load_tokenizer(checkpoint)
    harness = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    try:
        results = lm_eval.simple_evaluate(model=harness, tasks=list(settings.tasks))["results"]
    except (KeyError, ValueError) as error:
        raise HeaprError(f"lm-eval cannot run {', '.join(settings.tasks)}: {first_line(error)}") from error
    numbers: dict[str, dict[str, float]] = {}
    for task, metrics in results.items():
        floats = {name: value for name, value in metrics.items() if isinstance(value, float)}
        numbers[task] = {name.removesuffix(",none"): value for name, value in floats.items()}
    return numbers


def _lm_eval() -> Any:
    try:
        import lm_eval.models.huggingface
    except ImportError as error:
        raise HeaprError(f"--tasks needs lm-eval: {install_command('eval')}") from error
    return lm_eval


def format_comparison(rows: list[dict[str, Any]]) -> str:
    """Aligns the rows as a table, one column per metric of every task."""
    cells = [_cells(row) for row in rows]
    columns = dict.fromkeys(["model", "size", "perplexity", "change", "stored", "executed"])
    for found in cells:
        columns |= dict.fromkeys(found)
    table = [list(columns)]
    table += [[found.get(column, "") for column in columns] for found in cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(_aligned(line, widths) for line in table)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Formats a row, column -> text."""
    cells = {"model": row["model"], "perplexity": f"{row['perplexity']:.3f}", "change": f"{row['change']:+.1%}"}
    if row["weight_bytes"]:
        cells["size"] = format_size(row["weight_bytes"])
    for column in ("stored", "executed"):
        if f"{column}_reduction" in row:
            cells[column] = f"{-row[f'{column}_reduction']:.1%}"
    return cells | {metric: f"{value:.3f}" for metric, value in _task_metrics(row).items()}


def _aligned(line: list[str], widths: list[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    return "  ".join([line[0].ljust(len(first)), *others])


def _task_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Collects "task metric" -> value, without the standard errors."""
    found: dict[str, float] = {}
    for task, metrics in row.get("tasks", {}).items():
        found |= {f"{task} {metric}": value for metric, value in metrics.items() if "stderr" not in metric}
    return found
