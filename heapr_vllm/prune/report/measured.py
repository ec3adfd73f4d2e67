# SPDX-License-Identifier: Apache-2.0
"""What `heapr eval` measured of a pruned model: the file given or the one in its folder, and the row that is it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.evaluation_record import Agreement, EvaluationRecord, ModelRecord, TaskResult
from heapr_vllm.formats.folder import inside

EVALUATION_FILE = "heapr/evaluation.json"


@dataclass(frozen=True)
class Measured:
    """The rows of one pruned model and of what it is compared with, and the record they are from."""

    baseline: ModelRecord
    model: ModelRecord
    record: EvaluationRecord

    @property
    def alone(self) -> EvaluationRecord:
        """The record without other models, to lie in the model's folder."""
        return replace(self.record, models=(self.baseline, self.model))

    @property
    def tasks(self) -> list[tuple[str, TaskResult, TaskResult | None]]:
        """Lists (task, result of the pruned model, result of the baseline or None)."""
        return [(name, task, self.baseline.tasks.get(name)) for name, task in sorted(self.model.tasks.items())]


def read_evaluation(path: Path) -> EvaluationRecord:
    """Reads what `heapr eval -o` wrote. Raises HeaprError if it is missing, damaged or empty."""
    remedy = f"`heapr eval DIR --baseline BASE --dataset TEXT -o {path}` writes it"
    if not path.is_file():
        raise HeaprError(f"{path} is no file; {remedy}")
    record = EvaluationRecord.read(path)
    if not record.models:
        raise HeaprError(f"{path} has no models; {remedy}")
    return record


def own_evaluation(directory: Path) -> EvaluationRecord | None:
    """Reads the evaluation in a model's folder, None if there is none. Raises HeaprError if it is damaged."""
    path = inside(directory, EVALUATION_FILE)
    return read_evaluation(path) if path.is_file() else None


def measured(
    record: EvaluationRecord, directory: Path, masks_sha256: str, stored_reduction: float, *, is_own: bool = False
) -> Measured | None:
    """Finds the row of the model in `directory`, by its path or as the only one of its masks; None without one.

    A row of other masks is none of this model. One that does not name its masks, as older versions wrote it, is found
    by its path only, or if the record `is_own`: the one in the folder.
    """
    baseline, *others = record.models
    place = os.path.realpath(directory)
    here = [row for row in others if os.path.realpath(row.model) == place]
    elsewhere = [row for row in others if row.masks_sha256 or is_own]

    def fits(row: ModelRecord) -> bool:
        near = _is_near(row.stored_reduction, stored_reduction)
        return row.masks_sha256 == masks_sha256 if row.masks_sha256 else near

    rows = [*filter(fits, here)][:1] or [*filter(fits, elsewhere)]
    return Measured(baseline, rows[0], record) if len(rows) == 1 else None


def _is_near(found: float | None, expected: float) -> bool:
    return found is None or math.isclose(found, expected, abs_tol=1e-6)


def format_value(value: float, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """Writes a number with its interval, if it has one."""
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def format_task(result: TaskResult) -> str:
    return format_value(result.value, result.low, result.high)


def format_divergence(agreement: Agreement) -> str:
    """Writes the KL divergence in nats with its interval."""
    return format_value(agreement.kl_divergence, agreement.kl_low, agreement.kl_high, digits=4)


def format_top1(agreement: Agreement) -> str:
    """Writes the fraction of equal most likely tokens with its interval."""
    return format_value(agreement.top1, agreement.top1_low, agreement.top1_high)
