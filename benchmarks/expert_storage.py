# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model against the bytes of its experts: pruned, quantized, repaired.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.expert_storage --corpus build/corpus -o build/expert_storage

writes `expert_storage.json` (every measurement), `expert_storage.md` (the tables) and `expert_storage.png`. Masks are
those of `fisher` under stored budgets. A repair is that of `heapr export --repair least-squares`, which rounds
down_proj to 4 bits with the second moments at hand. All is in float32, apart from activations that "a8" rounds to 8
bits, which no repaired model is measured with.
"""

import argparse
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm
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
from heapr_vllm.prune.repair.fit import fit_expert, rounding_of
from heapr_vllm.prune.repair.second_moments import SecondMoments, collect_second_moments
from heapr_vllm.prune.report.plot import new_figure
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples

STORAGES = ("bf16", "int8", "int8 a8", "fp8", "int4", "int4 a8")
SPARSITIES = (0.1, 0.2, 0.25, 0.4, 0.5)


@contextmanager
def stored(
    model: PreTrainedModel, masks: NeuronMasks, storage: str, moments: SecondMoments | None = None
) -> Generator[None]:
    """Runs the model pruned, repaired if there are `moments`, with its experts in a storage.

    "a8" rounds activations too, in our compiled op.
    """
    scheme, _, activations = storage.partition(" ")
    with changed(model, masks, scheme, moments), applied(masks, model):
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
def changed(model: PreTrainedModel, masks: NeuronMasks, storage: str, moments: SecondMoments | None) -> Generator[None]:
    """Gives experts the values that they have once repaired and in a storage; their own come back on exit."""
    modules = expert_modules(model)
    saved = [(module.gate_up_proj.data.clone(), module.down_proj.data.clone()) for module in modules.values()]
    scheme = None if storage == "bf16" else ExpertScheme.for_hidden_size(storage, model.config.hidden_size)
    try:
        for prefix, of_experts in (moments or {}).items():
            for expert, moment in of_experts.items():
                weight, keep = modules[prefix].down_proj.data[expert], masks.keep[prefix][expert]
                if keep.any():
                    weight[:, keep] = fit_expert(weight, moment, keep, rounding_of(scheme))[1].float()
        if scheme:
            round_experts(model, scheme)
        yield
    finally:
        for module, (gate_up, down) in zip(modules.values(), saved, strict=True):
            module.gate_up_proj.data.copy_(gate_up)
            module.down_proj.data.copy_(down)


def relative_bytes(storage: str, sparsity: float, hidden_size: int) -> float:
    """Returns the bytes of expert weights and scales, of those of the unpruned experts in bf16."""
    name = storage.partition(" ")[0]
    bits = 16 if name == "bf16" else ExpertScheme.for_hidden_size(name, hidden_size).bits_per_weight()
    return (1 - sparsity) * bits / 16


def measure(
    corpus: Path,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0,),
    num_samples: int = 128,
    held_out_tokens: int = 24576,
) -> dict:
    """{"dense": perplexity, "rows": [...]}, one row per draw of the calibration text, sparsity, storage and repair.

    A row has its `perplexity`, the `increase` over the dense model in bf16, and `bytes`, of that model's experts.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    context = model.config.max_position_embeddings
    text = {split: read_documents(str(corpus / f"{split}.jsonl")) for split in ("calibration", "held_out")}
    held_out = token_samples(text["held_out"], tokenizer, held_out_tokens // context, context, seed=0)
    whole = {prefix: torch.ones(shape, dtype=torch.bool) for prefix, shape in expert_shapes(model).items()}
    with stored(model, NeuronMasks(whole), "bf16"):
        dense = perplexity(model, held_out)
    storages = [each for each in STORAGES if "a8" not in each or CompiledA8Kernel().machine_obstacle() is None]
    rows = []
    for seed in seeds:
        blocks = token_samples(text["calibration"], tokenizer, num_samples, context, seed)
        selector = Selector(collect_moments(model, blocks, batch_size=4), "fisher")
        second_moments = collect_second_moments(model, blocks, batch_size=4)
        masks = {0.0: NeuronMasks(whole)} | {ratio: selector.masks(Budget(stored=ratio)) for ratio in sparsities}
        for sparsity, storage, repair in tqdm(list(cases(list(masks), storages)), desc=f"seed {seed}", disable=None):
            with stored(model, masks[sparsity], storage, second_moments if repair else None):
                value = perplexity(model, held_out)
            rows.append(
                {
                    "seed": seed,
                    "sparsity": sparsity,
                    "experts": storage,
                    "repair": repair,
                    "bytes": relative_bytes(storage, sparsity, model.config.hidden_size),
                    "perplexity": value,
                    "increase": value / dense - 1,
                }
            )
    return {
        "dense": dense,
        "held_out_tokens": held_out.numel(),
        "calibration_tokens": num_samples * context,
        "rows": rows,
    }


def cases(sparsities: Sequence[float], storages: Sequence[str]) -> Iterator[tuple[float, str, bool]]:
    """Yields what there is to measure: sparsity, storage, and whether repaired, where a repair does anything."""
    for sparsity, storage in product(sparsities, storages):
        yield sparsity, storage, False
        if "a8" not in storage and (sparsity or storage == "int4"):
            yield sparsity, storage, True


def summarize(rows: list[dict]) -> dict[tuple[str, bool], dict[float, dict[str, float]]]:
    """(storage, repaired) and sparsity to the means over the draws, with the lowest and highest increase."""
    groups: dict[tuple[str, bool], dict[float, list[dict]]] = {}
    for row in rows:
        groups.setdefault((row["experts"], row["repair"]), {}).setdefault(row["sparsity"], []).append(row)
    return {
        line: {sparsity: _mean_of(group) for sparsity, group in by_sparsity.items()}
        for line, by_sparsity in groups.items()
    }


def _mean_of(group: list[dict]) -> dict[str, float]:
    increases = [row["increase"] for row in group]
    return {
        "bytes": group[0]["bytes"],
        "increase": mean(increases),
        "low": min(increases),
        "high": max(increases),
    }


def frontier(summary: dict[tuple[str, bool], dict[float, dict[str, float]]]) -> list[tuple[float, float, str]]:
    """(bytes, increase, name) of every point than which none has both fewer bytes and less increase, fewest first."""
    points = []
    for (storage, repair), by_sparsity in summary.items():
        for sparsity, entry in by_sparsity.items():
            name = f"{storage}, {sparsity:.0%} pruned{', repaired' * repair}"
            points.append((entry["bytes"], entry["increase"], name))
    best: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def format_tables(result: dict) -> str:
    """Markdown: increases and bytes by storage and sparsity, and the frontier of both."""
    summary = summarize(result["rows"])
    sparsities = sorted({row["sparsity"] for row in result["rows"]})
    draws = len({row["seed"] for row in result["rows"]})
    caption = (
        f"Perplexity increase over dense in bf16 ({result['dense']:.3f}) on {result['held_out_tokens']:,} held-out "
        f"tokens, mean of {draws} draws of {result['calibration_tokens']:,} calibration tokens (lowest to highest); "
        "then bytes of the experts, of those of the dense model in bf16."
    )
    lines = [
        caption,
        "",
        "| experts | " + " | ".join("dense" if not s else f"{s:.0%} pruned" for s in sparsities) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for (storage, repair), by_sparsity in summary.items():
        cells = [_cell(by_sparsity[sparsity]) if sparsity in by_sparsity else "" for sparsity in sparsities]
        lines.append(f"| {storage}{' + repair' * repair} | " + " | ".join(cells) + " |")
    lines += ["", "| bytes | increase | the least for so many bytes |", "|---|---|---|"]
    lines += [f"| {size:.2f} | {increase:+.2%} | {name} |" for size, increase, name in frontier(summary)]
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, float]) -> str:
    spread = f" ({100 * entry['low']:.2f} to {100 * entry['high']:.2f})" if entry["low"] < entry["high"] else ""
    return f"{entry['increase']:+.2%}{spread}; {entry['bytes']:.2f}"


