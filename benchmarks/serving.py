# SPDX-License-Identifier: Apache-2.0
"""Output tokens/s of a dense model in stock vLLM and of its pruned version with the plugin.

    python -m benchmarks.serving --pruned build/demo/pruned --dense serving_examples/tiny_qwen3_moe

Both servers run at once with equal options and are asked in turn by `vllm bench serve`, so that a slow moment of the
machine hits both; the ratio is the median over rounds of pruned / dense.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.rows import append_csv
from serving_examples.vllm_server import alternate, serve

SERVE_OPTIONS = ("--no-enable-prefix-caching", "--disable-uvicorn-access-log")


def compare(dense: Path, pruned: Path, *, concurrencies: list[int], rounds: int, input_len: int, output_len: int,
            requests: int, options: list[str], log_dir: Path) -> list[dict]:
    """One row per concurrency: medians of both arms, and the median and range of the per-round ratios.

    `requests` is the number of requests per round, at least four per concurrent stream.
    """
    rows = []
    with (serve(dense, *SERVE_OPTIONS, *options, log=log_dir / "dense.log", plugins="") as dense_url,
          serve(pruned, *SERVE_OPTIONS, *options, log=log_dir / "pruned.log") as pruned_url):
        for concurrency in concurrencies:
            speeds = alternate({"dense": (dense_url, dense), "pruned": (pruned_url, pruned)}, rounds,
                               concurrency=concurrency, num_prompts=max(requests, 4 * concurrency),
                               input_len=input_len, output_len=output_len)
            ratios = [p / d for p, d in zip(speeds["pruned"], speeds["dense"], strict=True)]
            rows.append({"batch": concurrency, "dense_tok_s": round(statistics.median(speeds["dense"]), 1),
                         "pruned_tok_s": round(statistics.median(speeds["pruned"]), 1),
                         "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
                         "ratio_max": round(max(ratios), 3), "rounds": rounds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="concurrent requests")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=8, help="per round, at least four per concurrent stream")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    parser.add_argument("--log-dir", type=Path, default=Path("build/serving"))
    parser.add_argument("options", nargs="*", help="further `vllm serve` options for both, after --")
    args = parser.parse_args()
    rows = compare(args.dense, args.pruned, concurrencies=args.batch, rounds=args.rounds, input_len=args.input_len,
                   output_len=args.output_len, requests=args.requests, options=args.options, log_dir=args.log_dir)
    for row in rows:
        print(f"batch {row['batch']:>3}: dense {row['dense_tok_s']:.0f} tokens/s, pruned {row['pruned_tok_s']:.0f} "
              f"tokens/s, ratio {row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f} over "
              f"{row['rounds']} rounds)")
    if args.csv:
        append_csv(args.csv, rows)


if __name__ == "__main__":
    main()
