# SPDX-License-Identifier: Apache-2.0
"""Width buckets of vLLM's native op."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
from heapr_vllm.model_executor.kernels.cpu_native import bucketed


@settings(deadline=None)
@given(widths=st.lists(st.integers(0, 12), min_size=1, max_size=7), max_buckets=st.integers(2, 4))
def test_buckets_are_the_cheapest(widths: list[int], max_buckets: int) -> None:
    sizes = sorted(set(widths) - {0})
    if not sizes:
        assert bucketed(widths, 1, max_buckets) == widths
        return
    choices = [set(c) | {sizes[-1]} for c in combinations_with_replacement(sizes, max_buckets - 1)]
    cheapest = min(sum(min(b for b in bounds if b >= width) for width in widths if width) for bounds in choices)
    assert sum(bucketed(widths, 1, max_buckets)) == cheapest
