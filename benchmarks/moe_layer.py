# SPDX-License-Identifier: Apache-2.0
"""Time of one MoE layer: ragged kernels against stock vLLM, at the sizes of the paper's models.

    python -m benchmarks.moe_layer --csv benchmarks/results/moe_layer.csv          # --quick: a few minutes
    python -m benchmarks.plot_moe_layer benchmarks/results/moe_layer.csv -o moe_layer.png

Arms, interleaved in one process: vLLM's Triton MoE as shipped, with its H200 file where this GPU has none, and tuned;
the same on the pruned weights at full width, zeros in place of the pruned neurons ("zeroed"); FlashInfer's CUTLASS
MoE; ours on unpruned and on ragged weights, and with --quantize on their like in 8 or 4 bits, beside what vLLM runs for
unpruned experts in FP8 blocks and, by Marlin, in 4 bits; and tuned vLLM on a model of uniformly narrower experts of the
same size.
Stock on zeroed weights is what an engine without variable widths gets from pruning, ours unpruned is our engineering
without pruning, and `vs_unpruned` is pruning without engineering. Both sides get the same tuning time per token count.
Calls run as CUDA graphs over several weight copies and freshly routed batches (normal tokens, uniformly random
routing), so weights come from memory and not from L2. Arms that cannot run here are left out with the reason: PyTorch
and Triton are enough for ours. `--device cpu` is `benchmarks.cpu_layer` and takes its options; for a look at this one
without a GPU:

    TRITON_INTERPRET=1 python -m benchmarks.moe_layer --shape tiny --tokens 1 8 --tune-seconds 0
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from benchmarks import stock_moe
from benchmarks.roofline import Peaks, measure_peaks, work
from benchmarks.rows import append_csv
from benchmarks.stock_moe import UniformLayer
from benchmarks.stock_quantized_moe import OPPONENTS as QUANTIZED_OPPONENTS
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.tuning.jobs import Job, jobs_of_shapes, with_rounded_activations
from heapr_vllm.model_executor.tuning.search import batches_for, tune
from heapr_vllm.model_executor.tuning.stopwatch import interleave, stopwatch
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, Batch, MoEShape, SyntheticLayer, ragged_widths

TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 8192)
QUICK_TOKENS = (1, 64, 1024, 8192)
COPIES = 2
TUNED = "vllm tuned"
UNPRUNED = "heapr unpruned"
A8 = "-a8"  # activations rounded to 8 bits too, as the kernel triton_a8 does
QUANTIZE = ("int8", "fp8", "int4", f"int8{A8}", f"fp8{A8}")
TOLERANCE = 0.02  # of the largest output
ROUNDING = {"int8": 0.05, "fp8": 0.1, "int4": 0.25}  # the same, where experts or activations are rounded


@dataclass(frozen=True)
class Arm:
    """One line of the table. `run(batch, copy)` gives the output; `widths` are what it stores.

    `sparsity`: whose output it must give, to `tolerance` of the largest; None for a model of its own. `scheme`: how it
    stores experts.
    """

    name: str
    widths: list[int]
    run: Callable[[Batch, int], torch.Tensor]
    sparsity: float | None
    config: stock_moe.Config | None = None
    scheme: ExpertScheme | None = None
    tolerance: float = TOLERANCE


def ours(layer: SyntheticLayer) -> Callable[[Batch, int], torch.Tensor]:
    def run(batch: Batch, copy: int) -> torch.Tensor:
        output = torch.empty_like(batch.x)
        triton_ragged_moe(output, *layer.arguments(batch, copy), steps=layer.steps)
        return output

    return run


def as_uniform(layer: SyntheticLayer) -> UniformLayer:
    """The same experts in vLLM's layout, at the unpruned width: pruned neurons are zero."""
    experts, _, hidden, full = layer.moe
    w1 = [copy.w13.new_zeros(experts, 2, full, hidden) for copy in layer.copies]
    w2 = [copy.w2.new_zeros(experts, hidden, full) for copy in layer.copies]
    layout = RaggedLayout.build(layer.widths, layer.widths)
    for expert in (expert for expert, width in enumerate(layer.widths) if width):
        row, width = layout.place(expert)
        for copy, packed in enumerate(layer.copies):
            w1[copy][expert, :, :width] = packed.w13[2 * row : 2 * (row + width)].view(width, 2, hidden).transpose(0, 1)
            slabs = packed.w2[row : row + width].view(-1, hidden, TRITON_UNIT)
            w2[copy][expert, :, :width] = slabs.transpose(0, 1).reshape(hidden, width)
    return UniformLayer(layer.moe, [weight.flatten(1, 2) for weight in w1], w2)


