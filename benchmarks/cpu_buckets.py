# SPDX-License-Identifier: Apache-2.0
"""Time of one MoE layer on the CPU by number of width buckets, against the native op on unpruned weights.

    python -m benchmarks.cpu_buckets

It is where the constants of `heapr_vllm/model_executor/cpu_moe.py` come from. Weights rotate over several copies, so
that they come from memory and not from the cache; arms are interleaved; the table gives medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from vllm.platforms import current_platform

from heapr_vllm.model_executor.cpu_moe import (
    WIDTH_UNIT,
    cpu_ragged_moe,
    cpu_uniform_moe,
    native_isa,
    prepack,
    stored_widths,
)
from heapr_vllm.model_executor.layout import RaggedLayout, bucketed
from heapr_vllm.model_executor.reference import ragged_moe_reference

COPIES = 4


def ragged_widths(num_experts: int, full: int, kept: float) -> list[int]:
    """A spread of widths, multiples of 16, whose mean is `kept` of `full`."""
    position = torch.linspace(-1, 1, num_experts)
    return ((full * (kept + (1 - kept) * 0.95 * position)) / 16).round().int().mul(16).clamp(0, full).tolist()


def arm(widths: list[int], stored: list[int], hidden: int, dtype: torch.dtype, kernel: str | None) -> Callable:
    """A function of (x, weights, ids) that runs the layer on the next copy of random weights."""
    layout = RaggedLayout.build(widths, stored)
    copies = []
    for _ in range(COPIES):
        w13 = torch.randn(2 * layout.num_rows, hidden).mul_(0.02).to(dtype)
        w2 = torch.randn(layout.num_rows, hidden).mul_(0.02).to(dtype)
        if kernel:
            prepack(w13, w2, layout, kernel)
        copies.append((w13, w2))
    slots = torch.tensor(layout.slots, dtype=torch.int32)
    table = torch.tensor(layout.bucket_table() if kernel else layout.expert_table(), dtype=torch.int32)
    turn = 0

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        nonlocal turn
        turn += 1
        w13, w2 = copies[turn % COPIES]
        output = torch.empty_like(x)
        if kernel is None:
            ragged_moe_reference(x, w13, w2, weights, ids, slots, table)
        elif layout.is_uniform:
            cpu_uniform_moe(output, x, w13, w2, weights, ids, len(widths), kernel)
        else:
            cpu_ragged_moe(output, x, w13, w2, weights, ids, slots, table, kernel)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--kept", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    current_platform.import_kernels()
    dtype = getattr(torch, args.dtype)
    isa = native_isa(dtype, args.hidden)
    widths = ragged_widths(args.experts, args.width, args.kept)
    chosen = len(set(stored_widths(widths, args.top_k, args.hidden, dtype.itemsize)) - {0})
    full = [args.width] * args.experts
    arms = {"unpruned": arm(full, full, args.hidden, dtype, isa)}
    arms |= {f"{n} bucket{'s' * (n > 1)}": arm(widths, bucketed(widths, WIDTH_UNIT, n), args.hidden, dtype, isa)
             for n in (1, 2, 3, 6, args.experts)}
    arms["torch reference"] = arm(widths, widths, args.hidden, dtype, None)
    print(f"{args.experts} experts, top-{args.top_k}, hidden {args.hidden}, width {args.width}, kept "
          f"{sum(widths) / sum(full):.2f}, {args.dtype}, isa {isa}, {torch.get_num_threads()} threads; "
          f"the plugin would take {chosen} bucket(s)")
    print(f"{'speed against unpruned':<24}" + "".join(f"{f'M={tokens}':>16}" for tokens in args.tokens))
    columns = []
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden, dtype=dtype)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(args.repeats + 2):
            weights, ids = torch.rand(tokens, args.experts).topk(args.top_k)
            ids = ids.int()
            for name, run in arms.items():
                start = time.perf_counter()
                run(x, weights, ids)
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - start)
        columns.append({name: statistics.median(values) for name, values in seconds.items()})
    for name in arms:
        cells = (f"{column['unpruned'] / column[name]:>6.2f}x {1e3 * column[name]:>6.2f} ms" for column in columns)
        print(f"{name:<24}" + "".join(cells))


if __name__ == "__main__":
    main()
