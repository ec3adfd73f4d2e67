# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model with and without least-squares repair, over calibration seeds.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.repair --corpus build/corpus

Criteria: "heapr" the paper's score; "fisher" the joint moment sum (h dl/dh)^2; "fisher/flop" the same divided by the
expert's token count, the cost of a neuron in executed FLOPs. "same size" removes the same share of neurons, "same
FLOPs" the same executed share as the paper's score does there.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import ALIGN, MODEL
from heapr_vllm.masks import NeuronMasks
from heapr_vllm.prune import NeuronMoments, collect_moments, perplexity, select, select_by_saliency
from heapr_vllm.prune.compensation import compensations, repaired
from heapr_vllm.prune.data import read_documents, token_blocks
from heapr_vllm.prune.second_moments import collect_second_moments

SPARSITIES = (0.25, 0.4, 0.5)


def per_flop(moments: NeuronMoments) -> dict[str, torch.Tensor]:
    return {prefix: sums.double() / moments.tokens[prefix].clamp(min=1)[:, None]
            for prefix, sums in moments.fisher.items()}


def select_by_flops(moments: NeuronMoments, reduction: float) -> NeuronMasks:
    """The smallest removal per FLOP whose executed reduction is at least `reduction`, by bisection over sparsity."""
    saliency, low, high = per_flop(moments), 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        masks = select_by_saliency(saliency, middle, align=ALIGN)
        low, high = (low, middle) if masks.executed_reduction(moments.tokens) >= reduction else (middle, high)
    return select_by_saliency(saliency, high, align=ALIGN)


def candidates(moments: NeuronMoments, sparsity: float) -> dict[tuple[str, str], NeuronMasks]:
    """(criterion, budget) to masks."""
    paper = select(moments, sparsity, align=ALIGN)
    return {("heapr", "same size"): paper,
            ("fisher", "same size"): select_by_saliency(moments.fisher, sparsity, align=ALIGN),
            ("fisher/flop", "same size"): select_by_saliency(per_flop(moments), sparsity, align=ALIGN),
            ("fisher/flop", "same FLOPs"): select_by_flops(moments, paper.executed_reduction(moments.tokens))}


def measure(corpus: Path, num_samples: int, num_blocks: int, seeds: list[int],
            sparsities: tuple[float, ...] = SPARSITIES) -> list[dict]:
    """One row per seed, sparsity, criterion, budget and repair; `increase` is relative to the dense perplexity."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    context = model.config.max_position_embeddings
    text = {split: read_documents(str(corpus / f"{split}.jsonl")) for split in ("calibration", "held_out")}
    held_out = token_blocks(text["held_out"], tokenizer, num_blocks, context, seed=0)
    dense = perplexity(model, held_out)
    rows = []
    for seed in seeds:
        blocks = token_blocks(text["calibration"], tokenizer, num_samples, context, seed)
        moments = collect_moments(model, blocks, batch_size=4)
        second_moments = collect_second_moments(model, blocks, batch_size=4)
        for sparsity in sparsities:
            for (criterion, budget), masks in candidates(moments, sparsity).items():
                for repair in (False, True):
                    found = compensations(second_moments, masks) if repair else {}
                    with repaired(model, masks, found):
                        pruned = perplexity(model, held_out)
                    rows.append({"seed": seed, "sparsity": sparsity, "criterion": criterion, "budget": budget,
                                 "repair": repair, "stored_reduction": masks.sparsity,
                                 "executed_reduction": masks.executed_reduction(moments.tokens),
                                 "dense": dense, "perplexity": pruned, "increase": pruned / dense - 1})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def format_table(rows: list[dict]) -> str:
    """Mean and standard deviation of the increase over the seeds; the share of the paper's unrepaired increase."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["sparsity"], row["criterion"], row["budget"], row["repair"]].append(row)
    lines = ["| paper's score at | criterion | budget | repair | stored | executed | increase | of the paper's |",
             "|---|---|---|---|---|---|---|---|"]
    for (sparsity, criterion, budget, repair), group in groups.items():
        average = {key: mean(row[key] for row in group) for key in ("stored_reduction", "executed_reduction",
                                                                    "increase")}
        spread = stdev(row["increase"] for row in group) if len(group) > 1 else 0.0
        paper = mean(row["increase"] for row in groups[sparsity, "heapr", "same size", False])
        lines.append(f"| {sparsity:.0%} | {criterion} | {budget} | {'yes' if repair else 'no'} | "
                     f"-{average['stored_reduction']:.1%} | -{average['executed_reduction']:.1%} | "
                     f"{average['increase']:+.2%} ± {spread:.2%} | {average['increase'] / paper:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("--num-calibration-samples", type=int, default=256, help="blocks of 512 tokens")
    parser.add_argument("--num-blocks", type=int, default=100, help="held-out blocks of 512 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of the calibration text")
    args = parser.parse_args()
    print(format_table(measure(args.corpus, args.num_calibration_samples, args.num_blocks, args.seeds)))


if __name__ == "__main__":
    main()
