# SPDX-License-Identifier: Apache-2.0
"""Seconds from `vllm serve` to the first answer: stock vLLM, and the plugin with compact checkpoints and masks.

    python -m benchmarks.startup --model Qwen3-30B-A3B-2-layers --rounds 4
    python -m benchmarks.startup --dense serving_examples/tiny_qwen3_moe --pruned build/demo/pruned

Arms: "dense" in stock vLLM; "unpruned", the same weights through the plugin as a compact checkpoint that keeps all;
"compact" and "masks", pruned, the latter sliced out of the dense weights while they load. Servers start one at a time,
arms in turn. The first start of each, with an empty cache of vLLM (compiled graphs, our CPU op, timings of kernels), is
a row of its own; the table's figures are of the starts that follow.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import add_models, pruned_models
from benchmarks.random_models import write_dense
from benchmarks.rows import append_csv
from benchmarks.variants import keep_all, write_masks, write_pruned
from benchmarks.vllm_server import serve
from benchmarks.workload import complete

OPTIONS = ("--max-model-len", "512", "--no-enable-prefix-caching", "--disable-uvicorn-access-log")


def seconds_to_answer(model: Path, plugins: str | None, options: list[str], log: Path) -> float:
    """Starts a server, asks it for one token, stops it."""
    begin = time.perf_counter()
    with serve(model, *OPTIONS, *options, plugins=plugins, log=log) as url:
        complete(url, model, [1, 2, 3], 1)
        return time.perf_counter() - begin


def rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per arm: the first start, and the median, lowest and highest of the others beside dense's."""
    dense = statistics.median(seconds["dense"][1:])
    found = []
    for arm, (first, *later) in seconds.items():
        found.append(
            {
                "arm": arm,
                "first_start_s": round(first, 1),
                "start_s": round(statistics.median(later), 1),
                "start_s_min": round(min(later), 1),
                "start_s_max": round(max(later), 1),
                "more_than_dense_s": round(statistics.median(later) - dense, 1),
                "rounds": len(later),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--rounds", type=int, default=4, help="starts of each arm after the first")
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("options", nargs="*", help="further vLLM options for all, after --")
    args = parser.parse_args()
    if args.model:
        args.dense = write_dense(args.model, args.work, weights=True)
    elif not (args.dense and args.pruned):
        parser.error("name a --model, or --dense and --pruned")
    masks, compact = next(iter(pruned_models(args).values()))
    cache = args.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["VLLM_CACHE_ROOT"] = str(cache.resolve())
    arms: dict[str, tuple[Path, str | None, list[str]]] = {
        "dense": (args.dense, "", []),
        "unpruned": (write_pruned(args.dense, keep_all(masks), args.work / "unpruned"), None, []),
        "compact": (compact, None, []),
        "masks": (write_masks(args.dense, masks, args.work / "masks"), None, ["--load-format", "heapr"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(args.rounds + 1):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            model, plugins, options = arms[name]
            log = args.work / f"start-{name}.log"
            seconds[name].append(seconds_to_answer(model, plugins, [*options, *args.options], log))
            print(f"round {number}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    table = rows(seconds)
    for row in table:
        print(
            f"{row['arm']:<9} {row['start_s']:>6.1f} s ({row['start_s_min']:.1f} to {row['start_s_max']:.1f}), "
            f"{row['more_than_dense_s']:+.1f} s; first start {row['first_start_s']:.1f} s"
        )
    if args.csv:
        append_csv(args.csv, [{"model": args.model or args.dense.name, **row} for row in table])


if __name__ == "__main__":
    main()
