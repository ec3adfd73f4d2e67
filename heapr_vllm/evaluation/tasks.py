# SPDX-License-Identifier: Apache-2.0
"""Tasks, run by lm-eval: what every model got right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.evaluation.statistics import mcnemar, wilson
from heapr_vllm.formats.evaluation_record import TaskResult


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One metric of one task or group of tasks.

    `right`: sample -> whether it was right, empty if the metric is more than right or wrong.
    """

    metric: str
    value: float
    num_samples: int
    num_fewshot: int
    higher_is_better: bool
    right: dict[str, bool] = field(default_factory=dict)

    def against(self, baseline: Outcomes | None) -> TaskResult:
        """Adds the interval and, with a baseline, what is kept of its value and whether the two differ."""
        low, high = wilson(sum(self.right.values()), len(self.right)) if self.right else (None, None)
        is_comparable = baseline is not None and self.higher_is_better and baseline.value > 0
        return TaskResult(
            metric=self.metric,
            num_samples=self.num_samples,
            value=self.value,
            low=low,
            high=high,
            recovery=self.value / baseline.value if baseline and is_comparable else None,
            mcnemar_p=self._mcnemar(baseline) if baseline and self.right else None,
            num_fewshot=self.num_fewshot,
        )

    def _mcnemar(self, baseline: Outcomes) -> float | None:
        if self.right.keys() != baseline.right.keys():
            return None
        return mcnemar(list(self.right.values()), [baseline.right[sample] for sample in self.right])


def check_tasks(settings: EvaluationSettings) -> None:
    """Raises HeaprError if lm-eval is missing or does not know a task."""
    manager = _task_manager(settings)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        raise HeaprError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, --include-path DIR adds "
            "those of a folder"
        )


def run_tasks(harness: Any, settings: EvaluationSettings, samples: Path | None) -> dict[str, Outcomes]:
    """Runs all tasks on a model of lm-eval; one entry per task, or per metric where a task has several.

    Writes what it answered to `samples`, one JSONL per task. Raises HeaprError if lm-eval cannot run a task.
    """
    try:
        found = _lm_eval().simple_evaluate(
            model=harness,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=_task_manager(settings),
            bootstrap_iters=0,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise HeaprError(f"lm-eval cannot run {', '.join(settings.tasks)}: {first_line(error)}") from error
    if samples is not None:
        _write_samples(found["samples"], samples)
    outcomes: dict[str, Outcomes] = {}
    for name, leaves in _groups(settings.tasks, found).items():
        outcomes |= _outcomes(name, leaves, found)
    return outcomes


def _lm_eval() -> Any:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise HeaprError(f"--tasks needs lm-eval: {install_command('eval')}") from error
    return lm_eval


def _task_manager(settings: EvaluationSettings) -> Any:
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise HeaprError(f"--include-path {settings.include_path} is no folder of tasks")
    return _lm_eval().tasks.TaskManager(include_path=settings.include_path)


def _groups(tasks: Iterable[str], found: dict[str, Any]) -> dict[str, list[str]]:
    """Collects the tasks that ran, group -> its tasks; those of no group that was asked for stand alone."""
    groups = {task: leaves for task in tasks if (leaves := _leaves(task, found))}
    grouped = {leaf for leaves in groups.values() for leaf in leaves}
    return groups | {leaf: [leaf] for leaf in found["samples"] if leaf not in grouped}


def _leaves(task: str, found: dict[str, Any]) -> list[str]:
    if task in found["samples"]:
        return [task]
    leaves: list[str] = []
    for part in found["group_subtasks"].get(task, ()):
        leaves += _leaves(part, found)
    return leaves


def _outcomes(name: str, leaves: list[str], found: dict[str, Any]) -> dict[str, Outcomes]:
    """Puts the samples of all `leaves` together, one entry per metric that all have; without one they stand alone."""
    metrics = [_metrics(leaf, found) for leaf in leaves]
    common = [metric for metric in metrics[0] if all(metric in others for others in metrics)]
    entries: dict[str, Outcomes] = {}
    if not common and len(leaves) > 1:
        for leaf in leaves:
            entries |= _outcomes(leaf, [leaf], found)
    for metric in common:
        entry = name if len(common) == 1 else f"{name} {metric.removesuffix(',none')}"
        entries[entry] = _pooled(leaves, metric, found)
    return entries


def _metrics(task: str, found: dict[str, Any]) -> dict[str, float]:
    """Finds the values that lm-eval reports, "metric,filter" -> value."""
    metrics: dict[str, float] = {}
    for name, value in found["results"][task].items():
        metric, comma, _ = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            metrics[name] = float(value)
    return metrics


def _pooled(leaves: list[str], name: str, found: dict[str, Any]) -> Outcomes:
    metric, _, kind = name.partition(",")
    values: dict[str, Any] = {}
    total, num_samples = 0.0, 0
    for leaf in leaves:
        records = [record for record in found["samples"][leaf] if record["filter"] == kind and metric in record]
        values |= {f"{leaf} {record['doc_id']}": record[metric] for record in records}
        count = found["n-samples"][leaf]["effective"]
        total += found["results"][leaf][name] * count
        num_samples += count
    value = total / num_samples
    is_binary = all(each in (0, 1) for each in values.values())  # what is averaged otherwise may be any object
    is_mean = is_binary and len(values) == num_samples and math.isclose(sum(values.values()), total, abs_tol=1e-6)
    return Outcomes(
        metric=metric,
        value=value,
        num_samples=num_samples,
        num_fewshot=found["n-shot"][leaves[0]],
        higher_is_better=found["higher_is_better"][leaves[0]].get(metric) is not False,
        right={sample: bool(each) for sample, each in values.items()} if is_mean else {},
    )


def _write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for task, records in samples.items():
        lines = [json.dumps(record, default=str, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
