# SPDX-License-Identifier: Apache-2.0
"""Curves of `benchmarks.moe_layer`: time against the baseline over the token count, a panel per model.

Rows of the device, dtype and baseline of the last one.

    python -m benchmarks.plot_moe_layer benchmarks/results/moe_layer.csv -o moe_layer.png
"""

import argparse
import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def curves(rows: list[dict[str, str]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Shape to arm to (tokens, vs_baseline), later rows replacing earlier ones of the same arm and token count."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if any(row[key] != rows[-1][key] for key in ("device", "dtype", "baseline")):
            continue
        found.setdefault(row["shape"], {}).setdefault(row["arm"], {})[int(row["tokens"])] = float(row["vs_baseline"])
    return {shape: {arm: sorted(points.items()) for arm, points in arms.items()} for shape, arms in found.items()}


def plot(rows: list[dict[str, str]], output: Path) -> None:
    panels = curves(rows)
    figure = Figure(figsize=(5 * min(len(panels), 2), 3.6 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // 2), min(len(panels), 2), squeeze=False).flatten()
    for axis, (shape, arms) in zip(axes, panels.items(), strict=False):
        for arm, points in arms.items():
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                label=arm,
                linestyle="-" if arm.startswith("heapr") else "--",
            )
        axis.set(title=shape, xlabel="tokens", ylabel=f"time / {rows[-1]['baseline']}", xscale="log", ylim=(0, None))
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0].legend(fontsize=6)
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['date']}, {rows[-1]['versions']}", fontsize=7)
    figure.savefig(output, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    with args.csv.open() as file:
        plot(list(csv.DictReader(file)), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
