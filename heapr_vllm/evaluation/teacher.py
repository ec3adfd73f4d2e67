# SPDX-License-Identifier: Apache-2.0
"""The baseline's predictions, which the other models are compared with: kept in a folder if there is one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.evaluation.predictions import PredictionsFolder
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.text.samples import fingerprint

TEACHER_FILE = "teacher.json"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the predictions depend on. `files`: sha256 over names, sizes and times of the checkpoint's files."""

    model: str
    files: str
    text: str
    backend: str
    dtype: str
    engine_args: dict[str, Any]
    top_k: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, samples: torch.Tensor, settings: EvaluationSettings) -> Teacher:
        digest = hashlib.sha256()
        for path in sorted(checkpoint.path.rglob("*")):
            found = path.stat()
            if path.is_file():
                digest.update(f"{path.relative_to(checkpoint.path)} {found.st_size} {found.st_mtime_ns}\n".encode())
        return cls(
            model=str(checkpoint.path.resolve()),
            files=digest.hexdigest(),
            text=fingerprint(samples),
            backend=settings.backend,
            dtype=settings.dtype,
            engine_args=settings.engine_args,
            top_k=settings.top_k,
        )

    @property
    def name(self) -> str:
        """A name for the folder of these predictions, different for all others."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@contextmanager
def teacher_folder(teacher: Teacher, cache: str | None) -> Generator[PredictionsFolder]:
    """Yields the teacher's folder inside of `cache`, or one that is removed afterwards."""
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            yield PredictionsFolder(Path(folder))
        return
    folder = Path(cache) / teacher.name
    folder.mkdir(parents=True, exist_ok=True)
    atomic_file(folder / TEACHER_FILE, lambda path: path.write_text(json.dumps(asdict(teacher), indent=2) + "\n"))
    yield PredictionsFolder(folder)