def plot(result: dict, path: Path) -> None:
    """Draws the increase over the bytes: a colour per storage, dashed without the repair, the frontier behind."""
    summary = {line: entries for line, entries in summarize(result["rows"]).items() if "a8" not in line[0]}
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    best = frontier(summary)
    axes.plot([point[0] for point in best], [100 * point[1] for point in best], color="0.85", linewidth=7, zorder=0)
    colors = {storage: f"C{index}" for index, storage in enumerate(dict.fromkeys(storage for storage, _ in summary))}
    for (storage, repair), by_sparsity in summary.items():
        points = sorted((entry["bytes"], 100 * entry["increase"]) for entry in by_sparsity.values())
        x, y = zip(*points, strict=True)
        style = "-" if repair else "--"
        label = f"{storage}{' + repair' * repair}"
        axes.plot(x, y, style, color=colors[storage], marker="o", markersize=4, label=label)
    axes.set(xlabel="bytes of the experts, of dense bf16", ylabel="held-out perplexity increase, %")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the three results")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, metavar="R")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="draws of the calibration text")
    parser.add_argument("--held-out-tokens", type=int, default=24576)
    args = parser.parse_args()
    result = measure(args.corpus, sparsities=args.sparsities, seeds=args.seeds, held_out_tokens=args.held_out_tokens)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "expert_storage.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output / "expert_storage.md").write_text(format_tables(result))
    plot(result, args.output / "expert_storage.png")
    print(format_tables(result))


if __name__ == "__main__":
    main()
