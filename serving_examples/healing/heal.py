# SPDX-License-Identifier: Apache-2.0
"""A pruned model trained to predict again what the dense one predicts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from heapr_vllm.environment import versions
from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.teacher import Teacher, teacher_folder
from heapr_vllm.formats.atomic import CHECKPOINT, alone_in, atomic_directory, check_writable
from heapr_vllm.formats.base_model import base_checkpoint, check_base
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.prune.models.loading import check_device
from heapr_vllm.prune.models.module_weights import empty_model
from heapr_vllm.prune.models.pruned import opened
from heapr_vllm.prune.text.batches import Batch, batches
from heapr_vllm.prune.text.samples import draw_samples
from serving_examples.healing.distillation import Lessons, distill, trained
from serving_examples.healing.memory import MemoryPlan
from serving_examples.healing.record import HealingRecord
from serving_examples.healing.settings import HealingSettings
from serving_examples.healing.student import AdapterStudent, Student, WeightsStudent
from serving_examples.healing.teacher import ask_teacher

HELD_OUT_EVERY = 32  # one batch of so many is measured on and not trained on


def heal(
    pruned: Path,
    output: Path,
    settings: HealingSettings,
    *,
    model: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> HealingRecord:
    """Trains the model of a masks repository or a compact checkpoint, and writes an adapter or a checkpoint.

    `model`: the base model, where it is not the one that `pruned` names. Says how much memory it takes before any
    weight is loaded. What a killed run left beside `output` is not done again. Raises HeaprError if `pruned` is not
    pruned, its base model is missing or another one, `output` exists, or the settings cannot be met.
    """
    settings.check()
    check_device(settings.device)
    check_writable(output)
    if output.exists():
        raise HeaprError(f"{output} already exists; remove it, or choose another --output")
    checkpoint, base, masks = _read(pruned, model)
    samples = draw_samples(base, settings, settings.num_samples)
    taught, held_out = split(batches(samples, settings.batch_size))
    empty = empty_model(base, settings.dtype)
    print(MemoryPlan.of(empty, make_student(empty, masks, checkpoint, base, settings).model, samples, settings))
    sys.stdout.flush()
    about = settings.as_evaluation()
    work = output.with_name(f".{output.name}.healing")
    with (
        alone_in(work),
        teacher_folder(Teacher.of(base, samples, about), settings.cache or str(work / "teacher")) as teacher,
    ):
        started = time.monotonic()
        ask_teacher(base, samples, teacher, settings)
        asked = time.monotonic()
        with opened(checkpoint, settings.dtype, settings.device) as (loaded, _):
            student = make_student(loaded, masks, checkpoint, base, settings)
            measured = Lessons(held_out, teacher)
            before = measured.divergence(student.model)
            training = time.monotonic()
            folder = work / settings.identity(Teacher.of(checkpoint, samples, about).name)
            distill(student.model, Lessons(taught, teacher), settings, folder, callbacks)
            record = HealingRecord(
                into=settings.into,
                samples=len(samples),
                tokens=settings.epochs * sum(batch.ids.numel() for batch in taught),
                trained=sum(parameter.numel() for parameter in trained(student.model).values()),
                learning_rate=settings.peak_learning_rate,
                kl_before=before,
                kl_after=measured.divergence(student.model),
                teacher_seconds=round(asked - started, 1),
                training_seconds=round(time.monotonic() - training, 1),
                versions=versions(),
            )
            with atomic_directory(output, CHECKPOINT, inputs=[pruned, base.path]) as written:
                student.write(written)
                record.write(written)
        for entry in work.iterdir():
            shutil.rmtree(entry)
    return record


def make_student(
    model: PreTrainedModel, masks: NeuronMasks, pruned: Checkpoint, base: Checkpoint, settings: HealingSettings
) -> Student:
    """Chooses what is trained of `model`, which is that of `pruned`."""
    if settings.into == "adapter":
        return AdapterStudent.of(model, settings)
    return WeightsStudent.of(model, masks, pruned, base, settings)


def split(found: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Parts batches into those to train on and those to measure on. Raises HeaprError if there is one only."""
    if len(found) < 2:
        raise HeaprError("one batch is measured on, so none is left to train on; give more text with --num-samples")
    return [batch for index, batch in enumerate(found) if index % HELD_OUT_EVERY], found[::HELD_OUT_EVERY]


def _read(pruned: Path, model: str | None) -> tuple[Checkpoint, Checkpoint, NeuronMasks]:
    """Opens a pruned model and its base model, checked against each other."""
    checkpoint = Checkpoint.resolve(pruned)
    if checkpoint.pruning is None:
        raise HeaprError(f"{pruned} is not pruned; name what `heapr prune` or `heapr export` wrote")
    base = base_checkpoint(checkpoint, checkpoint.pruning, model, "name it with --model")
    masks = read_masks(checkpoint.path)
    check_base(base, masks, checkpoint.pruning.base_model.fingerprint, "name the right one with --model")
    return checkpoint, base, masks
