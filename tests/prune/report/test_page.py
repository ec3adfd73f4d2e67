# SPDX-License-Identifier: Apache-2.0
"""The report page: what stands in it, that names stay text, that it loads nothing; and in a browser, that it works."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from heapr_vllm.cli.main import main
from heapr_vllm.prune.report.charts import widths_chart
from heapr_vllm.prune.report.measured import EVALUATION_FILE
from heapr_vllm.prune.report.page import write_page
from heapr_vllm.prune.report.speed import SpeedRow, read_speed
from heapr_vllm.prune.report.summary import load_report

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>\"'&"
SPEED = """model,workload,concurrency,arm,tok_s,tok_s_min,tok_s_max,vs_dense,weights_gib,date,device,versions,command
tiny,batch,16,dense,995,980,1010,1.0,0.02,2026-11-26,a CPU,vllm=0.32.0,python -m benchmarks.serving
tiny,batch,16,pruned,1279,1260,1301,1.285,,2026-11-26,a CPU,vllm=0.32.0,python -m benchmarks.serving
"""


class Page(HTMLParser):
    """A parsed page: `text` outside of scripts and styles, `scripts` by type, start tags with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self.cdata_elem is None:
            self.text += data

    @property
    def specs(self) -> dict[str, Any]:
        (text,) = [text for kind, text in self.scripts if kind == "application/json"]
        return json.loads(text)


def write_evaluation(path: Path, *models: dict[str, Any], dataset: str = "held_out.jsonl") -> Path:
    """An evaluation file of `models` after a baseline."""
    settings = {
        "dataset": dataset,
        "num_samples": 8,
        "max_seq_length": 64,
        "seed": 0,
        "backend": "vllm",
        "dtype": "auto",
    }
    task = {"metric": "exact_match", "num_samples": 100, "value": 0.71, "low": 0.61, "high": 0.79}
    baseline = {"model": "base", "weight_bytes": 10**6, "perplexity": 9.21, "change": 0.0, "tasks": {"brackets": task}}
    content = {"format_version": 1, "settings": settings, "versions": {"vllm": "0.32.0"}, "models": [baseline, *models]}
    path.write_text(json.dumps(content))
    return path


def row(model: object, **more: Any) -> dict[str, Any]:
    agreement = {"kl_divergence": 0.0213, "kl_low": 0.0199, "kl_high": 0.0227, "top1": 0.941, "top1_low": 0.938}
    task = {"metric": "exact_match", "num_samples": 100, "value": 0.7, "low": 0.6, "high": 0.78, "recovery": 0.986}
    return {
        "model": str(model),
        "weight_bytes": 800_000,
        "perplexity": 9.31,
        "change": 0.0109,
        "agreement": {"against": "base", **agreement, "top1_high": 0.944, "tokens": 4096, "top_k": 100},
        "tasks": {"brackets": {**task, "mcnemar_p": 0.31}},
    } | more


@pytest.fixture(scope="module")
def pruned(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masks repository with a frontier, as `heapr prune` writes it."""
    output = tmp_path_factory.mktemp("pruned") / "quarter"
    assert main(["prune", str(calibration), "--sparsity", "0.25", "--align", "1", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def page_path(pruned: Path, masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything, about two models."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "rows.csv").write_text(SPEED)
    evaluation = write_evaluation(folder / "evaluation.json", row(pruned, stored_reduction=0.25))
    output = folder / "report.html"
    argv = ["report", str(pruned), str(masks_repository), "--evaluation", str(evaluation)]
    assert main([*argv, "--speed", str(folder / "rows.csv"), "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def page(page_path: Path) -> Page:
    return Page(page_path)


def test_what_stands_in_it(page: Page, pruned: Path, masks_repository: Path) -> None:
    summary = load_report(pruned)
    for words in (
        "quarter",
        "masks",
        f"{summary.kept:,} of {summary.neurons:,} stay",
        f"-{summary.executed_reduction:.1%}",
        "0.0213 [0.0199, 0.0227]",
        "0.941 [0.938, 0.944]",
        "0.700 [0.600, 0.780]",
        "98.6%",
        "+1.09%",
        "1279 (1260 to 1301)",
        "1.28x",
        "a CPU",
        "seed 0, run by vllm, dtype auto",
        "64 tokens",
        "transformers",
        "masks has no frontier: heapr prune CALIB",
    ):
        assert words in page.text, words
    chart = page.specs["widths-0"]
    assert [layer["width"] for layer in chart["datasets"]["layers"]] == list(summary.widths.values())
    (point,) = [layer for layer in page.specs["loss-stored"]["layer"] if layer["mark"]["type"] == "point"]
    values = point["data"].get("values") or page.specs["loss-stored"]["datasets"][point["data"]["name"]]
    assert [each["model"] for each in values] == ["quarter"]
    assert values[0]["loss_increase"] == summary.frontier["chosen"]["loss_increase"]


def test_every_chart_has_its_place(page: Page) -> None:
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert page.specs.keys() <= ids and page.specs.keys() == {
        "widths-0",
        "widths-1",
        "loss-stored",
        "loss-executed",
        "tasks-0",
        "speed-chart",
    }


def test_small_and_nothing_is_loaded(page: Page, page_path: Path) -> None:
    assert page_path.stat().st_size < 2_000_000
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "poster", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    (policy,) = [each["content"] for tag, each in page.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy and "http" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert "url(" not in style and "@import" not in style


def test_the_largest_model_fits(page: Page, pruned: Path) -> None:
    """DeepSeek-V3's 58 x 256 experts take less than half of what is left of 2 MB."""
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(3, 61)]
    widths = {name: [1234 + expert for expert in range(256)] for name in names}
    full = dict.fromkeys(names, 2048)
    chart = widths_chart(
        replace(load_report(pruned), widths=widths, full_width=full), dict.fromkeys(names, [123456] * 256)
    )
    runtime = len(max((text for _, text in page.scripts), key=len))
    assert len(json.dumps(chart)) < (2_000_000 - runtime) / 2


