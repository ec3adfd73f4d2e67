# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a transformers model on token blocks."""

import math

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token cross entropy over `blocks` int64 [N, L]; every block is its own context."""
    model.eval()
    nll = 0.0
    for ids in blocks.split(batch_size):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nll / (blocks.shape[0] * (blocks.shape[1] - 1)))
