# SPDX-License-Identifier: Apache-2.0
"""Rows of experts in storage."""

from hypothesis import given
from hypothesis import strategies as st

from heapr_vllm.model_executor.kernels.cpu_native import bucketed
from heapr_vllm.model_executor.storage.layout import RaggedLayout

WIDTHS = st.lists(st.integers(0, 130), min_size=1, max_size=12)


@given(widths=WIDTHS, unit=st.sampled_from([1, 16, 32]), max_buckets=st.integers(1, 5))
def test_layout_is_a_partition_of_the_rows(widths: list[int], unit: int, max_buckets: int) -> None:
    stored = bucketed(widths, unit, max_buckets)
    layout = RaggedLayout.build(widths, stored)
    assert all(width <= size and size % unit == 0 for width, size in zip(widths, stored, strict=True))
    assert len(layout.buckets) <= max_buckets
    covered = []
    for expert, slot in enumerate(layout.slots):
        assert (slot == layout.num_slots) == (stored[expert] == 0)
        if slot < layout.num_slots:
            row, size = layout.place(expert)
            assert size == stored[expert]
            covered += range(row, row + size)
    assert sorted(covered) == list(range(layout.num_rows))
    placed = sorted(slot for slot in layout.slots if slot < layout.num_slots)
    assert placed == list(range(len(placed)))
    assert [b.width for b in layout.buckets] == sorted({b.width for b in layout.buckets}, reverse=True)
