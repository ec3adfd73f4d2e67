# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model, pruned, repaired and healed.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.healing --corpus build/corpus --work build/healing --csv benchmarks/results/healing.csv

Held-out text and its perplexity are those of `benchmarks.quality`; the text to train on is the corpus' calibration
split, of which the held-out one shares no file. What is in the folder `--work` is not made again.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.quality import MODEL
from benchmarks.rows import append_csv
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune import (
    CalibrationSettings,
    NeuronMoments,
    Selector,
    calibrate,
    export_checkpoint,
    write_masks_repository,
)
from heapr_vllm.prune.models.pruned import opened
from heapr_vllm.prune.repair.fit import RepairSettings
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples
from serving_examples.healing.heal import heal
from serving_examples.healing.record import HEALING_FILE
from serving_examples.healing.settings import HealingSettings

LENGTH = 512
HELD_OUT_TOKENS = 24576
CALIBRATION_SAMPLES = 128


@dataclass(frozen=True)
class Bench:
    """Everything that the rows are made of, in a folder."""

    corpus: Path
    work: Path
    seed: int
    num_samples: int

    def calibration(self) -> Path:
        """Folder of a calibration as that of `benchmarks.quality`."""
        settings = CalibrationSettings(
            model=str(MODEL),
            dataset=str(self.corpus / "calibration.jsonl"),
            num_calibration_samples=CALIBRATION_SAMPLES,
            max_seq_length=LENGTH,
            batch_size=4,
            seed=self.seed,
            dtype="float32",
        )
        calibrate(settings, self.work / "calib", resume=True)
        return self.work / "calib"

    def masks(self, criterion: str, ratio: float) -> Path:
        """Masks repository that removes `ratio` of the stored neurons."""
        output = self.work / f"{criterion}-{ratio}"
        if not output.exists():
            selector = Selector(NeuronMoments.from_pretrained(self.calibration()), criterion)
            write_masks_repository(selector.masks(Budget(stored=ratio)), self.calibration(), output)
        return output

    def repaired(self, ratio: float) -> Path:
        """Compact checkpoint with refitted down_proj."""
        output = self.work / f"repaired-{ratio}"
        if not output.exists():
            export_checkpoint(self.masks("fisher", ratio), output, repair=RepairSettings())
        return output

    def healed(self, pruned: Path, into: str) -> Path:
        """Adapter on, or full-size checkpoint of, `pruned`."""
        output = self.work / f"{into}-on-{pruned.name}"
        if not output.exists():
            settings = HealingSettings(
                dataset=str(self.corpus / "calibration.jsonl"),
                max_seq_length=LENGTH,
                seed=self.seed,
                into=into,
                num_samples=self.num_samples,
                dtype="float32",
                cache=str(self.work / "teacher"),
            )
            heal(pruned, output, settings)
        return output

    def compact(self, healed: Path, ratio: float) -> Path:
        """Compact checkpoint of healed weights."""
        output = self.work / f"compact-{healed.name}"
        if not output.exists():
            export_checkpoint(self.masks("fisher", ratio), output, model=str(healed), verify=False)
        return output
