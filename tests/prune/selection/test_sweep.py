# SPDX-License-Identifier: Apache-2.0
"""Sweep and frontier agree with the masks they stand for."""

import math
from pathlib import Path

import pytest

from heapr_vllm.prune import NeuronMoments, Selector
from heapr_vllm.prune.report.plot import plot_sweep
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.criteria import CRITERIA
from heapr_vllm.prune.selection.selector import select
from heapr_vllm.prune.selection.sweep import format_sweep, frontier, sweep


@pytest.fixture(scope="module")
def moments(calibration: Path) -> NeuronMoments:
    return NeuronMoments.from_pretrained(calibration)


def test_rows_equal_the_masks(moments: NeuronMoments) -> None:
    rows = sweep(moments, ["heapr", "fisher"], [0.25, 0.5], align=8)
    assert len(rows) == 8
    for row in rows:
        masks = select(moments, row["sparsity"], flops=row["flops"], criterion=row["criterion"], align=8)
        assert row["stored_reduction"] == pytest.approx(masks.sparsity)
        assert row["executed_reduction"] == pytest.approx(masks.executed_reduction(moments.tokens))
        assert row["dead_experts"] == sum(int((widths == 0).sum()) for widths in masks.widths.values())
        removed = sum(float(moments[prefix].fisher[~keep].double().sum()) for prefix, keep in masks.keep.items())
        assert row["loss_increase"] == pytest.approx(removed / 2 / (6 * 63)), "of 64 tokens 63 are predicted"


def test_fisher_has_the_lowest_predicted_loss(moments: NeuronMoments) -> None:
    rows = sweep(moments, CRITERIA, align=4)  # small blocks: larger ones miss a budget by more
    for kind in ("sparsity", "flops"):
        for ratio in (0.1, 0.5):
            some = {row["criterion"]: row["loss_increase"] for row in rows if row[kind] == ratio}
            assert min(some, key=some.get) == "fisher" and len(some) == 7
    table = format_sweep(rows).splitlines()
    assert len(table) == 1 + len(rows) and table[1].split()[:3] == ["stored", "-10%", "fisher"]


def test_budgets_out_of_reach_are_marked(moments: NeuronMoments, tmp_path: Path) -> None:
    low, high = sweep(moments, ["heapr"], [0.25], min_width=16), sweep(moments, ["heapr"], [0.9], min_width=16)
    assert all("error" not in row for row in low)
    assert all("out of reach" in row["error"] and "loss_increase" not in row for row in high)
    assert format_sweep(high).count("out of reach") == 2
    plot_sweep([*low, *high], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_frontier_rises_and_holds_the_choice(moments: NeuronMoments) -> None:
    selector = Selector(moments, "fisher", unrouted="prune")
    curves = frontier(selector, Budget(stored=0.25))
    for name in ("stored", "executed"):
        losses = [point["loss_increase"] for point in curves[name]]
        assert len(losses) == 19 and losses == sorted(losses)
        assert curves[name][9][f"{name}_reduction"] == pytest.approx(0.5, abs=0.03)
    assert curves["chosen"] in curves["stored"] and math.isfinite(curves["chosen"]["loss_increase"])
