# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a served benchmark go: experts hit per decode step, and how much of their width is left.

Counted outside the servers, whose speed it must not touch: transformers runs the same weights on the same prompts, as
many at once, and samples the next tokens at temperature 1.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.workload import Workload, random_prompts, vocabulary
from heapr_vllm.evaluation.perplexity import counted_routes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.models.pruned import applied, opened

PROMPT_TOKENS, STEPS = 128, 16  # at most


class Routing(NamedTuple):
    """`experts_hit`: distinct experts per layer and decode step; `tokens`: prefix to routes per expert [E].

    `source`: "counted", or "assumed uniform", where `tokens` is empty.
    """

    experts_hit: float
    tokens: dict[str, torch.Tensor]
    source: str

    def kept(self, masks: NeuronMasks | None) -> float:
        """Fraction of the executed neurons that `masks` leaves."""
        if masks is None:
            return 1.0
        return 1 - (masks.executed_reduction(self.tokens) if self.tokens else masks.sparsity)


def counted(dense: Path, masks: Iterable[NeuronMasks | None], workload: Workload, device: str) -> list[Routing]:
    """Routing of `dense` under `workload`, with the neurons switched off that each of `masks` prunes."""
    ids = torch.tensor(random_prompts(workload, vocabulary(dense), seed=0))[: workload.concurrency, :PROMPT_TOKENS]
    found = []
    with opened(Checkpoint(dense), "auto", device) as (model, _):
        for mask in masks:
            with applied(mask, model) if mask else nullcontext():
                found.append(_decode(model, ids.to(device)))
    return found


@torch.no_grad()
def _decode(model: PreTrainedModel, ids: torch.Tensor) -> Routing:
    """Prefill of the prompts `ids` [sequences, tokens], then STEPS tokens each."""
    generator = torch.Generator(model.device).manual_seed(0)
    cache, hits = None, []
    with counted_routes(model.eval()) as tokens:
        for _ in range(1 + STEPS):
            before = {prefix: count.clone() for prefix, count in tokens.items()}
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1].float().softmax(-1).multinomial(1, generator=generator)
            hits.append(sum(int((tokens[prefix] > count).sum()) for prefix, count in before.items()) / len(tokens))
    return Routing(sum(hits[1:]) / STEPS, tokens, "counted")


def uniform(dense: Path, sequences: int) -> Routing:
    """What to expect of `sequences` tokens whose experts are uniformly random."""
    config = Checkpoint(dense).config
    num_experts = config.get("num_experts") or config["n_routed_experts"]
    missed = (1 - config["num_experts_per_tok"] / num_experts) ** sequences
    return Routing(num_experts * (1 - missed), {}, "assumed uniform")
