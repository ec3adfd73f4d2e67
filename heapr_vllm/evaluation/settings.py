# SPDX-License-Identifier: Apache-2.0
"""What `heapr eval` measures models on, and what runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Text, tasks, and what runs the models.

    The text is `num_samples` seeded samples of `max_seq_length` tokens, the same for every model. `top_k`: how many of
    the baseline's most likely tokens the divergence from it looks at one by one, 0 for no comparison; `cache`: a folder
    that keeps the baseline's log-probabilities. `tasks` to `confirm_run_unsafe_code` are lm-eval's, `samples` is a
    folder for what the models answered. `engine_args` are vLLM's.
    """

    dataset: str
    num_samples: int = 64
    max_seq_length: int = 2048
    batch_size: int = 8
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    backend: str = "transformers"
    top_k: int = 64
    cache: str | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    confirm_run_unsafe_code: bool = False
    samples: str | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