def test_names_stay_text(masks_repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "|")
    shutil.copytree(masks_repository, folder)
    record = json.loads((folder / "heapr/calibration.json").read_text())
    record |= {"model": HOSTILE, "dataset": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (folder / "heapr/calibration.json").write_text(json.dumps(record))
    evaluation = write_evaluation(
        tmp_path / "evaluation.json", row(HOSTILE, tasks={HOSTILE: row("")["tasks"]["brackets"]}), dataset=HOSTILE
    )
    (tmp_path / "rows.csv").write_text(f'arm,tok_s,model,workload,device\n"x",1,{",".join([quoted(HOSTILE)] * 3)}\n')
    write_page([folder], tmp_path / "page.html", evaluation=evaluation, speed=tmp_path / "rows.csv")
    page = Page(tmp_path / "page.html")
    assert page.text.count(HOSTILE) >= 8
    assert len(page.scripts) == 3 and "img" not in {tag for tag, _ in page.tags}
    assert json.dumps(HOSTILE) in json.dumps(page.specs)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def test_what_is_missing_says_which_command_makes_it(masks_repository: Path, tmp_path: Path) -> None:
    write_page([masks_repository], tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    assert f"heapr eval {masks_repository} --baseline BASE --dataset TEXT -o evaluation.json" in text
    assert f"python -m benchmarks.serving --dense BASE --pruned {masks_repository} --csv rows.csv" in text
    assert "has no frontier: heapr prune CALIB --sparsity R -o MASKS" in text


def test_masks_put_together_have_no_frontier(pruned: Path, masks_repository: Path, tmp_path: Path) -> None:
    assert main(["masks", "union", str(pruned), str(masks_repository), "-o", str(tmp_path / "both")]) == 0
    evaluation = write_evaluation(tmp_path / "evaluation.json", row("another"))
    content = json.loads(evaluation.read_text())
    content["settings"]["loss"] = "assistant"
    evaluation.write_text(json.dumps(content))
    write_page([tmp_path / "both"], tmp_path / "page.html", evaluation=evaluation)
    text = Page(tmp_path / "page.html").text
    assert "both has no frontier: heapr masks put it together" in text and "heapr prune CALIB" not in text
    assert "8 samples of up to 64 tokens of held_out.jsonl, assistant tokens only, seed 0" in text


def test_an_evaluation_in_the_folder(pruned: Path, masks_repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quarter"
    shutil.copytree(pruned, folder)
    write_evaluation(folder / EVALUATION_FILE, row("elsewhere", perplexity=77.125))
    write_page([folder], tmp_path / "page.html")
    assert "77.125" in Page(tmp_path / "page.html").text
    given = write_evaluation(tmp_path / "evaluation.json", row(folder, perplexity=88.25))
    write_page([folder], tmp_path / "page.html", evaluation=given)
    text = Page(tmp_path / "page.html").text
    assert "88.250" in text and "77.125" not in text, "the file given comes first"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--evaluation", "{folder}/nothing.json"], "nothing.json is no file; `heapr eval DIR --baseline BASE"),
        (["--evaluation", "{folder}/empty.json"], "empty.json has no models; `heapr eval"),
        (["--evaluation", "{folder}/bad.json"], "bad.json is damaged"),
        (["--speed", "{folder}/nothing.csv"], "nothing.csv is no file; `python -m benchmarks.serving"),
        (["--speed", "{folder}/bad.json"], "has no rows with the columns arm and tok_s"),
        (["--speed", "{folder}/words.csv"], "words.csv, row 2 is damaged (Expected `float`"),
        (["--card"], "--card writes an evaluation into model cards; name it with --evaluation"),
    ],
)
def test_one_line_errors(argv: list[str], message: str, masks_repository: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.json").write_text("{")
    content = json.loads(write_evaluation(tmp_path / "empty.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"models": []}))
    (tmp_path / "words.csv").write_text("arm,tok_s\na,1\nb,fast\n")
    options = [each.format(folder=tmp_path) for each in argv]
    assert main(["report", str(masks_repository), *options, "-o", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "page.html").exists()


def test_speed_without_optional_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("arm,tok_s,other\ndense,10.5,\n")
    assert read_speed(tmp_path / "rows.csv") == [SpeedRow(arm="dense", tok_s=10.5)]
    (tmp_path / "rows.csv").write_text("arm,tok_s\ndense,nan\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_speed(tmp_path / "rows.csv")
