# SPDX-License-Identifier: Apache-2.0
"""A causal language model with one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.models.experts import StackedExperts, expert_modules
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.module_weights import ModuleWeights, empty_model
from heapr_vllm.prune.text.batches import Batch, summed_loss

HEAD_TOKENS = 1024  # tokens whose logits exist at a time


class LayeredModel:
    """Runs embedding, decoder layers and head one after the other, each with its own weights only.

    The model's own forward decides masks, positions and whatever else a layer gets: it runs with stand-ins for the
    layers that note their arguments. Hidden states are [B, L, H] in the model's dtype.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "auto", device: str = "cpu") -> None:
        """Raises HeaprError if the model cannot be built or its decoder layers cannot be found, or for "auto"."""
        if device == "auto":
            raise HeaprError("--stream runs one layer at a time on one device; use --device cuda or cpu")
        self.device = torch.device(device)
        self.model: PreTrainedModel = empty_model(checkpoint, dtype)
        for buffer in self.model.buffers():
            buffer.data = buffer.to(self.device)
        layers = getattr(self.model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise HeaprError(f"{type(self.model).__name__} has no list of decoder layers; calibrate without --stream")
        self.layers: list[nn.Module] = list(layers)
        names = {module: name for name, module in self.model.named_modules()}
        self.layer_names = [names[layer] for layer in self.layers]
        self.embedding_name = names[self.model.get_input_embeddings()]
        self.head_name = names[self.model.get_output_embeddings()]
        self.weights = ModuleWeights(checkpoint, self.model, self.device)
        large = tuple(f"{name}." for name in (*self.layer_names, self.embedding_name, self.head_name))
        for name in {name.rpartition(".")[0] for name in self.model.state_dict() if not name.startswith(large)}:
            self.weights.load(name)
        self._experts = expert_modules(self.model)
        self._arguments: tuple[Batch, list[dict[str, Any]]] | None = None

    @property
    def first_moe_layer(self) -> int:
        """Index of the lowest layer with routed experts."""
        return next(index for index, layer in enumerate(self.layers) if self.experts_of(layer))

    def experts_of(self, layer: nn.Module) -> dict[str, StackedExperts]:
        """Returns the part of `expert_modules` that lies inside a decoder layer."""
        inside = set(layer.modules())
        return {prefix: module for prefix, module in self._experts.items() if module in inside}

    @contextmanager
    def layer(self, index: int) -> Generator[Callable[[torch.Tensor, Batch], torch.Tensor]]:
        """Yields layer `index` as a function of its input for a batch, with its weights in memory."""
        with self.weights.resident(self.layer_names[index]):
            yield lambda hidden, batch: self.layers[index](hidden, **self._layer_arguments(hidden, batch)[index])

    def embedding(self) -> AbstractContextManager[None]:
        """Keeps the embedding in memory for `embed`."""
        return self.weights.resident(self.embedding_name)

    def head(self) -> AbstractContextManager[None]:
        """Keeps the output projection in memory for `loss`."""
        return self.weights.resident(self.head_name)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Computes the first layer's input."""
        inputs: list[torch.Tensor] = []
        self._record(lambda index, hidden, arguments: inputs.append(hidden), **batch.inputs(self.device))
        return inputs[0]

    def loss(self, hidden: torch.Tensor, batch: Batch) -> tuple[float, torch.Tensor]:
        """Sums the cross entropies that count; also the gradient at the last layer's output `hidden`.

        Logits are made for a few positions at a time: the loss is a sum over them.
        """
        gradient, total = torch.zeros_like(hidden), 0.0
        targets = batch.labels.to(self.device)[:, 1:]
        positions = max(1, HEAD_TOKENS // len(targets))
        for start in range(0, targets.shape[1], positions):
            wanted = targets[:, start : start + positions]
            part = hidden[:, start : start + wanted.shape[1]].detach().requires_grad_()
            loss = summed_loss(self._logits(part), wanted)
            loss.backward()
            assert part.grad is not None, "backward has run"
            gradient[:, start : start + wanted.shape[1]] = part.grad
            total += loss.item()
        return total, gradient

    @torch.no_grad()
    def forward(
        self,
        batches: list[Batch],
        store: ActivationStore,
        *,
        keep_from: int = 0,
        after_steps: Callable[[int], None] | None = None,
    ) -> None:
        """Leaves every layer's input for every batch in `store`, the last layer's output as input n.

        What the store already holds is not computed again; inputs of layers below `keep_from` go when they are not
        needed any more. `after_steps(n)` is called when n more steps of one batch in one layer are done.
        """
        steps = after_steps or (lambda _: None)
        done = store.last_complete("input", len(self.layers), len(batches))
        steps((done + 1) * len(batches))
        if done < 0:
            with self.embedding():
                for number, batch in enumerate(batches):
                    if not store.has("input", 0, number):
                        store.save("input", 0, number, self.embed(batch))
                    steps(1)
        for index in range(max(done, 0), len(self.layers)):
            with self.layer(index) as layer:
                for number, batch in enumerate(batches):
                    if not store.has("input", index + 1, number):
                        hidden = store.load("input", index, number, self.device)
                        store.save("input", index + 1, number, layer(hidden, batch))
                    steps(1)
            if index < keep_from:
                store.drop("input", index)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._stand_ins(lambda index, *_, **__: hidden):
            return self.model(inputs_embeds=hidden, use_cache=False).logits

    def _layer_arguments(self, hidden: torch.Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Finds what the model passes to each layer beside the hidden state of a batch; its values do not matter.

        What was found last is kept for batches that look the same.
        """
        if self._arguments is None or not self._arguments[0].looks_like(batch):
            found: list[dict[str, Any]] = []
            inputs = batch.inputs(self.device) | {"inputs_embeds": torch.zeros_like(hidden)}
            del inputs["input_ids"]
            self._record(lambda index, _, arguments: found.append(arguments), **inputs)
            self._arguments = batch, found
        return self._arguments[1]

    @torch.no_grad()
    def _record(self, note: Callable[[int, torch.Tensor, dict[str, Any]], None], **inputs: torch.Tensor) -> None:
        def stand_in(index: int, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
            note(index, hidden, arguments)
            return hidden

        with self._stand_ins(stand_in):
            self.model.get_decoder()(**inputs, use_cache=False)

    @contextmanager
    def _stand_ins(self, forward: Callable[..., torch.Tensor]) -> Generator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = partial(forward, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
