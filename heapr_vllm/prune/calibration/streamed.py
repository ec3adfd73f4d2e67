# SPDX-License-Identifier: Apache-2.0
"""Calibration of a model larger than memory: the same moments with one decoder layer in memory at a time.

Forward, the input of every layer goes to disk; at the head the loss gives the gradient of the last layer's output;
backward, every layer runs again from its input and turns the gradient of its output into that of its input. This is
gradient checkpointing per layer, as in `collect_moments`, with all samples going through a layer before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.progress import progress
from heapr_vllm.prune.calibration.collector import check_experts
from heapr_vllm.prune.calibration.mix_collector import MixCollector
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.calibration.saved_state import SavedState
from heapr_vllm.prune.calibration.settings import CalibrationSettings, check_finite
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.layered import LayeredModel
from heapr_vllm.prune.text.batches import Batch, as_batches, token_counts
from heapr_vllm.prune.text.samples import Samples


@dataclass(frozen=True)
class BackwardPosition:
    """Sums are complete for the layers above `layer`, and there for the first `batches` batches."""

    layer: int
    batches: int


def calibrate_streamed(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    batches: list[Batch],
    device: str,
    state: SavedState,
    partial: NeuronMoments | None,
    every: int,
) -> NeuronMoments:
    """Does `heapr calibrate --stream`, between reading the text and writing the result.

    Hidden states and gradients are on disk; the sums are saved every `every` batches of the backward pass and after
    each of its layers, and come back as `partial` when the run is resumed.
    """
    model = LayeredModel(checkpoint, settings.dtype, device)
    collector = MixCollector(model.model, state.names, model.device)
    check_experts(checkpoint, collector.first)
    position = None
    if partial is None:
        state.save(collector, {})
    else:
        collector.restore(partial)
        if "layer" in partial.metadata:
            position = BackwardPosition(partial.metadata["layer"], partial.metadata["batches"])
    first = 0 if position is None else num_steps(model, len(batches), position)
    with progress(
        total=num_steps(model, len(batches)),
        initial=first,
        unit="step",
        desc="streaming layers",
        disable=state.processes.hides_progress,
    ) as bar:

        def save_position(position: BackwardPosition) -> None:
            if position.batches % every == 0:
                state.save(collector, asdict(position))

        return collect_moments_streamed(
            model,
            batches,
            ActivationStore(state.stream_folder),
            collector=collector,
            position=position,
            save=save_position,
            after_steps=bar.update,
        )


def num_steps(model: LayeredModel, batches: int, position: BackwardPosition | None = None) -> int:
    """Counts the steps until `position`, by default of a whole run.

    One per batch for the embedding, the head, every layer forward, and every layer backward down to the lowest with
    experts.
    """
    layers = len(model.layers)
    position = position or BackwardPosition(model.first_moe_layer - 1, 0)
    return batches * (layers + 2 + layers - 1 - position.layer) + position.batches


def collect_moments_streamed(
    model: LayeredModel,
    samples: torch.Tensor | Samples | list[Batch],
    store: ActivationStore,
    batch_size: int = 1,
    *,
    collector: MixCollector | None = None,
    position: BackwardPosition | None = None,
    save: Callable[[BackwardPosition], None] | None = None,
    after_steps: Callable[[int], None] | None = None,
) -> NeuronMoments:
    """Does `collect_moments` for a `LayeredModel`.

    Continues from what `store` holds; once the backward pass has begun, `collector` and `position` say how far it got.
    `save(position)` is called whenever both could be saved, and `after_steps(n)` after n more steps of `num_steps`.
    Raises HeaprError if the loss is not finite.
    """
    batches, top, bottom = as_batches(samples, batch_size), len(model.layers), model.first_moe_layer
    collector = collector or MixCollector.numbered(model.model, batches, model.device)
    save, steps = save or (lambda _: None), after_steps or (lambda _: None)
    if position is None:
        position = BackwardPosition(top - 1, 0)
        if store.complete("gradient", top, len(batches)):
            steps(num_steps(model, len(batches), position))
        else:
            with collector.attached():  # counts on the way back only, so any source will do
                model.forward(batches, store, keep_from=bottom, after_steps=steps)
                _head(model, batches, store, steps)
        store.drop("input", top)
    for layer in range(position.layer, bottom - 1, -1):
        first = position.batches if layer == position.layer else 0
        _backward(model, layer, batches, first, collector, store, save, steps, keep_gradient=layer > bottom)
        save(BackwardPosition(layer - 1, 0))
        store.drop("input", layer)
        store.drop("gradient", layer + 1)
    collector.check_reached(batches)
    return collector.moments(token_counts(batches))


def _head(model: LayeredModel, batches: list[Batch], store: ActivationStore, steps: Callable[[int], None]) -> None:
    top = len(model.layers)
    with model.head():
        for number, batch in enumerate(batches):
            if not store.has("gradient", top, number):
                loss, gradient = model.loss(store.load("input", top, number, model.device), batch)
                check_finite(loss, batch.first)
                store.save("gradient", top, number, gradient)
            steps(1)


def _backward(
    model: LayeredModel,
    layer: int,
    batches: list[Batch],
    first: int,
    collector: MixCollector,
    store: ActivationStore,
    save: Callable[[BackwardPosition], None],
    steps: Callable[[int], None],
    *,
    keep_gradient: bool,
) -> None:
    with model.layer(layer) as run:
        for number in range(first, len(batches)):
            hidden = store.load("input", layer, number, model.device).requires_grad_()
            with collector.attached(batches[number].source):
                run(hidden, batches[number]).backward(store.load("gradient", layer + 1, number, model.device))
            if keep_gradient:
                assert hidden.grad is not None, "backward has run"
                store.save("gradient", layer, number, hidden.grad)
            save(BackwardPosition(layer, number + 1))
            steps(1)
