# SPDX-License-Identifier: Apache-2.0
"""What a healing was, and what it gave: `healing.json` beside what it wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

HEALING_FILE = "healing.json"


@dataclass(frozen=True, kw_only=True)
class HealingRecord:
    """The content of healing.json.

    `tokens`: trained on, in all epochs. `trained`: number of parameters. `kl_before`, `kl_after`: mean KL(dense ||
    pruned) in nats on samples that were not trained on. `teacher_seconds`, `training_seconds`: of this run, which is
    the rest if it continued another.
    """

    into: str
    samples: int
    tokens: int
    trained: int
    learning_rate: float
    kl_before: float
    kl_after: float
    teacher_seconds: float
    training_seconds: float
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        (folder / HEALING_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        return (
            f"trained {self.trained:,} parameters on {self.tokens:,} tokens; KL from the dense model, on text not "
            f"trained on: {self.kl_before:.4f} before, {self.kl_after:.4f} after"
        )
