# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of one MoE layer on an H100 or H200: stock vLLM, our kernels before and after November 2026.

    python -m benchmarks.layer_model --csv benchmarks/results/layer_model.csv           # a few minutes on a CPU
    python -m benchmarks.layer_model --against benchmarks/results/moe_layer.csv         # beside what was measured

Needs no GPU and measures nothing: kernels are simulated CTA by CTA (`benchmarks.event_simulation`) with constants most
of which are guesses (`benchmarks.layer_kernels`). Against the published times of one shape it is 3 to 16 % optimistic,
so that ratios are to be trusted to about 10 %, times less. Arms:

    vllm            stock vLLM on unpruned weights, with the tiles of its H200 file if the installed vLLM has one for
                    this shape, on both GPUs; otherwise with its defaults. The column tiles_from says which.
    vllm tuned      the same where there is such a file; elsewhere the fastest, in this model, of its defaults and the
                    tiles of its H200 files for the other shapes
    before          our kernels at commit c9db1ee with Triton up to 3.8: 2-byte loads of W2, old default tiles
    after           our kernels as they are, with the default tiles that the code at hand takes
    after, chained  the same with programmatic dependent launch
"""

import argparse
import csv
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.event_simulation import GPUS
from benchmarks.layer_kernels import AFTER, BEFORE, STOCK, LayerTime, chained, predict
from benchmarks.modelled_tiles import H200_FILE, LayerTiles, stock_candidates, stock_tiles, tiles_after, tiles_before
from benchmarks.moe_layer import TOKENS, TUNED
from benchmarks.rows import append_csv
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, MoEShape, ragged_widths


class Prediction(NamedTuple):
    """One arm of one layer."""

    arm: str
    time: LayerTime
    tiles: LayerTiles

    @property
    def microseconds(self) -> float:
        return 1e6 * self.time.total


@cache
def predict_stock(shape: str, gpu: str, tokens: int, device_file: str = H200_FILE) -> Prediction:
    """Stock vLLM, unpruned, with the tiles that it ships for the device of this name."""
    moe = PAPER_SHAPES[shape]
    return _predict_stock(STOCK.name, moe, gpu, tokens, stock_tiles(moe, tokens, device_file))


@cache
def predict_tuned(shape: str, gpu: str, tokens: int) -> Prediction:
    """Stock vLLM, unpruned, with the fastest of its candidates."""
    moe = PAPER_SHAPES[shape]
    predictions = [_predict_stock(TUNED, moe, gpu, tokens, tiles) for tiles in stock_candidates(moe, tokens)]
    return min(predictions, key=lambda prediction: prediction.time.total)


@cache
def _predict_stock(arm: str, moe: MoEShape, gpu: str, tokens: int, tiles: LayerTiles) -> Prediction:
    widths = [moe.moe_intermediate_size] * moe.num_experts
    return Prediction(arm, predict(STOCK, moe, widths, tokens, GPUS[gpu], tiles), tiles)


@cache
def predict_ours(shape: str, gpu: str, tokens: int, sparsity: float) -> list[Prediction]:
    """Our arms with this share of the layer's neurons pruned."""
    moe = PAPER_SHAPES[shape]
    widths = ragged_widths(moe.num_experts, moe.moe_intermediate_size, sparsity)
    old, new = tiles_before(moe, widths, tokens), tiles_after(moe, widths, tokens)
    before, after = (
        predict(code, moe, widths, tokens, GPUS[gpu], tiles) for code, tiles in ((BEFORE, old), (AFTER, new))
    )
    return [
        Prediction(BEFORE.name, before, old),
        Prediction(AFTER.name, after, new),
        Prediction(f"{AFTER.name}, chained", chained(after), new),
    ]


