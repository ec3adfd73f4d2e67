# SPDX-License-Identifier: Apache-2.0
"""Time of one MoE layer on the CPU: our compiled op and width buckets against vLLM's native op on unpruned weights.

    python -m benchmarks.cpu_layer --csv benchmarks/results/cpu_layer_arms.csv
    python -m benchmarks.cpu_layer --sparsity 0.25 --buckets 1 2 3 6 32
    python -m benchmarks.cpu_layer --experts 128 --top-k 8 --hidden 2048 --quantize int8 --copies 1 --threads 1 2

The second command is where the constants of `kernels/cpu_native.py` come from. Arms are interleaved in
one process: vLLM's op on unpruned weights, ours on the same widths (engineering without pruning), and per sparsity
vLLM's op on full-width weights with zeros in place of the pruned neurons ("vllm zeroed", what pruning gives an engine
without variable widths) and ours on the ragged ones (`vs_unpruned`: pruning without engineering). --quantize adds ours
on quantized experts, with 8-bit activations too ("a8") where the CPU has the instruction. Tokens are normal and routing
is uniformly random. Weights rotate over several copies, so that they come from memory and not from the cache. The table
gives medians, and the load of the machine: above the number of threads the figures mean little.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from vllm.platforms import current_platform

from benchmarks.roofline import work
from benchmarks.rows import append_csv
from heapr_vllm.formats.quantized import BITWISE, NAMES, PACKED_DTYPE, ZERO_BYTE_4_BITS, ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales, slots_table
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.model_executor.kernels.cpu_compiled.a8_kernel import CompiledA8Kernel
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
from heapr_vllm.model_executor.kernels.cpu_native import WIDTH_UNIT, NativeKernel, bucketed, native_isa
from heapr_vllm.model_executor.kernels.op import register_op
from heapr_vllm.model_executor.kernels.reference import ragged_moe_reference
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.tuning.stopwatch import interleave, stopwatch
from heapr_vllm.model_executor.tuning.synthetic import Batch, MoEShape, ragged_widths, random_batch

COPIES = 4
STOCK = "vllm"
UNPRUNED = "heapr unpruned"


@dataclass(frozen=True)
class Arm:
    """One line of the table: copies of a layer's weights, random and packed for `kernel`."""

    kernel: RaggedKernel
    layout: RaggedLayout
    copies: list[ExpertRows]
    slots: torch.Tensor

    @classmethod
    def build(
        cls,
        moe: MoEShape,
        widths: list[int],
        stored: list[int],
        dtype: torch.dtype,
        kernel: RaggedKernel,
        copies: int = COPIES,
        scheme: ExpertScheme | None = None,
    ) -> "Arm":
        """Neurons past `widths` are zero. Raises RuntimeError if the output is off by over 3 %, as vectors are."""
        narrow, wide = RaggedLayout.build(widths, widths), RaggedLayout.build(widths, stored)
        plain = [_random_rows(narrow, moe.hidden_size, dtype, scheme) for _ in range(copies)]
        batch = random_batch(8, moe, dtype, torch.device("cpu"))
        routes = Routes(batch.topk_weights, batch.topk_ids, slots_table(narrow.slots, narrow))
        expected = ragged_moe_reference(batch.x, routes, plain[0]).double()
        slots, table = kernel.index_tables(wide.slots, wide)
        packed = [_widened(rows, narrow, wide, table) for rows in plain]
        for rows in packed:
            kernel.pack(rows.w13, rows.w2, wide, rows.scales)
        arm = cls(kernel, wide, packed, slots)
        error = float((arm.run(batch, 0).double() - expected).norm() / expected.norm())
        if not error < 0.03:
            raise RuntimeError(f"kernel {kernel.name} is off by {error:.1%} at stored widths {stored}")
        return arm

    def run(self, batch: Batch, copy: int) -> torch.Tensor:
        output = torch.empty_like(batch.x)
        routes = Routes(batch.topk_weights, batch.topk_ids, self.slots)
        self.kernel.run_in_graph(output, batch.x, routes, self.copies[copy % len(self.copies)])
        return output


