# SPDX-License-Identifier: Apache-2.0
"""Training of a student on a teacher's predictions, by the Trainer of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.agreement import divergence
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.progress import progress
from heapr_vllm.prune.text.batches import IGNORED, Batch
from serving_examples.healing.settings import HealingSettings

TRAINED_FILE = "trained.safetensors"
SAVES = 10  # of what is trained, on the way


@dataclass(frozen=True)
class Lesson:
    """A batch of text, and what the teacher predicts at its places that count."""

    batch: Batch
    teacher: Predictions

    def divergence(self, model: nn.Module) -> torch.Tensor:
        """Computes the mean of KL(teacher || model) in nats, on the CPU."""
        labels = self.batch.labels[:, 1:]
        places = labels != IGNORED
        device = next(model.parameters()).device
        logits = model(**self.batch.inputs(device), use_cache=False).logits[:, :-1][places.to(device)].float()
        following = labels[places].to(device)
        student = Predictions.of_logits(logits, following, 0, self.teacher.tokens)
        return divergence(self.teacher, student).mean()


class Lessons(Dataset[Lesson]):
    """Lessons read when they are asked for."""

    def __init__(self, batches: Sequence[Batch], teacher: PredictionsFolder) -> None:
        self.batches, self.teacher = batches, teacher

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Lesson:
        batch = self.batches[index]
        found = [self.teacher.read(sample) for sample in range(batch.first, batch.done)]
        return Lesson(batch, Predictions.joined(found))

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> float:
        """Computes the mean over all lessons."""
        model.eval()
        return math.fsum(self[index].divergence(model).item() for index in range(len(self))) / len(self)


class Distillation(Trainer):
    """Minimises the divergence from the teacher (Hinton et al., 2015). Saves only what is trained."""

    model: nn.Module
    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return inputs["lesson"].divergence(model).to(self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None, "the Trainer names the folder of a save"
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained(self.model), Path(output_dir) / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / TRAINED_FILE), strict=False)


class ProgressCallback(TrainerCallback):
    """One bar, or lines in a log, with the divergence of the last steps."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.bar = progress(total=state.max_steps, initial=state.global_step, unit="step", desc="healing")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(KL=f"{float(logs['loss']):.4f}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.bar.close()


def distill(
    model: nn.Module,
    lessons: Lessons,
    settings: HealingSettings,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains what takes gradients in `model`. Saves in `folder`, from where the same call continues after a kill."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # a lesson is a batch
        num_train_epochs=settings.epochs,
        learning_rate=settings.peak_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        gradient_checkpointing=settings.gradient_checkpointing,
        save_strategy="steps",
        save_steps=math.ceil(settings.epochs * len(lessons) / SAVES),
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
    )
    if arguments.n_gpu > 1:
        raise HeaprError(f"healing runs on one GPU and torch sees {arguments.n_gpu}; set CUDA_VISIBLE_DEVICES=0")
    trainer = Distillation(
        model=model,
        args=arguments,
        train_dataset=lessons,
        data_collator=lambda lessons: {"lesson": lessons[0]},
        callbacks=[ProgressCallback(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_save(folder))


def last_save(folder: Path) -> str | None:
    """Finds the last save that is whole: the Trainer writes its state after everything else."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that take gradients, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
