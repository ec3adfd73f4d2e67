# SPDX-License-Identifier: Apache-2.0
"""Which neurons and which experts a rank holds. Pure Python, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence


def tensor_parallel_shares(widths: Sequence[int], tp_size: int, tp_rank: int, unit: int) -> list[tuple[int, int]]:
    """[start, stop) of this rank's share of every expert's kept neurons.

    A share is a run of whole units of `unit` neurons (the last one may be cut short). Units are dealt to the ranks
    round robin and the deal goes on from expert to expert, so totals differ by at most one unit. Any split is exact:
    an expert's output is a sum over its neurons.
    """
    shares, dealt = [], 0
    for width in widths:
        units = -(-width // unit)
        counts = [len(range((rank - dealt) % tp_size, units, tp_size)) for rank in range(tp_size)]
        start = sum(counts[:tp_rank])
        shares.append((min(start * unit, width), min((start + counts[tp_rank]) * unit, width)))
        dealt += units
    return shares


def expert_parallel_ranks(widths: Sequence[int], tokens: Sequence[int] | None, ep_size: int) -> list[int]:
    """Rank that holds each expert, so that ranks hold about as many neurons and have about as much to do.

    `tokens`: how often each expert was routed to while calibrating; None if unknown. An expert weighs two fractions of
    its layer, of the neurons and of the work (tokens x neurons). Dealt heaviest first, each goes where it adds least to
    the sum over ranks of both totals squared, then to the fewest experts. All ranks come to the same result.
    """
    neurons = _fractions(widths)
    work = _fractions([width * count for width, count in zip(widths, tokens or [0] * len(widths), strict=True)])
    neurons_held, work_held, experts_held = [0.0] * ep_size, [0.0] * ep_size, [0] * ep_size
    ranks = [0] * len(widths)
    for expert in sorted(range(len(widths)), key=lambda e: -(neurons[e] ** 2 + work[e] ** 2)):
        added = [
            (neurons[expert] * neurons_held[r] + work[expert] * work_held[r], experts_held[r], r)
            for r in range(ep_size)
        ]
        _, _, rank = min(added)
        ranks[expert] = rank
        neurons_held[rank] += neurons[expert]
        work_held[rank] += work[expert]
        experts_held[rank] += 1
    return ranks


def _fractions(values: Sequence[int]) -> list[float]:
    total = max(sum(values), 1)
    return [value / total for value in values]
