# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass over calibration text with the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.progress import progress
from heapr_vllm.prune.calibration.collector import MomentCollector, check_experts
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.calibration.saved_state import SavedState
from heapr_vllm.prune.calibration.settings import CalibrationSettings, check_finite
from heapr_vllm.prune.models.loading import load_model


def collect_moments(
    model: PreTrainedModel,
    samples: torch.Tensor,
    batch_size: int = 1,
    *,
    collector: MomentCollector | None = None,
    first: int = 0,
    after_batch: Callable[[int], None] | None = None,
) -> NeuronMoments:
    """Runs `model` over token `samples` int64 [N, L] and returns the moments; weights get no gradient.

    The loss is the sum of next-token cross entropies, so the result does not depend on `batch_size`. `collector` and
    `first` continue an interrupted run; `after_batch(n)` is called when n samples are done. Raises HeaprError if the
    loss is not finite, or if tokens do not reach the experts.
    """
    collector = collector or MomentCollector(model)
    with collector.attached(), _backward_only_to_activations(model):
        for start in range(first, len(samples), batch_size):
            ids = samples[start : start + batch_size].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            check_finite(loss.item(), start)
            loss.backward()
            if after_batch is not None:
                after_batch(start + len(ids))
    collector.check_reached()
    return collector.moments({"num_calibration_samples": len(samples), "max_seq_length": samples.shape[1]})


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
    samples: torch.Tensor,
    device: str,
    state: SavedState,
    partial: NeuronMoments | None,
    every: int,
) -> NeuronMoments:
    """Does `heapr calibrate` without `--stream`, between reading the text and writing the result."""
    model = load_model(checkpoint, settings.dtype, device)
    collector = MomentCollector(model)
    check_experts(checkpoint, collector)
    first = 0
    if partial is not None:
        collector.restore(partial)
        first = partial.metadata["samples_done"]
    with progress(
        total=samples.numel(),
        initial=first * settings.max_seq_length,
        unit="tok",
        unit_scale=True,
        desc="calibrating",
        disable=state.processes.hides_progress,
    ) as bar:

        def after_batch(done: int) -> None:
            bar.update(settings.batch_size * settings.max_seq_length)
            if done < len(samples) and done // settings.batch_size % every == 0:
                state.save(collector, {"samples_done": done})

        return collect_moments(
            model, samples, settings.batch_size, collector=collector, first=first, after_batch=after_batch
        )