class Contest:
    """All arms of one model shape."""

    def __init__(
        self,
        moe: MoEShape,
        sparsities: list[float],
        dtype: torch.dtype,
        device: torch.device,
        stock: bool,
        quantize: Sequence[str] = (),
    ) -> None:
        self.moe = moe
        full = moe.moe_intermediate_size
        self.ragged = {
            sparsity: SyntheticLayer.build(moe, ragged_widths(moe.num_experts, full, sparsity), dtype, device, COPIES)
            for sparsity in (0.0, *sparsities)
        }
        self.quantized = [
            (sparsity, quantized_layer(moe, layer.widths, dtype, device, name))
            for name, (sparsity, layer) in product(quantize, self.ragged.items())
        ]
        self.full: dict[float, UniformLayer] = {}
        self.narrow: dict[float, UniformLayer] = {}
        if stock:
            self.full = {sparsity: as_uniform(layer) for sparsity, layer in self.ragged.items()}
            self.narrow = {
                sparsity: UniformLayer.build(moe, round(full * (1 - sparsity) / 32) * 32, dtype, device, COPIES)
                for sparsity in sparsities
            }
        self.quantize = quantize
        has_flashinfer = stock and importlib.util.find_spec("flashinfer") is not None
        self.swapped = self.full[0.0].swapped() if has_flashinfer else None

    @property
    def stock_shapes(self) -> list[UniformLayer]:
        """One layer of every shape that the opponents run."""
        return [*list(self.full.values())[:1], *self.narrow.values()]

    def arms(self, batches: list[Batch], configs: Path, tune_seconds: float) -> list[Arm]:
        """Arms that run here and agree with the reference, stock ones tuned first if `tune_seconds` is not 0.

        Raises RuntimeError if ours do not.
        """
        ragged = [Arm(_name(sparsity), layer.widths, ours(layer), sparsity) for sparsity, layer in self.ragged.items()]
        quantized = [(quantized_arm(sparsity, layer), layer) for sparsity, layer in self.quantized]
        expected = {sparsity: layer.expected(batches[0]) for sparsity, layer in self.ragged.items()}
        found = [
            arm
            for arm in [*self.opponents(batches, configs, tune_seconds), *ragged]
            if arm.sparsity is None or _is_right(arm, batches[0], expected[arm.sparsity])
        ]
        found += [arm for arm, layer in quantized if _is_right(arm, batches[0], layer.expected(batches[0]))]
        if missing := {arm.name for arm in [*ragged, *(arm for arm, _ in quantized)]} - {arm.name for arm in found}:
            raise RuntimeError(f"{', '.join(missing)} is wrong here; run make test-gpu")
        return found

    def opponents(self, batches: list[Batch], configs: Path, tune_seconds: float) -> list[Arm]:
        """Stock arms, the zeroed ones with the best configuration there is for their shape."""
        if not self.full:
            return []

        def tuned(layer: UniformLayer) -> stock_moe.Config | None:
            return stock_moe.tuned_config(layer, batches, configs, tune_seconds) if tune_seconds else None

        dense, full = self.full[0.0], [self.moe.moe_intermediate_size] * self.moe.num_experts
        from_file, best = stock_moe.h200_config(dense, len(batches[0].x)), tuned(dense)
        found = [Arm("vllm", full, dense.vllm, 0.0)]
        if from_file:
            found.append(Arm("vllm H200 file", full, dense.vllm, 0.0, from_file))
        if self.swapped:
            found.append(Arm("flashinfer_cutlass", full, self.swapped.flashinfer, 0.0))
        if best:
            found.append(Arm(TUNED, full, dense.vllm, 0.0, best))
        found += self.quantized_opponents(full)
        found += [
            Arm(f"vllm zeroed {sparsity:.0%}", full, layer.vllm, sparsity, best or from_file)
            for sparsity, layer in self.full.items()
            if sparsity
        ]
        if best:
            found += [
                Arm(
                    f"{TUNED}, uniformly {sparsity:.0%} narrower",
                    [layer.width] * self.moe.num_experts,
                    layer.vllm,
                    None,
                    tuned(layer),
                )
                for sparsity, layer in self.narrow.items()
            ]
        return found

    def quantized_opponents(self, widths: list[int]) -> list[Arm]:
        """Stock arms on the unpruned experts, rounded to FP8 or to 4 bits if ours are too."""
        found = []
        for name in [each for each in self.quantize if each in QUANTIZED_OPPONENTS]:
            title, kind = QUANTIZED_OPPONENTS[name]
            scheme = ExpertScheme.for_hidden_size(name, self.moe.hidden_size)
            try:
                layer = kind.of(self.full[0.0])
            except Exception as error:  # as in `_is_right`
                print(f"{title} is left out: {type(error).__name__}: {error}")
                continue
            found.append(Arm(title, widths, layer.vllm, 0.0, scheme=scheme, tolerance=ROUNDING[name]))
        return found


