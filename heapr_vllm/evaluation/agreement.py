# SPDX-License-Identifier: Apache-2.0
"""How far a model's next-token predictions are from the baseline's on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from heapr_vllm.evaluation.predictions import Predictions
from heapr_vllm.evaluation.statistics import ratio_interval, wilson
from heapr_vllm.formats.evaluation_record import Agreement

LOWEST = -100.0  # log-probabilities below count as this one, so that 0 log 0 is 0
LEAST_REST = 1e-9  # fp32 does not tell smaller probabilities of all other tokens from 0


def divergence(teacher: Predictions, student: Predictions) -> torch.Tensor:
    """Computes KL(teacher || student) in nats at every place, fp64 [T].

    Tokens that both give a log-probability count one by one, all others together as one more: this never exceeds the
    divergence over the whole vocabulary, and equals it if all tokens are given.
    """
    ordered, order = student.tokens.sort(dim=1)
    place = torch.searchsorted(ordered, teacher.tokens).clamp(max=ordered.shape[1] - 1)
    common = ordered.gather(1, place) == teacher.tokens
    p = teacher.logprobs.double().clamp(min=LOWEST)
    q = student.logprobs.gather(1, order.gather(1, place)).double().clamp(min=LOWEST)
    inside = (p.exp() * (p - q) * common).sum(1)
    p_rest = 1 - (p.exp() * common).sum(1)
    q_rest = 1 - (q.exp() * common).sum(1)
    p_rest, q_rest = p_rest.clamp(min=LEAST_REST), q_rest.clamp(min=LEAST_REST)
    return inside + p_rest * (p_rest / q_rest).log()


def agreement(against: str, teachers: Iterable[Predictions], students: Iterable[Predictions], top_k: int) -> Agreement:
    """Compares predictions over the same samples, in the same order."""
    sums: list[float] = []
    counts: list[int] = []
    same = 0
    for teacher, student in zip(teachers, students, strict=True):
        sums.append(divergence(teacher, student).sum().item())
        counts.append(len(teacher.top))
        same += int((teacher.top == student.top).sum())
    tokens = sum(counts)
    top1_low, top1_high = wilson(same, tokens)
    kl_low, kl_high = ratio_interval(sums, counts) or (None, None)
    return Agreement(
        against=against,
        kl_divergence=math.fsum(sums) / tokens,
        kl_low=kl_low,
        kl_high=kl_high,
        top1=same / tokens,
        top1_low=top1_low,
        top1_high=top1_high,
        tokens=tokens,
        top_k=top_k,
    )
