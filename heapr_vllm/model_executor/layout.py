# SPDX-License-Identifier: Apache-2.0
"""Where the neurons of variable-width experts lie in two flat parameters. Pure Python, no vLLM.

Both parameters have neurons as rows: w13 [2 * rows, H] holds, expert after expert, a gate block and an up block of the
expert's stored width; w2 [rows, H] holds down_proj transposed. The stored width is the kept width plus zero rows.
Experts of equal stored width form a bucket, a contiguous stretch that a uniform-width kernel can run in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRITON_UNIT = 64  # the Triton kernels store widths in steps of it; also the slab of their w2

@dataclass(frozen=True)
class Bucket:
    """`num_slots` experts of stored `width`, the first in slot `first_slot` and at `row`."""

    first_slot: int
    num_slots: int
    width: int
    row: int


@dataclass(frozen=True)
class RaggedLayout:
    """Storage of one layer's local experts.

    `widths`: kept neurons per local expert. `slots`: position of each local expert in storage, `num_slots` if it has
    none because its stored width is 0.
    """

    widths: tuple[int, ...]
    slots: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @property
    def num_rows(self) -> int:
        """Stored neurons, padding included."""
        return sum(bucket.num_slots * bucket.width for bucket in self.buckets)

    @property
    def num_slots(self) -> int:
        return sum(bucket.num_slots for bucket in self.buckets)

    @property
    def max_width(self) -> int:
        """Widest stored width."""
        return max((bucket.width for bucket in self.buckets), default=0)

    @property
    def is_uniform(self) -> bool:
        """Whether all experts are stored at one width, in order."""
        return len(self.buckets) == 1 and self.slots == tuple(range(len(self.widths)))

    def place(self, expert: int) -> tuple[int, int]:
        """(first row, stored width) of a stored local expert."""
        return self.expert_table()[self.slots[expert]]

    def expert_table(self) -> list[tuple[int, int]]:
        """(first row, stored width) by slot."""
        return [(bucket.row + i * bucket.width, bucket.width) for bucket in self.buckets
                for i in range(bucket.num_slots)]

    def bucket_table(self) -> list[tuple[int, int, int, int]]:
        """(first slot, number of slots, stored width, first row) by bucket."""
        return [(bucket.first_slot, bucket.num_slots, bucket.width, bucket.row) for bucket in self.buckets]

    @classmethod
    def build(cls, widths: Sequence[int], stored_widths: Sequence[int]) -> RaggedLayout:
        """Experts sorted widest first into buckets of equal stored width; stored width 0 takes no slot."""
        order = sorted((e for e in range(len(widths)) if stored_widths[e]), key=lambda e: (-stored_widths[e], e))
        slots = [len(order)] * len(widths)
        buckets: list[Bucket] = []
        row = 0
        for slot, expert in enumerate(order):
            slots[expert] = slot
            width = stored_widths[expert]
            if buckets and buckets[-1].width == width:
                last = buckets.pop()
                buckets.append(Bucket(last.first_slot, last.num_slots + 1, width, last.row))
            else:
                buckets.append(Bucket(slot, 1, width, row))
            row += width
        return cls(tuple(widths), tuple(slots), tuple(buckets))


def bucketed(widths: Sequence[int], unit: int, max_buckets: int) -> list[int]:
    """Stored width per expert: the cheapest rounding up to at most `max_buckets` sizes, all multiples of `unit`.

    Minimises the total by dynamic programming over the distinct widths. Width 0 stays 0, except that a single bucket
    takes every expert, which spares the caller from sorting tokens.
    """
    if max_buckets == 1:
        return [round_up(max(widths), unit)] * len(widths)
    padded = [round_up(width, unit) for width in widths]
    sizes = sorted(set(padded) - {0})
    counts = [padded.count(size) for size in sizes]
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [(-1, ())] * len(sizes)
    for _ in range(max_buckets):
        grown = list(best)
        for end in range(1, len(sizes) + 1):
            for start in range(end):
                if best[start][0] < 0:
                    continue
                cost = best[start][0] + sizes[end - 1] * sum(counts[start:end])
                if grown[end][0] < 0 or cost < grown[end][0]:
                    grown[end] = (cost, (*best[start][1], sizes[end - 1]))
        best = grown
    bounds = best[-1][1]
    return [0 if not width else next(bound for bound in bounds if width <= bound) for width in padded]


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
        added = [(neurons[expert] * neurons_held[r] + work[expert] * work_held[r], experts_held[r], r)
                 for r in range(ep_size)]
        _, _, rank = min(added)
        ranks[expert] = rank
        neurons_held[rank] += neurons[expert]
        work_held[rank] += work[expert]
        experts_held[rank] += 1
    return ranks


def _fractions(values: Sequence[int]) -> list[float]:
    total = max(sum(values), 1)
    return [value / total for value in values]


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
