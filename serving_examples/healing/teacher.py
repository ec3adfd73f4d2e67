# SPDX-License-Identifier: Apache-2.0
"""The dense model's predictions of the text, written down before the pruned model is loaded: one model at a time."""

from __future__ import annotations

from heapr_vllm.evaluation.perplexity import next_token_logits
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.progress import progress
from heapr_vllm.prune.models.loading import load_model
from heapr_vllm.prune.text.samples import Samples
from serving_examples.healing.settings import HealingSettings


def ask_teacher(base: Checkpoint, samples: Samples, folder: PredictionsFolder, settings: HealingSettings) -> None:
    """Predicts those of `samples` that are missing in `folder`."""
    missing = folder.missing(len(samples))
    if not missing:
        return
    model = load_model(base, settings.dtype, settings.device)
    found = next_token_logits(model, Samples([samples.entries[index] for index in missing]), settings.batch_size)
    pairs = zip(missing, found, strict=True)
    for index, (logits, following) in progress(pairs, total=len(missing), unit="sample", desc="asking the dense model"):
        folder.write(index, Predictions.of_logits(logits, following, settings.top_k))
