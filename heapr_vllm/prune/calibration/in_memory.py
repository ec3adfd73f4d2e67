# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass over calibration text with the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.progress import progress
from heapr_vllm.prune.calibration.collector import check_experts
from heapr_vllm.prune.calibration.mix_collector import MixCollector
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.calibration.saved_state import SavedState
from heapr_vllm.prune.calibration.settings import CalibrationSettings, check_finite
from heapr_vllm.prune.models.loading import load_model
from heapr_vllm.prune.text.batches import Batch, as_batches, token_counts
from heapr_vllm.prune.text.samples import Samples


def collect_moments(
    model: PreTrainedModel,
    samples: torch.Tensor | Samples | list[Batch],
    batch_size: int = 1,
    *,
    collector: MixCollector | None = None,
    first: int = 0,
    after_batch: Callable[[Batch], None] | None = None,
) -> NeuronMoments:
    """Runs `model` over `samples`, token ids int64 [N, L] or what has become of them; weights get no gradient.

    The loss is the sum of next-token cross entropies, so the result does not depend on the batches. `collector` and
    `first` continue an interrupted run after so many samples; `after_batch` is called with every batch that is done.
    Raises HeaprError if the loss is not finite, or if tokens do not reach the experts.
    """
    batches = as_batches(samples, batch_size)
    collector = collector or MixCollector.numbered(model, batches)
    with _backward_only_to_activations(model):
        for batch in batches:
            if batch.done <= first:
                continue
            with collector.attached(batch.source):
                loss = batch.loss(model(**batch.inputs(model.device), use_cache=False).logits)
                check_finite(loss.item(), batch.first)
                loss.backward()
            if after_batch is not None:
                after_batch(batch)
    collector.check_reached(batches)
    return collector.moments(token_counts(batches))


@contextmanager
def _backward_only_to_activations(model: PreTrainedModel):
    """Sets no weight gradients, evaluation mode, gradient checkpointing; everything is put back on exit."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # checkpointing is active in training mode only; dropout inside stays off
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    try:
        yield
    finally:
        hook.remove()
        model.gradient_checkpointing_disable()
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)


def calibrate_in_memory(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    batches: list[Batch],
    device: str,
    state: SavedState,
    partial: NeuronMoments | None,
    every: int,
) -> NeuronMoments:
    """Does `heapr calibrate` without `--stream`, between reading the text and writing the result."""
    model = load_model(checkpoint, settings.dtype, device)
    collector = MixCollector(model, state.names)
    check_experts(checkpoint, collector.first)
    first = 0
    if partial is not None:
        collector.restore(partial)
        first = partial.metadata["samples_done"]
    with progress(
        total=sum(batch.ids.numel() for batch in batches),
        initial=sum(batch.ids.numel() for batch in batches if batch.done <= first),
        unit="tok",
        unit_scale=True,
        desc="calibrating",
        disable=state.processes.hides_progress,
    ) as bar:
        saves = {batch.done for batch in batches[every - 1 : -1 : every]}

        def after_batch(batch: Batch) -> None:
            bar.update(batch.ids.numel())
            if batch.done in saves:
                state.save(collector, {"samples_done": batch.done})

        return collect_moments(model, batches, collector=collector, first=first, after_batch=after_batch)
