# SPDX-License-Identifier: Apache-2.0
"""Criteria and budgets side by side, from the moments alone (`heapr sweep`).

The predicted loss increase is the joint Fisher of what is removed (`LayerMoments.loss_increase`), whatever the
criterion. It adds up neurons as if they did not interact, so it ranks choices and understates their cost: measured
increases of the bundled model are a few times larger (`benchmarks/quality.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NotRequired, TypedDict

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.selection.budget import Budget
from heapr_vllm.prune.selection.neuron_blocks import SHARED_WIDTHS
from heapr_vllm.prune.selection.selector import Point, Selector, keep_blocks

RATIOS = (0.1, 0.2, 0.25, 0.4, 0.5)
FRONTIER_RATIOS = tuple(percent / 100 for percent in range(5, 100, 5))


def budgets(ratios: Iterable[float]) -> list[Budget]:
    """Makes a stored and an executed budget for each ratio."""
    ratios = sorted(ratios)
    return [Budget(stored=ratio) for ratio in ratios] + [Budget(executed=ratio) for ratio in ratios]


class Frontier(TypedDict):
    """The content of frontier.json: the choice made, and choices along budgets of either kind.

    `own_widths`: where experts share a width, what as many neurons would do if every expert had its own.
    `sources`: predicted loss increase of the choice for every source of a mix, by name; none in older files.
    """

    criterion: str
    chosen: Point
    own_widths: NotRequired[Point]
    stored: list[Point]
    executed: list[Point]
    sources: NotRequired[dict[str, float]]


def frontier(selector: Selector, budget: Budget) -> Frontier:
    """Computes reductions and predicted loss of the choice made (`chosen`) and along budgets of either kind."""
    curves: dict[str, list[Point]] = {"stored": [], "executed": []}
    for other in budgets(FRONTIER_RATIOS):
        try:
            kept, _ = selector.keep(other)
        except HeaprError:  # out of reach, as are the larger ones
            continue
        curves["executed" if other.stored is None else "stored"].append(selector.point(kept))
    kept, _ = selector.keep(budget)
    chosen = selector.point(kept)
    found = Frontier(
        criterion=str(selector.metadata["criterion"]),
        chosen=chosen,
        sources=selector.source_losses(kept),
        stored=curves["stored"],
        executed=curves["executed"],
    )
    if selector.scope in SHARED_WIDTHS and 0 < chosen["stored_reduction"] < 1:
        kept, _ = keep_blocks(selector.blocks, Budget(stored=chosen["stored_reduction"]), "global")
        found["own_widths"] = selector.point(kept)
    return found


def sweep(
    moments: NeuronMoments, criteria: Iterable[str], ratios: Iterable[float] = RATIOS, **options: Any
) -> list[dict[str, Any]]:
    """Computes per criterion and budget both reductions, predicted loss increase in nats per token, dead experts.

    A budget out of reach gives a row with `error` in their place. `options` as in `Selector`. Raises HeaprError if an
    option is impossible or the moments lack what a criterion needs.
    """
    rows = []
    for criterion in criteria:
        selector = Selector(moments, criterion, **options)
        for budget in budgets(ratios):
            row: dict[str, Any] = {"criterion": criterion, "sparsity": budget.stored, "flops": budget.executed}
            try:
                kept, _ = selector.keep(budget)
                row |= selector.point(kept)
                row["dead_experts"] = int((selector.blocks.kept_per_expert(kept) == 0).sum())
            except HeaprError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows


def format_sweep(rows: list[dict[str, Any]]) -> str:
    """Aligns the rows as a table, budgets of one kind and size together, the lowest predicted loss first."""
    header = ("budget", "criterion", "stored", "executed", "predicted loss", "perplexity", "dead experts")
    lines = ["{:<16} {:<16} {:>8} {:>9} {:>15} {:>11} {:>13}".format(*header)]
    ordered = sorted(
        rows,
        key=lambda row: (row["sparsity"] is None, row["sparsity"] or row["flops"], row.get("loss_increase", math.inf)),
    )
    for row in ordered:
        budget = f"stored -{row['sparsity']:.0%}" if row["sparsity"] else f"executed -{row['flops']:.0%}"
        if "error" in row:
            lines.append(f"{budget:<16} {row['criterion']:<16} out of reach")
        else:
            lines.append(
                f"{budget:<16} {row['criterion']:<16} {-row['stored_reduction']:>8.1%} "
                f"{-row['executed_reduction']:>9.1%} {row['loss_increase']:>+15.5f} "
                f"{format_perplexity(row['loss_increase']):>11} {row['dead_experts']:>13}"
            )
    return "\n".join(lines)


def format_perplexity(loss_increase: float) -> str:
    """Writes the relative change of the perplexity that goes with a change of the loss in nats per token."""
    return f"{math.expm1(loss_increase):+.1%}" if loss_increase < 5 else "> +14000%"
