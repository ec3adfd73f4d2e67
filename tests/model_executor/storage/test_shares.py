# SPDX-License-Identifier: Apache-2.0
"""Shares of tensor-parallel ranks, placement of experts on expert-parallel ones."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from heapr_vllm.model_executor.storage.shares import expert_parallel_ranks, tensor_parallel_shares

WIDTHS = st.lists(st.integers(0, 130), min_size=1, max_size=12)


@given(widths=WIDTHS, tp_size=st.integers(1, 8), unit=st.sampled_from([1, 16]))
def test_shares_partition_every_expert_and_balance_the_ranks(widths: list[int], tp_size: int, unit: int) -> None:
    ranks = [tensor_parallel_shares(widths, tp_size, rank, unit) for rank in range(tp_size)]
    for expert, width in enumerate(widths):
        covered = [neuron for rank in ranks for neuron in range(*rank[expert])]
        assert covered == list(range(width))
        assert all((stop - start) % unit == 0 or stop == width for start, stop in (rank[expert] for rank in ranks))
    totals = [sum(-(-(stop - start) // unit) for start, stop in rank) for rank in ranks]
    assert max(totals) - min(totals) <= 1


@given(widths=WIDTHS, ep_size=st.integers(1, 8), data=st.data())
def test_expert_placement_is_at_least_as_even_as_chance(widths: list[int], ep_size: int, data: st.DataObject) -> None:
    """Sum over ranks of squared neurons and work: a random placement's mean bounds what dealing one by one can do."""
    tokens = data.draw(st.none() | st.lists(st.integers(0, 1000), min_size=len(widths), max_size=len(widths)))
    ranks = expert_parallel_ranks(widths, tokens, ep_size)
    assert len(ranks) == len(widths) and set(ranks) <= set(range(ep_size))
    found = by_chance = 0.0
    for values in (widths, [width * count for width, count in zip(widths, tokens or [0] * len(widths), strict=True)]):
        total, squares = max(sum(values), 1), sum(value**2 for value in values)
        found += sum(held**2 for held in _per_rank(values, ranks, ep_size)) / total**2
        by_chance += (squares + (sum(values) ** 2 - squares) / ep_size) / total**2
    assert found <= by_chance + 1e-9


@given(widths=WIDTHS, ep_size=st.integers(1, 8))
def test_expert_placement_balances_neurons(widths: list[int], ep_size: int) -> None:
    totals = _per_rank(widths, expert_parallel_ranks(widths, None, ep_size), ep_size)
    assert max(totals) - min(totals) <= max(widths)


def test_expert_placement_of_equal_widths_is_even() -> None:
    assert sorted(expert_parallel_ranks([7] * 8, None, 4)) == sorted([0, 1, 2, 3] * 2)
    assert sorted(expert_parallel_ranks([0] * 4, [5, 0, 1, 2], 2)) == [0, 0, 1, 1]


def test_expert_placement_balances_neurons_and_work() -> None:
    generator = Random(3)
    widths = [16 * generator.randint(2, 48) for _ in range(128)]
    tokens = [int(1e5 / (1 + expert) ** 0.3) for expert in range(128)]
    generator.shuffle(tokens)
    work = [width * count for width, count in zip(widths, tokens, strict=True)]
    by_neurons = _per_rank(work, expert_parallel_ranks(widths, None, 8), 8)
    ranks = expert_parallel_ranks(widths, tokens, 8)
    assert max(by_neurons) > 1.2 * sum(work) / 8, "otherwise the work needs no balancing"
    assert max(_per_rank(work, ranks, 8)) < 1.1 * sum(work) / 8
    assert max(_per_rank(widths, ranks, 8)) < 1.02 * sum(widths) / 8


def _per_rank(values: list[int], ranks: list[int], ep_size: int) -> list[int]:
    return [sum(value for value, rank in zip(values, ranks, strict=True) if rank == r) for r in range(ep_size)]
