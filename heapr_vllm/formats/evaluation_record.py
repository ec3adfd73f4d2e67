# SPDX-License-Identifier: Apache-2.0
"""The file that `heapr eval -o` writes: several models measured the same way, the first is the baseline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.schema import Count, Positive, Seed, read_json

_ALWAYS_WRITTEN = ("weight_bytes", "num_fewshot")  # null says "not known" and "as the task says"


@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """What every model of the file was measured on.

    `dataset`: one spec, or those of a mix; `loss`: whose tokens of it count. `num_fewshot` and `limit` were asked for,
    None leaves them to the task.
    """

    dataset: str | list[str]
    num_samples: Positive
    max_seq_length: Positive
    seed: Seed
    backend: str
    dtype: str
    tasks: tuple[str, ...] = ()
    num_fewshot: Count | None = None
    limit: float | None = None
    loss: str = "all"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Next-token predictions against those of the model `against`, over the same `tokens`.

    `kl_divergence` is the mean of KL(against || this model) in nats, over the `top_k` tokens that `against` finds most
    likely and the rest as one more; its interval comes from the standard error over samples (None: one sample). `top1`
    is the fraction of tokens with the same most likely next token, with its 95 % Wilson interval.
    """

    against: str
    kl_divergence: float
    top1: float
    top1_low: float
    top1_high: float
    tokens: Positive
    top_k: Positive
    kl_low: float | None = None
    kl_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task.

    `low` and `high` are the 95 % Wilson interval, None if samples are not right or wrong. `recovery` is `value` over
    the baseline's, `mcnemar_p` the exact two-sided p of the paired comparison with it; None for the baseline itself.
    """

    metric: str
    num_samples: Positive
    value: float
    low: float | None = None
    high: float | None = None
    recovery: float | None = None
    mcnemar_p: float | None = None
    num_fewshot: Count | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """One model.

    `change` is of the perplexity, against the baseline's. The reductions are of neurons stored and run, None for an
    unpruned model; `masks_sha256` tells by which masks it was pruned. `worst_task` has the lowest recovery.
    """

    model: str
    weight_bytes: Count | None
    perplexity: float
    change: float
    stored_reduction: float | None = None
    executed_reduction: float | None = None
    masks_sha256: str | None = None
    agreement: Agreement | None = None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    worst_task: str | None = None
    worst_recovery: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The content of the file."""

    format_version: Literal[1] = 1
    settings: MeasuredOn
    versions: dict[str, str]
    models: tuple[ModelRecord, ...]

    @classmethod
    def read(cls, path: Path) -> EvaluationRecord:
        """Reads a file; unknown keys are ignored. Raises HeaprError if it is damaged."""
        return read_json(path, cls, "write it again with `heapr eval -o`")

    def as_json(self) -> str:
        """Formats the content; optional fields without a value are left out."""
        return json.dumps(asdict(self, dict_factory=_present), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        atomic_file(path, lambda partial: partial.write_text(self.as_json()))


def _present(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None or name in _ALWAYS_WRITTEN}
