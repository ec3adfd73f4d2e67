# SPDX-License-Identifier: Apache-2.0
"""Pictures of reports and sweeps. Needs matplotlib."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.prune.report.summary import Summary, format_reductions
from heapr_vllm.prune.selection.selector import Point
from heapr_vllm.prune.selection.sweep import Frontier

KINDS = {"stored": "stored neurons removed", "executed": "executed expert FLOPs removed"}


def new_figure(width: float, height: float) -> Any:
    """Makes a matplotlib figure, sizes in inches, that needs no display. Raises HeaprError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HeaprError(f"--plot needs matplotlib: {install_command('prune')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_report(summary: Summary, path: Path) -> None:
    """Draws a heat map of the kept fraction per layer and expert; below it the frontier, if the summary has one."""
    rows = []
    for prefix, widths in summary.widths.items():
        full = summary.full_width[prefix]
        rows.append([width / full for width in widths])
    height = 1.6 + 0.22 * len(rows)
    if summary.frontier is not None:
        figure = new_figure(8, height + 3.2)
        top, bottom = figure.subfigures(2, height_ratios=(height, 3.2))
        _draw_frontier(summary.frontier, bottom.subplots(1, 2, sharey=True))
    else:
        top = figure = new_figure(8, height)
    axes = top.subplots()
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer", title=format_reductions(summary))
    axes.title.set_fontsize(9)
    top.colorbar(image, label="kept fraction")
    atomic_file(path, partial(figure.savefig, dpi=140))


def _reduction(point: Point, kind: str) -> float:
    return point["stored_reduction"] if kind == "stored" else point["executed_reduction"]


def _draw_frontier(curves: Frontier, panels: Any) -> None:
    """Draws the predicted loss over the stored and over the executed reduction, for budgets of both kinds."""
    for axes, kind in zip(panels, KINDS, strict=True):
        for budget, style in (("stored", "-"), ("executed", "--")):
            points = curves[budget]
            axes.plot(
                [_reduction(point, kind) for point in points],
                [point["loss_increase"] for point in points],
                style,
                label=f"{budget} budgets",
            )
        axes.plot(
            _reduction(curves["chosen"], kind),
            curves["chosen"]["loss_increase"],
            "k*",
            markersize=10,
            label="these masks",
        )
        axes.set(xlabel=KINDS[kind], yscale="log")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"predicted loss increase, nats\n(criterion {curves['criterion']})")
    panels[0].legend(fontsize=8)


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the predicted loss of every criterion over the stored (left) and the executed reduction (right)."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, budget in zip(panels, KINDS, ("sparsity", "flops"), strict=True):
        for criterion in dict.fromkeys(row["criterion"] for row in rows):
            points = [row for row in rows if row["criterion"] == criterion and row[budget] and "error" not in row]
            axes.plot(
                [row[f"{kind}_reduction"] for row in points],
                [row["loss_increase"] for row in points],
                "o-",
                markersize=3,
                label=criterion,
            )
        axes.set(xlabel=KINDS[kind], title=f"{kind} budgets", yscale="log")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("predicted loss increase, nats per token")
    panels[0].legend(fontsize=8)
    atomic_file(path, partial(figure.savefig, dpi=140))
