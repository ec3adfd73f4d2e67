# SPDX-License-Identifier: Apache-2.0
"""Intervals and paired tests of what was right and what was wrong."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError

CONFIDENCE = 0.95


def _binomtest(successes: int, trials: int) -> Any:
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise HeaprError(f"comparing models needs scipy: {install_command('eval')}") from error
    return binomtest(successes, trials)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Computes the 95 % Wilson interval of a proportion."""
    low, high = _binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def mcnemar(ours: list[bool], theirs: list[bool]) -> float:
    """Computes the exact two-sided p of McNemar's test: are those that only one got right split evenly?"""
    discordant = [one for one, other in zip(ours, theirs, strict=True) if one != other]
    return float(_binomtest(sum(discordant), len(discordant)).pvalue) if discordant else 1.0


def ratio_interval(sums: list[float], counts: list[int]) -> tuple[float, float] | None:
    """Computes the 95 % interval of sum(sums) / sum(counts) from how samples differ; None if there is one sample."""
    if len(sums) < 2:
        return None
    mean = math.fsum(sums) / sum(counts)
    squares = math.fsum((each - mean * count) ** 2 for each, count in zip(sums, counts, strict=True))
    error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return mean - reach, mean + reach
