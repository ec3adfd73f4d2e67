# SPDX-License-Identifier: Apache-2.0
"""What calibrating on one kind of text costs the others: single sources, their mix, and --worst-case.

    python -m benchmarks.mixed_corpus -o build/mixed
    python -m benchmarks.mixes --corpus build/mixed --json build/mixes.json

Perplexity of the bundled model on held-out code, prose and tool calls, pruned by masks from each source alone, from all
three in equal shares, and for the source that loses most. One calibration per draw serves all of them: its moments are
kept per source.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.mixed_corpus import SOURCES
from benchmarks.quality import MODEL
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import CalibrationSettings, NeuronMoments
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.selector import Selector
from heapr_vllm.prune.selection.worst_case import CRITERION, worst_case
from heapr_vllm.prune.text.samples import Samples, TextSettings, draw_samples

LENGTH = 512
HELD_OUT_SAMPLES = 32


def choices(moments: NeuronMoments, sparsity: float) -> Iterator[tuple[str, NeuronMasks]]:
    """Masks by what they are chosen for."""
    budget = Budget(stored=sparsity)
    equal = {source: 1 / len(SOURCES) for source in SOURCES}
    mixes = {source: {source: 1.0} for source in SOURCES} | {"all equally": equal}
    for name, shares in mixes.items():
        yield name, Selector(moments.mixed(shares), CRITERION).masks(budget)
    yield "worst case", worst_case(moments, budget).selector.masks(budget)


def moments_of(corpus: Path, samples: int, seed: int) -> NeuronMoments:
    """One calibration on all sources, `samples` of each."""
    settings = CalibrationSettings(
        model=str(MODEL),
        dataset=[f"{source}={corpus / source}.calibration.jsonl" for source in SOURCES],
        num_calibration_samples=samples * len(SOURCES),
        max_seq_length=LENGTH,
        batch_size=4,
        seed=seed,
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(settings, Path(folder) / "calib")


def held_out(corpus: Path) -> dict[str, Samples]:
    """Samples by source."""
    texts = {}
    for source in SOURCES:
        text = TextSettings(dataset=str(corpus / f"{source}.held_out.jsonl"), max_seq_length=LENGTH)
        texts[source] = draw_samples(Checkpoint(MODEL), text, HELD_OUT_SAMPLES)
    return texts


def measure(corpus: Path, sparsities: list[float], seeds: list[int], samples: int) -> dict[str, Any]:
    """{"dense": perplexities by source, "rows": [...], "seconds_per_choice": ...}."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    texts = held_out(corpus)
    dense = {source: perplexity(model, text) for source, text in texts.items()}
    rows, seconds = [], []
    for seed in seeds:
        moments = moments_of(corpus, samples, seed)
        for sparsity in sparsities:
            start = time.perf_counter()
            for name, masks in tqdm(
                list(choices(moments, sparsity)), desc=f"seed {seed}, {sparsity:.0%}", disable=None
            ):
                seconds.append(time.perf_counter() - start)
                with applied(masks, model):
                    found = {source: perplexity(model, text) for source, text in texts.items()}
                rows.append({"seed": seed, "sparsity": sparsity, "chosen_for": name, "perplexity": found})
                start = time.perf_counter()
    return {"dense": dense, "rows": rows, "seconds_per_choice": max(seconds)}


def format_table(result: dict[str, Any]) -> str:
    """Markdown: increase over dense per domain, mean over draws (lowest to highest), and of the worst domain."""
    lines = [
        "| removed | chosen for | " + " | ".join(SOURCES) + " | worst of them |",
        "|---" * (3 + len(SOURCES)) + "|",
        "| 0% | dense, perplexity | " + " | ".join(f"{result['dense'][source]:.2f}" for source in SOURCES) + " | |",
    ]
    groups: dict[tuple[float, str], list[dict[str, float]]] = {}
    for row in result["rows"]:
        increase = {source: row["perplexity"][source] / result["dense"][source] - 1 for source in SOURCES}
        groups.setdefault((row["sparsity"], row["chosen_for"]), []).append(increase)
    for (sparsity, name), draws in groups.items():
        cells = [_cell([draw[source] for draw in draws]) for source in SOURCES]
        cells.append(_cell([max(draw.values()) for draw in draws]))
        lines.append(f"| {sparsity:.0%} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):+.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by benchmarks.mixed_corpus")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of the calibration text")
    parser.add_argument("--samples", type=int, default=64, help=f"per source, of {LENGTH} tokens")
    parser.add_argument("--json", type=Path, help="every measurement")
    args = parser.parse_args()
    result = measure(args.corpus, args.sparsity, args.seeds, args.samples)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(format_table(result))
    print(f"\na choice took {result['seconds_per_choice']:.1f} s at most")


if __name__ == "__main__":
    main()
