# SPDX-License-Identifier: Apache-2.0
"""Rows of speed and memory, from a CSV file of `benchmarks.serving`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.formats.schema import convert

Measure = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_REMEDY = "`python -m benchmarks.serving --dense BASE --pruned DIR --csv rows.csv` writes such rows"


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """Output tokens per second of one arm under one workload: median, lowest and highest of several rounds.

    `vs_dense`: over the dense model in stock vLLM, in the same rounds. `weights_gib`, `kv_tokens`: memory of the
    weights and room for the KV cache, as vLLM reports them. What the benchmark did not write is None or empty.
    """

    arm: str
    tok_s: Measure
    tok_s_min: Measure | None = None
    tok_s_max: Measure | None = None
    vs_dense: Measure | None = None
    weights_gib: Measure | None = None
    kv_tokens: Measure | None = None
    model: str = ""
    workload: str = ""
    concurrency: str = ""
    date: str = ""
    device: str = ""
    versions: str = ""
    command: str = ""


def read_speed(path: Path) -> list[SpeedRow]:
    """Reads a CSV file that has at least the columns `arm` and `tok_s`. Raises HeaprError if it is none."""
    if not path.is_file():
        raise HeaprError(f"{path} is no file; {_REMEDY}")
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeError) as error:
        raise HeaprError(f"{path} is no CSV file ({first_line(error)}); {_REMEDY}") from error
    if not rows or not {"arm", "tok_s"} <= rows[0].keys():
        raise HeaprError(f"{path} has no rows with the columns arm and tok_s; {_REMEDY}")
    return [_parsed(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _parsed(row: dict[str, str], where: str) -> SpeedRow:
    return convert({name: text for name, text in row.items() if name and text}, SpeedRow, where, _REMEDY, strict=False)
