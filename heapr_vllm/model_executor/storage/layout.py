# SPDX-License-Identifier: Apache-2.0
"""Where the neurons of variable-width experts lie in two flat parameters. Pure Python, no vLLM.

Both parameters have neurons as rows: w13 [2 * rows, H] holds, expert after expert, a gate block and an up block of the
expert's stored width; w2 [rows, H] holds down_proj transposed. The stored width is the kept width plus zero rows.
Experts of equal stored width form a bucket, a contiguous stretch that a uniform-width kernel can run in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
        return [
            (bucket.row + i * bucket.width, bucket.width) for bucket in self.buckets for i in range(bucket.num_slots)
        ]

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


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
