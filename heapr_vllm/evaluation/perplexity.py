# SPDX-License-Identifier: Apache-2.0
"""Perplexity and routing of a transformers model on token samples."""

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.text.batches import as_batches, token_counts
from heapr_vllm.prune.text.samples import Samples


@torch.no_grad()
def perplexity(model: PreTrainedModel, samples: torch.Tensor | Samples, batch_size: int = 8) -> float:
    """Computes exp of the mean next-token cross entropy over `samples`, or token ids [N, L], each its own context."""
    model.eval()
    batches = as_batches(samples, batch_size)
    nll = sum(batch.loss(model(**batch.inputs(model.device), use_cache=False).logits).item() for batch in batches)
    return math.exp(nll / token_counts(batches)["loss_tokens"])


@contextmanager
def counted_routes(model: PreTrainedModel) -> Generator[dict[str, torch.Tensor]]:
    """Yields prefix -> int64 [E]: tokens routed to each expert by the forward passes inside the block."""
    modules = expert_modules(model)
    tokens = {prefix: torch.zeros(len(module.down_proj), dtype=torch.int64) for prefix, module in modules.items()}

    def counter(prefix: str):
        def count(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            top_k_index = arguments[1]  # of Transformers' experts interface: hidden states, indices, weights
            tokens[prefix] += top_k_index.flatten().bincount(minlength=len(tokens[prefix])).cpu()

        return count

    hooks = [module.register_forward_pre_hook(counter(prefix)) for prefix, module in modules.items()]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()
