# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model with its experts quantized, alone and on top of pruning.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.expert_storage --corpus build/corpus

Masks are those of `fisher` under stored budgets. The change is against the same masks in the model's dtype. All is in
float32, apart from activations that "a8" rounds to 8 bits.
"""

import argparse
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.quality import MODEL
from heapr_vllm.evaluation.perplexity import perplexity
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales
from heapr_vllm.model_executor.kernels.cpu_compiled.a8_kernel import CompiledA8Kernel
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.prune import Selector, collect_moments
from heapr_vllm.prune.models.experts import StackedExperts, expert_modules, expert_shapes
from heapr_vllm.prune.models.pruned import applied, round_experts
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples

STORAGES = ("model", "int8", "int8 a8", "fp8", "int4", "int4 a8")


@contextmanager
def stored(model: PreTrainedModel, masks: NeuronMasks, storage: str) -> Generator[None]:
    """Runs the model pruned, with its experts in a storage; "a8" rounds activations too, in our compiled op."""
    scheme, _, activations = storage.partition(" ")
    with rounded(model, scheme), applied(masks, model):
        if not activations:
            yield
            return
        modules = expert_modules(model)
        try:
            for prefix, module in modules.items():
                module.forward = _compiled(module, masks.keep[prefix], scheme)
            yield
        finally:
            for module in modules.values():
                del module.forward


def _compiled(module: StackedExperts, keep: torch.Tensor, storage: str) -> Callable[..., torch.Tensor]:
    """The forward of an experts module in float32 but for activations before products; `keep` bool [E, I]."""
    kernel, hidden_size = CompiledA8Kernel(), module.down_proj.shape[1]
    scheme = ExpertScheme.for_hidden_size(storage, hidden_size)
    widths = keep.sum(-1).tolist()
    layout = RaggedLayout.build(widths, kernel.stored_widths(widths))
    groups = hidden_size // (scheme.group_size or hidden_size)
    shapes = [(n * layout.num_rows, hidden_size // scheme.codes_per_byte) for n in (2, 1)]
    w13, w2 = (torch.full(shape, scheme.zero_byte, dtype=scheme.code_dtype) for shape in shapes)
    scales = Scales(torch.ones(len(w13), groups), torch.ones(len(w2), groups))
    for expert, width in enumerate(widths):
        if width:
            row, padded = layout.place(expert)
            gate, up = module.gate_up_proj[expert].detach().chunk(2)
            for weight, first in ((gate, 2 * row), (up, 2 * row + padded)):
                rows = slice(first, first + width)
                w13[rows], scales.w13[rows] = scheme.quantize(weight[keep[expert]], "w1")
            codes, scale = scheme.quantize(module.down_proj[expert].detach()[:, keep[expert]], "w2")
            w2[row : row + width], scales.w2[row : row + width] = codes.T, scale.T
    kernel.pack(w13, w2, layout, scales)
    slots, table = kernel.index_tables(layout.slots, layout)
    experts = ExpertRows(w13, w2, table, layout.max_width, scales=scales)

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        kernel.run(output, x, Routes(weights, ids.int(), slots), experts)
        return output

    return forward


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
    storages = [each for each in STORAGES if "a8" not in each or CompiledA8Kernel().machine_obstacle() is None]
    for sparsity, keep in masks.items():
        for storage in storages:
            with stored(model, keep, storage):
                value = perplexity(model, held_out)
            reference = value if storage == "model" else rows[-storages.index(storage)]["perplexity"]
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
    for storage in dict.fromkeys(row["experts"] for row in rows):
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
