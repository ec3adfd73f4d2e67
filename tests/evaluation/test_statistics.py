# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests against numbers worked out by hand."""

import sys

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.statistics import mcnemar, ratio_interval, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (81, 263), (500, 500)])
def test_wilson_solves_its_equation(successes: int, trials: int) -> None:
    """Its ends are the p at which the observed proportion is 1.96 standard errors away."""
    share = successes / trials
    for end in wilson(successes, trials):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, rel=1e-5, abs=1e-12)


def test_mcnemar_counts_discordant_pairs_only() -> None:
    ours = [True] * 50 + [True] * 2 + [False] * 10 + [False] * 5
    theirs = [True] * 50 + [False] * 2 + [True] * 10 + [False] * 5
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(ours, ours) == 1


def test_interval_of_a_mean_over_samples() -> None:
    assert ratio_interval([2.0, 2.0], [1, 1]) == (2, 2)
    low, high = ratio_interval([1.0, 2.0, 3.0], [1, 1, 1])
    assert (low + high) / 2 == pytest.approx(2) and high - low == pytest.approx(2 * 1.959964 / 3**0.5)
    assert ratio_interval([10.0, 40.0], [10, 40]) == pytest.approx((1, 1))  # long samples weigh more
    assert ratio_interval([1.0], [3]) is None


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(HeaprError, match=r"needs scipy: pip install .+\[eval\]"):
        wilson(1, 2)
