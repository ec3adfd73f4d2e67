# SPDX-License-Identifier: Apache-2.0
"""Charts of the report as Vega-Lite specifications, made with Altair.

Vega's runtime takes 0.9 MB inside a page, Bokeh's 1.3 MB, Plotly's 4.8 MB; and its SVG follows the page's colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from heapr_vllm.formats.names import layer_index
from heapr_vllm.prune.report.plot import KINDS
from heapr_vllm.prune.report.summary import Summary

Spec = dict[str, Any]
_FIT = {"type": "fit-x", "contains": "padding"}  # the page says how wide, the chart how high


def _altair() -> Any:
    """Imports Altair; type checkers cannot follow the decorators of its methods."""
    import altair

    return altair


def layer_names(summary: Summary) -> dict[str, str]:
    """Numbers the MoE modules by their decoder layers, prefix -> name; by their prefixes if that is ambiguous."""
    names = {prefix: str(layer_index(prefix)) for prefix in summary.widths}
    is_clear = len(set(names.values())) == len(names) and "-1" not in names.values()
    return names if is_clear else {prefix: prefix for prefix in names}


def widths_chart(summary: Summary, tokens: Mapping[str, list[int]]) -> Spec:
    """Draws the kept fraction of every expert; experts without neurons are crossed out.

    `tokens`: MoE module prefix -> calibration tokens of each expert. Rows of the data are layers, which Vega flattens:
    a cell takes a few bytes. `at_row`, `at_expert` are what the keyboard points to.
    """
    alt = _altair()
    names = layer_names(summary)
    rows = []
    for row, (prefix, widths) in enumerate(summary.widths.items()):
        routes = sum(tokens[prefix])
        rows.append(
            {
                "row": row,
                "layer": names[prefix],
                "module": prefix,
                "full": summary.full_width[prefix],
                "routes": routes,
                "width": widths,
                "tokens": tokens[prefix],
            }
        )
    num_experts = max(map(len, summary.widths.values()))
    base = alt.Chart(alt.NamedData(name="layers")).encode(
        x=alt.X(
            "expert:O",
            axis=alt.Axis(labelAngle=0, labelOverlap=True, values=list(range(0, num_experts, 8))),
            title="expert",
        ),
        y=alt.Y("layer:O", sort=None, title="layer", axis=alt.Axis(labelOverlap=True)),
    )
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color(
            "kept:Q",
            scale=alt.Scale(domain=[0, 1], scheme="viridis"),
            legend=alt.Legend(title="neurons kept", format="%", orient="top", gradientLength=160, tickCount=3),
        ),
        tooltip=[
            alt.Tooltip("module:N"),
            alt.Tooltip("layer:N"),
            alt.Tooltip("expert:O"),
            alt.Tooltip("of_full:N", title="width"),
            alt.Tooltip("share:Q", title="routing share", format=".2%"),
        ],
    )
    dead = base.mark_point(
        aria=False,
        shape="cross",
        angle=45,
        filled=True,
        color="#e4572e",
        size=max(8, min(60, 1500 // num_experts)),
        tooltip=None,
    )
    cursor = base.mark_rect(aria=False, filled=False, stroke="#e4572e", strokeWidth=3, tooltip=None)
    chart = alt.layer(
        cells,
        dead.transform_filter("datum.width === 0"),
        cursor.transform_filter("datum.row === at_row && datum.expert === at_expert"),
    )
    chart = (
        chart.transform_flatten(["width", "tokens"])
        .transform_window(number="row_number()", groupby=["module"])
        .transform_calculate(
            expert="datum.number - 1",
            kept="datum.width / datum.full",
            of_full="datum.width + ' of ' + datum.full",
            share="datum.routes ? datum.tokens / datum.routes : 0",
        )
        .add_params(alt.param(name="at_row", value=-1), alt.param(name="at_expert", value=-1))
        .properties(
            width="container",
            height=len(rows) * max(8, min(32, 600 // len(rows))),
            datasets={"layers": rows},
            autosize=_FIT,
        )
    )
    return chart.to_dict()


def frontier_chart(curves: list[dict[str, Any]], models: list[dict[str, Any]], kind: str) -> Spec:
    """Draws the predicted loss over the stored or the executed reduction (`kind`): curves, and one point per model.

    Rows are `Point`s, those of `curves` with `curve`, those of `models` with `model`. Some of either must be `drawn`.
    """
    alt = _altair()
    x = alt.X(
        f"{kind}_reduction:Q",
        title=KINDS[kind],
        axis=alt.Axis(format="%", tickCount=5, labelOverlap="greedy", labelSeparation=6),
    )
    powers = sorted({10.0 ** math.floor(math.log10(point["loss_increase"])) for point in (*curves, *models)})
    y = alt.Y(
        "loss_increase:Q",
        scale=alt.Scale(type="log"),
        title="predicted loss increase, nats",
        axis=alt.Axis(format="~g", values=[*powers, *(10 * power for power in powers[-1:])]),
    )
    numbers = [
        alt.Tooltip("stored_reduction:Q", title="stored", format=".1%"),
        alt.Tooltip("executed_reduction:Q", title="executed", format=".1%"),
        alt.Tooltip("loss_increase:Q", title="predicted loss increase", format=".5f"),
    ]
    legend = {"orient": "bottom", "columns": 1, "labelLimit": 260, "title": None}
    lines = (
        alt.Chart(alt.Data(values=curves))
        .mark_line(point=alt.OverlayMarkDef(size=18), strokeWidth=1.6)
        .encode(
            x=x,
            y=y,
            color=alt.Color("curve:N", sort=None, legend=alt.Legend(**legend, symbolType="stroke")),
            strokeDash=alt.StrokeDash("curve:N", sort=None, legend=alt.Legend(**legend, symbolType="stroke")),
            tooltip=[alt.Tooltip("curve:N", title="choices"), *numbers],
        )
    )
    points = (
        alt.Chart(alt.Data(values=models))
        .mark_point(size=150, filled=True, opacity=1, color="#e4572e", stroke="#ffffff", strokeWidth=1)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape(
                "model:N",
                sort=None,
                scale=alt.Scale(range=["diamond", "square", "triangle-up", "cross", "circle", "triangle-down"]),
                legend=alt.Legend(**legend, symbolFillColor="#e4572e", symbolStrokeColor="#e4572e"),
            ),
            tooltip=[alt.Tooltip("model:N"), *numbers],
        )
    )
    return alt.layer(lines, points).properties(width="container", height=300, autosize=_FIT).to_dict()


def drawn(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out losses of 0, which have no place on a logarithmic axis."""
    return [point for point in points if point["loss_increase"] > 0]


