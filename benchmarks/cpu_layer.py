# SPDX-License-Identifier: Apache-2.0
"""Time of one MoE layer on the CPU: our compiled op and width buckets against vLLM's native op on unpruned weights.

    python -m benchmarks.cpu_layer --csv benchmarks/results/cpu_layer.csv
    python -m benchmarks.cpu_layer --sparsity 0.25 --buckets 1 2 3 6 32

The second command is where the constants of `kernels/cpu_native.py` come from. Arms are interleaved in
one process. Weights rotate over several copies, so that they come from memory and not from the cache. The table gives
medians, and the load of the machine: above the number of threads the figures mean little.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.platforms import current_platform

from benchmarks.rows import append_csv
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.kernels.cpu_native import WIDTH_UNIT, bucketed, cpu_uniform_moe, native_isa
from heapr_vllm.model_executor.kernels.op import RAGGED, index_tables, pack, ragged_moe, stored_widths
from heapr_vllm.model_executor.kernels.reference import ragged_moe_reference
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.tuning.stopwatch import interleave, stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape, ragged_widths, random_batch

COPIES = 4
STOCK = "vllm"


@dataclass(frozen=True)
class Arm:
    """One line of the table: copies of a layer's weights, random and packed for `kernel`."""

    kernel: str
    layout: RaggedLayout
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    slots: torch.Tensor
    table: torch.Tensor

    @classmethod
    def build(cls, moe: MoEShape, widths: list[int], stored: list[int], dtype: torch.dtype, kernel: str) -> "Arm":
        """Raises RuntimeError if the arm's output is off by more than 2 % of the largest one."""
        layout = RaggedLayout.build(widths, stored)
        weights = [
            tuple(
                torch.randn(rows, moe.hidden_size).mul_(moe.hidden_size**-0.5).to(dtype)
                for rows in (2 * layout.num_rows, layout.num_rows)
            )
            for _ in range(COPIES)
        ]
        slots = torch.tensor([*layout.slots, layout.num_slots], dtype=torch.int32)
        batch = random_batch(8, moe, dtype, torch.device("cpu"))
        expected = ragged_moe_reference(*_arguments(batch, weights[0]), slots, torch.tensor(layout.expert_table()))
        for copy in weights:
            pack(kernel, *copy, layout)
        arm = cls(kernel, layout, weights, *index_tables(kernel, layout.slots, layout))
        error = float((arm.run(batch, 0).double() - expected.double()).abs().max() / expected.double().abs().max())
        if not error < 0.02:
            raise RuntimeError(f"kernel {kernel} is off by {error:.1%} at stored widths {stored}")
        return arm

    def run(self, batch: Batch, copy: int) -> torch.Tensor:
        output = torch.empty_like(batch.x)
        arguments = _arguments(batch, self.weights[copy % COPIES])
        if self.kernel != RAGGED and self.layout.is_uniform:
            cpu_uniform_moe(output, *arguments, len(self.layout.widths), self.kernel)
        else:
            ragged_moe(output, *arguments, self.slots, self.table, self.layout.max_width, self.kernel)
        return output


def _arguments(batch: Batch, weights: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return batch.x, *weights, batch.topk_weights, batch.topk_ids


def build_arms(moe: MoEShape, sparsities: list[float], buckets: list[int], dtype: torch.dtype) -> dict[str, Arm]:
    """vLLM's op on unpruned weights; ours, if it compiles, on unpruned and ragged ones; ragged ones in buckets."""
    full = moe.moe_intermediate_size
    isa = native_isa(dtype, moe.hidden_size)
    dense = [full] * moe.num_experts
    arms = {STOCK: Arm.build(moe, dense, dense, dtype, isa)}
    for sparsity in (0.0, *sparsities):
        widths = ragged_widths(moe.num_experts, full, sparsity, unit=16)
        name = f"{sparsity:.0%} pruned" if sparsity else "unpruned"
        if extension.load():
            stored = stored_widths(RAGGED, widths, moe.top_k, moe.hidden_size, dtype.itemsize)
            arms[f"heapr {name}"] = Arm.build(moe, widths, stored, dtype, RAGGED)
        for count in buckets if sparsity else ():
            arms[f"{name} in {count} buckets"] = Arm.build(moe, widths, bucketed(widths, WIDTH_UNIT, count), dtype, isa)
    return arms


def measure(arms: dict[str, Arm], batches: list[Batch], moe: MoEShape, rounds: int) -> list[dict]:
    """One row per arm. `vs_vllm` is the time of vLLM's op on unpruned weights over the arm's; `kept` counts padding."""
    device = torch.device("cpu")
    watches = {
        name: stopwatch(
            [lambda arm=arm, i=i, batch=batch: arm.run(batch, i) for i, batch in enumerate(batches)], device
        )
        for name, arm in arms.items()
    }
    seconds = interleave(watches, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name, arm in arms.items():
        ordered = sorted(seconds[name])
        spread = (ordered[9 * rounds // 10] - ordered[rounds // 10]) / medians[name]
        rows.append(
            {
                "tokens": len(batches[0].x),
                "threads": torch.get_num_threads(),
                "arm": name,
                "microseconds": round(1e6 * medians[name], 1),
                "spread": round(spread, 3),
                "vs_vllm": round(medians[STOCK] / medians[name], 3),
                "kept": round(arm.layout.num_rows / moe.num_experts / moe.moe_intermediate_size, 3),
                "load": round(os.getloadavg()[0], 2),
                "rounds": rounds,
            }
        )
    return rows


def timings(
    arms: dict[str, Arm],
    moe: MoEShape,
    dtype: torch.dtype,
    tokens: list[int],
    threads: list[int],
    rounds: int,
    show: Callable[[dict], None],
) -> list[dict]:
    """Rows of all token and thread counts; `show` gets each one at once."""
    rows = []
    default = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            for count in tokens:
                batches = [random_batch(count, moe, dtype, torch.device("cpu")) for _ in range(COPIES)]
                for row in measure(arms, batches, moe, rounds):
                    show(row)
                    rows.append(row)
    finally:
        torch.set_num_threads(default)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--buckets", type=int, nargs="*", default=[], help="numbers of buckets for vLLM's op")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args(arguments)
    current_platform.import_kernels()
    torch.manual_seed(0)
    moe, dtype = MoEShape(args.experts, args.top_k, args.hidden, args.width), getattr(torch, args.dtype)
    shape = f"{args.experts} experts, top-{args.top_k}, hidden {args.hidden}, width {args.width}"
    print(f"{shape}, {args.dtype}, vLLM's op: {native_isa(dtype, args.hidden)}, ours: {build.isa()}")

    def show(row: dict) -> None:
        print(
            f"  {row['threads']} threads, {row['tokens']:>4} tokens  {row['arm']:<26}{row['microseconds']:>9.0f} us  "
            f"{row['vs_vllm']:>5.2f}x  kept {row['kept']:.2f}  spread {row['spread']:>4.0%}  load {row['load']:.1f}",
            flush=True,
        )

    arms = build_arms(moe, args.sparsity, args.buckets, dtype)
    rows = timings(arms, moe, dtype, args.tokens, args.threads, args.rounds, show)
    if args.csv:
        append_csv(args.csv, [{"shape": shape, "dtype": args.dtype, **row} for row in rows])


if __name__ == "__main__":
    main()
