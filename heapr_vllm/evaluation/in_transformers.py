# SPDX-License-Identifier: Apache-2.0
"""A model in transformers, on text and on tasks: `heapr eval --backend transformers`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from heapr_vllm.evaluation.perplexity import counted_routes, next_token_logits
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.evaluation.tasks import Outcomes, run_tasks
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.prune.models.pruned import opened
from heapr_vllm.prune.text.samples import Samples, load_tokenizer


def run_in_transformers(
    checkpoint: Checkpoint,
    samples: Samples,
    missing: list[int],
    folder: PredictionsFolder,
    settings: EvaluationSettings,
    teacher: PredictionsFolder | None,
    answers: Path | None,
) -> tuple[dict[str, Outcomes], float | None]:
    """Predicts the `missing` ones of `samples`, each its own context, and runs the tasks.

    With a `teacher` the predictions are for the tokens that it holds. Also returns the executed reduction, counted from
    the routing of the text; None for an unpruned model, or if nothing was missing.
    """
    with opened(checkpoint, settings.dtype, settings.device) as (model, masks):
        if masks is None and (checkpoint.path / MASKS_FILE).is_file():  # exported for any engine
            masks = read_masks(checkpoint.path)
        with counted_routes(model) as routes:
            _predict(model, samples, missing, folder, settings, teacher)
        executed = masks.executed_reduction(routes) if masks is not None and missing else None
        return _run_tasks(model, checkpoint, settings, answers) if settings.tasks else {}, executed


def _predict(
    model: PreTrainedModel,
    samples: Samples,
    missing: list[int],
    folder: PredictionsFolder,
    settings: EvaluationSettings,
    teacher: PredictionsFolder | None,
) -> None:
    wanted = Samples([samples.entries[index] for index in missing])
    found = next_token_logits(model, wanted, settings.batch_size)
    for index, (logits, following) in zip(missing, found, strict=True):
        tokens = teacher.read(index).tokens if teacher else None
        folder.write(index, Predictions.of_logits(logits, following, max(1, settings.top_k), tokens))


def _run_tasks(
    model: PreTrainedModel, checkpoint: Checkpoint, settings: EvaluationSettings, answers: Path | None
) -> dict[str, Outcomes]:
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=load_tokenizer(checkpoint), batch_size=settings.batch_size)
    return run_tasks(harness, settings, answers)
