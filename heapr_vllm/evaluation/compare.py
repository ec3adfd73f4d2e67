# SPDX-License-Identifier: Apache-2.0
"""Several models on the same text and tasks, against the first of them (`heapr eval`)."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from heapr_vllm.environment import versions
from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.agreement import agreement
from heapr_vllm.evaluation.in_transformers import run_in_transformers
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.evaluation.served import run_served
from heapr_vllm.evaluation.settings import BACKENDS, EvaluationSettings
from heapr_vllm.evaluation.tasks import Outcomes, check_tasks
from heapr_vllm.evaluation.teacher import Teacher, teacher_folder
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.evaluation_record import EvaluationRecord, MeasuredOn, ModelRecord
from heapr_vllm.formats.masks import NeuronMasks, file_sha256
from heapr_vllm.formats.pruned import masks_path
from heapr_vllm.prune.models.loading import check_device
from heapr_vllm.prune.report.summary import load_report
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.text.samples import Samples, draw_samples


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What one run of a model found, beside the predictions in its folder."""

    tasks: dict[str, Outcomes] = field(default_factory=dict)
    executed_reduction: float | None = None


def evaluate(models: list[str], settings: EvaluationSettings) -> EvaluationRecord:
    """Measures checkpoint directories or Hub ids; the first is what the others are compared with.

    Pruned models also have their stored reduction, and with the backend "transformers" the executed one, counted from
    their routing of this text. Raises HeaprError if a model cannot be loaded, the tokenizers differ, lm-eval is
    missing, or `settings` do not fit together.
    """
    if settings.backend not in BACKENDS:
        raise HeaprError(f"backend {settings.backend!r} is not one of {', '.join(BACKENDS)}")
    if settings.engine_args and settings.backend != "vllm":
        raise HeaprError("--engine-args are vLLM's; add --backend vllm")
    check_device(settings.device)
    if settings.tasks:
        check_tasks(settings)
    checkpoints = [Checkpoint.resolve(model) for model in models]
    samples = _text(checkpoints, settings)
    rows: list[ModelRecord] = []
    with teacher_folder(Teacher.of(checkpoints[0], samples, settings), settings.cache) as teacher:
        if len(models) > 1 and settings.top_k:
            _announce(models[0], samples, settings, teacher)
        baseline = _measure(models[0], checkpoints[0], samples, settings, teacher)
        rows.append(_row(models[0], checkpoints[0], baseline, teacher.perplexity(len(samples))))
        for number, (name, checkpoint) in enumerate(zip(models[1:], checkpoints[1:], strict=True), 1):
            with tempfile.TemporaryDirectory() as work:
                folder = PredictionsFolder(Path(work))
                found = _measure(name, checkpoint, samples, settings, folder, teacher, number)
                row = _row(name, checkpoint, found, folder.perplexity(len(samples)), rows[0].perplexity, baseline)
                rows.append(_compared(row, models[0], teacher, folder, len(samples), settings.top_k))
    return EvaluationRecord(settings=_measured_on(settings), versions=versions(), models=tuple(rows))


def _text(checkpoints: list[Checkpoint], settings: EvaluationSettings) -> Samples:
    """Draws the samples. Raises HeaprError if they are not the same for all models."""
    texts = [draw_samples(checkpoint, settings, settings.num_samples) for checkpoint in checkpoints]
    if len({samples.fingerprint() for samples in texts}) > 1:
        raise HeaprError("the models have different tokenizers, so their perplexities cannot be compared")
    limit = min(checkpoint.text.max_position_embeddings or sys.maxsize for checkpoint in checkpoints)
    if settings.backend == "vllm" and settings.max_seq_length >= limit:
        raise HeaprError(
            f"--max-seq-length {settings.max_seq_length} leaves vLLM none of the model's {limit} positions to generate "
            f"a token; pass --max-seq-length {limit - 1}"
        )
    return texts[0]


def _announce(name: str, samples: Samples, settings: EvaluationSettings, teacher: PredictionsFolder) -> None:
    places = samples.predictions
    size = format_size(Predictions.num_bytes(places, settings.top_k))
    kept = f"in {teacher.folder}" if settings.cache else "of temporary files; --cache DIR keeps them"
    print(f"{settings.top_k} log-probabilities of {name} at {places} places: {size} {kept}", file=sys.stderr)


def _measure(
    name: str,
    checkpoint: Checkpoint,
    samples: Samples,
    settings: EvaluationSettings,
    folder: PredictionsFolder,
    teacher: PredictionsFolder | None = None,
    number: int = 0,
) -> _Measured:
    """Fills the folder and runs the tasks; starts nothing if there is nothing to do."""
    missing = folder.missing(len(samples))
    if not missing and not settings.tasks:
        return _Measured()
    answers = Path(settings.samples) / f"{number}-{Path(name).name}" if settings.samples else None
    if settings.backend == "vllm":
        return _Measured(tasks=run_served(checkpoint, samples, missing, folder, settings, answers))
    tasks, executed = run_in_transformers(checkpoint, samples, missing, folder, settings, teacher, answers)
    return _Measured(tasks=tasks, executed_reduction=executed)


def _row(
    name: str,
    checkpoint: Checkpoint,
    found: _Measured,
    perplexity: float,
    baseline_perplexity: float | None = None,
    baseline: _Measured | None = None,
) -> ModelRecord:
    if not math.isfinite(perplexity):
        raise HeaprError(f"{name} predicts no numbers for this text, so it has no perplexity; try --dtype float32")
    masks = masks_path(checkpoint.path) if (checkpoint.path / MASKS_FILE).is_file() else None
    others = baseline.tasks if baseline else {}
    tasks = {task: outcomes.against(others.get(task)) for task, outcomes in found.tasks.items()}
    recoveries = {task: result.recovery for task, result in tasks.items() if result.recovery is not None}
    worst = min(recoveries, key=recoveries.__getitem__, default=None)
    return ModelRecord(
        model=name,
        weight_bytes=_weight_bytes(checkpoint),
        perplexity=perplexity,
        change=perplexity / (baseline_perplexity or perplexity) - 1,
        stored_reduction=NeuronMasks.load(masks).sparsity if masks else None,
        executed_reduction=found.executed_reduction,
        masks_sha256=file_sha256(masks) if masks else None,
        tasks=tasks,
        worst_task=worst,
        worst_recovery=recoveries[worst] if worst else None,
    )


def _compared(
    row: ModelRecord, against: str, teacher: PredictionsFolder, folder: PredictionsFolder, num_samples: int, top_k: int
) -> ModelRecord:
    if not top_k:
        return row
    found = agreement(against, teacher.read_all(num_samples), folder.read_all(num_samples), top_k)
    return replace(row, agreement=found)


def _weight_bytes(checkpoint: Checkpoint) -> int | None:
    """Masks have the size of the checkpoint that `heapr export` makes of them."""
    return sizes.num_bytes(checkpoint) if checkpoint.has_weights else load_report(checkpoint.path).compact_bytes


def _measured_on(settings: EvaluationSettings) -> MeasuredOn:
    names = {field.name for field in fields(MeasuredOn)}
    return MeasuredOn(**{name: value for name, value in asdict(settings).items() if name in names})
