# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model: criteria x stored and executed budgets x repair x calibration seeds.

    python serving_examples/python_corpus.py -o build/corpus
    python -m benchmarks.quality --corpus build/corpus -o build/quality

writes `quality.json` (every measurement), `quality.md` (the tables) and `quality.png`. Executed FLOPs are counted from
the routing of the pruned model on the held-out text. Under an executed budget `heapr-frequency` is the paper's own
ranking (`heapr --sparsity`), cut where the budget is met.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from heapr_vllm.evaluation.perplexity import counted_routes, perplexity
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import NeuronMoments, Selector, collect_moments
from heapr_vllm.prune.models.pruned import applied
from heapr_vllm.prune.repair.least_squares import compensations, repaired
from heapr_vllm.prune.repair.second_moments import collect_second_moments
from heapr_vllm.prune.report.plot import KINDS, new_figure
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.criteria import CRITERIA
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples

MODEL = Path(__file__).parent.parent / "serving_examples" / "tiny_qwen3_moe"
RATIOS = (0.1, 0.2, 0.25, 0.4, 0.5)
SCOPES = {"reap": "layer"}  # as published, equally many experts in every layer; "global" for the others


def choices(
    moments: NeuronMoments, criteria: Iterable[str], budgets: Iterable[str], ratios: Iterable[float], seed: int
) -> Iterator[tuple[dict, NeuronMasks]]:
    """Masks of every criterion under every budget, with the columns that name them."""
    for criterion in criteria:
        selector = Selector(moments, criterion, scope=SCOPES.get(criterion, "global"), seed=seed)
        for budget, ratio in product(budgets, ratios):
            name = {"budget": budget, "ratio": ratio, "seed": seed}
            yield {"criterion": criterion, **name}, selector.masks(Budget(**{budget: ratio}))


