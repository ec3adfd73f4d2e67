# SPDX-License-Identifier: Apache-2.0
"""The report as one page of HTML that loads nothing (`heapr report`).

Names of models, data sets and files are anybody's: Jinja escapes them, and the page's content security policy lets no
script run but the two that are written here, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from heapr_vllm import __version__
from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.prune.report import charts, reported
from heapr_vllm.prune.report.measured import read_evaluation
from heapr_vllm.prune.report.reported import ReportedModel, short_names
from heapr_vllm.prune.report.speed import SpeedRow, read_speed
from heapr_vllm.prune.selection.budget import format_size

_TEMPLATE = Path(__file__).parent / "template"


def write_page(
    directories: Sequence[Path], output: Path, *, evaluation: Path | None = None, speed: Path | None = None
) -> None:
    """Writes the report of pruned models, masks repositories or exported checkpoints, to `output`.

    `evaluation`: what `heapr eval -o` wrote; models that it lacks are shown as measured in their folders. `speed`: CSV
    rows of `benchmarks.serving`. Raises HeaprError if a folder is no pruned model, a file is damaged, or Altair is
    missing.
    """
    labels = short_names(map(str, directories))
    models = [ReportedModel.read(directory, labels[str(directory)]) for directory in dict.fromkeys(directories)]
    records = [read_evaluation(evaluation)] if evaluation else []
    records += [model.evaluation for model in models if model.evaluation and not model.measured(records)]
    text = render(models, records, read_speed(speed) if speed else [])
    atomic_file(output, lambda path: path.write_text(text))


def render(models: Sequence[ReportedModel], records: Sequence[EvaluationRecord], speed: Sequence[SpeedRow]) -> str:
    """Makes the page. Raises HeaprError without Altair, Vega or Jinja."""
    try:
        import jinja2

        scripts = [_vega(), (_TEMPLATE / "page.js").read_text()]
        specs = _specs(models, records, speed)
    except ImportError as error:
        raise HeaprError(f"the report needs {error.name}: {install_command('prune')}") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": format_size, "quote": shlex.quote}
    bases = short_names(model.summary.base_model for model in models)
    return environment.get_template("page.html").render(
        title=f"{', '.join(bases.values())}, pruned",
        models=models,
        records=records,
        speed=speed,
        specs=specs,
        tables=reported,
        style=(_TEMPLATE / "page.css").read_text(),
        scripts=scripts,
        hashes=[_content_hash(script) for script in scripts],
        version=__version__,
    )


@cache
def _vega() -> str:
    """Bundles Vega's runtime, which takes seconds."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _content_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _specs(
    models: Sequence[ReportedModel], records: Sequence[EvaluationRecord], speed: Sequence[SpeedRow]
) -> dict[str, charts.Spec]:
    """Draws all charts, id of their element -> specification."""
    specs = {}
    for number, model in enumerate(models):
        specs[f"widths-{number}"] = charts.widths_chart(model.summary, model.calibration.tokens)
    points = [{**model.summary.frontier["chosen"], "model": model.label} for model in models if model.summary.frontier]
    curves, points = charts.drawn(_curves(models)), charts.drawn(points)
    for kind in charts.KINDS if curves and points else ():
        specs[f"loss-{kind}"] = charts.frontier_chart(curves, points, kind)
    for number, record in enumerate(records):
        if rows := _task_rows(record):
            specs[f"tasks-{number}"] = charts.intervals_chart(rows, "score, with its 95 % interval")
    if speed:
        rows = [_speed_row(row) for row in speed]
        specs["speed-chart"] = charts.intervals_chart(rows, "output tokens per second", zero=True)
    return specs


def _curves(models: Sequence[ReportedModel]) -> list[dict[str, Any]]:
    """Collects the curves of all frontiers; models of one calibration and criterion have the same."""
    seen: list[Any] = []
    rows: list[dict[str, Any]] = []
    for model in models:
        frontier = model.summary.frontier
        if frontier is None or (curves := (frontier["stored"], frontier["executed"])) in seen:
            continue
        whose = f", {model.label}" if seen else ""
        seen.append(curves)
        for kind, points in zip(charts.KINDS, curves, strict=True):
            rows += [{**point, "curve": f"{frontier['criterion']}, {kind} budgets{whose}"} for point in points]
    return rows


def _task_rows(record: EvaluationRecord) -> list[dict[str, Any]]:
    names = short_names(model.model for model in record.models)
    rows = []
    for model in record.models:
        for task, found in model.tasks.items():
            rows.append(_interval(task, names[model.model], found.value, found.low, found.high))
    return rows


def _speed_row(row: SpeedRow) -> dict[str, Any]:
    series = " ".join(filter(None, (row.model, row.arm)))
    return _interval(row.workload or "all", series, row.tok_s, row.tok_s_min, row.tok_s_max)


def _interval(group: str, series: str, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    """Makes a row of `charts.intervals_chart`; without an interval it is the value alone."""
    low, high = value if low is None else low, value if high is None else high
    return {"group": group, "series": series, "value": value, "low": low, "high": high}
