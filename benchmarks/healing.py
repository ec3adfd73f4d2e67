# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model, pruned, repaired and healed.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.healing --corpus build/corpus --work build/healing --csv benchmarks/results/healing.csv

Held-out text and its perplexity are those of `benchmarks.quality`; the text to train on is the corpus' calibration
split, of which the held-out one shares no file. What is in the folder `--work` is not made again.
"""

import argparse
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

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
METHODS = (
    "paper",
    "fisher",
    "+ repair",
    "+ heal (adapter)",
    "+ repair + heal (adapter)",
    "+ repair + heal (weights)",
)


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

    def made(self, method: str, ratio: float) -> tuple[Path, Path | None]:
        """What is pruned without `ratio` of the neurons, and the folder of its healing; makes what is missing."""
        if method == "paper":
            return self.masks("heapr", ratio), None
        fisher = self.masks("fisher", ratio)
        if method == "fisher":
            return fisher, None
        if method == "+ heal (adapter)":
            return fisher, self.healed(fisher, "adapter")
        repaired = self.repaired(ratio)
        if method == "+ repair":
            return repaired, None
        if method == "+ repair + heal (adapter)":
            return repaired, self.healed(repaired, "adapter")
        weights = self.healed(repaired, "weights")
        return self.compact(weights, ratio), weights

    def row(self, method: str, ratio: float, dense: float, held_out: torch.Tensor) -> dict[str, Any]:
        """What `method` leaves of the model, against the perplexity `dense` on the same text."""
        pruned, healed = self.made(method, ratio)
        adapter = healed if healed and (healed / "adapter_config.json").is_file() else None
        with adapted(pruned, adapter) as model:
            found = perplexity(model, held_out)
        row = {"removed": ratio, "method": method, "perplexity": round(found, 4)}
        return row | {"increase": round(found / dense - 1, 5)} | costs(healed)


@contextmanager
def adapted(pruned: Path, adapter: Path | None) -> Generator[Any]:
    """A pruned model in float32, with an adapter if there is one."""
    with opened(Checkpoint(pruned), "float32", "cpu") as (model, _):
        yield PeftModel.from_pretrained(model, str(adapter)) if adapter else model


def costs(healed: Path | None) -> dict[str, Any]:
    """The columns that say what a healing took; empty without one."""
    names = ("tokens", "trained", "learning_rate", "kl_before", "kl_after", "teacher_seconds", "training_seconds")
    record = json.loads((healed / HEALING_FILE).read_text()) if healed else {}
    return {name: record.get(name, "") for name in names}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: methods by ratios."""
    ratios = list(dict.fromkeys(row["removed"] for row in rows))
    lines = ["| | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " | tokens | minutes |"]
    lines.append("|---" * (3 + len(ratios)) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [f"{row['increase']:+.2%}" for row in own]
        trained_on = f"{own[0]['tokens']:,}" if own[0]["tokens"] else ""
        seconds = [row["training_seconds"] for row in own if row["tokens"]]
        minutes = f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else ""
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {trained_on} | {minutes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything on the way")
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.25, 0.4, 0.5), metavar="R")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of calibration and training text")
    parser.add_argument("--num-samples", type=int, default=320, help=f"to train on, of {LENGTH} tokens")
    parser.add_argument("--csv", type=Path, help="append every row to it")
    args = parser.parse_args()
    documents = read_documents(str(args.corpus / "held_out.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held_out = token_samples(documents, tokenizer, HELD_OUT_TOKENS // LENGTH, LENGTH, seed=0)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), held_out)
    bench = Bench(args.corpus, args.work, args.seed, args.num_samples)
    rows = [bench.row(method, ratio, dense, held_out) for ratio, method in product(args.ratios, args.methods)]
    if args.csv:
        append_csv(args.csv, rows)
    print(f"dense: {dense:.3f}\n\n{format_table(rows)}")


if __name__ == "__main__":
    main()
