# SPDX-License-Identifier: Apache-2.0
"""Perplexity and routing of a transformers model on token samples."""

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from heapr_vllm.prune.models.experts import expert_modules


@torch.no_grad()
def perplexity(model: PreTrainedModel, samples: torch.Tensor, batch_size: int = 8) -> float:
    """Computes exp of the mean next-token cross entropy over `samples` int64 [N, L], each its own context."""
    model.eval()
    nll = 0.0
    for ids in samples.split(batch_size):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nll / (samples.shape[0] * (samples.shape[1] - 1)))


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