def table(shape: str, gpu: str, tokens: int, sparsity: float) -> list[dict]:
    """One row per arm. Speed-ups: time of `vllm` and `vllm tuned` over time; `other_us`: all but the two GEMMs."""
    stock, tuned = predict_stock(shape, gpu, tokens), predict_tuned(shape, gpu, tokens)
    rows = []
    for prediction in (stock, tuned, *predict_ours(shape, gpu, tokens, sparsity)):
        up, down = 1e6 * prediction.time.up, 1e6 * prediction.time.down
        rows.append(
            {
                "shape": shape,
                "gpu": gpu,
                "tokens": tokens,
                "sparsity": sparsity,
                "arm": prediction.arm,
                "microseconds": round(prediction.microseconds, 1),
                "speedup": round(stock.microseconds / prediction.microseconds, 3),
                "speedup_over_tuned": round(tuned.microseconds / prediction.microseconds, 3),
                "up_us": round(up, 1),
                "down_us": round(down, 1),
                "other_us": round(prediction.microseconds - up - down, 1),
                "tiles_from": prediction.tiles.source,
                "tiles": str(prediction.tiles),
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """Prints the arms of one layer."""
    first = rows[0]
    print(f"{first['shape']}, {first['gpu']}, {first['tokens']} tokens, {first['sparsity']:.0%} pruned")
    for row in rows:
        print(
            f"  {row['arm']:<14} {row['microseconds']:>8.1f} us  x{row['speedup']:<5.2f} {row['tiles']} "
            f"({row['tiles_from']})",
            flush=True,
        )


def predict_measured(arm: str, shape: str, device: str, tokens: int) -> list[Prediction]:
    """Counterparts of an arm of `benchmarks.moe_layer` on this device: all of ours for ours; none for other arms."""
    gpu = next((name for name in GPUS if name in device), None)
    if gpu is None or shape not in PAPER_SHAPES:
        return []
    if pruned := re.fullmatch(r"heapr (?:(\d+)% pruned|unpruned)", arm):
        return predict_ours(shape, gpu, tokens, int(pruned[1] or 0) / 100)
    if arm == "vllm":  # with the file of the device itself
        return [predict_stock(shape, gpu, tokens, device.split(", ")[0].replace(" ", "_"))]
    if arm == "vllm H200 file":
        return [predict_stock(shape, gpu, tokens)]
    if arm == TUNED or re.fullmatch(r"vllm zeroed \d+%", arm):  # zeros take as long
        return [predict_tuned(shape, gpu, tokens)]
    return []


def compare(measured: Iterable[dict[str, str]]) -> list[dict]:
    """Rows of `benchmarks.moe_layer` with predictions; those of other arms, shapes and devices are left out.

    `predicted`: arm to microseconds. `speedup`: over tuned vLLM, and `predicted_speedup` by arm; None and empty where
    tuned vLLM was not measured.
    """
    found = []
    for row in measured:
        tokens = int(row["tokens"])
        predictions = predict_measured(row["arm"], row["shape"], row["device"], tokens)
        if not predictions:
            continue
        has_stock = row["baseline"] == TUNED
        tuned = predict_measured(TUNED, row["shape"], row["device"], tokens)[0]
        found.append(
            {
                "shape": row["shape"],
                "device": row["device"],
                "tokens": tokens,
                "arm": row["arm"],
                "microseconds": float(row["microseconds"]),
                "predicted": {prediction.arm: prediction.microseconds for prediction in predictions},
                "speedup": 1 / float(row["vs_baseline"]) if has_stock else None,
                "predicted_speedup": {
                    prediction.arm: tuned.microseconds / prediction.microseconds
                    for prediction in predictions
                    if has_stock
                },
            }
        )
    return found


def show_comparison(found: list[dict]) -> None:
    """One line per measured row: time, speed-up over tuned vLLM, and the same as predicted."""
    for row in found:
        predicted = []
        for arm, microseconds in row["predicted"].items():
            speedup = row["predicted_speedup"].get(arm)
            predicted.append(
                f"{arm} {_figures(microseconds, speedup)}, measured / predicted "
                f"{row['microseconds'] / microseconds:.2f}"
            )
        print(
            f"{row['shape']}, {row['device']}, {row['tokens']} tokens, {row['arm']}: measured "
            f"{_figures(row['microseconds'], row['speedup'])}; predicted {'; '.join(predicted)}"
        )


def _figures(microseconds: float, speedup: float | None) -> str:
    return f"{microseconds:.1f} us" + (f" x{speedup:.2f}" if speedup else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=GPUS, default=["H200", "H100"])
    parser.add_argument(
        "--shape", nargs="+", choices=PAPER_SHAPES, default=[name for name in PAPER_SHAPES if name != "tiny"]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--csv", type=Path, help="write the rows here, over earlier predictions")
    parser.add_argument("--against", type=Path, metavar="CSV", help="compare with these rows of benchmarks.moe_layer")
    args = parser.parse_args()
    if args.against:
        with args.against.open(newline="") as file:
            measured = list(csv.DictReader(file))
        found = compare(measured)
        show_comparison(found)
        return print(f"{len(measured) - len(found)} rows are left out: other arms, shapes or devices")
    if args.csv and args.csv.exists() and "tiles_from" not in args.csv.read_text().partition("\n")[0]:
        parser.error(f"{args.csv} holds no predictions; choose another --csv")
    rows = []
    for gpu in args.device:
        for shape in args.shape:
            for tokens in args.tokens:
                for sparsity in args.sparsity:
                    rows += (layer := table(shape, gpu, tokens, sparsity))
                    show(layer)
    if args.csv:
        args.csv.unlink(missing_ok=True)
        append_csv(args.csv, rows)


if __name__ == "__main__":
    main()
