# SPDX-License-Identifier: Apache-2.0
"""Products of rows sorted by expert with one matrix per expert, in one launch where torch has a kernel for it."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 64  # rows per expert are padded to it: oneDNN compiles a primitive for every new shape
ALIGNMENT = 16  # bytes, of every row that torch's grouped product reads or writes


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiplies each expert's `rows`, of [R, K], by its matrix of `weights` [E, K, N], row-major or transposed.

    `ends`: int32 [E], where each expert's rows end; the last is R. Returns [R, N]. On a GPU this is
    `torch.nn.functional.grouped_mm`, which reads `ends` there; torch itself loops over experts for other dtypes than
    bfloat16 and before Hopper. No gradient.
    """
    if rows.is_cuda and takes_grouped_mm(rows, weights):
        return F.grouped_mm(rows, weights, offs=ends)
    return product_by_expert(rows, weights, ends)


def takes_grouped_mm(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Tells whether this torch has a grouped product, from 2.10 on, and every row of all operands is aligned."""
    sizes = (rows.shape[1], weights.shape[2])
    return hasattr(F, "grouped_mm") and all(size * rows.itemsize % ALIGNMENT == 0 for size in sizes)


def product_by_expert(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Does `grouped_product` with one product per expert.

    An expert's product runs on into the rows of the next ones, up to a multiple of ROW_MULTIPLE; those write their rows
    afterwards. So nothing is copied but the last experts' rows.
    """
    result = rows.new_empty(len(rows), weights.shape[2])
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start == end:
            continue
        padding = (start - end) % ROW_MULTIPLE
        if end + padding <= len(rows):
            torch.mm(rows[start : end + padding], weights[expert], out=result[start : end + padding])
        else:
            result[start:end] = (F.pad(rows[start:end], (0, 0, 0, padding)) @ weights[expert])[: end - start]
    return result
