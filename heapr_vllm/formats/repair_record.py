# SPDX-License-Identifier: Apache-2.0
"""repair.json of an exported checkpoint: how its kept weights were refitted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from heapr_vllm.formats.schema import Count, Positive, Seed, read_json

REPAIR_FILE = "heapr/repair.json"


@dataclass(frozen=True, kw_only=True)
class RepairRecord:
    """The content of repair.json.

    `dataset` to `tokens`: the text. `prior`: weight of the original weights, in tokens per kept neuron. `experts`: how
    many were refitted, `experts_with_few_tokens` of them on fewer tokens than they keep neurons.
    `output_error_removed`: fraction of the squared output error, on that text, of what pruning, and in 4 bits rounding
    to the nearest codes, adds.
    """

    method: str
    dataset: str
    dataset_fingerprint: str
    num_samples: Positive
    max_seq_length: Positive
    seed: Seed
    tokens: Positive
    prior: float
    experts: Positive
    experts_with_few_tokens: Count
    output_error_removed: float

    @classmethod
    def read(cls, checkpoint: Path) -> RepairRecord | None:
        """Reads the record of an exported checkpoint; None if it was not repaired. Unknown keys are ignored."""
        path = checkpoint / REPAIR_FILE
        if not path.is_file():
            return None
        return read_json(path, cls, "export again, or remove it")

    def write(self, checkpoint: Path) -> None:
        """Writes the record into a checkpoint that has a folder `heapr`."""
        (checkpoint / REPAIR_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")