def _random_rows(
    layout: RaggedLayout, hidden_size: int, dtype: torch.dtype, scheme: ExpertScheme | None = None
) -> ExpertRows:
    w13 = torch.randn(2 * layout.num_rows, hidden_size).mul_(hidden_size**-0.5).to(dtype)
    w2 = torch.randn(layout.num_rows, hidden_size).mul_(hidden_size**-0.5).to(dtype)
    table = torch.tensor(layout.expert_table())
    if scheme is None:
        return ExpertRows(w13, w2, table, layout.max_width)
    (w13, w13_scale), (w2, w2_scale) = _quantized(w13, scheme), _quantized(w2, scheme)
    return ExpertRows(w13, w2, table, layout.max_width, scales=Scales(w13_scale, w2_scale))


def _quantized(rows: torch.Tensor, scheme: ExpertScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales by group of neurons' rows; a few of them at a time, since all in float32 may be too large."""
    parts = [scheme.quantize(part, "w1") for part in rows.split(8192)]
    codes = torch.cat([codes.view(BITWISE) for codes, _ in parts]).view(scheme.code_dtype)
    return codes, torch.cat([scale for _, scale in parts])


def _widened(rows: ExpertRows, narrow: RaggedLayout, wide: RaggedLayout, table: torch.Tensor) -> ExpertRows:
    """The experts of `narrow` at their places in `wide`; after them zeros, of scale 1."""
    scales = None
    if rows.scales:
        scales = Scales(
            _widened_rows(rows.scales.w13, narrow, wide, 2, 1), _widened_rows(rows.scales.w2, narrow, wide, 1, 1)
        )
    zero = ZERO_BYTE_4_BITS if rows.w2.dtype == PACKED_DTYPE else 0
    return ExpertRows(
        _widened_rows(rows.w13, narrow, wide, 2, zero),
        _widened_rows(rows.w2, narrow, wide, 1, zero),
        table,
        wide.max_width,
        len(wide.widths) if wide.is_uniform else 0,
        scales,
    )


def _widened_rows(
    rows: torch.Tensor, narrow: RaggedLayout, wide: RaggedLayout, blocks: int, padding: int
) -> torch.Tensor:
    """`rows`: [blocks * rows, C], of each expert as many blocks of its width."""
    result = rows.new_full((blocks * wide.num_rows, rows.shape[1]), padding)
    for expert, width in enumerate(narrow.widths):
        if not width:
            continue
        (source, _), (target, stored) = narrow.place(expert), wide.place(expert)
        kept = rows[blocks * source : blocks * (source + width)].unflatten(0, (blocks, width))
        result[blocks * target : blocks * (target + stored)].unflatten(0, (blocks, stored))[:, :width] = kept
    return result


def build_arms(
    moe: MoEShape,
    sparsities: list[float],
    buckets: list[int],
    dtype: torch.dtype,
    quantize: Sequence[str] = (),
    copies: int = COPIES,
) -> dict[str, Arm]:
    """vLLM's op on unpruned and zeroed weights; ours, if it compiles, on unpruned and ragged ones; buckets."""
    full = moe.moe_intermediate_size
    native, compiled = NativeKernel(), CompiledKernel()
    dense = [full] * moe.num_experts
    arms = {STOCK: Arm.build(moe, dense, dense, dtype, native, copies)}
    for sparsity in (0.0, *sparsities):
        widths = ragged_widths(moe.num_experts, full, sparsity, unit=16)
        name = f"{sparsity:.0%} pruned" if sparsity else "unpruned"
        if sparsity:
            arms[f"{STOCK} zeroed {sparsity:.0%}"] = Arm.build(moe, widths, dense, dtype, native, copies)
        if compiled.machine_obstacle() is None:
            stored = compiled.stored_widths(widths)
            ours = f"heapr {name}"
            arms[ours] = Arm.build(moe, widths, stored, dtype, compiled, copies)
            for kind, kernel in product(quantize, (compiled, CompiledA8Kernel())):
                scheme = ExpertScheme.for_hidden_size(kind, moe.hidden_size)
                if kernel.machine_obstacle() or kernel.layer_obstacle(dtype, moe.hidden_size, scheme):
                    continue
                suffix = f" a{kernel.activation_bits}" if kernel.activation_bits else ""
                arms[f"{ours} {kind}{suffix}"] = Arm.build(
                    moe, widths, kernel.stored_widths(widths), dtype, kernel, copies, scheme
                )
        for count in buckets if sparsity else ():
            stored = bucketed(widths, WIDTH_UNIT, count)
            arms[f"{name} in {count} buckets"] = Arm.build(moe, widths, stored, dtype, native, copies)
    return arms


def measure(arms: dict[str, Arm], batches: list[Batch], moe: MoEShape, rounds: int) -> list[dict]:
    """One row per arm. `vs_vllm`: time of vLLM's op on unpruned weights over the arm's; `vs_unpruned`: that of ours.

    `kept`: stored fraction of the neurons, padding and zeros included; `kept_routed`: the same weighted by routing;
    `experts_hit`: distinct experts per call.
    """
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
        todo = work(
            moe,
            [arm.layout.place(e)[1] if slot < arm.layout.num_slots else 0 for e, slot in enumerate(arm.layout.slots)],
            batches,
        )
        rows.append(
            {
                "tokens": len(batches[0].x),
                "threads": torch.get_num_threads(),
                "arm": name,
                "microseconds": round(1e6 * medians[name], 1),
                "spread": round(spread, 3),
                "vs_vllm": round(medians[STOCK] / medians[name], 3),
                "vs_unpruned": round(medians[UNPRUNED] / medians[name], 3) if UNPRUNED in medians else "",
                "kept": round(arm.layout.num_rows / moe.num_experts / moe.moe_intermediate_size, 3),
                "kept_routed": round(todo.routed_width / moe.moe_intermediate_size, 3),
                "experts_hit": round(todo.experts, 1),
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
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--buckets", type=int, nargs="*", default=[], help="numbers of buckets for vLLM's op")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--quantize", nargs="*", default=[], choices=tuple(NAMES.values()), help="our op on quantized experts too"
    )
    parser.add_argument("--copies", type=int, default=COPIES, help="of the weights; 1 if experts are many and large")
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args(arguments)
    current_platform.import_kernels()
    register_op()
    torch.manual_seed(0)
    moe, dtype = MoEShape(args.experts, args.top_k, args.hidden, args.width), getattr(torch, args.dtype)
    shape = f"{args.experts} experts, top-{args.top_k}, hidden {args.hidden}, width {args.width}"
    print(f"{shape}, {args.dtype}, vLLM's op: {native_isa(dtype, args.hidden)}, ours: {build.isa()}")

    def show(row: dict) -> None:
        print(
            f"  {row['threads']} threads, {row['tokens']:>4} tokens  {row['arm']:<26}{row['microseconds']:>9.0f} us  "
            f"{row['vs_vllm']:>5.2f}x  kept {row['kept']:.2f} (routed {row['kept_routed']:.2f})  "
            f"{row['experts_hit']:.0f} experts  spread {row['spread']:>4.0%}  load {row['load']:.1f}",
            flush=True,
        )

    arms = build_arms(moe, args.sparsity, args.buckets, dtype, args.quantize, args.copies)
    rows = timings(arms, moe, dtype, args.tokens, args.threads, args.rounds, show)
    if args.csv:
        append_csv(args.csv, [{"shape": shape, "dtype": args.dtype, **row} for row in rows])


if __name__ == "__main__":
    main()
