# SPDX-License-Identifier: Apache-2.0
"""Samples to batches without padding: rows of equal length, each one sample or several that do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from heapr_vllm.prune.text.samples import Sample, Samples

IGNORED = -100  # as a label: of tokens whose prediction does not count


@dataclass(frozen=True)
class Batch:
    """Rows of one source.

    `ids`, `labels`: int64 [B, L], labels IGNORED where nothing counts, as in every first token of a sample.
    `positions`: int64 [B, L], beginning again with every sample, or None if each row is one: transformers tells packed
    samples by them and lets none see another. `first`, `samples`: which samples of all are in it.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    first: int
    samples: int
    source: int

    @property
    def done(self) -> int:
        """Samples up to its end."""
        return self.first + self.samples

    def looks_like(self, other: Batch) -> bool:
        """Tells whether positions and attention are the same."""
        if self.positions is None or other.positions is None:
            return self.positions is other.positions and self.ids.shape == other.ids.shape
        return torch.equal(self.positions, other.positions)

    def inputs(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Makes the arguments of a transformers model."""
        inputs = {"input_ids": self.ids, "position_ids": self.positions}
        return {name: tensor.to(device) for name, tensor in inputs.items() if tensor is not None}

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Sums the cross entropies that count; `logits`: [B, L, vocabulary] of the model."""
        return summed_loss(logits[:, :-1], self.labels[:, 1:].to(logits.device))


def token_counts(batches: list[Batch]) -> dict[str, Any]:
    """Counts all tokens, and those whose prediction counts, as metadata of moments; of several sources also of each."""
    counts: dict[str, Any] = _counted(batches)
    numbers = sorted({batch.source for batch in batches})
    if len(numbers) > 1:
        counts["sources"] = []
        for number in numbers:
            tokens, predictions = _counted([batch for batch in batches if batch.source == number]).values()
            counts["sources"].append({"name": str(number), "tokens": tokens, "predictions": predictions})
    return counts


def _counted(batches: list[Batch]) -> dict[str, int]:
    return {
        "calibration_tokens": sum(batch.ids.numel() for batch in batches),
        "loss_tokens": sum(int((batch.labels != IGNORED).sum()) for batch in batches),
    }


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums cross entropies of `labels` int64 [B, L] under `logits` [B, L, vocabulary], but not where IGNORED."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def as_batches(samples: torch.Tensor | Samples | list[Batch], batch_size: int = 1) -> list[Batch]:
    """Cuts token ids int64 [N, L] or samples into batches; those that are there pass as they are."""
    if isinstance(samples, list):
        return samples
    return batches(samples if isinstance(samples, Samples) else Samples.equal(samples), batch_size)


def batches(samples: Samples, batch_size: int = 1, packed_length: int | None = None) -> list[Batch]:
    """Puts samples into batches in their order: up to `batch_size` neighbours of one length and source.

    With `packed_length` neighbours of a source share a row as long as they fit into that many tokens.
    """
    rows = list(_rows(samples.entries, packed_length))
    found: list[Batch] = []
    first = 0
    for _, group in groupby(rows, key=lambda row: (row[0].source, sum(len(sample.ids) for sample in row))):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            found.append(_batch(alike[start : start + batch_size], first))
            first = found[-1].done
    return found


def _rows(entries: list[Sample], packed_length: int | None) -> Iterator[list[Sample]]:
    row: list[Sample] = []
    used = 0
    for sample in entries:
        fits = packed_length is not None and used + len(sample.ids) <= packed_length
        if row and not (fits and sample.source == row[0].source):
            yield row
            row, used = [], 0
        row.append(sample)
        used += len(sample.ids)
    if row:
        yield row


def _batch(rows: list[list[Sample]], first: int) -> Batch:
    labels = torch.stack([torch.cat([_labels(sample) for sample in row]) for row in rows])
    positions = [torch.cat([torch.arange(len(sample.ids)) for sample in row]) for row in rows]
    is_packed = any(len(row) > 1 for row in rows)
    return Batch(
        ids=torch.stack([torch.cat([sample.ids for sample in row]) for row in rows]),
        labels=labels,
        positions=torch.stack(positions) if is_packed else None,
        first=first,
        samples=sum(map(len, rows)),
        source=rows[0][0].source,
    )


def _labels(sample: Sample) -> torch.Tensor:
    labels = sample.ids.masked_fill(~sample.counted, IGNORED)
    labels[0] = IGNORED
    return labels
