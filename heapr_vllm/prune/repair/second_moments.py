# SPDX-License-Identifier: Apache-2.0
"""Second moments of expert activations: what a closed-form refit of down_proj needs.

For an expert with SwiGLU product h [I] and router weight p, the sum over its tokens of p^2 h h^T, float64 [I, I]. The
router weight multiplies the expert's output, so an error of the output counts p^2.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from heapr_vllm.prune.calibration.grouped_product import ROW_MULTIPLE
from heapr_vllm.prune.models.experts import StackedExperts, expert_modules, expert_shapes
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.layered import LayeredModel
from heapr_vllm.prune.text.batches import Batch, as_batches


@dataclass
class SecondMoment:
    """What one expert has added up: `tokens` routed to it, `sums` float64 [I, I]."""

    tokens: int
    sums: torch.Tensor


SecondMoments = dict[str, dict[int, SecondMoment]]  # MoE module prefix, expert


class _AllSeen(Exception):
    """Every watched module has run, so the rest of the forward pass is of no use."""


class SecondMomentCollector:
    """Watches experts of a transformers model run forward, by hooks on their modules while `attached`.

    `experts`: MoE module prefix -> the experts of interest. Works beside any experts implementation, because it
    computes h by itself from what the router hands to the module. `moments` lie on the device of each module.
    """

    def __init__(self, model: PreTrainedModel, experts: dict[str, list[int]]) -> None:
        self.modules = {module: prefix for prefix, module in expert_modules(model).items() if prefix in experts}
        self.moments: SecondMoments = {}
        self.pending: set[StackedExperts] = set()
        for module, prefix in self.modules.items():
            width = module.down_proj.shape[2]
            empty = torch.zeros(width, width, dtype=torch.float64, device=module.down_proj.device)
            self.moments[prefix] = {expert: SecondMoment(0, empty.clone()) for expert in experts[prefix]}

    @contextmanager
    def attached(self) -> Generator[None]:
        hooks = [module.register_forward_pre_hook(self._add) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, model: PreTrainedModel, batch: Batch) -> None:
        """Runs `model` on a batch, no further than the last watched module."""
        self.pending = set(self.modules)
        with suppress(_AllSeen):
            model(**batch.inputs(model.device), use_cache=False)

    def _add(self, module: StackedExperts, arguments: tuple[torch.Tensor, ...]) -> None:
        """Adds tokens `hidden_states` [T, H], routed by `top_k_index` with weights `top_k_weights` [T, top_k]."""
        hidden_states, top_k_index, top_k_weights = arguments
        for expert, moment in self.moments[self.modules[module]].items():
            token, rank = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            padding = (0, 0, 0, -len(token) % ROW_MULTIPLE)
            gate_up = F.linear(F.pad(hidden_states[token], padding), module.gate_up_proj[expert])
            h = module._apply_gate(gate_up).float() * F.pad(top_k_weights[token, rank, None].float(), padding)
            moment.tokens += len(token)
            moment.sums += h.T @ h
        if module in self.pending:
            self.pending.remove(module)
            if not self.pending:
                raise _AllSeen


@torch.no_grad()
def collect_second_moments(
    model: PreTrainedModel,
    samples: torch.Tensor | list[Batch],
    batch_size: int = 1,
    *,
    experts: dict[str, list[int]] | None = None,
    after_batch: Callable[[Batch], None] | None = None,
) -> SecondMoments:
    """Runs `model` forward over `samples`, token ids int64 [N, L] or batches.

    `experts`: which ones, by MoE module prefix; all by default. `after_batch` is called with every batch that is done.
    """
    if experts is None:
        experts = {prefix: list(range(count)) for prefix, (count, _) in expert_shapes(model).items()}
    collector = SecondMomentCollector(model, experts)
    model.eval()
    with collector.attached():
        for batch in as_batches(samples, batch_size):
            collector.run(model, batch)
            if after_batch is not None:
                after_batch(batch)
    return collector.moments


@torch.no_grad()
def stream_second_moments(
    model: LayeredModel,
    batches: list[Batch],
    store: ActivationStore,
    experts: dict[str, list[int]],
    after_batch: Callable[[Batch], None] | None = None,
) -> Iterator[tuple[str, dict[int, SecondMoment], torch.Tensor]]:
    """Yields the same with one decoder layer in memory: MoE module prefix, moments, down_proj [E, H, I] per layer.

    Hidden states of one layer at a time are in `store`. `after_batch` is called with every batch that is done in a
    layer. The weights of an item are there until the next one is asked for.
    """
    with model.embedding():
        for number, batch in enumerate(batches):
            store.save("input", 0, number, model.embed(batch))
    remaining = dict(experts)
    for index, modules in enumerate(map(model.experts_of, model.layers)):
        inside = {prefix: remaining.pop(prefix) for prefix in modules if prefix in experts}
        with model.layer(index) as layer:
            collector = SecondMomentCollector(model.model, inside)
            with collector.attached():
                for number, batch in enumerate(batches):
                    hidden = store.load("input", index, number, model.device)
                    store.save("input", index + 1, number, layer(hidden, batch))
                    if after_batch is not None:
                        after_batch(batch)
            for prefix, moments in collector.moments.items():
                yield prefix, moments, modules[prefix].down_proj
        store.drop("input", index)
        if not remaining:
            return