def intervals_chart(rows: list[dict[str, Any]], title: str, *, zero: bool = False) -> Spec:
    """Draws one dot with its interval per row of `group`, `series`, `value`, `low` and `high`.

    `zero`: whether the axis starts there.
    """
    alt = _altair()
    groups = len({row["group"] for row in rows})
    series = len({row["series"] for row in rows})
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("group:N", sort=None, title=None, axis=alt.Axis(labelLimit=110)),
        yOffset=alt.YOffset("series:N", sort=None),
        color=alt.Color(
            "series:N",
            sort=None,
            legend=alt.Legend(orient="bottom", columns=1, labelLimit=260, title=None),
        ),
        tooltip=[
            alt.Tooltip("group:N", title=" "),
            alt.Tooltip("series:N", title="  "),
            alt.Tooltip("value:Q", title=title),
            alt.Tooltip("low:Q", title="from"),
            alt.Tooltip("high:Q", title="to"),
        ],
    )
    ranges = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=title, scale=alt.Scale(zero=zero), axis=alt.Axis(tickCount=6, labelOverlap=True)),
        x2="high:Q",
    )
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x="value:Q")
    height = max(60, groups * (18 * series + 14))
    return alt.layer(ranges, dots).properties(width="container", height=height, autosize=_FIT).to_dict()