def measure(
    corpus: Path,
    *,
    criteria: Sequence[str] = tuple(CRITERIA),
    repair: Sequence[str] = (),
    budgets: Sequence[str] = tuple(KINDS),
    ratios: Sequence[float] = RATIOS,
    seeds: Sequence[int] = (0, 1, 2),
    num_samples: int = 128,
    held_out_tokens: int = 24576,
) -> dict:
    """{"dense": perplexity, "rows": [...]}, one row per measurement, with its perplexity `increase` over dense.

    The criteria in `repair` are measured a second time with down_proj refitted on the same calibration text.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    context = model.config.max_position_embeddings
    text = {split: read_documents(str(corpus / f"{split}.jsonl")) for split in ("calibration", "held_out")}
    held_out = token_samples(text["held_out"], tokenizer, held_out_tokens // context, context, seed=0)
    dense = perplexity(model, held_out)
    rows = []
    for seed in seeds:
        blocks = token_samples(text["calibration"], tokenizer, num_samples, context, seed)
        moments = collect_moments(model, blocks, batch_size=4)
        second_moments = collect_second_moments(model, blocks, batch_size=4) if repair else {}
        cases = list(choices(moments, criteria, budgets, ratios, seed))
        for name, masks in tqdm(cases, desc=f"seed {seed}", disable=None):
            with applied(masks, model):
                rows.append({**name, **evaluate(model, masks, held_out, dense)})
            if name["criterion"] in repair:
                with repaired(model, masks, compensations(second_moments, masks)):
                    rows.append(
                        {
                            **name,
                            "criterion": f"{name['criterion']} + repair",
                            **evaluate(model, masks, held_out, dense),
                        }
                    )
    return {
        "dense": dense,
        "held_out_tokens": held_out.numel(),
        "calibration_tokens": num_samples * context,
        "rows": rows,
    }


def evaluate(model: PreTrainedModel, masks: NeuronMasks, held_out: torch.Tensor, dense: float) -> dict[str, float]:
    """Measurements of the pruned `model`: perplexity, its relative increase, both reductions, dead experts."""
    with counted_routes(model) as tokens:
        pruned = perplexity(model, held_out)
    return {
        "perplexity": pruned,
        "increase": pruned / dense - 1,
        "stored_reduction": masks.sparsity,
        "executed_reduction": masks.executed_reduction(tokens),
        "dead_experts": sum(int((widths == 0).sum()) for widths in masks.widths.values()),
    }


def summarize(rows: list[dict]) -> dict[tuple[str, str, float], dict[str, float]]:
    """(budget, criterion, ratio) to means over the seeds, with the lowest and highest increase."""
    groups: dict[tuple[str, str, float], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["criterion"], row["ratio"]), []).append(row)
    return {
        key: {
            **{
                name: sum(row[name] for row in group) / len(group)
                for name in ("increase", "stored_reduction", "executed_reduction")
            },
            "low": min(row["increase"] for row in group),
            "high": max(row["increase"] for row in group),
        }
        for key, group in groups.items()
    }


def format_tables(result: dict) -> str:
    """Markdown: one table per kind of budget, criteria by ratios, best criterion of the largest ratio first."""
    summary = summarize(result["rows"])
    ratios = sorted({ratio for _, _, ratio in summary})
    draws = len({row["seed"] for row in result["rows"]})
    caption = (
        f"Perplexity increase over dense ({result['dense']:.3f}) on {result['held_out_tokens']:,} held-out "
        f"tokens: mean of {draws} draws of {result['calibration_tokens']:,} calibration tokens (lowest to "
        "highest); then the other reduction, in percent."
    )
    parts = [caption]
    for budget in dict.fromkeys(budget for budget, _, _ in summary):
        (other,) = KINDS.keys() - {budget}
        names = {name for kind, name, _ in summary if kind == budget}
        parts.append(
            "\n".join(
                [
                    f"| {KINDS[budget]} | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |",
                    "|---" * (1 + len(ratios)) + "|",
                    *(
                        f"| {name} | "
                        + " | ".join(_cell(summary[budget, name, ratio], other) for ratio in ratios)
                        + " |"
                        for name in sorted(names, key=lambda name: summary[budget, name, ratios[-1]]["increase"])
                    ),
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _cell(entry: dict[str, float], other: str) -> str:
    return (
        f"{entry['increase']:+.2%} ({100 * entry['low']:.2f} to {100 * entry['high']:.2f}); "
        f"{other} {-100 * entry[f'{other}_reduction']:.1f}"
    )


def plot(result: dict, path: Path) -> None:
    """Perplexity increase over both reductions, a line per criterion, bars over the seeds."""
    summary = summarize(result["rows"])
    figure = new_figure(11, 4.5)
    budgets = list(dict.fromkeys(budget for budget, _, _ in summary))
    for axes, budget in zip(figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0], budgets, strict=True):
        for name in dict.fromkeys(name for kind, name, _ in summary if kind == budget):
            points = sorted(
                (entry[f"{budget}_reduction"], entry["increase"], entry["low"], entry["high"])
                for key, entry in summary.items()
                if key[:2] == (budget, name)
            )
            x, mean, low, high = zip(*points, strict=True)
            bars = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            axes.errorbar(x, mean, bars, marker="o", markersize=3, capsize=2, label=name)
        axes.set(xlabel=KINDS[budget], title=f"{budget} budgets", yscale="log")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("held-out perplexity increase")
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by python_corpus.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the three results")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), metavar="NAME")
    parser.add_argument(
        "--repair",
        nargs="*",
        default=["heapr", "fisher"],
        metavar="NAME",
        help="criteria to measure with least-squares repair too",
    )
    parser.add_argument("--budgets", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, metavar="R")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="draws of the calibration text")
    parser.add_argument("--num-calibration-samples", type=int, default=128, help="blocks of 512 tokens")
    parser.add_argument("--held-out-tokens", type=int, default=24576)
    args = parser.parse_args()
    result = measure(
        args.corpus,
        criteria=args.criteria,
        repair=args.repair,
        budgets=args.budgets,
        ratios=args.ratios,
        seeds=args.seeds,
        num_samples=args.num_calibration_samples,
        held_out_tokens=args.held_out_tokens,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output / "quality.md").write_text(format_tables(result))
    plot(result, args.output / "quality.png")
    print(format_tables(result))


if __name__ == "__main__":
    main()
