# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model under HEAPr and three baselines, at equal stored size.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.quality --corpus build/corpus
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from heapr_vllm.masks import NeuronMasks, expert_shapes
from heapr_vllm.prune import NeuronMoments, collect_moments, perplexity, select, select_by_saliency
from heapr_vllm.prune.data import read_documents, token_blocks

MODEL = Path(__file__).parent.parent / "serving_examples" / "tiny_qwen3_moe"
SPARSITIES = (0.25, 0.5)
ALIGN = 16


def random_saliency(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {prefix: torch.rand(shape, generator=generator) for prefix, shape in expert_shapes(model).items()}


def magnitude_saliency(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Product of the norms of a neuron's gate row, up row and down column."""
    saliency = {}
    for prefix in expert_shapes(model):
        experts = model.get_submodule(prefix)
        gate, up = experts.gate_up_proj.detach().norm(dim=-1).chunk(2, -1)
        saliency[prefix] = gate * up * experts.down_proj.detach().norm(dim=1)
    return saliency


def whole_expert_saliency(moments: NeuronMoments) -> dict[str, torch.Tensor]:
    """HEAPr's own score summed over the expert: the same criterion at the granularity of whole experts."""
    return {prefix: scores.sum(-1, keepdim=True).expand_as(scores) for prefix, scores in moments.saliency().items()}


def candidates(model: PreTrainedModel, moments: NeuronMoments, sparsity: float) -> Iterator[tuple[str, NeuronMasks]]:
    """(name, masks) at equal sparsity."""
    yield "heapr", select(moments, sparsity, align=ALIGN)
    yield "whole experts", select_by_saliency(whole_expert_saliency(moments), sparsity, align=ALIGN)
    yield "magnitude", select_by_saliency(magnitude_saliency(model), sparsity, align=ALIGN)
    yield "random", select_by_saliency(random_saliency(model), sparsity, align=ALIGN)


def measure(corpus: Path, num_samples: int, num_blocks: int, seed: int = 0) -> dict:
    """Perplexities and executed reductions: {"dense": p, "rows": [{"criterion", "sparsity", ...}]}."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    context = model.config.max_position_embeddings
    text = {split: read_documents(str(corpus / f"{split}.jsonl")) for split in ("calibration", "held_out")}
    held_out = token_blocks(text["held_out"], tokenizer, num_blocks, context, seed=0)
    moments = collect_moments(model, token_blocks(text["calibration"], tokenizer, num_samples, context, seed))
    rows = []
    for sparsity in SPARSITIES:
        for criterion, masks in candidates(model, moments, sparsity):
            with masks.applied(model):
                rows.append({"criterion": criterion, "sparsity": sparsity, "stored_reduction": masks.sparsity,
                             "executed_reduction": masks.executed_reduction(moments.tokens),
                             "perplexity": perplexity(model, held_out)})
    return {"dense": perplexity(model, held_out), "rows": rows}


def format_table(result: dict) -> str:
    lines = [f"| pruned | criterion | perplexity (dense {result['dense']:.2f}) | change | executed FLOPs |",
             "|---|---|---|---|---|"]
    lines += [f"| {row['stored_reduction']:.0%} | {row['criterion']} | {row['perplexity']:.2f} | "
              f"{row['perplexity'] / result['dense'] - 1:+.1%} | -{row['executed_reduction']:.1%} |"
              for row in result["rows"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("--num-calibration-samples", type=int, default=128)
    parser.add_argument("--num-blocks", type=int, default=200, help="held-out blocks of 512 tokens")
    parser.add_argument("--seed", type=int, default=0, help="draw of the calibration text")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.corpus, args.num_calibration_samples, args.num_blocks, args.seed)
    print(json.dumps(result, indent=2) if args.json else format_table(result))


if __name__ == "__main__":
    main()
