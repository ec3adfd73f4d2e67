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
from heapr_vllm.prune.text.batches import IGNORED, as_batches
from heapr_vllm.prune.text.samples import Samples


def perplexity(model: PreTrainedModel, samples: torch.Tensor | Samples, batch_size: int = 8) -> float:
    """Computes exp of the mean next-token cross entropy over `samples`, or token ids [N, L], each its own context."""
    total, places = 0.0, 0
    for logits, following in next_token_logits(model, samples, batch_size):
        total += F.cross_entropy(logits, following, reduction="sum").item()
        places += len(following)
    return math.exp(total / places)


def next_token_logits(
    model: PreTrainedModel, samples: torch.Tensor | Samples, batch_size: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields logits fp32 [T, V] and the T tokens that follow and count, int64 [T], of one sample after the other."""
    model.eval()
    for batch in as_batches(samples, batch_size):
        with torch.no_grad():
            logits = model(**batch.inputs(model.device), use_cache=False).logits
        for each, labels in zip(logits, batch.labels.to(model.device), strict=True):
            places = labels[1:] != IGNORED
            yield each[:-1][places].float(), labels[1:][places]


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
