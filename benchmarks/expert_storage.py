# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model with its experts stored in 8 bits, alone and on top of pruning.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.expert_storage --corpus build/corpus

Masks are those of `fisher` under stored budgets. The change is against the same masks in the model's dtype.
"""

import argparse
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.quality import MODEL
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.prune import Selector, collect_moments
from heapr_vllm.prune.models.experts import expert_modules, expert_shapes
from heapr_vllm.prune.models.pruned import applied, round_experts
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples

STORAGES = ("model", "int8", "fp8")


@contextmanager
def rounded(model: PreTrainedModel, storage: str) -> Generator[None]:
    """Gives experts the values that they have in a storage; their own come back on exit."""
    if storage == "model":
        yield
        return
    modules = expert_modules(model).values()
    saved = [(module.gate_up_proj.data.clone(), module.down_proj.data.clone()) for module in modules]
    round_experts(model, ExpertScheme.for_hidden_size(storage, model.config.hidden_size))
    try:
        yield
    finally:
        for module, (gate_up, down) in zip(modules, saved, strict=True):
            module.gate_up_proj.data.copy_(gate_up)
            module.down_proj.data.copy_(down)


def measure(
    corpus: Path, *, sparsities: Sequence[float] = (0.25, 0.5), num_samples: int = 128, held_out_tokens: int = 24576
) -> list[dict]:
    """One row per sparsity, 0 first, and storage: perplexity, and its change against the model's dtype."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    context = model.config.max_position_embeddings
    held_out = token_samples(
        read_documents(str(corpus / "held_out.jsonl")), tokenizer, held_out_tokens // context, context, seed=0
    )
    calibration = token_samples(
        read_documents(str(corpus / "calibration.jsonl")), tokenizer, num_samples, context, seed=0
    )
    selector = Selector(collect_moments(model, calibration, batch_size=4), "fisher")
    whole = {prefix: torch.ones(shape, dtype=torch.bool) for prefix, shape in expert_shapes(model).items()}
    masks = {0.0: NeuronMasks(whole)} | {ratio: selector.masks(Budget(stored=ratio)) for ratio in sparsities}
    rows = []
    for sparsity, keep in masks.items():
        for storage in STORAGES:
            with rounded(model, storage), applied(keep, model):
                value = perplexity(model, held_out)
            reference = value if storage == "model" else rows[-STORAGES.index(storage)]["perplexity"]
            rows.append(
                {"sparsity": sparsity, "experts": storage, "perplexity": value, "change": value / reference - 1}
            )
    return rows


def format_table(rows: list[dict]) -> str:
    """Markdown: a row per storage, a column per sparsity."""
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    lines = [
        "| experts stored as | " + " | ".join("dense" if not s else f"{s:.0%} pruned" for s in sparsities) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for storage in STORAGES:
        cells = []
        for row in (row for row in rows if row["experts"] == storage):
            cells.append(f"{row['perplexity']:.3f}" if storage == "model" else f"{row['change']:+.3%}")
        lines.append(f"| {storage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.25, 0.5), metavar="R")
    parser.add_argument("--held-out-tokens", type=int, default=24576)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.corpus, sparsities=args.sparsities, held_out_tokens=args.held_out_tokens)
    print(json.dumps(rows, indent=2) if args.json else format_table(rows))


if __name__ == "__main__":
    main()