def quantized_layer(
    moe: MoEShape, widths: list[int], dtype: torch.dtype, device: torch.device, name: str
) -> SyntheticLayer:
    """Our experts as `--quantize` names them."""
    scheme = ExpertScheme.for_hidden_size(name.removesuffix(A8), moe.hidden_size)
    activation_bits = 8 if name.endswith(A8) else None
    return SyntheticLayer.build(moe, widths, dtype, device, COPIES, scheme, activation_bits)


def quantized_arm(sparsity: float, layer: SyntheticLayer) -> Arm:
    """Our arm on them, which must give what codes and scales say, but for the rounding of activations."""
    assert layer.scheme is not None
    rounds = layer.steps.activation_bits is not None
    tolerance = ROUNDING[layer.scheme.name] if rounds else TOLERANCE
    name = f"{_name(sparsity)} {layer.scheme.name}{A8 * rounds}"
    return Arm(name, layer.widths, ours(layer), None, scheme=layer.scheme, tolerance=tolerance)


def _name(sparsity: float) -> str:
    return f"heapr {sparsity:.0%} pruned" if sparsity else UNPRUNED


def _is_right(arm: Arm, batch: Batch, expected: torch.Tensor) -> bool:
    """Whether `arm` runs here and agrees with the expected output; says why not."""
    try:
        with stock_moe.using(arm.config):
            output = arm.run(batch, 0)
    except Exception as error:  # whatever keeps an opponent from running here is printed, and the others go on
        print(f"{arm.name} is left out: {type(error).__name__}: {error}")
        return False
    error = float((output.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error < arm.tolerance:
        print(f"{arm.name} is left out: its output is off by {error:.1%}")
    return error < arm.tolerance


def tuning_jobs(shape: str, sparsities: list[float], dtype: torch.dtype, quantize: Sequence[str]) -> list[Job]:
    """What to find tiles for: all of our arms."""
    jobs = jobs_of_shapes([shape], sparsities, dtype)
    for name in quantize:
        found = jobs_of_shapes([shape], sparsities, dtype, quantize=name.removesuffix(A8))
        jobs += with_rounded_activations(found) if name.endswith(A8) else found
    return jobs


def measure(arms: list[Arm], moe: MoEShape, batches: list[Batch], peaks: Peaks, rounds: int) -> list[dict]:
    """One row per arm. `vs_baseline`: time over that of `baseline`, which is tuned vLLM or, without it, ours unpruned.

    `vs_unpruned`: time over that of ours unpruned. `experts_hit`: distinct experts per call. `kept`: stored fraction of
    the neurons, zeros included; `kept_routed`: the same weighted by routing, that is, the executed fraction;
    `roofline`: least possible time over time.
    """
    watches = {}
    for arm in arms:
        with stock_moe.using(arm.config):
            watches[arm.name] = stopwatch(
                [lambda arm=arm, i=i, b=b: arm.run(b, i) for i, b in enumerate(batches)], batches[0].x.device
            )
    interleave(watches, max(rounds // 5, 1))
    seconds = interleave(watches, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = TUNED if TUNED in medians else UNPRUNED
    rows = []
    for arm in arms:
        todo = work(moe, arm.widths, batches, arm.scheme)
        median, ordered = medians[arm.name], sorted(seconds[arm.name])
        spread = (ordered[9 * len(ordered) // 10] - ordered[len(ordered) // 10]) / median
        rows.append(
            {
                "tokens": len(batches[0].x),
                "arm": arm.name,
                "dtype": str(batches[0].x.dtype).split(".")[1],
                "microseconds": round(1e6 * median, 2),
                "spread": round(spread, 3),
                "baseline": baseline,
                "vs_baseline": round(median / medians[baseline], 3),
                "vs_unpruned": round(median / medians[UNPRUNED], 3),
                "kept": round(sum(arm.widths) / moe.num_experts / moe.moe_intermediate_size, 3),
                "kept_routed": round(todo.routed_width / moe.moe_intermediate_size, 3),
                "experts_hit": round(todo.experts, 1),
                "floor_us": round(1e6 * todo.floor(peaks), 2),
                "roofline": float(f"{todo.floor(peaks) / median:.3g}"),
                "tflops": round(todo.flops / median / 1e12, 1),
                "rounds": rounds,
            }
        )
    return rows


def show(shape: str, rows: list[dict]) -> None:
    print(f"\n{shape}, {rows[0]['tokens']} tokens, {rows[0]['experts_hit']:.0f} experts hit")
    for row in rows:
        print(
            f"  {row['arm']:<36} {row['microseconds']:>10.1f} us  x{row['vs_baseline']:<6} "
            f"(x{row['vs_unpruned']:<6} of {UNPRUNED})  kept {row['kept']:.2f} "
            f"(routed {row['kept_routed']:.2f})  {row['roofline']:>4.0%} of roofline  {row['tflops']:>6.1f} TFLOP/s  "
            f"spread {row['spread']:.0%}",
            flush=True,
        )


def main() -> None:
    device_parser = argparse.ArgumentParser(add_help=False)
    device_parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: as `benchmarks.cpu_layer`")
    chosen, others = device_parser.parse_known_args()
    if chosen.device == "cpu":
        from benchmarks import cpu_layer  # needs vLLM

        return cpu_layer.main(others)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[device_parser]
    )
    parser.add_argument(
        "--shape", nargs="+", choices=PAPER_SHAPES, default=[name for name in PAPER_SHAPES if name != "tiny"]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--quantize", nargs="*", default=[], choices=QUANTIZE, help="ours, quantized, too")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--tune-seconds", type=float, default=6, help="per arm and token count; 0: tune nothing")
    parser.add_argument("--configs", type=Path, default=Path("build/tile_configs"), help="tuned tiles of both sides")
    parser.add_argument("--quick", action="store_true", help="two shapes, four token counts, less tuning")
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.tune_seconds, args.rounds = QUICK_TOKENS, min(args.tune_seconds, 1.5), 21
        args.shape = args.shape[:2]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("torch sees no GPU; for a look without one set TRITON_INTERPRET=1 and pass --shape tiny")
    dtype = getattr(torch, args.dtype if device.type == "cuda" else "float16")
    os.environ["HEAPR_CONFIG_FOLDER"] = str(args.configs)
    torch.manual_seed(0)
    if reason := stock_moe.why_missing():
        print(f"stock vLLM is left out: {reason}")
    peaks = measure_peaks(device, dtype)
    print(f"measured peaks: {peaks.bandwidth / 1e12:.2f} TB/s, {peaks.flops / 1e12:.0f} TFLOP/s")
    for shape in args.shape:
        moe = PAPER_SHAPES[shape]
        if args.tune_seconds:
            jobs = tuning_jobs(shape, [0.0, *args.sparsity], dtype, args.quantize)
            tune(jobs, args.tokens, args.configs, args.tune_seconds * len(jobs) * len(args.tokens))
        contest = Contest(moe, args.sparsity, dtype, device, reason is None, args.quantize)
        if args.tune_seconds:
            stock_moe.compile_all([(layer, tokens) for layer in contest.stock_shapes for tokens in args.tokens])
        for tokens in args.tokens:
            batches = batches_for(contest.ragged[0.0], tokens)
            arms = contest.arms(batches, args.configs, args.tune_seconds)
            rows = measure(arms, moe, batches, peaks, args.rounds if device.type == "cuda" else 3)
            show(shape, rows)
            if args.csv:
                append_csv(args.csv, [{"shape": shape, **row} for row in rows])
        del contest


if __name__ == "__main__":
    main()
