# SPDX-License-Identifier: Apache-2.0
"""Perplexity and routing of a transformers model on token samples."""

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from heapr_vllm.prune.models.experts import expert_modules


def perplexity(model: PreTrainedModel, samples: torch.Tensor, batch_size: int = 8) -> float:
    """Computes exp of the mean next-token cross entropy over `samples` int64 [N, L], each its own context."""
    nll = sum(
        F.cross_entropy(logits, following, reduction="sum").item()
        for logits, following in next_token_logits(model, samples, batch_size)
    )
    return math.exp(nll / (samples.shape[0] * (samples.shape[1] - 1)))


def next_token_logits(
    model: PreTrainedModel, samples: torch.Tensor, batch_size: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields logits fp32 [L-1, V] and the tokens that follow, int64 [L-1], of one sample after the other."""
    model.eval()
    for ids in samples.split(batch_size):
        ids = ids.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        for each, sample in zip(logits, ids, strict=True):
            yield each[:-1].float(), sample[1:]


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
